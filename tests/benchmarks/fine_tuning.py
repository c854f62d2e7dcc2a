"""What fine-tuning gains: a captioner of 5,000 photos of Flickr8k's train split, fine-tuned on the
other 1,000, beside one that is trained on these 1,000 alone.

    python -m tests.benchmarks.fine_tuning --encoder-weights FILE      after make data DATA=flickr8k
    python -m tests.benchmarks.fine_tuning --config scenes --finetune scenes --add-words 2 \\
        --start build/checkpoints/scenes                               across a shift of the data

Without --start the captioner of 5,000 photos is trained first, by --config. From scratch means
--config on the 1,000 photos; --finetune is the config of the fine-tuning runs, one for each of
--seeds. Runs that are there already are not trained again. Figures are CIDEr of the whole dev split
by the decoding that each checkpoint is served with.
"""

import argparse
from pathlib import Path

from tests.benchmarks.timing import machine, report, table
from training.checkpoint import load_captioner
from training.config import TrainConfig, load_config
from training.data.manifest import Manifest, data_folder, read_manifest, write_manifest
from training.folders import STATE_FILE
from training.loop.allocator import keep_freed_memory
from training.loop.fine_tuning import fine_tuning_config
from training.loop.train import train
from training.scores.captions import caption_rows
from training.scores.metrics import score

ROOT = Path("build/bench/fine-tuning")
FIRST = 5000


def halves(source: str) -> tuple[Manifest, Manifest]:
    """The dataset with the first 5,000 photos of its train split, and with the others; the dev
    split is whole in both."""
    whole = read_manifest(data_folder(source))
    trained, val = whole.split("train"), whole.split("val")
    parts = {"first": trained[:FIRST], "others": trained[FIRST:]}
    for name, rows in parts.items():
        write_manifest(ROOT / name, f"{source}-{name}", [*rows, *val], whole.image_root, [])
    first, others = (read_manifest(ROOT / name) for name in parts)
    return first, others


def trained(config: TrainConfig, manifest: Manifest, run: str, weights: Path | None) -> Path:
    """The checkpoint of a run, which is trained, or goes on, where it is not finished."""
    folder, finished = ROOT / run, ROOT / f"{run}.finished"
    if not finished.exists():
        train(config, manifest, folder, weights, resume=(folder / STATE_FILE).exists())
        finished.touch()
    return folder


def dev_cider(folder: Path, manifest: Manifest) -> float:
    captioner, rows = load_captioner(folder), manifest.split("val")
    found = caption_rows(captioner, manifest, rows, num_return_sequences=1)
    predictions = {photo: captions[0] for photo, captions in found.items()}
    references = {row.id: row.captions for row in rows}
    return float(score(predictions, references, metrics=("cider",))["CIDEr"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="flickr8k")
    parser.add_argument("--config", default="flickr8k", help="of the start, and from scratch")
    parser.add_argument("--finetune", default="finetune", help="of the fine-tuning runs")
    parser.add_argument("--encoder-weights", type=Path)
    parser.add_argument("--start", type=Path, help="a checkpoint instead of the one of 5,000")
    parser.add_argument("--add-words", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    keep_freed_memory()
    first, others = halves(arguments.data)
    config, weights = load_config(arguments.config, data=arguments.data), arguments.encoder_weights
    start = arguments.start or trained(config, first, f"{config.name}-start", weights)
    runs = {"from scratch": trained(config, others, f"{config.name}-scratch", weights)}
    for seed in arguments.seeds:
        fine = fine_tuning_config(
            arguments.finetune, start, arguments.add_words, data=arguments.data, seed=seed
        )
        name = f"{start.name}-{fine.name}-{seed}"
        runs[f"fine-tuned, seed {seed}"] = trained(fine, others, name, None)
    figures = {
        name: dev_cider(folder, others) for name, folder in {"before": start, **runs}.items()
    }
    rows = [[name, f"{value:.3f}"] for name, value in figures.items()]
    title = f"{start}, {len(others.split('train'))} photos; {machine()}"
    report(f"fine-tuning-{start.name}", f"{title}\n\n{table(('', 'CIDEr'), rows)}\n", figures)


if __name__ == "__main__":
    main()
