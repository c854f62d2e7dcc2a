"""Jobs of handler.batch for the tests: photos in every layout, the rows that came out, a driver and
its processes, and a photo that kills whoever reads it."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY

from handler.batch import namespace
from handler.batch.output import Output
from handler.batch.record import describe, open_run
from handler.batch.shard import Job, Worker, part_name
from handler.batch.source import Shard

BROKEN = {
    "bad.jpg": (b"\xff\xd8\xff\xe0 no photo", "InvalidImage"),
    "text.png": (b"words", "UnsupportedMediaType"),
}

needs_namespace = pytest.mark.skipif(
    not (namespace.is_alone() or namespace.is_possible()),
    reason="Ray would open its ports on every interface",
)


def write_folder(folder: Path, photos: dict[str, bytes]) -> str:
    for name, content in photos.items():
        path = folder / "sub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def write_tars(folder: Path, photos: dict[str, bytes], tars: int = 2) -> str:
    folder.mkdir(parents=True)
    names = sorted(photos)
    for number in range(tars):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in names[number::tars]:
                add(tar, name, photos[name])
                add(tar, f"{Path(name).stem}.json", b"{}")
    return f"{folder}/{{0..{tars - 1}}}.tar"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_parquet(
    folder: Path, photos: dict[str, bytes], structs: bool = False, rows: int = 8
) -> str:
    folder.mkdir(parents=True)
    table = [
        {"id": name, "image": {"bytes": content, "path": None} if structs else content}
        for name, content in photos.items()
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "a.parquet", row_group_size=rows)
    return str(folder)


def write_paths(folder: Path, photos: dict[str, bytes]) -> str:
    write_folder(folder, photos)
    rows = [{"image": f"sub/{name}"} for name in photos]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=8)
    return str(folder / "a.parquet")


def rows_of(out: Path) -> list[dict]:
    parts = sorted(out.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def start_batch(where: str, out: Path, export: Path, *more: str) -> "Driver":
    command = [sys.executable, "-W", "ignore", "-m", "handler.batch"]
    command += ["--source", where, "--out", str(out), "--export", str(export), *more]
    return Driver(command, out.parent)


class Driver:
    """`python -m handler.batch` at work, and all processes that come from it, also once it is gone:
    they stay in its working folder."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.folder = cwd / f"driver-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        given = filter(None, [os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*given, str(REPOSITORY)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those of the job whose command line holds `title`."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.folder) and process.status() != "zombie":
                    found += [process] if title in " ".join(process.cmdline()) else []
        return found

    def actors(self) -> list[psutil.Process]:
        """By the title that Ray gives them."""
        return self.processes("ray::Actor")

    def kill(self) -> None:
        """As the system's memory killer would: nothing is told, nothing cleaned up."""
        self.process.kill()
        self.process.communicate()

    def wait(self, seconds: float = 280) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def check_all_ended(self) -> None:
        """Everything ends with the driver, Ray's own processes after a moment."""
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, [process.cmdline() for process in left]


# Run by each interpreter that starts while a photo is deadly.
ENDS_WHO_OPENS = """
import os, signal, sys

def watch(event, arguments):
    if event == "open" and str(arguments[0]) == {photo!r}:
        with open({dead!r}, "a") as file:
            print(os.getpid(), file=file)
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
"""


@contextmanager
def deadly(path: Path) -> Iterator[list[int]]:
    """A photo that ends whatever process opens it, as a decoder's crash would. Yields the process
    ids of the dead, which are known at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"never read")
    dead: list[int] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        log = Path(folder) / "dead"
        hook = ENDS_WHO_OPENS.format(photo=str(path), dead=str(log))
        (Path(folder) / "sitecustomize.py").write_text(hook)
        patch.setenv("PYTHONPATH", folder)
        patch.syspath_prepend(folder)  # of which a batch's processes take theirs
        yield dead
        dead += [int(line) for line in log.read_text().split()] if log.exists() else []


def caption_all(export: Path, where: str, out: Path, extend: bool = False) -> list[Shard]:
    """What a driver does, in this process."""
    output = Output(str(out))
    shards, _ = open_run(output, describe(export, {}, where), extend)
    worker = Worker(Job(str(export), {}, str(out)))
    for one in shards:
        if part_name(one) not in output.names():
            worker.caption(one)
    return shards
