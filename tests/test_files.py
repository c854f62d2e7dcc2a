"""Folders that are replaced whole, and never somebody else's."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from handler.errors import UserError
from handler.files import FolderKind, locked, read_json, replace_folder

KIND = FolderKind("a box", "box.json", ("format", "lid"), ("box.json", "*.bin"))


def write_box(folder, lid="red"):
    with replace_folder(folder, KIND) as new:
        (new / "box.json").write_text(json.dumps({"format": 1, "lid": lid}))
        (new / "1.bin").write_bytes(b"x")


def test_a_folder_of_the_same_kind_is_replaced(tmp_path):
    write_box(tmp_path / "a", "red")
    write_box(tmp_path / "a", "blue")
    assert read_json(tmp_path / "a" / "box.json")["lid"] == "blue"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    write_box(tmp_path / "a")
    assert (tmp_path / "a" / "1.bin").exists()


@pytest.mark.parametrize(
    "names", [{"thesis.txt": "x"}, {"box.json": "{}"}, {"box.json": "not json"}, {"1.bin": "x"}]
)
def test_a_folder_of_another_kind_is_refused(tmp_path, names):
    folder = tmp_path / "a"
    folder.mkdir()
    for name, text in names.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match="is not a box"):
        write_box(folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == names
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_file_that_somebody_added_is_kept(tmp_path):
    write_box(tmp_path / "a")
    (tmp_path / "a" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="'thesis.txt' is not part of a box"):
        write_box(tmp_path / "a", "blue")
    assert (tmp_path / "a" / "thesis.txt").read_text() == "x"
    assert read_json(tmp_path / "a" / "box.json")["lid"] == "red"


@pytest.mark.parametrize("out, where", [("in", "is"), (".", "is above"), ("in/x", "is below")])
def test_an_input_is_never_replaced(tmp_path, out, where):
    (tmp_path / "in").mkdir()
    with (
        pytest.raises(UserError, match=f"output {where} the input"),
        replace_folder(tmp_path / out, KIND, [tmp_path / "in"]),
    ):
        pass


def test_an_input_behind_a_link_is_never_replaced(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    with (
        pytest.raises(UserError, match="is the input"),
        replace_folder(tmp_path / "link", KIND, [tmp_path / "in"]),
    ):
        pass


def test_a_failure_leaves_what_was_there(tmp_path):
    write_box(tmp_path / "a")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write raises it
    with (
        pytest.raises(OSError, match=f"left on device: '{tmp_path}/a'"),
        replace_folder(tmp_path / "a", KIND) as new,
    ):
        (new / "box.json").write_text("half")
        raise full
    assert read_json(tmp_path / "a" / "box.json")["lid"] == "red"
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_what_is_added_while_the_folder_is_made_is_kept(tmp_path):
    write_box(tmp_path / "a")
    with pytest.raises(UserError, match="thesis"), replace_folder(tmp_path / "a", KIND):
        (tmp_path / "a" / "thesis.txt").write_text("x")
    assert (tmp_path / "a" / "thesis.txt").exists()


def test_a_second_writer_is_refused(tmp_path):
    with locked(tmp_path / "a"):
        code = (
            "import sys; from pathlib import Path; from handler.files import locked\n"
            "with locked(Path(sys.argv[1])): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True
        )
        assert "another process is writing it" in done.stderr
    with locked(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_blocks_nobody_and_loses_nothing(tmp_path):
    write_box(tmp_path / "a")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from handler.files import replace_folder; from tests.test_files import KIND\n"
        "with replace_folder(Path(sys.argv[1]), KIND) as new:\n"
        "    (new / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")])
    assert done.returncode == -signal.SIGKILL
    assert read_json(tmp_path / "a" / "box.json")["lid"] == "red"
    write_box(tmp_path / "a", "blue")
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["1.bin", "box.json"]


def test_a_swap_that_was_cut_in_half_is_completed_backwards(tmp_path):
    write_box(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / ".a.old")
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "a", KIND):
        raise ZeroDivisionError
    assert read_json(tmp_path / "a" / "box.json")["lid"] == "red"


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_none_names_its_file(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json: not readable as JSON"):
        read_json(tmp_path / "x.json")
