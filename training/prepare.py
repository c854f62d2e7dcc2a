"""`python -m training.prepare`, behind `make data`: any source -> one manifest.

Every photo is decoded once, so that what trains later is known to be readable; the photos stay
where they are, in a folder or in webdataset shards (of a folder, or at URLs). A broken photo, an
empty caption or a caption without its photo is named; it is skipped only up to `--max-skipped`, and
otherwise nothing is written.
"""

import argparse
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import FolderKind, as_utf8, replace_folder
from handler.image_preprocess import MAX_BYTES, PHOTO_SUFFIXES, InvalidImage, decode
from training.data import download, scenes
from training.data.coco import read_coco
from training.data.flickr import read_flickr8k, read_flickr30k
from training.data.folder import read_folder
from training.data.manifest import (
    CAPTIONS_FILE,
    DATASET_FILE,
    DATASETS,
    Row,
    count_splits,
    is_url,
    summary,
    write_manifest,
)
from training.data.shards import ShardPhoto, find_shards, read_shard, split_of_shards
from training.data.source import HASHED, Photo, Source, locate, split_by_hash

READERS: dict[str, Callable[[Path], Source]] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "folder": read_folder,
}
DRAWN = ("scenes", "scenes_full")
# Of its folders each command replaces only its own: by a field of dataset.json that the others do
# not write.
MANIFEST_FILES = (DATASET_FILE, CAPTIONS_FILE)
PREPARED = FolderKind("a prepared dataset", DATASET_FILE, ("splits",), MANIFEST_FILES)
SCENES = FolderKind("a drawn dataset", DATASET_FILE, ("seed",), (*MANIFEST_FILES, "images"))
SHARDS = "shards"
DOWNLOADS = Path("build/downloads")
FAULTS_SHOWN = 20
FAULTS_IN_ERROR = 5


def find_photos(source: Source) -> tuple[dict[str, str], int]:
    """The file of every photo that has one, by the name that its captions use, and how many photo
    files in the same folders have no captions."""
    found, there = locate(source.image_root, [photo.image for photo in source.photos])
    uncaptioned = there - set(found.values())
    return found, sum(name.lower().endswith(PHOTO_SUFFIXES) for name in uncaptioned)


def find_fault(path: Path | None) -> str | None:
    """Why a photo cannot be used, or None."""
    # isfile is False, too, for what would never end (a pipe) and for links that lead nowhere.
    if path is None or not os.path.isfile(path):
        return "photo is missing"
    try:
        with path.open("rb") as file:
            decode(file.read(MAX_BYTES + 1))  # which says so where there is more
    except OSError as error:
        return f"photo cannot be read ({error.strerror})"
    except InvalidImage as error:
        return str(error)
    return None


def clean(raw: tuple[str, ...]) -> tuple[list[str], tuple[str, ...], list[str]]:
    """Captions whose blanks are single, those of them that say anything, and the faults."""
    captions = [" ".join(caption.split()) for caption in raw]
    said = [any(map(str.isalnum, caption)) for caption in captions]
    reasons = [
        f"caption {n} is {json.dumps(text, ensure_ascii=False) if text else 'empty'}"
        for n, (text, says) in enumerate(zip(captions, said, strict=True), 1)
        if not says
    ]
    return captions, tuple(itertools.compress(captions, said)), reasons


def check_photos(source: Source, found: dict[str, str]) -> tuple[list[Row], list[dict[str, str]]]:
    """Opens every photo that a split uses. Returns the rows that can be used, with captions whose
    blanks are single, and what was left out and why."""
    skipped = [{"image": name, "reason": reason} for name, reason in source.faults]

    def fault_of(photo: Photo) -> str | None:
        file = found.get(photo.image)
        if photo.split is None:
            return None if file else "photo is missing"
        return find_fault(source.image_root / file if file else None)

    rows = []
    owner: dict[str, str] = {}
    # Threads, for Pillow lets go of the interpreter's lock while it decodes.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        faults: Iterable[str | None] = pool.map(fault_of, source.photos)
        faults = tqdm(faults, total=len(source.photos), desc="photos", unit="photo", disable=None)
        for photo, fault in zip(source.photos, faults, strict=True):
            captions, kept, reasons = clean(photo.captions)
            if fault is None and not captions:
                fault = "photo has no caption"
            if fault is None and owner.setdefault(found[photo.image], photo.id) != photo.id:
                fault = f"the same file as {owner[found[photo.image]]}"
            if fault is not None:
                reasons = [fault, *reasons]
            elif kept and photo.split is not None:
                rows.append(Row(photo.id, found[photo.image], kept, photo.split))
            if fault is not None or photo.split is not None:
                skipped += [{"image": photo.image, "reason": reason} for reason in reasons]
    finally:
        # Otherwise Ctrl-C would wait for all the photos that are still to come.
        pool.shutdown(cancel_futures=True)
    return rows, skipped


def prepare(kind: str, name: str, folder: Path, out: Path, max_skipped: int | float) -> None:
    """Writes the raw files in `folder`, laid out as `kind`, as the dataset `name` into `out`.

    max_skipped: how many faults pass (int), or their share of the photos (float). Raises
    UserError, leaving an earlier manifest as it was, where the source is damaged or has more.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; SOURCE must name the one with the raw files")
    with replace_folder(out, PREPARED, [folder]) as new:
        source = READERS[kind](folder)
        photos = len(source.photos)
        found, uncaptioned = find_photos(source)
        if not photos:
            raise UserError(f"{folder}: its captions name no photo at all")
        if not found:
            raise UserError(
                f"{source.image_root}: none of the {photos} photos that have captions lies there "
                f"(the first is {source.photos[0].image}); put them there"
            )
        rows, skipped = check_photos(source, found)
        report_faults(skipped, photos, out, str(folder), max_skipped)
        known = [{"image": image, "reason": reason} for image, reason in source.known]
        skipped += known
        unused = sum(photo.split is None for photo in source.photos)
        notes = {"splits": source.splits, "unused": unused, "uncaptioned": uncaptioned}
        write(new, name, rows, source.image_root, skipped, notes)
    report(out, rows, skipped, notes)


def prepare_shards(name: str, source: str, out: Path, max_skipped: int | float) -> None:
    """Writes the shards in the folder or at the URLs `source` (see `find_shards`) as the dataset
    `name` into `out`, with the place of each photo in its tar; the shards stay where they are.

    Splits: as the captions' records say; otherwise by the shards' names; otherwise by a hash.
    Faults as in `prepare`.
    """
    root, shards = find_shards(source)
    inputs = [] if isinstance(root, str) else [root]
    with replace_folder(out, PREPARED, inputs) as new:
        found: list[ShardPhoto] = []
        skipped: list[dict[str, str]] = []
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            parts = pool.map(lambda shard: read_shard(root, shard), shards)
            for photos, faults in tqdm(parts, SHARDS, len(shards), unit="shard", disable=None):
                found += photos
                skipped += [
                    {"image": as_utf8(image), "reason": as_utf8(reason)} for image, reason in faults
                ]
        finally:
            pool.shutdown(cancel_futures=True)
        samples = len(found) + len(skipped)
        if not samples:
            raise UserError(f"{source}: its shards hold no photo at all")
        by_name, splits = split_of_shards(shards), "by the captions' records"
        split_of: dict[str, str | None] = {item.photo.id: item.photo.split for item in found}
        recorded = any(split_of.values())
        if not recorded and by_name is not None:
            splits = "by the shards' names"
            split_of = {item.photo.id: by_name[item.shard] for item in found}
        elif not recorded:
            splits = HASHED
            split_of = {**split_by_hash(split_of)}
        rows = []
        for item in found:
            photo, split = item.photo, split_of[item.photo.id]
            captions, kept, reasons = clean(photo.captions)
            reasons = reasons if captions else ["photo has no caption"]
            skipped += [{"image": photo.image, "reason": reason} for reason in reasons if split]
            if kept and split:
                rows.append(Row(photo.id, photo.image, kept, split, item.scene, item.span))
        report_faults(skipped, samples, out, source, max_skipped)
        unused = sum(split is None for split in split_of.values())
        notes = {"splits": splits, "unused": unused}
        write(new, name, rows, root, skipped, notes)
    report(out, rows, skipped, notes)


def report_faults(
    skipped: list[dict[str, str]], photos: int, out: Path, source: str, max_skipped: int | float
) -> None:
    """Says what is skipped; UserError where that is more than `max_skipped`."""
    most = max_skipped if isinstance(max_skipped, int) else max_skipped * photos
    passes = len(skipped) <= most
    shown = FAULTS_SHOWN if passes else len(skipped)
    for entry in skipped[:shown]:
        print(f"  {entry['image']}: {entry['reason']}")
    if len(skipped) > shown:
        print(f"  and {len(skipped) - shown} more, listed in {out / DATASET_FILE}")
    if not passes:
        first = [f"{entry['image']}: {entry['reason']}" for entry in skipped[:FAULTS_IN_ERROR]]
        rest = len(skipped) - len(first)
        raise UserError(
            f"{source}: {len(skipped)} fault{'s' if len(skipped) > 1 else ''} ("
            + "; ".join([*first, *([f"and {rest} more"] if rest else [])])
            + f"); mend them, or let them pass with --max-skipped {len(skipped)} "
            f'(make: DATA_ARGS="--max-skipped {len(skipped)}")'
        )


def write(
    folder: Path,
    name: str,
    rows: list[Row],
    image_root: Path | str,
    skipped: list[dict[str, str]],
    notes: dict[str, Any],
) -> None:
    """Writes the manifest with its counts."""
    captions = Counter((row.id, caption) for row in rows for caption in row.captions)
    counts = {
        "splits": notes["splits"],
        "captions": captions.total(),
        "repeated_captions": captions.total() - len(captions),
    }
    write_manifest(folder, name, rows, image_root, skipped, {**counts, **notes})


def report(
    out: Path, rows: list[Row], skipped: list[dict[str, str]], notes: dict[str, Any]
) -> None:
    """Says what is in the manifest, and what training will miss."""
    print(f"{summary(out)} (splits {notes['splits']}); {len(skipped)} skipped; ", end="")
    print(f"{notes['unused']} photos in no split", end="")
    print(f"; {notes['uncaptioned']} without captions" if "uncaptioned" in notes else "")
    for split in ("train", "val"):
        if split not in count_splits(rows):
            print(
                f"warning: {out}: no photo in the split {split!r}, which training needs; put some "
                "photos into it, or leave the splits out of the source: 10 % are then held out as "
                "val",
                file=sys.stderr,
            )


def draw(preset: str, out: Path) -> None:
    """Draws the scenes of a preset into `out`; an earlier dataset there stays until all are drawn.

    Raises UserError for a folder that holds anything else, or cannot be written.
    """
    with replace_folder(out, SCENES) as new:
        scenes.generate(new, preset)
    print(summary(out))


def limit(text: str) -> int | float:
    """argparse type: a whole number, or a share such as `1%` or `0.01`."""
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        number = float(text)
        if number >= 1:
            raise argparse.ArgumentTypeError("must be a whole number or a share below 1") from None
    if not 0 <= number < float("inf") or (text.endswith("%") and number > 1):
        raise argparse.ArgumentTypeError("must be at least 0, and a share at most 100 %")
    return number


def main() -> None:
    parser = ArgumentParser(prog="training.prepare", description=__doc__)
    parser.add_argument("--data", default="scenes", choices=(*DRAWN, *READERS, SHARDS))
    parser.add_argument(
        "--source",
        help="folder where the raw files lie; of shards also https://host/NAME-{000000..000112}.tar",
    )
    parser.add_argument("--name", help="what the dataset is called, default as --data")
    parser.add_argument("--out", type=Path, help=f"default {DATASETS}/NAME")
    parser.add_argument(
        "--max-skipped",
        type=limit,
        default=0,
        metavar="N",
        help="faults that are let pass: a number, or a share of the photos such as 1%%",
    )
    parser.add_argument(
        "--mirror", default=download.MIRROR, help="where flickr8k is loaded from without --source"
    )
    arguments = parser.parse_args()
    kind, source = arguments.data, arguments.source
    name = kind if arguments.name is None else arguments.name
    if not name.strip() or name in (".", "..") or set(name) & {"/", "\0"}:
        raise UserError(f"--name must be the name of a folder, not {name!r}")
    out = arguments.out or DATASETS / name
    if kind in DRAWN:
        if source is not None or arguments.name is not None:
            raise UserError(f"--source and --name do not belong to --data {kind}, drawn here")
        draw(kind, out)
        return
    if source is None and kind == "flickr8k":
        source = str(download.download_flickr8k(DOWNLOADS, arguments.mirror))
    if source is None:
        raise UserError(f"{kind} cannot be downloaded automatically; set SOURCE=DIR (--source DIR)")
    if not is_url(source):
        source = os.path.expanduser(source)
    if kind == SHARDS:
        prepare_shards(name, source, out, arguments.max_skipped)
    else:
        prepare(kind, name, Path(source), out, arguments.max_skipped)


if __name__ == "__main__":
    run_command(main)
