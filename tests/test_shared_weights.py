"""Processes that load one export keep its packed weights once, and say the same."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

from export.export import export_checkpoint
from handler import captioner as captioner_module
from handler import shared_weights
from handler.captioner import Captioner
from handler.native_library import native_library
from handler.shared_weights import Arena, name_of_weights, packing

needs_native = pytest.mark.skipif(
    native_library() is None, reason="no AVX-512 with VNNI here, or no C compiler"
)
PHOTOS = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(3)]
# Waits for a line, loads, says that it has, and waits for another before it captions.
LOADER = """
import sys
from pathlib import Path
from PIL import Image
from handler import shared_weights
from handler.captioner import Captioner
shared_weights.SHARED_PAGES = Path(sys.argv[2])
sys.stdin.readline()
captioner = Captioner.load(sys.argv[1])
print("loaded", flush=True)
sys.stdin.readline()
print(captioner.caption([Image.open(sys.argv[3])])[0][0].text, flush=True)
"""


@pytest.fixture
def large_pages(tmp_path, monkeypatch) -> Path:
    """A system that has them for shared memory."""
    path = tmp_path / "shmem_enabled"
    path.write_text("always within_size [advise] never deny force\n")
    monkeypatch.setattr(shared_weights, "SHARED_PAGES", path)
    return path


@pytest.fixture
def export(tiny_export, tmp_path) -> Path:
    """One that no other process has loaded."""
    return Path(shutil.copytree(tiny_export, tmp_path / "export"))


def arenas(captioner: Captioner) -> list[Arena]:
    return [captioner.encoder._stack.weights._arena, captioner.decoder._weights._arena]


def links() -> dict[Path, str]:
    """What this process has open."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing itself
            found[link] = os.readlink(link)
    return found


def mapped(process: int) -> set[str]:
    """The shared weights of a process, by inode."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:captioner-" in line}


class Loading:
    """A process that loads an export."""

    def __init__(self, export: Path, large_pages: Path, photo: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOADER, str(export), str(large_pages), str(photo)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def go_on(self) -> str:
        """The next line that it prints."""
        self.tell()
        return self.heard()

    def tell(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def heard(self) -> str:
        return self.process.stdout.readline().strip()


@needs_native
def test_processes_share_and_outlive_the_first(export, large_pages, tmp_path):
    """Three that start at once, of which the one that packed the weights is killed."""
    photo = tmp_path / "photo.png"
    PHOTOS[0].save(photo)
    loading = [Loading(export, large_pages, photo) for _ in range(3)]
    try:
        for one in loading:
            one.tell()
        assert [one.heard() for one in loading] == ["loaded"] * 3
        memory = [mapped(one.process.pid) for one in loading]
        assert len(memory[0]) == 2 and memory == [memory[0]] * 3
        text = Captioner.load(export).caption([Image.open(photo)])[0][0].text
        loading[0].process.kill()
        loading[0].process.wait()
        assert [one.go_on() for one in loading[1:]] == [text] * 2
        assert mapped(os.getpid()) & memory[0] == set()  # ours are gone with their captioner
    finally:
        for one in loading:
            one.process.kill()
            one.process.communicate()


@needs_native
@pytest.mark.parametrize("setting", ["always within_size advise [never] deny force", None])
def test_without_large_pages_for_it_nothing_is_shared(setting, export, large_pages):
    first = Captioner.load(export)
    if setting is None:
        large_pages.unlink()
    else:
        large_pages.write_text(setting)
    own = Captioner.load(export)
    assert not any(arena.is_shared for arena in arenas(own))
    assert own.caption(PHOTOS, num_beams=3) == first.caption(PHOTOS, num_beams=3)


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_what_is_found_is_what_was_packed(precision, tiny_run, export, large_pages, tmp_path):
    folder = export
    if precision != "fp32":
        folder = tmp_path / precision
        export_checkpoint(tiny_run / "build/checkpoints/tiny", folder, precision=precision)
    large_pages.write_text("[never]")
    own = Captioner.load(folder)
    large_pages.write_text("[advise]")
    first = Captioner.load(folder)
    second = Captioner.load(folder)
    assert [arena.is_filled for arena in arenas(first)] == [False, False]
    assert [arena.is_filled for arena in arenas(second)] == [True, True]
    for captioner in (first, second):
        assert captioner.caption(PHOTOS, num_beams=3) == own.caption(PHOTOS, num_beams=3)


@needs_native
def test_an_export_that_changed_is_another(export, large_pages):
    first = Captioner.load(export)
    file = export / "decoder.pt"
    content = file.read_bytes()
    time.sleep(0.01)
    file.write_bytes(content)  # of equal size and content, but who knows
    second = Captioner.load(export)
    assert first and not any(arena.is_filled for arena in arenas(second))
    assert all(arena.is_filled for arena in arenas(Captioner.load(export)))


@needs_native
def test_an_export_that_changes_while_it_is_read_is_not_shared(export, large_pages, monkeypatch):
    """Its old weights would be found under the name of the new files."""
    real = captioner_module.read_script

    def read(path, device):
        script = real(path, device)
        path.write_bytes(path.read_bytes())
        return script

    monkeypatch.setattr(captioner_module, "read_script", read)
    assert not any(arena.is_shared for arena in arenas(Captioner.load(export)))


@needs_native
def test_nobody_waits_for_long(export, large_pages, monkeypatch):
    """For a process that is stopped while it packs, say."""
    monkeypatch.setattr(shared_weights, "PATIENCE", 1)
    with packing(export, name_of_weights(export)) as name:
        assert name is not None
        assert not any(arena.is_shared for arena in arenas(Captioner.load(export)))
        child = os.fork()  # it has the lock's file open, too
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        assert all(arena.is_shared for arena in arenas(Captioner.load(export)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_only_whole_memory_of_the_right_size_is_found(large_pages):
    first = Arena(100, "captioner-test-1")
    first.memory.fill_(7)
    assert not Arena(100, "captioner-test-1").is_filled
    first.seal()
    found = Arena(100, "captioner-test-1")
    assert found.is_filled and found.memory.tolist() == [7] * 100
    assert not Arena(200, "captioner-test-1").is_filled
    assert not Arena(100, "captioner-other").is_filled
    link = next(link for link, target in links().items() if "captioner-test-1 " in target)
    file = os.open(link, os.O_RDWR)
    with pytest.raises(PermissionError):  # sealed: nobody changes what others read
        os.write(file, b"x")
    os.close(file)
    del first
    assert found.memory.tolist() == [7] * 100


@pytest.mark.parametrize("whose", ["another user's process", "another user's memory"])
def test_what_is_another_users_is_not_taken(whose, large_pages, monkeypatch):
    name = f"captioner-{whose}"
    kept = Arena(100, name)
    kept.seal()
    user, real = os.geteuid(), os.fstat

    def of_another(file):
        fields = list(real(file))
        fields[4] = user + 1
        return os.stat_result(fields)

    with monkeypatch.context() as patched:
        if whose.endswith("process"):
            patched.setattr(os, "geteuid", lambda: user + 1)
        else:
            patched.setattr(os, "fstat", of_another)
        assert not Arena(100, name).is_filled
    assert Arena(100, name).is_filled


@pytest.mark.parametrize("broken", ["os.memfd_create", "mmap.mmap"])
def test_where_nothing_can_be_shared_weights_are_private(broken, large_pages, monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(broken, refuse)
        arena = Arena(100, "captioner-test-3")
    assert not arena.is_shared and arena.memory.shape == (100,)
    assert arena.memory.dtype == torch.uint8
    arena.seal()
    assert not Arena(100, "captioner-test-3").is_filled  # nobody takes what was never filled


def test_a_mapping_has_one_descriptor_and_nothing_else_is_left(export, large_pages):
    before = len(links())
    kept = Arena(10_000, "captioner-kept")
    kept.seal()
    found = Arena(10_000, "captioner-kept")
    Arena(20_000, "captioner-kept").seal()
    with packing(export, name_of_weights(export)) as name:
        assert name
    assert found.is_filled and len(links()) == before + 2
    del kept, found
    assert len(links()) == before
