"""The manifest: the one format that every source is converted to, and that training and evaluation
read.

A dataset is a folder with two files. `captions.jsonl` has one line per photo,

    {"id": "...", "image": "relative/path.jpg", "captions": ["...", ...], "split": "train"}

(`scenes` adds `"scene"`, the ground truth). `dataset.json` holds the number of photos, what was
skipped and why, and the folder of the photos (`image_root`: absolute, or relative to the dataset's
folder). The photos themselves are not copied.

For a photo in a tar (see `training.data.shards`), `image` is for example
`coco-000000.tar/000123.jpg`, and `"span": [offset, length]` gives its bytes within the tar;
`image_root` may then be a URL.
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
from handler.files import FORMAT, as_utf8

SPLITS = ("train", "val", "test")
DATASETS = Path("build/data")
CAPTIONS_FILE = "captions.jsonl"
DATASET_FILE = "dataset.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One photo: `image` is relative to the manifest's image root, with forward slashes.

    The constructor raises UserError, naming the field, for any value that could not be written,
    read and opened again.
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
    """A dataset as read from `folder`: its rows in file order, and the folder of their photos, or
    the URL (a str) if they are on a server."""

    name: str
    rows: tuple[Row, ...]
    image_root: Path | str
    folder: Path

    def split(self, name: str) -> list[Row]:
        """The rows of one split. Raises UserError if there are none."""
        rows = [row for row in self.rows if row.split == name]
        if not rows:
            splits = ", ".join(f"{split} ({n})" for split, n in count_splits(self.rows).items())
            raise UserError(
                f"dataset '{self.name}' has no split '{name}'; it has {splits or 'no photos'}"
            )
        return rows

    def path(self, row: Row) -> Path | str:
        """The photo's file, or the tar that contains it; a str is a URL."""
        name = row.shard or row.image
        if isinstance(self.image_root, str):
            return f"{self.image_root.rstrip('/')}/{name}"
        return self.image_root / name


def count_splits(rows: Iterable[Row]) -> dict[str, int]:
    """The number of photos per split, in the order of `SPLITS`, without empty splits."""
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
    """Writes `captions.jsonl` and `dataset.json` into `directory`. Earlier files are replaced only
    when both new ones are complete.

    skipped: `{"image" or "id": ..., "reason": ...}` for everything that was left out.
    notes: further fields of `dataset.json`, such as the rule that defined the splits.
    Raises UserError for an id that occurs twice, for no rows, and for a folder that cannot be
    written.
    """
    directory = Path(os.path.abspath(directory))
    rows = list(rows)
    if not rows:
        raise UserError(f"dataset '{name}': no photo with a caption is left; nothing was written")
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
            f"{directory}: {error.strerror}; choose a folder that can be written"
        ) from None


def inputs_of(manifest: Manifest, out: Path) -> list[Path]:
    """The folders that the output `out` of a command must not replace: the dataset's folder and the
    folder of the photos. `out` may be in the latter, beside the photos."""
    if isinstance(manifest.image_root, str):
        return [manifest.folder]
    root, real = (Path(os.path.realpath(path)) for path in (manifest.image_root, out))
    if root not in real.parents:
        return [manifest.folder, root]
    within = real.relative_to(root).as_posix() + "/"
    holds = any(row.image.startswith(within) for row in manifest.rows)
    return [manifest.folder, real] if holds else [manifest.folder]


def data_folder(name_or_folder: str) -> Path:
    """The folder of a dataset, given its name (under build/data) or the folder itself. What has
    another form than a name, such as "./name", is a folder."""
    named = DATASETS / name_or_folder
    is_name = Path(name_or_folder).name == name_or_folder
    return named if is_name and named.exists() else Path(name_or_folder)


def read_manifest(directory: Path) -> Manifest:
    """Reads a dataset's folder (or its `captions.jsonl`).

    Raises UserError, naming file, line and field, for any damage. The photos were checked when the
    manifest was written; here only their folder is checked.
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
            raise UserError(f"{dataset_file}: field '{field}' must be a string that is not empty")
    if dataset.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{dataset_file}: field 'format' is {dataset['format']!r}, but this version reads "
            f"{FORMAT}; run `make data` again"
        )
    name = texts["name"]
    root = texts["image_root"] if is_url(texts["image_root"]) else directory / texts["image_root"]
    if isinstance(root, Path) and not os.path.isdir(root):
        raise UserError(
            f"{dataset_file}: field 'image_root' is {root}, which is not a folder; "
            "put the photos back or run `make data` again"
        )

    rows: list[Row] = []
    line_of: dict[str, int] = {}
    # Split at newlines only: str.splitlines also splits at U+2028, which a caption may contain.
    for number, line in enumerate(_read_bytes(captions_file).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{captions_file}, line {number}"
        row = _parse_row(line, where)
        if row.id in line_of:
            raise UserError(f"{where}: id {row.id!r} occurs already in line {line_of[row.id]}")
        line_of[row.id] = number
        if row.span is None and isinstance(root, str):
            raise UserError(f"{where}: field 'span' is missing; photos at {root} must be in shards")
        rows.append(row)
    if not rows:
        raise UserError(f"{captions_file} lists no photos; run `make data` again")
    if "counts" in dataset and dataset["counts"] != count_splits(rows):
        # A warning only: the user may have shortened the list on purpose.
        log.warning(
            "warning: %s lists %s, but %s counts %s",
            captions_file, count_splits(rows), dataset_file.name, dataset["counts"],
        )  # fmt: skip
    return Manifest(name, tuple(rows), root, directory)


def summary(out: Path) -> str:
    """One line: the folder of a dataset, its photos per split, and its number of captions."""
    rows = read_manifest(out).rows
    counts = ", ".join(f"{count} {split}" for split, count in count_splits(rows).items())
    return f"{out}: {counts}; {sum(len(row.captions) for row in rows)} captions"


def is_url(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _root(image_root: Path, directory: Path) -> str:
    """Relative if possible, so that the dataset can be moved together with its photos."""
    root = Path(os.path.abspath(image_root))
    if as_utf8(str(root)) != str(root):
        raise UserError(f"{as_utf8(str(root))}: the name of a folder is not UTF-8; rename it")
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
        raise UserError(f"field '{field}' must be a string that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can encode half a surrogate pair, UTF-8 cannot
        raise UserError(f"field '{field}' contains half a surrogate pair") from None
