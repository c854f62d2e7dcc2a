"""Ctrl-C ends a command with one line and status 130, whenever it comes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_house import MODULES, is_command

from handler.errors import INTERRUPT, end_on_interrupt

# Packages that take long to import.
HEAVY = ("torch", "grpc", "requests", "numpy", "PIL")
# Run by make setup alone, and by handler.batch.
COMMANDS = {name for name in MODULES if is_command(name)} - {
    *("handler.client.generate_stubs", "handler.batch.child", "handler.batch.loopback"),
    "handler.batch.reaper",
}


def interrupted(command: list[str], folder: Path) -> tuple[int, str]:
    """Status and standard error of a program that gets a Ctrl-C when it prints its first line; so
    do the programs that it has started."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "now\n", process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an import of a heavy package takes an hour, and takes any exception for a reason to do
    without something."""
    slow = """
        import time
        try:
            print("now", flush=True)
            time.sleep(3600)
        except BaseException:
            raise ImportError("this optional thing is not installed")
    """
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(slow))
    return tmp_path


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_in_the_imports(name, folder):
    """It was a traceback of forty lines, or an ImportError."""
    command = name.removesuffix(".__main__")
    assert interrupted(["-m", command, "--help"], folder) == (130, "error: interrupted\n")


@pytest.mark.parametrize("late", [False, True])
def test_in_main_and_behind_it(late, tmp_path):
    """In main it is an exception, which may say how to go on; behind it nothing is."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training/__init__.py").touch()
    body = f"""
        import atexit, time
        from handler.errors import run_command

        def wait():
            print("now", flush=True)
            time.sleep(3600)

        def main():
            try:
                if {late}:
                    atexit.register(wait)
                else:
                    wait()
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted; continue with --resume") from None

        if __name__ == "__main__":
            run_command(main)
    """
    (tmp_path / "training/late.py").write_text(textwrap.dedent(body))
    said = "error: interrupted" + ("" if late else "; continue with --resume") + "\n"
    assert interrupted(["-m", "training.late"], tmp_path) == (130, said)


@pytest.mark.parametrize("words", ["-m pytest training", "train.py -m", "-m trainings", ""])
def test_programs_of_others_keep_their_own(words, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", *words.split()])
    end_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is INTERRUPT


def test_who_ignores_it_still_does(monkeypatch):
    """As under nohup."""
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "training.train"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
