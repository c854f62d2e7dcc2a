"""Flickr8k in its original layout: `Flickr8k.token.txt` with lists of photos a split.

Hodosh, Young and Hockenmaier 2013. The photos lie in `images/`, `Images/` or
`Flicker8k_Dataset/`; the official dev list is called `val` here.
"""

from dataclasses import dataclass
from pathlib import Path

from handler.errors import UserError

IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images")
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


@dataclass(frozen=True)
class Source:
    """What a source found, before any photo was opened: `rows` are (id, image relative to
    `image_root`, captions, split); `unused` counts photos that belong to no split; `defects` are
    (name, reason) pairs."""

    image_root: Path
    rows: list[tuple[str, str, list[str], str]]
    defects: list[tuple[str, str]]
    unused: int


def read_lines(path: Path) -> list[str]:
    """A text file's lines; a byte-order mark and Windows line ends are fine."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; SOURCE must hold it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error})") from error


def image_folder(source: Path) -> Path:
    """The folder of photos in a source."""
    for name in IMAGE_FOLDERS:
        if (source / name).is_dir():
            return source / name
    raise UserError(f"{source}: no folder of photos there; one of {', '.join(IMAGE_FOLDERS)}")


def read_tokens(path: Path) -> dict[str, list[str]]:
    """Captions by photo from lines `NAME.jpg#N<TAB>caption`."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        photo, hash_, _ = name.partition("#")
        if not tab or not hash_ or not photo:
            raise UserError(f"{path}: line {number} is not NAME.jpg#N<TAB>caption")
        captions.setdefault(photo, []).append(caption)
    return captions


def read_flickr8k(source: Path) -> Source:
    """Reads the original layout. Raises UserError naming file and line."""
    captions = read_tokens(source / "Flickr8k.token.txt")
    rows, defects, listed = [], [], set()
    for split, name in SPLIT_LISTS.items():
        if not (source / name).exists():
            continue
        for line in read_lines(source / name):
            photo = line.strip()
            if not photo:
                continue
            if photo in listed:
                raise UserError(f"{source / name}: {photo} is listed twice")
            listed.add(photo)
            if photo not in captions:
                defects.append((photo, f"listed in {name}, but without a caption"))
                continue
            rows.append((photo, photo, captions[photo], split))
    if not listed:
        raise UserError(f"{source}: none of {', '.join(SPLIT_LISTS.values())} is there")
    return Source(image_folder(source), rows, defects, len(captions.keys() - listed))
