"""`python -m training.prepare`, behind `make data`: any source -> one manifest.

Every photo is decoded once, so that what trains later is known to be readable. A broken photo, an
empty caption or a caption without its photo is named; it is skipped only up to `--max-skipped`,
and otherwise nothing is written.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from handler.errors import ArgumentParser, UserError, run_command
from handler.image_preprocess import InvalidImage, decode
from training.data.flickr import Source, read_flickr8k
from training.data.manifest import Row, check_inside, write_manifest

SOURCES = {"flickr8k": read_flickr8k}


def check_rows(source: Source) -> tuple[list[Row], list[dict[str, str]]]:
    """The rows whose photo opens, with their captions cleaned, and what was skipped and why."""
    skipped = [{"image": name, "reason": reason} for name, reason in source.defects]

    def broken(image: str) -> str | None:
        try:
            check_inside(image, "photo")
            decode((source.image_root / image).read_bytes())
        except OSError as error:
            return f"photo cannot be read ({error.strerror})"
        except (InvalidImage, UserError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = [row[1] for row in source.rows]
        reasons = list(
            tqdm(pool.map(broken, images), total=len(images), desc="photos", unit="photo")
        )
    rows = []
    for (key, image, captions, split), reason in zip(source.rows, reasons, strict=True):
        if reason is not None:
            skipped.append({"image": image, "reason": reason})
            continue
        cleaned = [" ".join(caption.split()) for caption in captions]
        skipped += [
            {"image": image, "reason": f"caption {number} is empty"}
            for number, caption in enumerate(cleaned)
            if not caption
        ]
        if any(cleaned):
            rows.append(Row(key, image, tuple(c for c in cleaned if c), split))
    return rows, skipped


def prepare(name: str, source: Path | None, out: Path, max_skipped: int) -> None:
    """Writes the dataset `name` into the folder `out`."""
    from training.data import scenes

    if name in scenes.PRESETS:
        scenes.generate(out, name)
        return
    if source is None:
        raise UserError(f"{name}: say where its files lie with SOURCE=DIR")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; SOURCE must name one")
    found = SOURCES[name](source)
    rows, skipped = check_rows(found)
    for entry in skipped[:20]:
        print(f"  {entry['image']}: {entry['reason']}")
    if len(skipped) > max_skipped:
        first = f"{skipped[0]['image']}: {skipped[0]['reason']}"
        raise UserError(
            f"{source}: {len(skipped)} faults, the first {first}; "
            f"mend them, or allow them with --max-skipped {len(skipped)}"
        )
    write_manifest(out, name, rows, found.image_root, skipped)
    counts = ", ".join(
        f"{sum(row.split == split for row in rows)} {split}" for split in ("train", "val", "test")
    )
    captions = sum(len(row.captions) for row in rows)
    print(
        f"{out}: {counts}; {captions} captions; {len(skipped)} skipped; "
        f"{found.unused} photos in no split"
    )


def main() -> None:
    parser = ArgumentParser(prog="training.prepare", description=__doc__)
    names = ("scenes", "scenes_full", *SOURCES)
    parser.add_argument("--data", default="scenes", choices=names)
    parser.add_argument("--source", type=Path, help="folder where the raw files lie")
    parser.add_argument("--out", type=Path, help="default build/data/NAME")
    parser.add_argument("--max-skipped", type=int, default=0, help="faults that are let pass")
    arguments = parser.parse_args()
    out = arguments.out or Path("build/data") / arguments.data
    prepare(arguments.data, arguments.source, out, arguments.max_skipped)


if __name__ == "__main__":
    run_command(main)
