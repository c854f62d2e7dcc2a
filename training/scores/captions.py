"""Generates the captions of a split, writes and reads them in COCO's result format, and scores
them."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from handler.beam_search import DecodeOptions
from handler.captioner import Caption, Captioner
from handler.errors import UserError
from handler.files import as_utf8, write_atomic
from training.data.manifest import Manifest, Row, data_folder, read_manifest
from training.data.photos import read_photo
from training.data.source import check_unicode
from training.scores.claims import score_claims
from training.scores.habits import describe
from training.scores.intervals import score_with_intervals

BATCH = 50


def preprocessed(
    captioner: Captioner, manifest: Manifest, rows: Sequence[Row], **bar: Any
) -> Iterator[tuple[Sequence[Row], Tensor]]:
    """Rows with their preprocessed photos (n, 3, S, S), BATCH at a time, behind a progress bar with
    these settings. Raises UserError naming a damaged photo."""
    with tqdm(total=len(rows), unit="photo", **bar) as shown:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            yield part, torch.stack([captioner.preprocess(read_photo(manifest, r)) for r in part])
            shown.update(len(part))


def scored_text(captioner: Captioner, options: DecodeOptions, caption: Caption) -> str:
    """What is compared with the references. They do not have the captioner's own prompt, behind
    which it was trained to say them; a prompt that was asked for belongs to the caption."""
    is_own = options.prompt is not None and options.prompt == captioner.decoding.get("prompt")
    return captioner.tokenizer.decode(caption.ids) if is_own else caption.text


def caption_rows(
    captioner: Captioner, manifest: Manifest, rows: Sequence[Row], **options: Any
) -> dict[str, list[str]]:
    """Generates the captions of each row's photo, best first, by id: as many as there are beams,
    unless `options` has num_return_sequences. Raises UserError naming a damaged photo."""
    chosen = captioner.options(**options)
    if "num_return_sequences" not in options:
        chosen = dataclasses.replace(chosen, num_return_sequences=chosen.beams)
    captions: dict[str, list[str]] = {}
    for part, images_B3SS in preprocessed(captioner, manifest, rows, desc="captions"):
        results = captioner.caption_tensors(images_B3SS, [chosen] * len(part))
        for row, best in zip(part, results, strict=True):
            captions[row.id] = [scored_text(captioner, chosen, caption) for caption in best]
    return captions


def evaluated_name(data: str, split: str) -> str:
    """The beginning of the name of the folder that holds the scores of a dataset's split."""
    return re.sub(r"[^\w.-]+", "-", data) + f"-{split}"


def dataset_of(captioner: Captioner, folder: Path, data: str | None) -> Manifest:
    """The dataset `data`, or by default the one that the model in `folder` was trained on."""
    data = data or captioner.config.get("training", {}).get("config", {}).get("data")
    if data is None:
        raise UserError(f"{folder}: its config names no dataset; set one with DATA=")
    return read_manifest(data_folder(data))


def score_rows(
    predictions: Mapping[str, str],
    rows: Sequence[Row],
    metrics: Sequence[str],
    training: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores one caption for each of `rows`: metrics, habits (see `training.scores.habits`) and, on
    drawn scenes, the share of true claims. `training` are the captions of the training split."""
    if missing := [row.id for row in rows if row.id not in predictions]:
        raise UserError(
            f"predictions: no caption for photo {missing[0]!r} ({len(missing)} of {len(rows)}); "
            "scores are comparable only on all photos of a split"
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
    """Writes COCO's result format. Numeric ids (COCO's) are written as numbers, which COCO's tools
    require."""
    results = [
        {"image_id": int(key) if key == str(_number(key)) else key, "caption": caption}
        for key, caption in predictions.items()
    ]
    write_atomic(path, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def _number(key: str) -> int | None:
    return int(key) if key.isdecimal() else None


def read_captions(path: Path, field: str | None = None) -> dict[str, list[str]]:
    """Reads captions by photo from a file of COCO: a list of {"image_id", "caption"}, or an object
    with this list in `field` (annotations)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        captions: dict[str, list[str]] = {}
        for entry in content[field] if field else content:
            image, caption = entry["image_id"], entry["caption"]
            if not isinstance(image, int | str) or not isinstance(caption, str):
                raise TypeError
            check_unicode(f"{image}{caption}", f"{path}: photo {as_utf8(str(image))!r}")
            captions.setdefault(str(image), []).append(caption)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        where = f"an object whose field {field!r} is " if field else ""
        form = f'{where}a list of {{"image_id", "caption"}}'
        raise UserError(f"{path}: not in COCO's format, {form}") from error
    return captions


def read_predictions(path: Path) -> dict[str, str]:
    """Reads one caption per photo from COCO's result format."""
    captions = read_captions(path)
    if twice := [key for key, texts in captions.items() if len(texts) > 1]:
        raise UserError(f"{path}: photo {twice[0]!r} has {len(captions[twice[0]])} captions")
    return {key: texts[0] for key, texts in captions.items()}
