"""One tiny captioner, trained for seconds on coloured squares, shared by the tests of the road."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training.data.manifest import Row, write_manifest

REPOSITORY = Path(__file__).parent.parent
# A make that a test starts is not one of those that `make test` starts, which say more.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)
# A shell makes what it starts in the background ignore Ctrl-C, and so would the programs that tests
# start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
TINY = {
    "data": "tiny",
    "encoder": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
    "decoder": {"width": 32, "layers": 1, "heads": 2, "dropout": 0.1, "max_tokens": 10},
    "tokenizer": {"kind": "word", "min_count": 1},
    "stages": [
        {"name": "scratch", "epochs": 2, "batch_photos": 4, "augment": True, "flip": True},
        {"name": "frozen", "encoder": "frozen", "epochs": 2, "batch_photos": 4, "views": 2,
         "flip": True},
    ],
    "validation": {"num_beams": 2},
    "workers": 0,
}  # fmt: skip


def run_program(module: str, *arguments: str, cwd: Path, **environment: str):
    """`python -m module`, as make runs it, in another folder."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def make_targets(*arguments: str, folder: Path = REPOSITORY) -> str:
    """What `make` would run, the installation left out."""
    command = ["make", "-n", "--no-print-directory", "-o", ".venv/.installed", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return re.sub(r"\s*\\\n\s*", " ", done.stdout)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """16 + 4 coloured squares."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny-data")
    (folder / "images").mkdir()
    colours = ("red", "green", "blue", "yellow")
    rows = []
    for number in range(20):
        colour = colours[number % 4]
        image = Image.new("RGB", (40, 30), colour)
        image.putpixel((number, 3), (255, 255, 255))
        image.save(folder / "images" / f"{number}.png")
        captions = (f"a {colour} square", f"the square on the left is {colour}")
        split = "train" if number < 16 else "val"
        rows.append(Row(str(number), f"images/{number}.png", captions, split))
    write_manifest(folder, "tiny", rows, folder, [])
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_data) -> Path:
    """A folder in which the tiny captioner was trained as run `tiny`."""
    folder = tmp_path_factory.mktemp("tiny-run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = run_program(
        "training.train", "--config", "tiny.yaml", "--data", str(tiny_data), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_export(tiny_run, tiny_data) -> Path:
    """The tiny captioner's export."""
    done = run_program(
        "export.export", "--checkpoint", "build/checkpoints/tiny", "--data", str(tiny_data),
        cwd=tiny_run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tiny_run / "build/export/tiny"
