"""The archive alone: what is in it, that nothing else is needed, and that it is reproducible."""

import json
import subprocess
import sys
import zipfile

import pytest
from conftest import run_program

from export.archive import build_archive
from handler.errors import UserError
from training.checkpoint import load_captioner

PROBE = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
from handler.captioner import Captioner
caption = Captioner.load(".").caption([Path(sys.argv[1]).read_bytes()])[0][0]
ours = ("handler", "training", "export")
files = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ours]
print(json.dumps([caption.text, files]))
"""


@pytest.fixture(scope="module")
def archive(tiny_export, tmp_path_factory):
    return build_archive(tiny_export, tmp_path_factory.mktemp("store") / "captioner.mar", "1.0")


def test_same_inputs_give_the_same_bytes(archive, tiny_export, tmp_path):
    again = build_archive(tiny_export, tmp_path / "captioner.mar", "1.0")
    assert again.read_bytes() == archive.read_bytes()
    other = build_archive(tiny_export, tmp_path / "captioner.mar", "2.0")
    assert other.read_bytes() != archive.read_bytes()


def test_manifest_names_the_packaged_handler(archive):
    with zipfile.ZipFile(archive) as opened:
        model = json.loads(opened.read("MAR-INF/MANIFEST.json"))["model"]
        names = set(opened.namelist())
    assert model["handler"] == "handler.caption_handler"
    assert model["configFile"] in names and "handler/client.py" not in names


def test_a_bare_folder_captions_as_the_checkpoint_does(archive, tiny_run, tiny_data, tmp_path):
    """Unzipped elsewhere, every module of ours comes from the archive itself."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    photo = tiny_data / "images/17.png"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-I", "-c", PROBE, str(photo)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text, files = json.loads(done.stdout)
    assert files and all(file.startswith(str(tmp_path)) for file in files)
    eager = load_captioner(tiny_run / "build/checkpoints/tiny")
    assert text == eager.caption([photo.read_bytes()])[0][0].text


def test_an_incomplete_export_is_refused_and_the_old_archive_stays(archive, tmp_path):
    before = archive.read_bytes()
    with pytest.raises(UserError, match="config.json"):
        build_archive(tmp_path, archive, "1.0")
    assert archive.read_bytes() == before


def test_a_failed_export_leaves_no_bundle(tiny_run):
    folder = tiny_run / "build/checkpoints/tiny"
    done = run_program("export.export", "--checkpoint", str(folder), "--data", "nowhere", "--out",
                       "build/export/broken", cwd=tiny_run)  # fmt: skip
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tiny_run / "build/export").glob("*broken*"))
