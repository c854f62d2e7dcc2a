"""The captions of a split: generated, written and read in COCO's result format, and scored."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from handler.captioner import Captioner
from handler.errors import UserError
from handler.files import write_atomic
from training.data.manifest import Manifest, Row, data_folder, read_manifest
from training.data.photos import read_photo
from training.scores.claims import score_claims
from training.scores.habits import describe
from training.scores.intervals import score_with_intervals

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


def dataset_of(captioner: Captioner, folder: Path, data: str | None) -> Manifest:
    """The dataset that was named, or else the one that the model of `folder` was trained on."""
    data = data or captioner.config.get("training", {}).get("config", {}).get("data")
    if data is None:
        raise UserError(f"{folder}: its config names no dataset; give one with DATA=")
    return read_manifest(data_folder(data))


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
    except (ValueError, TypeError, KeyError, RecursionError) as error:
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
