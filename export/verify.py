"""Verifies an export: it is loaded from its files, and its numbers (at batch sizes and lengths that
were not traced) and captions are compared with those of the eager model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from handler.captioner import Caption, Captioner
from handler.errors import UserError
from training.scores.captions import scored_text
from training.scores.metrics import score

# The largest allowed difference, relative to the largest number. In fp32, only the order of sums
# differs (observed: below 1e-5). The tolerances of bf16 and int8 find layers that are wrong.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.2}
# What a precision should keep on a trained model: the share of identical captions, and the share of
# CIDEr that may be lost. In fp32 a violation is an error; in the others it is reported.
FLOORS = {"fp32": (1.0, 0.0), "bf16": (0.99, 0.01), "int8": (0.95, 0.01)}
BATCH = 32


@dataclass(frozen=True)
class ValidationPhotos:
    """Preprocessed photos (3, S, S), which may be read when they are asked for, where they come
    from, and their references, if any."""

    source: str
    images: Sequence[Tensor]
    references: Sequence[Sequence[str]] | None


def verify(
    eager: Captioner,
    exported: Captioner,
    photos: ValidationPhotos,
    expected: Sequence[Caption],
    precision: str,
) -> dict[str, Any]:
    """Returns what is written into the export's config: the share of photos with the `expected`
    captions (those of the eager model), the CIDEr of both if there are references, the largest
    difference of numbers, and whether the floor of the precision is kept. Raises UserError for
    numbers beyond the tolerance and, in fp32, for a different caption."""
    difference = verify_numbers(eager, exported, TOLERANCES[precision])
    captions = captions_of(exported, photos.images, f"captions of the export in {precision}")
    same = [a.ids == b.ids for a, b in zip(expected, captions, strict=True)]
    if precision == "fp32" and not all(same):
        number = same.index(False)
        raise UserError(
            f"export: photo {number} is {expected[number].text!r} eager and "
            f"{captions[number].text!r} exported"
        )
    verified: dict[str, Any] = {
        "against": "eager",
        "photos": len(same),
        "source": photos.source,
        "identical_captions": sum(same) / len(same),
        "largest_difference": difference,
    }
    least, loss = FLOORS[precision]
    kept = verified["identical_captions"] >= least
    if photos.references is not None and precision != "fp32":
        references = {str(i): list(r) for i, r in enumerate(photos.references)}
        options = eager.options()
        for name, candidates in (("cider", captions), ("cider_eager", expected)):
            texts = {str(i): scored_text(eager, options, c) for i, c in enumerate(candidates)}
            verified[name] = score(texts, references, metrics=("cider",))["CIDEr"]
        kept = kept and verified["cider"] >= (1 - loss) * verified["cider_eager"]
    return {**verified, "kept": kept}


@torch.inference_mode()
def verify_numbers(eager: Captioner, exported: Captioner, tolerance: float) -> float:
    """The largest difference of encoder memory and of step logits, relative to the largest number
    of each. Raises UserError if it is beyond the tolerance, or if shapes differ."""
    size = eager.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for photos, beams, length in ((1, 1, 1), (2, 3, 4), (3, 5, 7)):
        images = torch.randn(photos, 3, size, size, generator=generator)
        length = min(length, eager.decoder.max_positions)
        memories = [captioner.encoder(images) for captioner in (eager, exported)]
        worst = max(worst, _difference("encoder memory", memories, tolerance))
        tokens = torch.randint(
            eager.decoder.vocab_size, (length, photos, beams), generator=generator
        )
        both = list(zip((eager, exported), memories, strict=True))
        logits = [_steps(captioner, memory, tokens) for captioner, memory in both]
        worst = max(worst, _difference("decoder logits", logits, tolerance))
        logits = [_prefill(captioner, memory, tokens[:, :, 0].T) for captioner, memory in both]
        worst = max(worst, _difference("logits behind a prompt", logits, tolerance))
    return worst


def _steps(captioner: Captioner, memory: Tensor, tokens_TBK: Tensor) -> Tensor:
    length, photos, beams = tokens_TBK.shape
    decoder = captioner.decoder
    cross, cache = decoder.begin(memory), decoder.new_cache(photos, length * beams)
    own = torch.eye(beams, dtype=torch.bool).expand(photos, -1, -1)
    logits = [
        decoder.step(
            tokens_TBK[t],
            torch.full_like(tokens_TBK[t], t),
            own.repeat(1, 1, t + 1),
            cache,
            t * beams,
            cross,
        )
        for t in range(length)
    ]
    return torch.stack(logits)


def _prefill(captioner: Captioner, memory: Tensor, tokens_BQ: Tensor) -> Tensor:
    """Logits of what follows the tokens of each photo, all of them of the first, and one less of
    each other."""
    photos, length = tokens_BQ.shape
    decoder = captioner.decoder
    slots_Q, padding_B1 = torch.arange(length), torch.arange(photos).unsqueeze(1) % length
    real_BQ = slots_Q >= padding_B1
    seen_BQQ = torch.ones(length, length, dtype=torch.bool).tril() & real_BQ.unsqueeze(1)
    return decoder.prefill(
        tokens_BQ,
        (slots_Q - padding_B1).clamp(min=0),
        seen_BQQ | torch.eye(length, dtype=torch.bool),
        real_BQ,
        decoder.new_cache(photos, length),
        decoder.begin(memory),
    )


def _difference(what: str, pair: list[Tensor], tolerance: float) -> float:
    eager, exported = pair
    if eager.shape != exported.shape:
        raise UserError(f"export: {what} has shape {exported.shape}, eager {eager.shape}")
    difference = ((eager - exported).abs().max() / eager.abs().max()).item()
    if not difference <= tolerance:
        raise UserError(
            f"export: {what} differs by {difference:.2g}, relative to the eager model's largest"
        )
    return difference


def captions_of(captioner: Captioner, images: Sequence[Tensor], of: str = "") -> list[Caption]:
    """The best caption of each preprocessed photo with default options, but for sampling, behind a
    progress bar that says `of` what."""
    options = captioner.options(do_sample=False, num_return_sequences=1)
    captions: list[Caption] = []
    with tqdm(total=len(images), desc=of, unit="photo", delay=1) as bar:
        for start in range(0, len(images), BATCH):
            part = range(start, min(len(images), start + BATCH))
            batch = torch.stack([images[number] for number in part])
            found = captioner.caption_tensors(batch, [options] * len(batch))
            captions += [best[0] for best in found]
            bar.update(len(batch))
    return captions
