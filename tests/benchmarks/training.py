"""`make bench`: captions a second of training, ours against a plain loop over Hugging Face's
`VisionEncoderDecoderModel` of the same dimensions, on the same photos and captions, in one run.

    python -m tests.benchmarks.training

The dimensions are those of the flickr8k preset. Ours is `training.loop.train.train`, as make train
runs it, over one epoch without augmentation; what counts is its own log. Theirs is what the
examples write: a row for each pair of photo and caption, padded to the longest of its batch, AdamW
as it stands; in float32, and under bfloat16's autocast, which ours takes where the processor has
it. Both load photos in one worker. Frozen, theirs runs the encoder in every step, and in further
rows is handed the encoder's outputs, made beforehand.

Every contender runs in a process of its own, once a round. A process's first step is left out: it
starts the worker and makes oneDNN's plans.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from handler.caption_tokenizer import CaptionTokenizer
from tests.benchmarks.timing import OUT, machine, own_peak, report, table
from training.config import Stage, TrainConfig, Validation, load_config
from training.data.manifest import Manifest, Row, read_manifest, write_manifest

PRESET = load_config("flickr8k")
FROZEN = next(stage for stage in PRESET.stages if stage.encoder == "frozen")
CAPTIONS, WORDS = 5, 2900
# Photos of a batch of ours, and pairs of most of theirs: a step encodes as many photos.
BATCH = FROZEN.batch_photos
STEPS_OURS, STEPS_THEIRS = 4, 9
# Of theirs: whether the encoder is frozen, its outputs made beforehand, and bfloat16 used; pairs a
# step.
CONTENDERS: dict[str, dict[str, tuple[bool, bool, bool, int] | None]] = {
    "end-to-end": {
        "plain loop": (False, False, False, BATCH),
        "plain loop, bf16": (False, False, True, BATCH),
        "ours": None,
    },
    "frozen": {
        "plain loop": (True, False, False, BATCH),
        "plain loop, bf16": (True, False, True, BATCH),
        "plain loop, outputs made beforehand": (True, True, False, BATCH),
        "plain loop, outputs made beforehand, bf16": (True, True, True, BATCH),
        "the same, as many captions a step as ours": (True, True, True, CAPTIONS * BATCH),
        "ours": None,
    },
}


def make_data(folder: Path) -> Path:
    """Photos of Flickr8k's usual size, five captions each, as long as its own (10.8 words on
    average, 3.8 apart) over a vocabulary of the preset's size."""
    if (folder / "dataset.json").exists():
        return folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, noise = random.Random(0), np.random.default_rng(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(WORDS)]
    rows = []
    for number in range(STEPS_OURS * BATCH + 1):
        coarse = Image.fromarray(noise.integers(0, 255, (15, 20, 3), dtype=np.uint8))
        name = f"{number}.jpg"
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "images" / name)
        captions = tuple(
            " ".join(rng.choices(words, k=max(2, round(rng.gammavariate(8.0, 1.35)))))
            for _ in range(CAPTIONS)
        )
        rows.append(Row(str(number), name, captions, "train" if number else "val"))
    write_manifest(folder, "made", rows, folder / "images", [])
    return folder


def run_ours(manifest: Manifest, frozen: bool) -> dict[str, float]:
    """One epoch of `train` in the current folder. The figures are those of its log; the making of
    the frozen encoder's features, which is part of none, is timed."""
    # Imported here, so that theirs need not hold it in memory.
    from training.loop import stage as stage_loop
    from training.loop.allocator import keep_freed_memory
    from training.loop.train import train

    stage = Stage("whole", 1, batch_photos=BATCH)
    if frozen:
        stage = dataclasses.replace(FROZEN, epochs=1)
    config = TrainConfig(
        "made",
        "made",
        (stage,),
        decoder=PRESET.decoder,
        tokenizer=dataclasses.replace(PRESET.tokenizer, min_count=1),
        validation=Validation(num_beams=1),
    )
    features, make_features = 0.0, stage_loop.make_features

    def timed(*arguments):
        nonlocal features
        started = time.perf_counter()
        made = make_features(*arguments)
        features = time.perf_counter() - started
        return made

    keep_freed_memory()
    with mock.patch.object(stage_loop, "make_features", timed):
        train(config, manifest, Path("run"), None, resume=False)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    speeds = [line["photos_per_second"] for line in lines if "loss" in line]
    assert len(speeds) == STEPS_OURS
    counted = len(speeds) - 1
    return {
        "captions": counted * BATCH * CAPTIONS,
        "seconds": sum(BATCH / speed for speed in speeds[1:]),
        "features": features * counted / len(speeds) / FROZEN.epochs,
    }


class Pairs(Dataset):
    """(pixel values or encoder output, labels) of each pair of photo and caption."""

    def __init__(self, rows: list[Row], load: Callable[[Row], torch.Tensor], tokenizer) -> None:
        self.pairs = [(row, caption) for row in rows for caption in row.captions]
        self.load, self.tokenizer = load, tokenizer

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, caption = self.pairs[index]
        ids = [*self.tokenizer.encode(caption), self.tokenizer.end_id]
        return self.load(row), torch.tensor(ids[: PRESET.decoder.max_tokens])


def collate(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    photos, labels = zip(*pairs, strict=True)
    return torch.stack(photos), torch.nn.utils.rnn.pad_sequence(list(labels), True, -100)


def plain_model(tokenizer: CaptionTokenizer):
    import transformers

    encoder, decoder = PRESET.encoder, PRESET.decoder
    photo = transformers.ViTConfig(
        hidden_size=encoder.width, num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads, intermediate_size=4 * encoder.width,
        image_size=encoder.image_size, patch_size=encoder.patch_size,
    )  # fmt: skip
    text = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=decoder.max_tokens, n_embd=decoder.width,
        n_layer=decoder.layers, n_head=decoder.heads, add_cross_attention=True,
        bos_token_id=tokenizer.begin_id, eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(photo, text)
    config.decoder_start_token_id, config.pad_token_id = tokenizer.begin_id, tokenizer.pad_id
    return transformers.VisionEncoderDecoderModel(config)


def run_theirs(
    manifest: Manifest, frozen: bool, beforehand: bool, bf16: bool, batch: int
) -> dict[str, float]:
    """Some steps of the plain loop."""
    import transformers
    from transformers.modeling_outputs import BaseModelOutput

    torch.manual_seed(0)
    rows = manifest.split("train")
    captions = [caption for row in rows for caption in row.captions]
    choice = PRESET.tokenizer
    tokenizer = CaptionTokenizer.train(captions, choice.kind, choice.vocab_size, 1)
    model = plain_model(tokenizer)
    model.encoder.requires_grad_(not frozen)
    processor = transformers.ViTImageProcessor()

    def pixels(row: Row) -> torch.Tensor:
        photo = Image.open(manifest.path(row)).convert("RGB")
        return processor(photo, return_tensors="pt").pixel_values[0]

    load: Callable[[Row], torch.Tensor] = pixels
    if beforehand:
        with torch.no_grad():
            made = {row.id: model.encoder(pixels(row)[None]).last_hidden_state[0] for row in rows}

        load = lambda row: made[row.id]  # noqa: E731
    pairs = Pairs(rows, load, tokenizer)
    loader = DataLoader(
        pairs,
        sampler=torch.randperm(len(pairs))[: STEPS_THEIRS * batch].tolist(),
        batch_size=batch,
        num_workers=0 if beforehand else 1,
        collate_fn=collate,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    model.train()
    ends = [time.perf_counter()]
    for photos, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if beforehand:
                outputs = model(encoder_outputs=BaseModelOutput(photos), labels=labels)
            else:
                outputs = model(pixel_values=photos, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return {"captions": (len(ends) - 2) * batch, "seconds": ends[-1] - ends[1]}


def run_contender(part: str, name: str, data: Path) -> dict[str, float]:
    """Runs in the current folder, a fresh one."""
    manifest, choice = read_manifest(data), CONTENDERS[part][name]
    if choice is None:
        figures = run_ours(manifest, frozen=part == "frozen")
    else:
        figures = run_theirs(manifest, *choice)
    return {**figures, "peak": own_peak()}


def in_process(part: str, name: str, data: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.training"]
        done = subprocess.run(
            [*command, "--data", str(data), "--contender", part, name],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(run_contender(*arguments.contender, arguments.data)))
        return

    data = make_data(OUT.absolute() / "training-data")
    names = [(part, name) for part, contenders in CONTENDERS.items() for name in contenders]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for part, name in names:
            runs[part, name].append(in_process(part, name, data))
    rows, figures = [], []
    for part, name in names:
        rate = captions_a_second(runs[part, name])
        times = captions_a_second(runs[part, "ours"]) / rate
        peak = max(run["peak"] for run in runs[part, name])
        rows.append([part, name, f"{rate:.1f}", f"{times:.1f}", f"{peak:.0f}"])
        figures.append({"part": part, "contender": name, "captions/s": rate, "peak MB": peak})
    # Their plain loop pays the encoder in every step; ours once a view, spread over the epochs.
    rate = captions_a_second(runs["frozen", "ours"], features=True)
    rows.append(["frozen", "ours, making of the features included", f"{rate:.1f}", "", ""])
    title = f"Training, the flickr8k preset's dimensions, {arguments.rounds} rounds. {machine()}"
    header = ("encoder", "contender", "captions/s", "ours is times faster", "peak MB")
    report("training", f"{title}\n\n{table(header, rows)}\n", figures)


def captions_a_second(runs: list[dict[str, float]], features: bool = False) -> float:
    """The median of the runs; `features` adds their making, a share of it for each epoch of the
    preset."""
    return statistics.median(
        run["captions"] / (run["seconds"] + features * run.get("features", 0.0)) for run in runs
    )


if __name__ == "__main__":
    main()
