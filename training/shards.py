"""`python -m training.shards`, behind `make shards`: a dataset -> shards in the webdataset format.

A folder of tars, each of one split and of about `--shard-mb`, in which every photo, as it was
encoded, stands beside its captions under one number: `000000123.jpg`, `000000123.json`. Beside them
the manifest that trains from them (`make train DATA=DIR`); where they are put on a server, set
its URL as `image_root` in `dataset.json`, or make a manifest from the shards alone
(`make data DATA=shards SOURCE=https://host/NAME-train-{000000..000112}.tar::...`). Whatever reads
webdataset reads them. The same dataset gives the same bytes.
"""

import io
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from handler.errors import ArgumentParser, UserError, run_command
from handler.files import FolderKind, replace_folder
from handler.image_preprocess import sniff
from training.data.manifest import (
    CAPTIONS_FILE,
    DATASET_FILE,
    Manifest,
    Row,
    count_splits,
    data_folder,
    inputs_of,
    read_manifest,
    write_manifest,
)
from training.data.photos import read_bytes

SHARD_MB = 256
# `_write_split` names them; a tar of another name is nobody's to delete.
SHARD_FILES = f"*-{'[0-9]' * 6}.tar"
SHARDED = FolderKind(
    *("a folder of shards", DATASET_FILE, ("shard_bytes",)),
    (DATASET_FILE, CAPTIONS_FILE, SHARD_FILES),
)
SUFFIXES = {"JPEG": "jpg"}  # other formats are called by their names


def write_shards(manifest: Manifest, out: Path, most: int) -> None:
    """Writes the shards of a dataset, and the manifest that trains from them, into the folder
    `out`, whole or not at all; earlier shards there are replaced. `most` is the bytes after which a
    shard is ended.

    Raises UserError where `out` holds anything else or cannot be written, and for a photo that
    cannot be read.
    """
    name = re.sub(r"[^\w-]+", "-", manifest.name)
    try:
        with replace_folder(out, SHARDED, inputs_of(manifest, out)) as folder:
            rows: list[Row] = []
            bar = tqdm(total=len(manifest.rows), desc="shards", unit="photo", disable=None)
            for split in count_splits(manifest.rows):
                rows += _write_split(manifest, split, folder, f"{name}-{split}", most, bar)
            bar.close()
            write_manifest(folder, manifest.name, rows, folder, [], {"shard_bytes": most})
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose a folder that can be written") from None
    counts = ", ".join(f"{count} {split}" for split, count in count_splits(rows).items())
    print(f"{out}: {counts} in {len({row.shard for row in rows})} shards")


def _write_split(
    manifest: Manifest, split: str, folder: Path, stem: str, most: int, bar: Any
) -> list[Row]:
    """Writes `STEM-000000.tar` and so on; returns the rows that find the photos there."""
    source, rows = manifest.split(split), list[Row]()
    for number in itertools.count():
        if len(rows) == len(source):
            break
        shard = f"{stem}-{number:06}.tar"
        # ustar: the header before a photo is one block, and names it by itself.
        with (
            open(folder / shard, "xb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            while len(rows) < len(source) and file.tell() < most:
                row = source[len(rows)]
                photo = read_bytes(manifest, row)
                record: dict[str, Any] = {"id": row.id, "captions": row.captions, "split": split}
                if row.scene is not None:
                    record["scene"] = row.scene
                key, suffix = f"{len(rows):09}", sniff(photo)
                if suffix is None:
                    raise UserError(f"{manifest.path(row)}: no photo; prepare the data again")
                member = f"{key}.{SUFFIXES.get(suffix, suffix.lower())}"
                span = file.tell() + tarfile.BLOCKSIZE, len(photo)
                _add(tar, member, photo)
                _add(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
                image = f"{shard}/{member}"
                rows.append(Row(row.id, image, row.captions, split, row.scene, span))
                bar.update()
    return rows


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # owner, time and mode are the same for all
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def main() -> None:
    parser = ArgumentParser(prog="training.shards", description=__doc__)
    parser.add_argument(
        "--data", default="scenes", help="a dataset under build/data, or its folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--shard-mb", type=float, default=SHARD_MB, help=f"size of a shard, default {SHARD_MB}"
    )
    arguments = parser.parse_args()
    if not 0 < arguments.shard_mb < float("inf"):
        raise UserError(f"--shard-mb must be above 0, not {arguments.shard_mb}")
    manifest = read_manifest(data_folder(arguments.data))
    write_shards(manifest, arguments.out, max(1, round(arguments.shard_mb * 2**20)))


if __name__ == "__main__":
    run_command(main)
