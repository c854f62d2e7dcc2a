"""COCO captions (Chen et al. 2015): `captions_{train,val}{2014,2017}.json` in the source's folder
or in its `annotations/`. The photos are in `train2014/` and so on, in the source's folder or in its
`images/`. If both years are present, 2017 is read: it has the same photos in other splits.

If Karpathy's `dataset_coco.json` is present, its captions and splits are used, because published
scores are measured on them. COCO's own test captions are not public, so there is no test split.
"""

from pathlib import Path

from handler.errors import UserError
from training.data.karpathy import read_karpathy
from training.data.source import Photo, Source, image_name, parse_json, read_text, take

YEARS = ("2017", "2014")


def read_coco(source: Path) -> Source:
    """Reads either layout; the ids are COCO's image ids. Raises UserError naming file and field."""
    image_root = source / "images" if (source / "images").is_dir() else source
    for folder in (source, source / "annotations"):
        if (folder / "dataset_coco.json").is_file():
            return read_karpathy(folder / "dataset_coco.json", image_root)
    for year in YEARS:
        photos: list[Photo] = []
        faults: list[tuple[str, str]] = []
        for split in ("train", "val"):
            for folder in (source / "annotations", source):
                path = folder / f"captions_{split}{year}.json"
                if path.is_file():
                    _read_annotations(path, f"{split}{year}", split, photos, faults)
                    break
        if photos:
            return Source(image_root, photos, faults)
    raise UserError(
        f"{source}: neither this folder nor its annotations/ has dataset_coco.json or a "
        "captions_train2017.json (val, 2014) that lists photos"
    )


def _read_annotations(
    path: Path, folder: str, split: str, photos: list[Photo], faults: list[tuple[str, str]]
) -> None:
    """Appends the photos of one file in its order, and as faults the captions of other photos."""
    record = parse_json(read_text(path), str(path))
    images: dict[int, str] = {}
    for number, entry in enumerate(take(record, "images", list, str(path))):
        where = f"{path}: images[{number}]"
        key = take(entry, "id", int, where)
        if key in images:
            raise UserError(f"{where}: id {key} occurs more than once")
        images[key] = image_name(f"{folder}/{take(entry, 'file_name', str, where)}", where)
    captions: dict[int, list[str]] = {key: [] for key in images}
    for number, entry in enumerate(take(record, "annotations", list, str(path))):
        where = f"{path}: annotations[{number}]"
        key = take(entry, "image_id", int, where)
        caption = take(entry, "caption", str, where)
        if key in captions:
            captions[key].append(caption)
        else:
            faults.append((str(key), f"annotations[{number}] of {path.name} names no photo there"))
    photos += [Photo(str(key), images[key], tuple(captions[key]), split) for key in images]
