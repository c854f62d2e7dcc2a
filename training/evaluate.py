"""`python -m training.evaluate`, behind `make evaluate`: captions every photo of a split and scores
them. Predictions are written in COCO's result format first, so that `--predictions` can score them
again, or anyone's: against a split, or with `--references` against COCO's own annotations."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handler.captioner import Captioner
from handler.errors import ArgumentParser, run_command
from handler.files import write_atomic
from handler.request import add_decoding_options, decoding_options
from training.checkpoint import WEIGHTS_FILE, load_captioner
from training.data.manifest import data_folder, read_manifest
from training.scores.captions import (
    caption_rows,
    dataset_of,
    read_captions,
    read_predictions,
    score_rows,
    training_captions,
    write_predictions,
)
from training.scores.habits import describe, little_learnt
from training.scores.intervals import score_with_intervals
from training.scores.metrics import DEFAULT_METRICS, METRICS, has_spice


def finish(predictions: Mapping[str, str], scores: dict[str, Any], out: Path | None) -> None:
    """Prints the scores, and writes them to `out` where one is given."""
    scores["photos"] = len(predictions)
    if out:
        write_atomic(out / "metrics.json", json.dumps(scores, ensure_ascii=False, indent=2) + "\n")
    for name, value in scores.items():
        if name == "recall_by_training_count":
            for times, found in value.items():
                share = f"{found['recall']:.4f} of {found['words']}"
                print(f"{f'words seen {times} times':24} {share}")
        elif name in scores["intervals"]:
            low, high = scores["intervals"][name]
            print(f"{name:24} {value:.4f}  95 % from {low:.4f} to {high:.4f}")
        elif not isinstance(value, dict):
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
    if reason := little_learnt(**scores):
        print(f"warning: {reason}")
    if out:
        print(f"{out}: {', '.join(sorted(path.name for path in out.glob('*.json')))}")


def model_size(captioner: Captioner, folder: Path) -> dict[str, float]:
    """Megabytes (10^6 bytes) of the weights on disk and, of a checkpoint, how many there are; an
    export's are constants of its code, which cannot be counted."""
    files = (folder / name for name in (WEIGHTS_FILE, "encoder.pt", "decoder.pt"))
    size = {"megabytes": sum(file.stat().st_size for file in files if file.exists()) / 1e6}
    parts = (captioner.encoder, captioner.decoder)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return size | ({"parameters": count} if count else {})


def main() -> None:
    parser = ArgumentParser(prog="training.evaluate", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="folder of a checkpoint")
    what.add_argument("--export", type=Path, help="folder of an export")
    what.add_argument("--predictions", type=Path, help="captions in COCO's result format")
    parser.add_argument("--references", type=Path, help="COCO annotations for --predictions")
    parser.add_argument("--data", help="a dataset's name or folder (default: the training one)")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--out", type=Path, help="default build/evaluate/NAME")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that run here")
    add_decoding_options(parser)
    arguments = parser.parse_args()
    options = decoding_options(arguments)
    metrics = arguments.metrics or (METRICS if has_spice() else DEFAULT_METRICS)

    if arguments.predictions:
        if options:
            parser.error(f"{next(iter(options))}: --predictions are captions already")
        if not arguments.data and not arguments.references:
            parser.error("--predictions needs --data or --references")
        predictions = read_predictions(arguments.predictions)
        if arguments.references:
            references = read_captions(arguments.references, "annotations")
            scores = score_with_intervals(predictions, references, metrics)
            scores |= describe(predictions, references)
        else:
            manifest = read_manifest(data_folder(arguments.data))
            rows = manifest.split(arguments.split)
            scores = score_rows(predictions, rows, metrics, training_captions(manifest))
        finish(predictions, scores, arguments.out)
        return
    if arguments.references:
        parser.error("--references goes with --predictions")

    folder: Path = arguments.checkpoint or arguments.export
    captioner = (load_captioner if arguments.checkpoint else Captioner.load)(folder)
    manifest = dataset_of(captioner, folder, arguments.data)
    rows = manifest.split(arguments.split)
    captions = caption_rows(captioner, manifest, rows, **options)
    predictions = {photo: best[0] for photo, best in captions.items()}
    out = arguments.out or Path("build/evaluate") / folder.resolve().name
    write_predictions(out / "predictions.json", predictions)
    scores = score_rows(predictions, rows, metrics, training_captions(manifest))
    scores |= model_size(captioner, folder)
    scores |= {"model": folder.as_posix(), "data": manifest.name, "split": arguments.split}
    scores["decoding"] = dataclasses.asdict(captioner.options(**options))
    finish(predictions, scores, out)


if __name__ == "__main__":
    run_command(main)
