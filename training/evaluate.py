"""`python -m training.evaluate`, behind `make evaluate`: captions every photo of a split and scores
them. Predictions are written in COCO's result format first, so that they can be scored again."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from handler.captioner import Captioner
from handler.errors import ArgumentParser, UserError, run_command, write_atomic
from handler.request import OPTION_TYPES, parse_option
from training.checkpoint import load_captioner
from training.data.manifest import Manifest, Row, read_manifest
from training.data.scenes import check
from training.dataset import read_photo
from training.metrics import score
from training.train import data_folder

BATCH = 50


def caption_rows(
    captioner: Captioner, manifest: Manifest, rows: list[Row], **options: Any
) -> dict[str, str]:
    """The best caption of each row's photo, by id."""
    chosen = captioner.options(**options)
    predictions: dict[str, str] = {}
    with tqdm(total=len(rows), desc="captions", unit="photo") as bar:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            photos = [captioner.preprocess(read_photo(manifest, row)) for row in part]
            found = captioner.caption_tensors(torch.stack(photos), [chosen] * len(part))
            predictions |= {row.id: best[0].text for row, best in zip(part, found, strict=True)}
            bar.update(len(part))
    return predictions


def score_claims(predictions: dict[str, str], rows: list[Row]) -> dict[str, float]:
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


def evaluate(
    captioner: Captioner, manifest: Manifest, split: str, out: Path, **options: Any
) -> None:
    """Captions and scores a split; writes `predictions.json` and `metrics.json` into `out`."""
    rows = manifest.split(split)
    predictions = caption_rows(captioner, manifest, rows, **options)
    results = [{"image_id": key, "caption": caption} for key, caption in predictions.items()]
    text = json.dumps(results, ensure_ascii=False, indent=1) + "\n"
    write_atomic(out / "predictions.json", text)
    metrics = score(predictions, {row.id: row.captions for row in rows})
    if all(row.scene is not None for row in rows):
        metrics |= score_claims(predictions, rows)
    metrics |= {"photos": len(rows), "split": split, "data": manifest.name}
    metrics["decoding"] = dataclasses.asdict(captioner.options(**options))
    metrics["distinct_captions"] = len(set(predictions.values()))
    write_atomic(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        if name != "decoding":
            print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
    print(f"{out}: metrics.json, predictions.json")


def main() -> None:
    parser = ArgumentParser(prog="training.evaluate", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path)
    what.add_argument("--export", type=Path)
    parser.add_argument("--data", help="a dataset's name or folder (default: the training one)")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--out", type=Path, help="default build/evaluate/NAME")
    for name in OPTION_TYPES:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help="decoding option")
    arguments = parser.parse_args()
    folder: Path = arguments.checkpoint or arguments.export
    load = load_captioner if arguments.checkpoint else Captioner.load
    captioner = load(folder)
    given = {name: getattr(arguments, name) for name in OPTION_TYPES}
    options = {k: parse_option(k, v) for k, v in given.items() if v is not None}
    data = arguments.data or captioner.config.get("training", {}).get("config", {}).get("data")
    if data is None:
        raise UserError(f"{folder}: its config names no dataset; give one with DATA=")
    manifest = read_manifest(data_folder(data))
    out = arguments.out or Path("build/evaluate") / folder.name
    evaluate(captioner, manifest, arguments.split, out, **options)


if __name__ == "__main__":
    run_command(main)
