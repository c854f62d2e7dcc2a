"""An export is believed only after this: loaded anew from its files, compared by numbers at batch
sizes and lengths that were not traced, and by its captions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from handler.captioner import Captioner
from handler.errors import UserError

# fp32 sums in another order: observed below 2e-5 on logits of order 10.
TOLERANCE = 1e-3


@torch.inference_mode()
def verify_numbers(eager: Captioner, exported: Captioner) -> float:
    """Largest absolute difference of encoder memory and step logits between both; raises UserError
    where it is beyond the tolerance or where shapes differ."""
    size = eager.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for photos, beams, length in ((1, 1, 1), (2, 3, 4), (3, 5, 7)):
        images = torch.randn(photos, 3, size, size, generator=generator)
        length = min(length, eager.decoder.max_positions)
        memories = [captioner.encoder(images) for captioner in (eager, exported)]
        worst = max(worst, _difference("encoder memory", memories))
        tokens = torch.randint(
            eager.decoder.vocab_size, (length, photos, beams), generator=generator
        )
        logits = [_steps(c, m, tokens) for c, m in zip((eager, exported), memories, strict=True)]
        worst = max(worst, _difference("decoder logits", logits))
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


def _difference(what: str, pair: list[Tensor]) -> float:
    eager, exported = pair
    if eager.shape != exported.shape:
        raise UserError(f"export: {what} has shape {exported.shape}, eager {eager.shape}")
    difference = (eager - exported).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(f"export: {what} differs by {difference:g} from the eager model's")
    return difference


def verify_captions(eager: Captioner, exported: Captioner, images: Sequence[Tensor]) -> int:
    """Captions preprocessed photos with both, default options; raises UserError at the first that
    differs. Returns how many were compared."""
    options = eager.options()
    for start in range(0, len(images), 32):
        batch = torch.stack(list(images[start : start + 32]))
        pairs = [c.caption_tensors(batch, [options] * len(batch)) for c in (eager, exported)]
        for number, (a, b) in enumerate(zip(*pairs, strict=True), start=start):
            if a[0].ids != b[0].ids:
                raise UserError(
                    f"export: photo {number} is {a[0].text!r} eager and {b[0].text!r} exported"
                )
    return len(images)
