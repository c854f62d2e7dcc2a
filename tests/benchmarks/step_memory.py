"""Peak memory of one training step of BLIP base (random weights, 384 pixels, 5 captions a photo),
with and without gradient checkpointing, in float32 and bfloat16, each in a process of its own.

    python -m tests.benchmarks.step_memory --photos 8

Weights, gradients, AdamW's moments and the average of the weights are part of it, as in a run.
"""

import argparse
import copy
import time

import torch

from tests.benchmarks.timing import machine, own_peak, peak_megabytes, report, table
from training.config import Stage
from training.data.captions import Batch
from training.loop.allocator import keep_freed_memory
from training.loop.distributed import Processes
from training.loop.optimizer import Optimizer, set_checkpointing, update_average
from training.model import CaptioningModel, DecoderConfig, EncoderConfig
from training.objectives.cross_entropy import CrossEntropyLoss
from training.objectives.objective import Objective

CAPTIONS, TOKENS = 5, 13
ENCODER = EncoderConfig(768, 12, 12, 3072, image_size=384, layer_norm_eps=1e-5)
DECODER = DecoderConfig(
    30524, 512, 768, 12, 12, 3072, 768, layer_norm_eps=1e-12, dropout=0.0, norm="post",
    embedding_norm=True, head_bias=True, head_transform=True,
)  # fmt: skip


def batch_of(photos: int) -> Batch:
    size = ENCODER.image_size
    images = torch.randn(photos, 3, size, size)
    tokens = torch.randint(1000, 30000, (photos, CAPTIONS * TOKENS))
    positions = torch.arange(TOKENS).repeat(CAPTIONS).expand(photos, -1)
    of_caption = torch.arange(CAPTIONS).repeat_interleave(TOKENS)
    mask = (of_caption[:, None] == of_caption).tril().expand(photos, -1, -1)
    targets = tokens.roll(-1, 1)
    return Batch(images, tokens, positions, targets, mask, range(photos), [False] * photos)


def step(photos: int, precision: str, checkpointing: bool) -> None:
    """Two steps, the second with the moments that the first has made; prints its seconds and the
    peak in megabytes."""
    torch.manual_seed(0)
    keep_freed_memory()
    model = CaptioningModel(ENCODER, DECODER)
    average = copy.deepcopy(model).requires_grad_(False)
    stage = Stage("fine-tuning", 1, encoder="trained", decoder_lr=1e-5, encoder_lr=1e-5)
    optimizer = Optimizer(model, stage, Processes())
    set_checkpointing(model, checkpointing)
    objective = Objective(model, CrossEntropyLoss(0.0), frozen=False)
    objective.set_mode()
    batch = batch_of(photos)
    for number in range(2):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total, tokens, _ = objective(batch, 0)
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, stage.ema, number + 1)
    print(f"{time.perf_counter() - started:.2f}", own_peak())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    if arguments.precision:
        step(arguments.photos, arguments.precision, arguments.checkpointing)
        return
    rows = []
    for precision in ("fp32", "bf16"):
        for option in ((), ("--checkpointing",)):
            given = ("--photos", str(arguments.photos), "--precision", precision, *option)
            peak = peak_megabytes("tests.benchmarks.step_memory", *given)
            rows.append([precision, "yes" if option else "no", f"{peak / 1000:.1f}"])
    header = ("precision", "gradient checkpointing", "peak, GB")
    title = f"BLIP base, a step of {arguments.photos} photos. {machine()}"
    report("step-memory", f"{title}\n\n{table(header, rows)}\n", rows)


if __name__ == "__main__":
    main()
