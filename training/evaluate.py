"""`python -m training.evaluate`, behind `make evaluate`: captions every photo of a split and scores
them. Predictions are written in COCO's result format first, so that `--predictions` can score them
again, or anyone's: against a split, or with `--references` against COCO's own annotations."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handler.captioner import Captioner
from handler.errors import ArgumentParser, run_command
from handler.files import FolderKind, replace_folder, write_atomic
from handler.request import add_decoding_options, decoding_options
from training.checkpoint import load_captioner
from training.data.manifest import Manifest, data_folder, inputs_of, read_manifest
from training.folders import WEIGHTS_FILE
from training.scores.captions import (
    caption_rows,
    dataset_of,
    evaluated_name,
    read_captions,
    read_predictions,
    score_rows,
    training_captions,
    write_predictions,
)
from training.scores.habits import describe, little_learnt
from training.scores.intervals import score_with_intervals
from training.scores.metrics import (
    DEFAULT_METRICS,
    METRICS,
    check_metrics,
    choose_tokenizer,
    has_spice,
)

EVALUATIONS = Path("build/evaluate")
EVALUATION = FolderKind(
    *("an evaluation", "metrics.json", ("intervals", "photos")),
    ("metrics.json", "predictions.json"),
)


def location(
    folder: Path, manifest: Manifest, split: str, captioner: Captioner, options: dict[str, Any]
) -> Path:
    """Where the scores of a checkpoint or export go: a folder for each dataset and split, and where
    the options are not the model's defaults, with a hash of them at its end."""
    name = evaluated_name(manifest.name, split)
    chosen, usual = (captioner.options(**given) for given in (options, {}))
    # Beams that are not given are those of the default.
    chosen, usual = (dataclasses.replace(each, num_beams=each.beams) for each in (chosen, usual))
    if chosen != usual:
        text = json.dumps(dataclasses.asdict(chosen), sort_keys=True)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return EVALUATIONS / folder.resolve().name / name


def write_scores(folder: Path, scores: Mapping[str, Any]) -> None:
    text = json.dumps(scores, ensure_ascii=False, indent=2) + "\n"
    write_atomic(folder / "metrics.json", text)


def print_scores(scores: Mapping[str, Any]) -> None:
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


def model_size(captioner: Captioner, folder: Path) -> dict[str, float]:
    """Megabytes (10^6 bytes) of the weights on disk and, of a checkpoint, how many there are; an
    export's are constants of its code, which cannot be counted."""
    files = (folder / name for name in (WEIGHTS_FILE, "encoder.pt", "decoder.pt"))
    size = {"megabytes": sum(file.stat().st_size for file in files if file.exists()) / 1e6}
    if "precision" in captioner.config:
        return size
    parts = (captioner.encoder, captioner.decoder)
    return size | {"parameters": sum(p.numel() for part in parts for p in part.parameters())}


def evaluate_model(arguments: argparse.Namespace, metrics: Sequence[str]) -> None:
    """Captions the photos of a split with a checkpoint or export, and scores the captions."""
    options = decoding_options(arguments)
    folder: Path = arguments.checkpoint or arguments.export
    captioner = (load_captioner if arguments.checkpoint else Captioner.load)(folder)
    manifest = dataset_of(captioner, folder, arguments.data)
    rows = manifest.split(arguments.split)
    usual = location(folder, manifest, arguments.split, captioner, options)
    out: Path = arguments.out or usual
    with replace_folder(out, EVALUATION, [folder, *inputs_of(manifest, out)]) as new:
        captions = caption_rows(captioner, manifest, rows, **options)
        predictions = {photo: best[0] for photo, best in captions.items()}
        write_predictions(new / "predictions.json", predictions)
        try:
            scores = score_rows(predictions, rows, metrics, training_captions(manifest))
        except BaseException:
            # Captions take hours, scores a minute and Java.
            unscored = out.with_name(f"{out.name}.unscored.json")
            write_predictions(unscored, predictions)
            print(f"the captions are kept: score them with --predictions {unscored}")
            raise
        scores |= model_size(captioner, folder)
        scores |= {"model": folder.as_posix(), "data": manifest.name, "split": arguments.split}
        scores["decoding"] = dataclasses.asdict(captioner.options(**options))
        scores["photos"] = len(predictions)
        write_scores(new, scores)
    print_scores(scores)
    print(f"{out}: metrics.json, predictions.json")


def evaluate_predictions(arguments: argparse.Namespace, metrics: Sequence[str]) -> None:
    """Scores the captions of a file against a split, or against COCO's annotations."""
    predictions = read_predictions(arguments.predictions)
    inputs = [arguments.predictions]
    if arguments.references:
        inputs.append(arguments.references)
        references = read_captions(arguments.references, "annotations")
        scores = score_with_intervals(predictions, references, metrics)
        scores |= describe(predictions, references)
    else:
        manifest = read_manifest(data_folder(arguments.data))
        if arguments.out:
            inputs += inputs_of(manifest, arguments.out)
        rows = manifest.split(arguments.split)
        scores = score_rows(predictions, rows, metrics, training_captions(manifest))
    scores["photos"] = len(predictions)
    print_scores(scores)
    if arguments.out:
        with replace_folder(arguments.out, EVALUATION, inputs) as new:
            write_scores(new, scores)
        print(f"{arguments.out}: metrics.json")


def main() -> None:
    parser = ArgumentParser(prog="training.evaluate", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="folder of a checkpoint")
    what.add_argument("--export", type=Path, help="folder of an export")
    what.add_argument("--predictions", type=Path, help="captions in COCO's result format")
    parser.add_argument("--references", type=Path, help="COCO annotations for --predictions")
    parser.add_argument("--data", help="a dataset's name or folder (default: the training one)")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument(
        "--out",
        type=Path,
        help=f"default {EVALUATIONS}/NAME/DATA-SPLIT, with other decoding options DATA-SPLIT-HASH",
    )
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that run here")
    add_decoding_options(parser)
    arguments = parser.parse_args()
    options = decoding_options(arguments)
    metrics = arguments.metrics or (METRICS if has_spice() else DEFAULT_METRICS)
    # What cannot be scored ends it before anything is captioned.
    check_metrics(metrics)
    choose_tokenizer()
    if not arguments.predictions:
        if arguments.references:
            parser.error("--references goes with --predictions")
        evaluate_model(arguments, metrics)
        return
    if options:
        parser.error(f"{next(iter(options))}: --predictions are captions already")
    if not arguments.data and not arguments.references:
        parser.error("--predictions needs --data or --references")
    if arguments.data and arguments.references:
        parser.error("--references replaces --data; give one of them")
    evaluate_predictions(arguments, metrics)


if __name__ == "__main__":
    run_command(main)
