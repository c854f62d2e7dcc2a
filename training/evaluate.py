"""`python -m training.evaluate`, behind `make evaluate`: captions every photo of a split and scores
them. Predictions are written in COCO's result format first, so that `--predictions` can score them
again, or anyone's: against a split, or with `--references` against COCO's own annotations."""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from handler.captioner import Captioner
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import write_atomic
from handler.request import OPTION_TYPES, parse_option
from training.checkpoint import WEIGHTS_FILE, load_captioner
from training.data.manifest import Manifest, Row, read_manifest
from training.data.photos import read_photo
from training.data.scenes import check
from training.scores.habits import agreement, describe
from training.scores.intervals import score_with_intervals
from training.scores.metrics import DEFAULT_METRICS, METRICS, has_spice
from training.train import data_folder

BATCH = 50


def caption_rows(
    captioner: Captioner, manifest: Manifest, rows: Sequence[Row], **options: Any
) -> dict[str, list[str]]:
    """The captions of each row's photo, best first, by id: as many as there are beams, where
    `options` ask for no other number. UserError names a photo that is broken."""
    chosen = captioner.options(**options)
    if "num_return_sequences" not in options:
        chosen = dataclasses.replace(chosen, num_return_sequences=chosen.beams)
    captions: dict[str, list[str]] = {}
    with tqdm(total=len(rows), desc="captions", unit="photo") as bar:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            photos = [captioner.preprocess(read_photo(manifest, row)) for row in part]
            found = captioner.caption_tensors(torch.stack(photos), [chosen] * len(part))
            for row, best in zip(part, found, strict=True):
                captions[row.id] = [caption.text for caption in best]
            bar.update(len(part))
    return captions


def score_claims(predictions: Mapping[str, str], rows: Sequence[Row]) -> dict[str, float]:
    """On drawn scenes: the share of claims that are true of the picture, by kind, and of captions
    that make some claim and only true ones."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    entirely = []
    for row in rows:
        claims = check(predictions[row.id], row.scene or {})
        entirely.append(bool(claims) and all(claim.true for claim in claims))
        for claim in claims:
            by_kind[claim.kind].append(claim.true)
    every = [true for kind in by_kind.values() for true in kind]
    result = {"claims_true": sum(every) / max(1, len(every))}
    result |= {f"claims_true_{k}": sum(v) / len(v) for k, v in sorted(by_kind.items())}
    result["captions_true"] = sum(entirely) / max(1, len(entirely))
    return result


def score_rows(
    predictions: Mapping[str, str],
    rows: Sequence[Row],
    metrics: Sequence[str],
    training: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of one caption for each of `rows`, on drawn scenes what is true of them, and habits
    (see `training.scores.habits`); `training` holds the captions of the training split."""
    if missing := [row.id for row in rows if row.id not in predictions]:
        raise UserError(
            f"predictions: no caption for photo {missing[0]!r} ({len(missing)} of {len(rows)}); "
            "scores compare only on all photos of a split"
        )
    if unknown := predictions.keys() - {row.id for row in rows}:
        raise UserError(f"predictions: photo {min(unknown)!r} is not in the split")
    references = {row.id: row.captions for row in rows}
    scores = score_with_intervals(predictions, references, metrics) | describe(
        predictions, references, training
    )
    if all(row.scene is not None for row in rows):
        scores |= score_claims(predictions, rows)
    return scores


def training_captions(manifest: Manifest) -> list[str]:
    return [caption for row in manifest.rows if row.split == "train" for caption in row.captions]


def write_predictions(path: Path, predictions: Mapping[str, str]) -> None:
    """COCO's result format. Ids that are numbers (COCO's) are written as numbers, as its own tools
    want them."""
    results = [
        {"image_id": int(key) if key == str(_number(key)) else key, "caption": caption}
        for key, caption in predictions.items()
    ]
    write_atomic(path, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def _number(key: str) -> int | None:
    return int(key) if key.isdecimal() else None


def read_captions(path: Path, field: str | None = None) -> dict[str, list[str]]:
    """Captions by photo from COCO's files: a list of {"image_id", "caption"}, under `field` where
    the file is an object (its annotations)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[str, list[str]] = {}
        for entry in content[field] if field else content:
            image, caption = entry["image_id"], entry["caption"]
            if not isinstance(image, int | str) or not isinstance(caption, str):
                raise TypeError
            captions.setdefault(str(image), []).append(caption)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        where = f"an object whose field {field!r} is " if field else ""
        form = f'{where}a list of {{"image_id", "caption"}}'
        raise UserError(f"{path}: not in COCO's format, {form}") from error
    return captions


def read_predictions(path: Path) -> dict[str, str]:
    """One caption a photo, from COCO's result format."""
    captions = read_captions(path)
    if twice := [key for key, texts in captions.items() if len(texts) > 1]:
        raise UserError(f"{path}: photo {twice[0]!r} has {len(captions[twice[0]])} captions")
    return {key: texts[0] for key, texts in captions.items()}


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


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding options (the checkpoint's defaults otherwise)")
    for name in OPTION_TYPES:
        # A bare flag is true (`--do-sample`).
        group.add_argument(f"--{name.replace('_', '-')}", nargs="?", const="true", metavar="VALUE")


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as `Captioner.options` takes them."""
    given = {name: getattr(arguments, name) for name in OPTION_TYPES}
    return {k: parse_option(k, v) for k, v in given.items() if v is not None}


def dataset_of(captioner: Captioner, folder: Path, data: str | None) -> Manifest:
    """The dataset that was named, or else the one that the model of `folder` was trained on."""
    data = data or captioner.config.get("training", {}).get("config", {}).get("data")
    if data is None:
        raise UserError(f"{folder}: its config names no dataset; give one with DATA=")
    return read_manifest(data_folder(data))


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
    alike = [value for best in captions.values() if (value := agreement(best)) is not None]
    if alike:
        scores["n_best_agreement"] = sum(alike) / len(alike)
    scores |= model_size(captioner, folder)
    scores |= {"model": folder.as_posix(), "data": manifest.name, "split": arguments.split}
    scores["decoding"] = dataclasses.asdict(captioner.options(**options))
    finish(predictions, scores, out)


if __name__ == "__main__":
    run_command(main)
