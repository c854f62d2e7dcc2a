"""What README, docs and deploy/ tell a reader to type does what they say."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TINY
from documents import blocks, commands, programs_of
from huggingface_models import save_family, save_florence
from live import configure
from PIL import Image

from handler.captioner import Captioner
from training.data.manifest import Row, write_manifest

# Not run by a test: why.
NOT_HERE = {
    r"make (demo|test|test-slow|bench|lint|setup)\b": "run as they are, by people and by CI",
    r"(docker|kubectl|helm) ": "need an engine or a cluster; see test_deploy.py",
    r"make data DATA=shards|DATA=cc|SOURCE='s3:": "their hosts are examples",
    r"python -m tests\.benchmarks|make batch .*EXPORT=\.\.\.": "minutes of measuring",
    r"scenes_full|checkpoints/(scenes|demo)\b|flickr8k_full": "another run's checkpoint",
    r"make data .*DATA=(flickr|coco)": "downloads a dataset; see test_prepare.py",
    r"import_huggingface \w+/|MODEL=\w+/": "downloads gigabytes; see test_import_huggingface.py",
    r"FROM=\S+-captioning": "needs what that downloads; see test_fine_tuning.py",
    r"\.\.\.|ADDRESS=": "a form, not a command",
}


def reason(command: str) -> str | None:
    return next((why for form, why in NOT_HERE.items() if re.search(form, command)), None)


class Parsed(BaseException):
    """The command line was understood."""


@pytest.mark.parametrize("command", [c for c in commands() if c.split()[0] in ("make", "python")])
def test_every_command_of_the_documents_is_understood(command, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(self, *_, **__):
        real(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for module, *arguments in programs_of(command):
        package = REPOSITORY / module.replace(".", "/") / "__main__.py"
        program = importlib.import_module(f"{module}.__main__" if package.exists() else module)
        if not hasattr(program, "main"):
            continue  # of the set-up, without a command line
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            program.main()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository in which the presets train a tiny model, beside what a reader has:
    photos, a folder of them, two more models, and somebody's ratings."""
    home = tmp_path_factory.mktemp("reader")
    folder = home / "captioner"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    for name in ("flickr8k", "scenes", "finetune"):
        tiny = {key: value for key, value in TINY.items() if key != "data" or name != "finetune"}
        (folder / f"training/configs/{name}.yaml").write_text(yaml.safe_dump(tiny | {"data": name}))
    configure(folder)
    for photos in (home / "photos", folder / "photos", folder / "holiday"):
        photos.mkdir()
        lines = ["image,caption"]
        for number in range(40):
            colour = ("red", "green", "blue", "yellow")[number % 4]
            Image.new("RGB", (48, 36), colour).save(photos / f"{number}.jpg")
            lines.append(f"{number}.jpg,a {colour} square")
        if photos.parent == home:
            (photos / "captions.csv").write_text("\n".join(lines))
    shutil.copy2(home / "photos" / "1.jpg", folder / "photo.jpg")
    for name in ("scenes", "flickr8k", "coco"):
        rows = [
            Row(str(n), f"{n}.jpg", (f"a photo of square {n % 4}", f"the square is {n % 4}"), split)
            for n, split in enumerate(["train"] * 16 + ["val"] * 6)
        ]
        write_manifest(folder / "build/data" / name, name, rows, home / "photos", [])
    return folder


def run(clone: Path, command: str, **more) -> subprocess.CompletedProcess[str]:
    """A command as a reader's shell runs it, but that nothing is installed."""
    settings = dict(
        line.split("=", 1) for line in (clone / "config.properties").read_text().split()
    )
    for port, name in (("8080", "inference_address"), ("8081", "management_address")):
        command = command.replace(f"127.0.0.1:{port}", settings[name].removeprefix("http://"))
    command = command.replace("127.0.0.1:7070", f"127.0.0.1:{settings['grpc_inference_port']}")
    command = command.replace("checkpoints/NAME", "checkpoints/flickr8k")
    stamps = "-o .venv/.installed -o .venv/.installed-batch"
    command = re.sub(r"\bmake\b(?! -o)", f"make {stamps}", command)
    environment = {
        **os.environ,
        "HOME": str(clone.parent),
        "PATH": f"{clone / '.venv/bin'}:{os.environ['PATH']}",
        "TS_CONFIG_FILE": str(clone / "config.properties"),
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True,
        timeout=600, **more,
    )  # fmt: skip


def succeeds(clone: Path, command: str) -> str:
    done = run(clone, command)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.timeout(3000)
def test_a_reader_types_what_the_documents_show(clone):
    """In an order in which each finds what it needs; none may be left over."""
    left = [command for command in commands() if not reason(command)]
    left = [command for command in left if command.split()[0] != "curl"]

    def take(form: str) -> list[str]:
        taken = [command for command in left if re.search(form, command)]
        left[:] = [command for command in left if command not in taken]
        return taken

    def run_all(form: str) -> None:
        for command in take(form):
            succeeds(clone, command)

    succeeds(clone, "make train export mar DATA=flickr8k CONFIG=flickr8k")
    shutil.copytree(clone / "build/checkpoints/flickr8k", clone / "A")
    shutil.copytree(clone / "build/checkpoints/flickr8k", clone / "B")
    shutil.copytree(clone / "A", clone / "build/checkpoints/A")
    try:
        run_all(r"^make (help|stop)$")
        for command in take(r"^make data train export mar serve\b"):
            succeeds(clone, f"{command} RUN=photos; make stop")
        for command in take(r"^make (data )?train\b"):
            command = command.replace("SOURCE=DIR", "SOURCE=~/photos")
            if "ARGS=" not in command:
                command += ' ARGS="--epochs 1"'
            succeeds(clone, command.replace('ARGS="', 'ARGS="--overwrite ') + " RUN=again")
        run_all(r"^make (data|export|mar)\b")
        run_all(r"^make (evaluate|distil|shards)\b")
        for name in ("A", "B"):
            succeeds(clone, f"make evaluate CHECKPOINT={name} DATA=flickr8k")
            predictions = clone / f"build/evaluate/{name}/flickr8k-val/predictions.json"
            shutil.copy2(predictions, clone / f"{name}.json")
        run_all(r"^make report\b")
        run_all(r"^make review ")
        [key] = (clone / "build/review").rglob("key.json")
        rate(clone, json.loads(key.read_text()))
        run_all(r"^make review-score\b")
        succeeds(clone, "make export PRECISION=int8 RUN=flickr8k")
        for number, command in enumerate(take(r"^make batch\b")):
            succeeds(
                clone,
                re.sub("OUT=\\S+", "", command).replace("SOURCE=DIR", "SOURCE=photos")
                + f" OUT=out{number}",
            )
        succeeds(clone, "make mar EXPORT=build/export/flickr8k")
        for command in take(r"^torchrun\b"):
            command = command.replace("NAME", "flickr8k").replace("--run RUN", "--run several")
            here = "--standalone --nproc-per-node 2"
            succeeds(clone, command.replace("--nnodes 2 --nproc-per-node 4", here))
        run_all(r"^python -m training\.describe_config$")
        for command in take(r"^python -m handler\.batch\b.*SLURM"):
            command = command.replace("--export export", "--export build/export/flickr8k")
            command = command.replace("--out captions", "--out array")
            succeeds(clone, f"export SLURM_ARRAY_TASK_ID=0; {command}")
        take(r"^python -m$")  # the beginning of a command, in a sentence
        ask_the_server(clone, take)
    finally:
        run(clone, "make stop")
    assert not left, left


def ask_the_server(clone: Path, take) -> None:
    for command in take(r"^make (stop )?serve( TLS=1)?$"):
        succeeds(clone, command)
        succeeds(clone, "make stop")
    for command in take(r"^torchserve\b"):
        assert "stop" not in command
    succeeds(clone, "make serve")
    for command in take(r"^make caption\b"):
        succeeds(clone, command.replace("IMAGES=DIR", "IMAGES=photos"))
    for command in take(r"^make web$"):
        done = run(clone, f"timeout 20 {command}")
        assert "key=" in done.stdout, done.stderr
    for block in blocks("bash"):
        if "curl" in block:
            output = succeeds(clone, block)
            # The management API writes a new key to key_file.json, and answers with nothing.
            assert "token?" in block or json.loads(output.strip().splitlines()[-1]), block
    for block in blocks("python"):
        if "spark" not in block:
            assert "square" in succeeds(clone, f"python - <<'END'\n{block}\nEND"), block


ONE_LINE = "make import export mar serve"
ASKED = {
    "vit+gpt2": ("a brown",),
    "blip": ("a brown",),
    "git": ("a brown",),
    "florence": ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>"),
}


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("family", ASKED)
def test_one_line_brings_a_model_to_the_server(family, clone):
    """As docs/models.md shows it; then each prompt, and none, by REST and gRPC."""
    assert any(command.startswith(f"{ONE_LINE} MODEL=") for command in commands())
    theirs = clone / "models" / family
    if family == "florence":
        save_florence(theirs)
    else:
        save_family(theirs, family)
    try:
        succeeds(clone, f"{ONE_LINE} MODEL={shlex.quote(str(theirs))}")
        captioner = Captioner.load(clone / "build/export" / family)
        photo = (clone / "photo.jpg").read_bytes()
        for prompt in (None, *ASKED[family]):
            option = f"--prompt {shlex.quote(prompt)}" if prompt else ""
            [[expected]] = captioner.caption([photo], prompt=prompt)
            for way in ("", "--grpc"):
                arguments = shlex.quote(f"{option} {way}")
                said = succeeds(clone, f"make caption IMAGE=photo.jpg ARGS={arguments}")
                assert said.strip() == expected.text
    finally:
        run(clone, "make stop")


def rate(clone: Path, key: dict) -> None:
    """What two people saved who like every caption, and one of them a little less."""
    for rater, value in (("ann", 5), ("bob", 4)):
        ratings = {
            f"{n}-{caption}": value
            for n, item in enumerate(key["items"])
            for caption in range(len(item["captions"]))
        }
        content = {"sheet": key["sheet"], "rater": rater, "ratings": ratings}
        (clone / f"ratings-{rater}.json").write_text(json.dumps(content))
