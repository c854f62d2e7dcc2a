"""Karpathy's JSON (Karpathy and Fei-Fei 2015): captions and splits of Flickr8k, Flickr30k or COCO
in one file, `dataset_flickr8k.json`, `dataset_flickr30k.json`, `dataset_coco.json`."""

from pathlib import Path

from handler.errors import UserError
from training.data.source import (
    Photo,
    Source,
    image_name,
    parse_json,
    read_text,
    split_name,
    take,
)


def read_karpathy(path: Path, image_root: Path) -> Source:
    """Reads `path`; photos are below `image_root`, those of COCO in the folder `filepath`.

    The id is COCO's image id if there is one, otherwise the file name. `restval` becomes train.
    Raises UserError naming the entry and its field.
    """
    photos = []
    seen = set()
    images = take(parse_json(read_text(path), str(path)), "images", list, str(path))
    for number, entry in enumerate(images):
        where = f"{path}: images[{number}]"
        name = take(entry, "filename", str, where)
        folder = take(entry, "filepath", str, where) if "filepath" in entry else ""
        key = str(take(entry, "cocoid", int, where)) if "cocoid" in entry else name
        if key in seen:
            raise UserError(f"{where}: photo {key!r} occurs more than once")
        seen.add(key)
        captions = tuple(
            take(sentence, "raw", str, f"{where}.sentences[{position}]")
            for position, sentence in enumerate(take(entry, "sentences", list, where))
        )
        image = image_name(f"{folder}/{name}" if folder else name, where)
        photos.append(
            Photo(key, image, captions, split_name(take(entry, "split", str, where), where))
        )
    return Source(image_root, photos)
