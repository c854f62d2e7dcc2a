"""`python -m export.archive`, behind `make mar`: packs an export and the package `handler` into one
`.mar`.

The manifest is created with torch-model-archiver's classes. The zip is written here because its
command cannot write a handler with a dotted name, and does not give the same bytes twice.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_archiver.manifest_components.manifest import Manifest
from model_archiver.manifest_components.model import Model

import handler
from handler.captioner import EXPORT_FILES, Captioner
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import atomic_path, check_apart, locked

HANDLER = Path(handler.__file__).parent
DEMO = "demo"  # the run of `make demo`
# The earliest date that a zip can hold, in its form and in the manifest's.
EPOCH, CREATED_ON = (1980, 1, 1, 0, 0, 0), "01/01/1980 00:00:00"


def build_archive(export: Path, out: Path, version: str) -> Path:
    """Packs `export` into the archive `out`, whose stem is the model's name. An older archive is
    replaced only when the new one is complete. Raises UserError naming what is missing or wrong."""
    if not export.is_dir():
        raise UserError(f"{export}: no such folder; run make export, or name one with EXPORT=")
    if out.suffix != ".mar":
        raise UserError(f"{out}: the name of an archive must end in .mar")
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]*", version):
        raise UserError(f"version {version!r}: give letters, digits, dots and dashes, such as 1.0")
    if out.is_dir():
        raise UserError(f"{out}: this is a folder; give the archive another name")
    check_apart(out, [export])
    # Loaded once to find damaged files here; with one, a worker of the server would never start.
    config = Captioner.load(export).config
    for field in ("name", "checkpoint", "precision"):
        if not isinstance(config.get(field), str):
            path = export / "config.json"
            raise UserError(f"{path}: field {field!r} is missing; export the checkpoint again")
    # Files only: the folders of the package are programs that run outside the server.
    files = {f"handler/{path.name}": path for path in HANDLER.iterdir() if path.is_file()}
    files |= {name: export / name for name in EXPORT_FILES}
    with locked(out), atomic_path(out) as partial:
        _write_zip(partial, files, _manifest(out.stem, version))
        _keep_previous(out, config)
    return out


def _keep_previous(out: Path, config: dict[str, Any]) -> None:
    """Keeps an archive of another checkpoint before the new one replaces it. A demo's archive
    does not replace the archive that is kept already."""
    if not out.exists():
        return
    old = _config_of(out)
    previous = out.with_name(f"{out.stem}.previous.mar")
    is_demo = old.get("name") == DEMO
    if old.get("checkpoint") == config["checkpoint"] or (is_demo and previous.exists()):
        return
    if previous.exists() and not _config_of(previous):
        raise UserError(
            f"{previous}: {out.name} would be kept under this name, but the file there is no "
            "archive of a captioner; move it elsewhere"
        )
    # Linked, not moved: `out` stays until the new archive replaces it, whatever happens before.
    spare = previous.with_name(f".{previous.name}.new")
    spare.unlink(missing_ok=True)
    try:
        os.link(out, spare)
    except OSError:  # a file system without links
        shutil.copyfile(out, spare)
    spare.replace(previous)
    print(f"{previous}: the previous {out.name}, which has another checkpoint")


def _config_of(archive: Path) -> dict[str, Any]:
    """The export's config in an archive; empty for what is not an archive of this project."""
    try:
        with zipfile.ZipFile(archive) as opened:
            config = json.loads(opened.read("config.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}
    return config if isinstance(config, dict) else {}


def _manifest(name: str, version: str) -> bytes:
    """The manifest for TorchServe; it names the handler's module and the settings file."""
    model = Model(name, None, "handler.caption_handler", model_version=version)
    model.model_dict["configFile"] = "handler/model-config.yaml"
    content = Manifest("python", model).manifest_dict
    content |= {"model": model.model_dict, "createdOn": CREATED_ON}
    return json.dumps(content, indent=2, sort_keys=True).encode()


def _write_zip(out: Path, files: Mapping[str, Path], manifest: bytes) -> None:
    """Uncompressed: weights hardly compress, and versions of zlib give different bytes."""
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(_entry("MAR-INF/MANIFEST.json", len(manifest)), manifest)
        for name, path in sorted(files.items(), key=lambda item: Path(item[0])):
            with (
                path.open("rb") as source,
                archive.open(_entry(name, path.stat().st_size), "w") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.external_attr = 0o100644 << 16
    entry.create_system = 3  # Unix, whatever the system is
    entry.file_size = size
    return entry


def main() -> None:
    parser = ArgumentParser(prog="export.archive", description=__doc__)
    parser.add_argument("--export", type=Path, required=True, help="folder of an export")
    parser.add_argument("--version", default="1.0")
    parser.add_argument("--out", type=Path, default=Path("model_store/captioner.mar"))
    arguments = parser.parse_args()
    out = build_archive(arguments.export, arguments.out, arguments.version)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
