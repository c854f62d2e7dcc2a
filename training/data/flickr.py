"""Flickr8k (Hodosh, Young and Hockenmaier 2013) and Flickr30k (Young et al. 2014) in their common
layouts:

- the original: `Flickr8k.token.txt` or `results_20130124.token`, lines `NAME.jpg#N<TAB>caption`,
- Karpathy's `dataset_flickr8k.json` or `dataset_flickr30k.json`,
- Kaggle's `captions.txt` (CSV with a header), or `results.csv` of Flickr30k (separated by `|`).

The files are in the source's folder or in a folder in it, such as `Flickr8k_text/`. If Flickr8k's
official lists `Flickr_8k.*Images.txt` are present, they define the splits; the dev list becomes
`val`. If nothing defines the splits, a hash of the photo's name does.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from handler.errors import UserError
from training.data.karpathy import read_karpathy
from training.data.source import (
    HASHED,
    Photo,
    Source,
    find_file,
    find_folder,
    image_name,
    read_csv,
    read_lines,
    split_by_hash,
)

IMAGE_FOLDERS = {
    "flickr8k": ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset"),
    "flickr30k": ("images", "Images", "flickr30k-images", "flickr30k_images"),
}
TOKEN_FILES = {"flickr8k": "Flickr8k.token.txt", "flickr30k": "results_20130124.token"}
KAGGLE_FILES = {"flickr8k": ("captions.txt",), "flickr30k": ("captions.txt", "results.csv")}
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
# The published token file has a caption of this photo, which is in no list and no archive.
KNOWN_DEFECT = "2258277193_586949ec62.jpg.1"


def read_flickr8k(source: Path) -> Source:
    """Reads the first layout found. Raises UserError naming file and line."""
    return _read(source, "flickr8k")


def read_flickr30k(source: Path) -> Source:
    """Reads the first layout found. Raises UserError naming file and line."""
    return _read(source, "flickr30k")


def _read(source: Path, name: str) -> Source:
    image_root = find_folder(source, IMAGE_FOLDERS[name])
    token_file = find_file(source, TOKEN_FILES[name])
    karpathy_file = find_file(source, f"dataset_{name}.json")
    official = SPLIT_LISTS if name == "flickr8k" else {}
    lists = {split: find_file(source, file) for split, file in official.items()}
    lists = {split: path for split, path in lists.items() if path.is_file()}
    if karpathy_file.is_file() and not (token_file.is_file() and lists):
        return read_karpathy(karpathy_file, image_root)
    captions: dict[str, list[str]] = {}
    for photo, caption in _captions(source, name):
        captions.setdefault(photo, []).append(caption)

    known = []
    if KNOWN_DEFECT in captions and not (image_root / KNOWN_DEFECT).exists():
        del captions[KNOWN_DEFECT]
        known = [(KNOWN_DEFECT, "caption of a photo that was never published")]
    if not lists:
        hashed = split_by_hash(captions)
        photos = [Photo(key, key, tuple(texts), hashed[key]) for key, texts in captions.items()]
        return Source(image_root, photos, known=known, splits=HASHED)
    split_of = _read_lists(lists)
    faults = [
        (photo, f"listed in {lists[split].name}, but has no caption")
        for photo, split in split_of.items()
        if photo not in captions
    ]
    # In the order of the lists; photos in no list follow.
    ordered = dict.fromkeys([*split_of, *captions])
    photos = [
        Photo(photo, photo, tuple(captions[photo]), split_of.get(photo))
        for photo in ordered
        if photo in captions
    ]
    return Source(image_root, photos, faults, known)


def _captions(source: Path, name: str) -> Iterator[tuple[str, str]]:
    token_file = find_file(source, TOKEN_FILES[name])
    if token_file.is_file():
        return _read_tokens(token_file)
    for path in (find_file(source, file) for file in KAGGLE_FILES[name]):
        if path.is_file():
            return _read_bars(path) if path.name == "results.csv" else _read_kaggle(path)
    files = (TOKEN_FILES[name], f"dataset_{name}.json", *KAGGLE_FILES[name])
    raise UserError(f"{source}: no captions found; it must contain one of {', '.join(files)}")


def _read_tokens(path: Path) -> Iterator[tuple[str, str]]:
    for where, line in read_lines(path):
        name, tab, caption = line.partition("\t")
        photo, _, number = name.rpartition("#")
        if not tab or not photo or not number.strip().isdigit():
            raise UserError(f"{where}: must be NAME.jpg#N<TAB>caption")
        yield image_name(photo, where), caption


def _read_kaggle(path: Path) -> Iterator[tuple[str, str]]:
    for where, record in read_csv(path):
        photo = record.get("image", record.get("image_name"))
        caption = record.get("caption", record.get("comment"))
        if photo is None or caption is None:
            raise UserError(f"{path}: the header must name the columns image and caption")
        yield image_name(photo, where), caption


def _read_bars(path: Path) -> Iterator[tuple[str, str]]:
    """`results.csv`: `image_name| comment_number| comment`, without quoting. In one line of the
    published file the second bar is missing, so spaces are accepted instead."""
    for position, (where, line) in enumerate(read_lines(path)):
        if position == 0 and line.replace(" ", "").startswith("image_name|"):
            continue
        parts = re.fullmatch(r"([^|]+)\|\s*\d+(?:\s*\||\s+)(.*)", line)
        if parts is None:
            raise UserError(f"{where}: must be NAME.jpg| N| caption")
        yield image_name(parts[1].strip(), where), parts[2].strip()


def _read_lists(lists: dict[str, Path]) -> dict[str, str]:
    """The split of each photo, in the order of the lists."""
    split_of: dict[str, str] = {}
    for split, path in lists.items():
        for where, line in read_lines(path):
            photo = image_name(line.strip(), where)
            if photo in split_of:
                raise UserError(f"{where}: {photo} is listed already, in {split_of[photo]}")
            split_of[photo] = split
    return split_of
