"""`python -m training.prepare`, behind `make data`: any source -> one manifest.

Every photo is decoded once, so that what trains later is known to be readable; the photos stay
where they are. A broken photo, an empty caption or a caption without its photo is named; it is
skipped only up to `--max-skipped`, and otherwise nothing is written.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from handler.errors import ArgumentParser, UserError, run_command
from handler.image_preprocess import InvalidImage, decode
from training.data import download
from training.data.coco import read_coco
from training.data.flickr import read_flickr8k, read_flickr30k
from training.data.folder import read_folder
from training.data.manifest import Row, count_splits, write_manifest
from training.data.source import Source

READERS: dict[str, Callable[[Path], Source]] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "folder": read_folder,
}
DRAWN = ("scenes", "scenes_full")
DOWNLOADS = Path("build/downloads")
FAULTS_SHOWN = 20


def find_fault(path: Path) -> str | None:
    """Why a photo cannot be used, or None."""
    try:
        decode(path.read_bytes())
    except FileNotFoundError:
        return "photo is missing"
    except OSError as error:
        return f"photo cannot be read ({error.strerror})"
    except InvalidImage as error:
        return str(error)
    return None


def check_photos(source: Source) -> tuple[list[Row], list[dict[str, str]], int]:
    """Opens every photo. Returns the rows that can be used, with captions whose blanks are single,
    what was left out and why, and how many photos belong to no split."""
    skipped = [{"image": name, "reason": reason} for name, reason in source.faults]
    used = [photo for photo in source.photos if photo.split is not None]
    unused = [photo for photo in source.photos if photo.split is None]
    for photo in unused:
        if not (source.image_root / photo.image).is_file():
            skipped.append({"image": photo.image, "reason": "photo is missing"})

    rows = []
    paths = [source.image_root / photo.image for photo in used]
    # Threads, for Pillow lets go of the interpreter's lock while it decodes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults: Iterable[str | None] = pool.map(find_fault, paths)
        faults = tqdm(faults, total=len(paths), desc="photos", unit="photo", disable=None)
        for photo, fault in zip(used, faults, strict=True):
            captions = [" ".join(caption.split()) for caption in photo.captions]
            kept = tuple(caption for caption in captions if caption)
            reasons = [f"caption {n} is empty" for n, text in enumerate(captions, 1) if not text]
            if fault is None and not captions:
                fault = "photo has no caption"
            if fault is not None:
                reasons = [fault, *reasons]
            elif kept:
                assert photo.split is not None
                rows.append(Row(photo.id, photo.image, kept, photo.split))
            skipped += [{"image": photo.image, "reason": reason} for reason in reasons]
    return rows, skipped, len(unused)


def prepare(name: str, folder: Path, out: Path, max_skipped: int) -> None:
    """Writes the dataset `name`, whose raw files lie in `folder`, into the folder `out`.

    Raises UserError, leaving an earlier manifest as it was, where the source is damaged or has
    more than `max_skipped` faults.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; SOURCE must name the one with the raw files")
    source = READERS[name](folder)
    rows, skipped, unused = check_photos(source)
    for entry in skipped[:FAULTS_SHOWN]:
        print(f"  {entry['image']}: {entry['reason']}")
    if len(skipped) > FAULTS_SHOWN:
        print(f"  and {len(skipped) - FAULTS_SHOWN} more")
    if len(skipped) > max_skipped:
        raise UserError(
            f"{folder}: {len(skipped)} faults, the first in {skipped[0]['image']}: "
            f"{skipped[0]['reason']}; mend them, or let them pass with --max-skipped {len(skipped)}"
        )
    known = [{"image": image, "reason": reason} for image, reason in source.known]
    notes = {"splits": source.splits, "unused": unused}
    write_manifest(out, name, rows, source.image_root, [*skipped, *known], notes)
    counts = ", ".join(f"{count} {split}" for split, count in count_splits(rows).items())
    captions = sum(len(row.captions) for row in rows)
    print(
        f"{out}: {counts} (splits {source.splits}); {captions} captions; "
        f"{len(skipped) + len(known)} skipped; {unused} photos in no split"
    )


def count(text: str) -> int:
    """argparse type: a whole number, not negative."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def main() -> None:
    parser = ArgumentParser(prog="training.prepare", description=__doc__)
    parser.add_argument("--data", default="scenes", choices=(*DRAWN, *READERS))
    parser.add_argument("--source", type=Path, help="folder where the raw files lie")
    parser.add_argument("--out", type=Path, help="default build/data/NAME")
    parser.add_argument("--max-skipped", type=count, default=0, help="faults that are let pass")
    parser.add_argument(
        "--mirror", default=download.MIRROR, help="where flickr8k is loaded from without --source"
    )
    arguments = parser.parse_args()
    name, folder = arguments.data, arguments.source
    out = arguments.out or Path("build/data") / name
    if name in DRAWN:
        if folder is not None:
            raise UserError(f"--source does not belong to --data {name}, which is drawn here")
        # Imported here, so that the other sources do without the drawing.
        from training.data import scenes

        scenes.generate(out, name)
        return
    if folder is None and name == "flickr8k":
        folder = download.download_flickr8k(DOWNLOADS, arguments.mirror)
    if folder is None:
        raise UserError(f"{name} is not loaded from anywhere; say SOURCE=DIR (--source DIR)")
    prepare(name, folder, out, arguments.max_skipped)


if __name__ == "__main__":
    run_command(main)
