"""`python -m export.archive`, behind `make mar`: an export and the package `handler` -> one `.mar`.

torch-model-archiver lays the files out; it writes no dotted handler and no reproducible zip, so the
manifest is completed and the zip written here: the same inputs give the same bytes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import handler
from handler.captioner import EXPORT_FILES, Captioner
from handler.errors import ArgumentParser, UserError, run_command
from handler.files import atomic_path, check_apart, locked

HANDLER = Path(handler.__file__).parent
DEMO = "demo"  # the run of `make demo`
# The earliest date that a zip can hold, in its form and in the manifest's.
EPOCH, CREATED_ON = (1980, 1, 1, 0, 0, 0), "01/01/1980 00:00:00"


def build_archive(export: Path, out: Path, version: str) -> Path:
    """Packs `export` into the archive `out`, whose stem is the model's name. Raises UserError
    naming what is missing; an older archive is replaced only by a whole new one."""
    if not export.is_dir():
        raise UserError(f"{export}: no such folder; run make export, or name one with EXPORT=")
    if out.suffix != ".mar":
        raise UserError(f"{out}: an archive's name ends in .mar")
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]*", version):
        raise UserError(f"version {version!r}: give letters, digits, dots and dashes, as 1.0")
    if out.is_dir():
        raise UserError(f"{out}: this is a folder; give the archive another name")
    check_apart(out, [export])
    # Loaded once, so that a damaged file is found here and not by a worker that never comes up.
    config = Captioner.load(export).config
    for field in ("name", "checkpoint", "precision"):
        if not isinstance(config.get(field), str):
            path = export / "config.json"
            raise UserError(f"{path}: field {field!r} is missing; export the checkpoint again")
    with locked(out), tempfile.TemporaryDirectory() as temporary:
        extra = Path(temporary) / "extra"
        package = extra / "handler"
        package.mkdir(parents=True)
        for file in sorted(HANDLER.iterdir()):
            if file.is_file():  # folders are tools of the client's side
                shutil.copyfile(file, package / file.name)
        for name in EXPORT_FILES:
            (extra / name).symlink_to((export / name).resolve())
        staged = _stage(Path(temporary), extra, out.stem, version)
        with atomic_path(out) as partial:
            _write_zip(staged, partial)
            _keep_previous(out, config)
    return out


def _keep_previous(out: Path, config: dict[str, Any]) -> None:
    """Renames an archive of another checkpoint before the new one takes its place. One that an
    earlier demo made is not worth the archive that is kept already."""
    if not out.exists():
        return
    try:
        with zipfile.ZipFile(out) as archive:
            old = json.loads(archive.read("config.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        old = {}  # no archive of this project
    previous = out.with_name(f"{out.stem}.previous.mar")
    demos = old.get("name") == config["name"] == DEMO
    if old.get("checkpoint") == config["checkpoint"] or (demos and previous.exists()):
        return
    out.replace(previous)
    print(f"{previous}: the archive of another checkpoint, which was {out.name} before")


def _stage(temporary: Path, extra: Path, name: str, version: str) -> Path:
    """The archiver's own layout, with the manifest that it cannot write."""
    scratch = temporary / "tmp"  # the archiver empties $TMPDIR/NAME
    scratch.mkdir()
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name]
    command += ["--version", version, "--handler", str(extra / "handler" / "caption_handler.py")]
    command += ["--extra-files", str(extra), "--export-path", str(temporary / "out")]
    command += ["--archive-format", "no-archive", "--force"]
    (temporary / "out").mkdir()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    )
    staged = temporary / "out" / name
    if done.returncode or not staged.is_dir():
        raise UserError(f"torch-model-archiver failed: {done.stderr.strip()[-300:]}")
    (staged / "caption_handler.py").unlink()  # the archiver's copy beside the package
    manifest_file = staged / "MAR-INF" / "MANIFEST.json"
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    model = manifest["model"]
    model["handler"] = "handler.caption_handler"
    model["configFile"] = "handler/model-config.yaml"
    manifest |= {"model": model, "createdOn": CREATED_ON}
    manifest_file.write_text(json.dumps(manifest, indent=2, sort_keys=True), encoding="utf-8")
    return staged


def _write_zip(folder: Path, out: Path) -> None:
    with zipfile.ZipFile(out, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.create_system = 3  # whatever machine packs it
            # Stored: weights hardly shrink, and two versions of zlib give different bytes.
            archive.writestr(entry, file.read_bytes(), compress_type=zipfile.ZIP_STORED)


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
