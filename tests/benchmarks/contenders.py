"""What is timed and weighed against each other: captions of noise, of exactly so many tokens, by an
export of ours and by Hugging Face's `generate`. Imports no more than their users would."""

from collections.abc import Sequence
from pathlib import Path

import torch

from handler.captioner import Captioner


def images_of(photos: int, size: int) -> torch.Tensor:
    return torch.randn(photos, 3, size, size, generator=torch.Generator().manual_seed(1))


def ours(
    captioner: Captioner, images: torch.Tensor, beams: int, tokens: int, task: str | None = None
):
    options = captioner.options(
        prompt=task, num_beams=beams, min_new_tokens=tokens, max_new_tokens=tokens
    )
    return captioner.caption_tensors(images, [options] * len(images))


def generate(
    model, images: torch.Tensor, beams: int, tokens: int, task_ids: Sequence[int] = ()
) -> torch.Tensor:
    """Sequences; `task_ids` is the prompt of a Florence-2, behind the places of its 577 tokens."""
    given = {"pixel_values": images.to(model.device, model.dtype)}
    if task_ids:
        ids = [model.config.image_token_id] * 577 + list(task_ids)
        given["input_ids"] = torch.tensor([ids] * len(images), device=model.device)
    with torch.inference_mode():
        found = model.generate(
            **given, num_beams=beams, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )
    return found.cpu()


def load_theirs(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A captioner of whatever class its `config.json` names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    return model.to(device, dtype)
