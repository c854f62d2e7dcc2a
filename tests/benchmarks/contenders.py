"""What is timed and weighed against each other: captions of noise, of exactly so many tokens, by an
export of ours and by Hugging Face's `generate`. Imports no more than their users would."""

from pathlib import Path

import torch

from handler.captioner import Captioner


def images_of(photos: int, size: int) -> torch.Tensor:
    return torch.randn(photos, 3, size, size, generator=torch.Generator().manual_seed(1))


def ours(captioner: Captioner, images: torch.Tensor, beams: int, tokens: int):
    options = captioner.options(num_beams=beams, min_new_tokens=tokens, max_new_tokens=tokens)
    return captioner.caption_tensors(images, [options] * len(images))


def generate(model, images: torch.Tensor, beams: int, tokens: int) -> torch.Tensor:
    with torch.inference_mode():
        found = model.generate(
            pixel_values=images.to(model.device, model.dtype), num_beams=beams, do_sample=False,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip
    return found.cpu()


def load_theirs(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A captioner of whatever class its `config.json` names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    return model.to(device, dtype)
