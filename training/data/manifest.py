"""The one format between every source and everything that trains or measures.

A dataset is a folder with `captions.jsonl`, one line a photo,

    {"id": "...", "image": "relative/path.jpg", "captions": ["...", ...], "split": "train"}

(`scenes` adds `"scene"`, the drawn truth), and `dataset.json`, which says how many there are, what
was skipped and why, and under which folder the photos lie (`image_root`: absolute, or relative to
the dataset's folder). The photos themselves stay where they are.

A photo in a tar (see `training.data.shards`) has an `image` such as `coco-000000.tar/000123.jpg`
and a `"span": [offset, length]`, its bytes within the tar; `image_root` may then be a URL.
"""

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from handler.errors import UserError
from handler.files import FORMAT

SPLITS = ("train", "val", "test")
DATASETS = Path("build/data")
CAPTIONS_FILE = "captions.jsonl"
DATASET_FILE = "dataset.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One photo: `image` is relative to the manifest's image root, with forward slashes.

    Raises UserError on construction, naming the field, for anything that could not be written,
    read back and opened again.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    split: str
    scene: dict[str, Any] | None = None
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_text("id", self.id)
        _check_text("image", self.image)
        check_inside(self.image, "field 'image'")
        if not isinstance(self.captions, tuple) or not self.captions:
            raise UserError("field 'captions' must be a list of at least one caption")
        for number, caption in enumerate(self.captions):
            _check_text(f"captions[{number}]", caption)
        if self.split not in SPLITS:
            raise UserError(f"field 'split' must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if self.scene is not None and not isinstance(self.scene, dict):
            raise UserError("field 'scene' must be an object")
        if self.span is not None:
            span = self.span if isinstance(self.span, tuple) else ()
            if len(span) != 2 or not all(type(n) is int and n >= 0 for n in span):
                raise UserError("field 'span' must be two whole numbers, offset and length")
            if not self.shard or not self.member:
                raise UserError(f"field 'image' must be SHARD.tar/NAME, not {self.image!r}")

    @property
    def shard(self) -> str:
        """The tar that holds the photo; empty for a photo that is a file of its own."""
        name, tar, _ = self.image.partition(".tar/")
        return name + ".tar" if tar and self.span is not None else ""

    @property
    def member(self) -> str:
        """The photo's name within its tar."""
        return self.image.partition(".tar/")[2]


@dataclass(frozen=True)
class Manifest:
    """A dataset as read from `folder`: its rows in file order, and the folder that their photos lie
    in, a URL (a text) where that is on a server."""

    name: str
    rows: tuple[Row, ...]
    image_root: Path | str
    folder: Path

    def split(self, name: str) -> list[Row]:
        """The rows of one split; UserError where it has none."""
        rows = [row for row in self.rows if row.split == name]
        if not rows:
            there = ", ".join(f"{split} ({n})" for split, n in count_splits(self.rows).items())
            raise UserError(
                f"dataset '{self.name}' has no split '{name}'; it has {there or 'no photos'}"
            )
        return rows

    def path(self, row: Row) -> Path | str:
        """The photo's file or the tar that holds it; a text is a URL."""
        name = row.shard or row.image
        if isinstance(self.image_root, str):
            return f"{self.image_root.rstrip('/')}/{name}"
        return self.image_root / name


def count_splits(rows: Iterable[Row]) -> dict[str, int]:
    """Photos a split, in the order of `SPLITS`, splits without photos left out."""
    counts = Counter(row.split for row in rows)
    return {split: counts[split] for split in SPLITS if counts[split]}


def check_inside(name: str, what: str) -> None:
    """Refuses a photo's name that could leave its folder: `../x.jpg`, `/etc/x.jpg`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise UserError(f"{what} must name a file inside the image folder, not {name!r}")


def write_manifest(
    directory: Path,
    name: str,
    rows: Iterable[Row],
    image_root: Path | str,
    skipped: Iterable[Mapping[str, str]],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes `captions.jsonl` and `dataset.json` into `directory`; until both are complete, what
    was there stays.

    skipped: `{"image" or "id": ..., "reason": ...}` for everything the source left out.
    notes: further fields of `dataset.json`, such as the rule that made the splits.
    Raises UserError for an id that occurs twice, where nothing is left to write, or for a folder
    that cannot be written.
    """
    directory = Path(os.path.abspath(directory))
    rows = list(rows)
    if not rows:
        raise UserError(f"dataset '{name}': no photo with a caption is left, nothing written")
    repeated = [key for key, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"dataset '{name}': id {repeated[0]!r} occurs more than once")
    lines = []
    for row in rows:
        record: dict[str, Any] = {
            "id": row.id,
            "image": row.image,
            "captions": row.captions,
            "split": row.split,
        }
        if row.scene is not None:
            record["scene"] = row.scene
        if row.span is not None:
            record["span"] = row.span
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    dataset = {
        "format": FORMAT,
        "name": name,
        "counts": count_splits(rows),
        **(notes or {}),
        "skipped": list(skipped),
        "image_root": image_root if isinstance(image_root, str) else _root(image_root, directory),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as beside:
            captions_file, dataset_file = Path(beside, CAPTIONS_FILE), Path(beside, DATASET_FILE)
            captions_file.write_bytes("".join(lines).encode())
            text = json.dumps(dataset, ensure_ascii=False, indent=2) + "\n"
            dataset_file.write_bytes(text.encode())
            os.replace(captions_file, directory / CAPTIONS_FILE)
            os.replace(dataset_file, directory / DATASET_FILE)
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror}; name a folder that can be written"
        ) from None


def inputs_of(manifest: Manifest, out: Path) -> list[Path]:
    """What a command that reads the dataset must not replace by its output `out`: the dataset's
    folder and the photos'. `out` may lie within the latter, beside the photos."""
    if isinstance(manifest.image_root, str):
        return [manifest.folder]
    root, real = (Path(os.path.realpath(path)) for path in (manifest.image_root, out))
    if root not in real.parents:
        return [manifest.folder, root]
    within = real.relative_to(root).as_posix() + "/"
    holds = any(row.image.startswith(within) for row in manifest.rows)
    return [manifest.folder, real] if holds else [manifest.folder]


def data_folder(name_or_folder: str) -> Path:
    """A dataset by name (under build/data) or by folder."""
    named = DATASETS / name_or_folder
    return named if named.exists() else Path(name_or_folder)


def read_manifest(directory: Path) -> Manifest:
    """Reads a dataset's folder (or its `captions.jsonl`).

    Raises UserError, naming file, line and field, for any damage. That the photos can be opened
    was checked when the manifest was written; here only their folder is looked for.
    """
    directory = Path(directory)
    captions_file = directory
    if directory.name == CAPTIONS_FILE and not directory.is_dir():
        directory = directory.parent
    else:
        captions_file = directory / CAPTIONS_FILE
    dataset_file = directory / DATASET_FILE

    dataset = _parse_object(_read_bytes(dataset_file), str(dataset_file))
    texts = {"name": dataset.get("name", directory.name), "image_root": dataset.get("image_root")}
    for field, value in texts.items():
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise UserError(f"{dataset_file}: field '{field}' must be a text that is not empty")
    if dataset.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{dataset_file}: field 'format' is {dataset['format']!r}, but this version reads "
            f"{FORMAT}; run `make data` again"
        )
    name = texts["name"]
    root = texts["image_root"] if is_url(texts["image_root"]) else directory / texts["image_root"]
    if isinstance(root, Path) and not os.path.isdir(root):
        raise UserError(
            f"{dataset_file}: field 'image_root' names {root}, which is no folder; "
            "put the photos back or run `make data` again"
        )

    rows: list[Row] = []
    line_of: dict[str, int] = {}
    # Split at newlines alone: str.splitlines would also cut at U+2028 inside a caption.
    for number, line in enumerate(_read_bytes(captions_file).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{captions_file}, line {number}"
        row = _parse_row(line, where)
        if row.id in line_of:
            raise UserError(f"{where}: id {row.id!r} stands already in line {line_of[row.id]}")
        line_of[row.id] = number
        if row.span is None and isinstance(root, str):
            raise UserError(f"{where}: field 'span' is missing; {root} can only hold shards")
        rows.append(row)
    if not rows:
        raise UserError(f"{captions_file} holds no photos; run `make data` again")
    if "counts" in dataset and dataset["counts"] != count_splits(rows):
        # Somebody may have shortened the list on purpose, so this is said, not refused.
        log.warning(
            "warning: %s holds %s, but %s counts %s",
            captions_file, count_splits(rows), dataset_file.name, dataset["counts"],
        )  # fmt: skip
    return Manifest(name, tuple(rows), root, directory)


def summary(out: Path) -> str:
    """Where a dataset lies, its photos a split, and its captions."""
    rows = read_manifest(out).rows
    counts = ", ".join(f"{count} {split}" for split, count in count_splits(rows).items())
    return f"{out}: {counts}; {sum(len(row.captions) for row in rows)} captions"


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _root(image_root: Path, directory: Path) -> str:
    """Relative where it can be, so that the folder can be moved with its photos."""
    root = Path(os.path.abspath(image_root))
    if root.is_relative_to(directory):
        return root.relative_to(directory).as_posix()
    return str(root)


def _parse_row(line: bytes, where: str) -> Row:
    record = _parse_object(line, where)
    unknown = record.keys() - {"id", "image", "captions", "split", "scene", "span"}
    missing = {"id", "image", "captions", "split"} - record.keys()
    if missing or unknown:
        kind, field = ("missing", min(missing)) if missing else ("unknown", min(unknown))
        raise UserError(f"{where}: field {field!r} is {kind}")
    captions, span = record["captions"], record.get("span")
    try:
        return Row(
            id=record["id"],
            image=record["image"],
            captions=tuple(captions) if isinstance(captions, list) else captions,
            split=record["split"],
            scene=record.get("scene"),
            span=tuple(span) if isinstance(span, list) else span,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object")
    return record


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: {reason}; `make data` writes it") from None


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"field '{field}' must be a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise UserError(f"field '{field}' holds half a surrogate pair") from None
