"""What a person has trained, exported and packed is never lost by an ordinary command."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, make_targets
from tiny_training import config_of

import training.loop.train
import training.loop.validation
import training.scores.metrics
from export.archive import build_archive
from export.export import export_checkpoint
from handler.captioner import Captioner
from handler.errors import UserError
from handler.files import locked
from training.checkpoint import load_captioner, load_model, save_checkpoint
from training.data.manifest import Row, read_manifest, write_manifest
from training.demo import is_of_demo
from training.demo import main as training_demo
from training.folders import WEIGHTS_FILE
from training.loop.train import train
from training.train import main as training_main

ONE_STAGE = [{"name": "scratch", "epochs": 2, "batch_photos": 4}]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def config(tmp_path, tiny_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return config_of(tmp_path / "tiny.yaml", data=str(tiny_data), stages=ONE_STAGE)


@pytest.fixture
def old_run(tmp_path, tiny_run) -> Path:
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "run")
    return tmp_path / "run"


# --- training ---


def test_a_run_that_exists_is_replaced_only_when_asked(config, tiny_data, old_run):
    """`make data train DATA=folder` after the demo replaced the demo's checkpoint."""
    before = contents(old_run)
    with pytest.raises(UserError, match="--resume.*--overwrite") as refused:
        train(config, read_manifest(tiny_data), old_run)
    assert "ARGS=--overwrite" in str(refused.value) and "RUN=" in str(refused.value)
    assert "interrupted" not in str(refused.value)  # it was finished
    assert contents(old_run) == before
    train(config, read_manifest(tiny_data), old_run, overwrite=True)
    assert contents(old_run)[WEIGHTS_FILE] != before[WEIGHTS_FILE]
    assert contents(old_run.with_name("run.previous")) == before
    assert sorted(os.listdir(old_run.parent)) == ["run", "run.previous", "tiny.yaml"]


@pytest.mark.parametrize("starts", [1, 2])
def test_a_start_that_fails_changes_nothing(config, tiny_data, old_run, monkeypatch, starts):
    """After two starts that failed before their first validation neither RUN nor RUN.previous had
    weights."""
    before = contents(old_run)

    def fail(*_):
        raise UserError("no disk, no Java, no luck")

    monkeypatch.setattr("training.loop.train.run_stage", fail)
    for _ in range(starts):
        with pytest.raises(UserError, match="no luck"):
            train(config, read_manifest(tiny_data), old_run, overwrite=True)
        with pytest.raises(UserError, match="no luck"):
            train(config, read_manifest(tiny_data), old_run.with_name("new"))
    assert contents(old_run) == before
    assert sorted(os.listdir(old_run.parent)) == ["run", "tiny.yaml"]


def test_what_a_killed_run_had_begun_to_write_is_removed(config, tiny_data, old_run):
    """Such a file made --overwrite refuse the run, and each kill left another."""
    for name in (".train_state.pt.abc_1234", ".model.safetensors.x2345678"):
        (old_run / name).write_bytes(b"half")
    (old_run / ".notes.mine1234").write_text("x")
    with pytest.raises(UserError, match=r"'\.notes.mine1234' is not part of a checkpoint"):
        train(config, read_manifest(tiny_data), old_run, overwrite=True)
    (old_run / ".notes.mine1234").unlink()
    train(config, read_manifest(tiny_data), old_run, overwrite=True)
    assert not [name for name in os.listdir(f"{old_run}.previous") if name.startswith(".")]


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_in_a_linked_folder(exists, config, tiny_data, tmp_path):
    """It was trained until its first save, and then deleted."""
    if exists:
        (tmp_path / "disk/x").mkdir(parents=True)
    Path("x").symlink_to(tmp_path / "disk/x")
    train(config, read_manifest(tiny_data), Path("x"))
    assert Path("x").is_symlink() and (tmp_path / "disk/x" / WEIGHTS_FILE).is_file()


def test_weights_are_never_deleted_for_a_run_without(config, tiny_data, old_run, monkeypatch):
    """RUN.previous keeps the last run that had weights, however many interrupted ones follow."""
    before = contents(old_run)
    monkeypatch.setattr("training.loop.stage.SAVE_EVERY_SECONDS", -1.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.loop.train.validate", interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt, match="ARGS=--resume"):
            train(config, read_manifest(tiny_data), old_run, overwrite=True)
        assert not (old_run / WEIGHTS_FILE).exists()
        assert contents(old_run.with_name("run.previous")) == before


def test_nothing_of_the_users_in_run_previous_is_deleted(config, tiny_data, old_run, monkeypatch):
    """RUN.previous made room for the run that was replaced, whatever was in it."""
    monkeypatch.setattr("training.loop.train.run_stage", lambda *_: pytest.fail("trained"))
    thesis = old_run.with_name("run.previous") / "thesis.txt"
    for marker in (False, True):  # a folder of the user's own, and a run with a file of theirs
        shutil.rmtree(thesis.parent, ignore_errors=True)
        if marker:
            shutil.copytree(old_run, thesis.parent)
        thesis.parent.mkdir(exist_ok=True)
        thesis.write_text("x")
        before = contents(old_run.parent)
        with pytest.raises(UserError, match=r"run\.previous: .*choose another folder"):
            train(config, read_manifest(tiny_data), old_run, overwrite=True)
        assert contents(old_run.parent) == before


def test_nothing_that_came_into_run_previous_meanwhile_is_deleted(
    config, tiny_data, old_run, monkeypatch
):
    thesis = old_run.with_name("run.previous") / "thesis.txt"
    run_stage = training.loop.train.run_stage

    def write_and_train(*arguments):
        thesis.parent.mkdir()
        thesis.write_text("x")
        run_stage(*arguments)

    monkeypatch.setattr("training.loop.train.run_stage", write_and_train)
    before = contents(old_run)
    with pytest.raises(UserError, match=r"run\.previous: .*choose another folder"):
        train(config, read_manifest(tiny_data), old_run, overwrite=True)
    assert thesis.exists() and contents(old_run) == before


def test_a_folder_of_somebody_elses_is_refused(config, tiny_data, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="thesis: the folder is not empty"):
            train(config, read_manifest(tiny_data), tmp_path / "thesis", overwrite=overwrite)
    assert contents(tmp_path / "thesis") == {"thesis.txt": b"x"}


def test_an_epoch_is_saved_before_it_is_validated(config, tiny_data, tmp_path, monkeypatch):
    """Java died in the validation at the end of an epoch, and the epoch was lost. Resumed, the run
    ends as one that was left alone."""
    train(config, read_manifest(tiny_data), Path("alone"))
    score = training.loop.validation.score
    calls = iter(range(100))

    def die_once(*arguments, **options):
        if next(calls) == 0:
            raise UserError("the tokenizer of the Penn treebank died")
        return score(*arguments, **options)

    monkeypatch.setattr("training.loop.validation.score", die_once)
    with pytest.raises(UserError, match="Penn"):
        train(config, read_manifest(tiny_data), Path("died"))
    state = torch.load("died/train_state.pt", weights_only=True)
    assert (state["epoch"], state["step_in_epoch"], state["step"]) == (0, 4, 4)
    train(config, read_manifest(tiny_data), Path("died"), resume=True)
    alone, died = (contents(Path(name)) for name in ("alone", "died"))
    assert alone[WEIGHTS_FILE] == died[WEIGHTS_FILE]


@pytest.mark.parametrize("java_at_first", [True, False])
def test_the_tokenizer_of_the_figures_does_not_change_within_a_run(
    config, tiny_data, monkeypatch, capsys, java_at_first
):
    """CIDEr on plain words was compared with that of earlier epochs, which had Java."""
    find_java, score = training.scores.metrics.find_java, training.loop.validation.score
    used = []

    def java(there: bool) -> None:
        found = find_java() if there else None
        monkeypatch.setattr("training.scores.metrics.find_java", lambda: found)

    def interrupt(*_):
        raise KeyboardInterrupt

    def note(*arguments):
        scores = score(*arguments)
        used.append(scores["tokenizer"])
        return scores

    java(java_at_first)
    monkeypatch.setattr("training.loop.validation.score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config, read_manifest(tiny_data), Path("run"))
    said = "scores with the PTB tokenizer" if java_at_first else "scores on simply split words"
    assert said in capsys.readouterr().out
    monkeypatch.setattr("training.loop.validation.score", note)
    java(not java_at_first)
    if java_at_first:
        with pytest.raises(UserError, match="run: its scores .* the PTB.*make setup"):
            train(config, read_manifest(tiny_data), Path("run"), resume=True)
        java(True)
    train(config, read_manifest(tiny_data), Path("run"), resume=True)
    assert said in capsys.readouterr().out
    assert set(used) == {"ptb" if java_at_first else "python"}


def test_a_run_that_learnt_little_says_so(config, tiny_data, tmp_path, capsys):
    """A run whose captions are of one word each was exported, packed and served."""
    config = config_of(
        tmp_path / "short.yaml", data=str(tiny_data), stages=ONE_STAGE,
        decoding={"max_new_tokens": 1},
    )  # fmt: skip
    train(config, read_manifest(tiny_data), Path("run"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: ") and last.endswith("train it longer")


def test_a_second_start_of_a_run_is_refused(config, tiny_data, tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        train(config, read_manifest(tiny_data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_on_its_own_data(config, tiny_data, tmp_path):
    """A run whose dataset was prepared anew from other photos went on, and said nothing. Where the
    dataset is on the disk does not matter."""
    train(config, read_manifest(tiny_data), Path("alone"))
    manifest = read_manifest(tiny_data)
    before = contents(Path("alone"))
    for change in ({"captions": ("another",)}, {"id": "another"}, {"split": "test"}):
        rows = [dataclasses.replace(manifest.rows[0], **change), *manifest.rows[1:]]
        write_manifest(tmp_path / "other", "tiny", rows, manifest.image_root, [])
        with pytest.raises(UserError, match="alone: the photos or captions of the dataset 'tiny'"):
            train(config, read_manifest(tmp_path / "other"), Path("alone"), resume=True)
        assert contents(Path("alone")) == before
    write_manifest(tmp_path / "moved", "moved", manifest.rows, manifest.image_root, [])
    train(config, read_manifest(tmp_path / "moved"), Path("alone"), resume=True)


def test_an_interrupted_run_says_how_it_goes_on(tiny_data, tmp_path):
    """Ctrl-C was answered with "error: interrupted" alone; in a linked folder nothing had been
    saved, it said."""
    (tmp_path / "build/checkpoints").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "build/checkpoints/tiny").symlink_to(tmp_path / "disk")
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "stages": [{**ONE_STAGE[0], "epochs": 10_000}]})
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "training.train", "--config", "tiny.yaml",
         "--data", str(tiny_data)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    state = tmp_path / "build/checkpoints/tiny/train_state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 130, errors[-3000:]
    assert last == "error: interrupted; continue with --resume (make: ARGS=--resume)"
    assert process.returncode == 130 and state.exists()


@pytest.mark.parametrize("photos", [1, 3])
def test_what_cannot_be_measured_does_not_choose(photos, tiny_data, tmp_path, monkeypatch, capsys):
    """With one validation photo CIDEr is 0 at every epoch, so the first epoch's weights won."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tiny_data)
    rows = [row for row in manifest.rows if row.split == "train"] + manifest.split("val")[:photos]
    write_manifest(Path("few"), "few", rows, manifest.image_root, [])
    stages = [{"name": "scratch", "epochs": 4, "batch_photos": 4, "encoder_lr": 1e-3,
               "decoder_lr": 1e-3, "ema": 0.0}]  # fmt: skip
    config = config_of(Path("few.yaml"), data="few", stages=stages)
    train(config, read_manifest(Path("few")), Path("run"))
    assert "too few for CIDEr" in capsys.readouterr().out
    log = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["val"]["loss"] for entry in log if "val" in entry]
    validation = json.loads(Path("run/config.json").read_text())["training"]["validation"]
    assert validation["chosen_by"] == "loss"
    assert validation["loss"] == min(losses) < losses[0]


def test_equal_figures_go_to_the_later_epoch(config, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("training.loop.validation.LEAST_PHOTOS_FOR_CIDER", 1)
    monkeypatch.setattr(
        "training.loop.validation.score", lambda *_, **__: {"BLEU-4": 0.0, "CIDEr": 0.0}
    )
    train(config, read_manifest(tiny_data), Path("run"))
    assert json.loads(Path("run/config.json").read_text())["training"]["step"] == 8


def test_the_remainder_of_an_accumulated_epoch_is_stepped(tiny_data, tmp_path, monkeypatch):
    """`accumulate` above the number of batches trained nothing and wrote random weights."""
    monkeypatch.chdir(tmp_path)
    for accumulate, steps in ((100, 1), (3, 2), (4, 1), (1, 4)):
        stages = [{**ONE_STAGE[0], "epochs": 1, "accumulate": accumulate}]
        config = config_of(Path("tiny.yaml"), data=str(tiny_data), stages=stages)
        train(config, read_manifest(tiny_data), Path(f"run{accumulate}"))
        lines = Path(f"run{accumulate}/metrics.jsonl").read_text().splitlines()
        assert sum('"gradient_norm"' in line for line in lines) == steps


def test_cached_features_belong_to_a_precision(tiny_data, tmp_path, monkeypatch):
    """A run in fp32 after one in bf16 took its features: other weights for the same seed."""
    monkeypatch.chdir(tmp_path)
    stages = [{**ONE_STAGE[0], "epochs": 1, "encoder": "frozen"}]
    for precision in ("bf16", "fp32", "fp32"):
        config = config_of(
            Path("tiny.yaml"), data=str(tiny_data), stages=stages, precision=precision
        )
        train(config, read_manifest(tiny_data), Path("run"), overwrite=True)
    assert len(list(Path("build/features").glob("*.bf16"))) == 2


# --- vocabulary ---


def japanese(tmp_path: Path, tiny_data: Path, share: int) -> Path:
    manifest = read_manifest(tiny_data)
    rows = [
        Row(row.id, row.image, (f"赤い四角が{n}つあります", "左にある四角")
            if n % 20 < share else row.captions, row.split)
        for n, row in enumerate(manifest.rows)
    ]  # fmt: skip
    write_manifest(tmp_path / "ja", "ja", rows, manifest.image_root, [])
    return tmp_path / "ja"


@pytest.mark.parametrize("share", [20, 5])
def test_captions_without_spaces_get_byte_pairs(share, tiny_data, tmp_path, monkeypatch, capsys):
    """Their words were whole sentences: an hour of training, and every caption was empty."""
    monkeypatch.chdir(tmp_path)
    data = japanese(tmp_path, tiny_data, share)
    fields = {"data": str(data), "stages": ONE_STAGE, "decoder": {**TINY["decoder"],
              "max_tokens": 40}}  # fmt: skip
    config = config_of(Path("ja.yaml"), **fields, tokenizer={"min_count": 1, "vocab_size": 400})
    train(config, read_manifest(data), Path("run"))
    assert "spaces: the vocabulary consists of byte pairs" in capsys.readouterr().out
    tokenizer = load_captioner("run").tokenizer
    assert tokenizer.decode(tokenizer.encode("左にある四角")) == "左にある四角"
    config = config_of(Path("ja.yaml"), **fields, tokenizer={"kind": "word", "min_count": 1})
    with pytest.raises(UserError, match=r"tokenizer: \{kind: bpe\}"):
        train(config, read_manifest(data), Path("words"))
    assert not Path("words").exists()


def test_a_vocabulary_that_holds_no_caption_is_refused(config, tiny_data, tmp_path):
    config = config_of(
        Path("tiny.yaml"), data=str(tiny_data), stages=ONE_STAGE, tokenizer={"min_count": 1000}
    )
    with pytest.raises(UserError, match="no word in the vocabulary.*min_count"):
        train(config, read_manifest(tiny_data), Path("run"))


def test_captions_that_are_cut_are_counted(tiny_data, tmp_path, monkeypatch, capsys):
    """40-word captions lost their ends without a word."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tiny_data)
    rows = [
        Row(r.id, r.image, (" ".join(["a red square"] * 13), "a square"), r.split)
        for r in manifest.rows
    ]
    write_manifest(Path("long"), "long", rows, manifest.image_root, [])
    config = config_of(Path("long.yaml"), data="long", stages=ONE_STAGE)
    train(config, read_manifest(Path("long")), Path("run"))
    out = capsys.readouterr().out
    assert "16 of 32 captions are longer than decoder.max_tokens (10) and are cut" in out
    assert "the longest has 40 tokens" in out


# --- export and archive ---


def test_an_export_replaces_nothing_but_an_export(tiny_run, tiny_data, tmp_path):
    """`export.export --out d` deleted a thesis, and with --out equal to the checkpoint, that."""
    checkpoint = tmp_path / "checkpoints/tiny"
    shutil.copytree(tiny_run / "build/checkpoints/tiny", checkpoint)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/thesis.txt").write_text("x")
    before = contents(tmp_path)
    for out, reason in [
        ("d", "is not an export"),
        ("checkpoints/tiny", "is the input"),
        ("checkpoints", "is above the input"),
        ("checkpoints/tiny/export", "is below the input"),
        ("d/thesis.txt", "this is a file"),
    ]:
        with pytest.raises(UserError, match=reason):
            export_checkpoint(checkpoint, tmp_path / out, data=str(tiny_data))
        assert contents(tmp_path) == before
    for _ in range(2):
        export_checkpoint(checkpoint, tmp_path / "export", data=str(tiny_data))
    assert Captioner.load(tmp_path / "export").config["format"] == 1
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    with pytest.raises(UserError, match="is not an export"):
        export_checkpoint(checkpoint, other, data=str(tiny_data))


@pytest.mark.parametrize("number", [None, 0, 2, "1"])
def test_a_folder_of_another_format_is_refused_by_number(number, tiny_export, tmp_path):
    shutil.copytree(tiny_export, tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    del config["format"]
    if number is not None:
        config["format"] = number
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"format {number or 0!r}, this version reads 1; export"):
        Captioner.load(tmp_path / "export")


@pytest.mark.parametrize("name", ["encoder.pt", "decoder.pt", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "missing"])
def test_a_damaged_export_is_not_packed(name, damage, tiny_export, tmp_path):
    """An empty encoder.pt went into the archive."""
    export = tmp_path / "export"
    shutil.copytree(tiny_export, export)
    content = (export / name).read_bytes()
    (export / name).unlink()
    if damage != "missing":
        (export / name).write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        build_archive(export, tmp_path / "store/captioner.mar", "1.0")
    assert not list(tmp_path.glob("store/*"))


def test_the_archive_of_another_checkpoint_is_kept(tiny_export, tmp_path, capsys):
    """`make demo` replaced a user's captioner.mar."""
    mine = tmp_path / "mine"
    shutil.copytree(tiny_export, mine)
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(
        json.dumps({**config, "name": "mine", "checkpoint": "sha256:0"})
    )
    out, previous = (tmp_path / f"captioner{part}.mar" for part in ("", ".previous"))

    def checkpoint(archive: Path) -> str:
        with zipfile.ZipFile(archive) as opened:
            return str(json.loads(opened.read("config.json"))["checkpoint"])

    build_archive(mine, out, "1.0")
    assert capsys.readouterr().out == "" and not previous.exists()
    for version in ("1.0", "2.0"):
        build_archive(tiny_export, out, version)
        assert checkpoint(out) == config["checkpoint"] and checkpoint(previous) == "sha256:0"
    assert capsys.readouterr().out.count("captioner.previous.mar: the previous captioner.mar") == 1
    assert sorted(os.listdir(tmp_path)) == ["captioner.mar", "captioner.previous.mar", "mine"]


def test_an_archive_that_cannot_be_written_leaves_the_one_before(
    tiny_export, tmp_path, monkeypatch
):
    """captioner.mar had been renamed to captioner.previous.mar by then."""
    out = tmp_path / "captioner.mar"
    out.write_bytes(b"of somebody else")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("handler.files._write_out", fail)
    with pytest.raises(OSError, match="No space"):
        build_archive(tiny_export, out, "1.0")
    assert out.read_bytes() == b"of somebody else"


def test_a_file_under_the_name_of_the_archive_that_is_kept(tiny_export, tmp_path):
    """The second archive of another checkpoint replaced it."""
    out, previous = (tmp_path / f"captioner{part}.mar" for part in ("", ".previous"))
    for path in (out, previous):
        path.write_bytes(b"of somebody else")
    with pytest.raises(UserError, match="previous.mar: .*no archive of a captioner; move it"):
        build_archive(tiny_export, out, "1.0")
    assert set(contents(tmp_path)) == {out.name, previous.name}
    assert out.read_bytes() == previous.read_bytes() == b"of somebody else"
    previous.unlink()
    build_archive(tiny_export, out, "1.0")
    assert previous.read_bytes() == b"of somebody else"


@pytest.mark.parametrize("field", ["name", "checkpoint", "precision"])
def test_an_export_without_what_the_server_answers_is_not_packed(field, tiny_export, tmp_path):
    """It was a KeyError, or an archive whose every answer was an error."""
    shutil.copytree(tiny_export, tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    # Without its precision it would be a checkpoint's.
    config[field] = None
    (tmp_path / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: field '{field}' is missing; export the"):
        build_archive(tmp_path / "export", tmp_path / "captioner.mar", "1.0")
    assert not (tmp_path / "captioner.mar").exists()


def test_a_folder_with_an_archives_name_is_left_alone(tiny_export, tmp_path):
    """It was renamed, as if it were an older archive."""
    (tmp_path / "captioner.mar").mkdir()
    (tmp_path / "captioner.mar/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="captioner.mar: this is a folder"):
        build_archive(tiny_export, tmp_path / "captioner.mar", "1.0")
    assert contents(tmp_path) == {"captioner.mar/thesis.txt": b"x"}


@pytest.mark.parametrize(
    ("runs", "kept", "told"),
    [
        (["mine", "tiny", "tiny"], "sha256:1", 2),
        (["mine", "demo", "demo"], "sha256:0", 1),
        (["mine", "demo", "other"], "sha256:0", 1),
    ],
)
def test_every_archive_of_another_checkpoint_is_kept(
    runs, kept, told, tiny_export, tmp_path, capsys
):
    """The third training of a run replaced the archive of the second, and said nothing. What a demo
    made is replaced by the next archive, and not the one that is kept since before the demo."""
    config = json.loads((tiny_export / "config.json").read_text())
    out, previous = (tmp_path / f"captioner{part}.mar" for part in ("", ".previous"))
    for number, name in enumerate(runs):
        export = tmp_path / f"export{number}"
        shutil.copytree(tiny_export, export)
        changed = {**config, "name": name, "checkpoint": f"sha256:{number}"}
        (export / "config.json").write_text(json.dumps(changed))
        build_archive(export, out, "1.0")
    with zipfile.ZipFile(previous) as archive:
        assert json.loads(archive.read("config.json"))["checkpoint"] == kept
    assert capsys.readouterr().out.count("captioner.previous.mar") == told


# --- a full disk ---


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 20 KB, as if the disk were full."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_an_export_and_keeps_the_old_one(
    tiny_run, tiny_export, tiny_data, tmp_path, small_files
):
    """It ended in C++, without a line, and left a hidden folder."""
    with pytest.raises(OSError):
        export_checkpoint(
            tiny_run / "build/checkpoints/tiny", tmp_path / "export", data=str(tiny_data)
        )
    with pytest.raises(OSError):
        build_archive(tiny_export, tmp_path / "captioner.mar", "1.0")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_ends_training_and_keeps_the_old_run(config, tiny_data, old_run, small_files):
    before = contents(old_run)
    with pytest.raises(OSError):
        train(config, read_manifest(tiny_data), old_run, overwrite=True)
    assert contents(old_run) == before
    assert sorted(os.listdir(old_run.parent)) == ["run", "tiny.yaml"]


def test_a_full_disk_ends_a_checkpoint_and_keeps_the_old_one(tiny_run, tmp_path, small_files):
    """config.json was of the new weights, which did not fit, and the weights were the old ones."""
    model, config, tokenizer = load_model(tiny_run / "build/checkpoints/tiny")
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "run", copy_function=os.symlink)
    before = contents(tmp_path)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "run", model, tokenizer, config["preprocessing"], {}, {})
    assert contents(tmp_path) == before


def test_a_full_disk_ends_the_features_of_a_frozen_encoder(
    tiny_data, tmp_path, monkeypatch, small_files
):
    """The mapped file had no blocks to write to: the process died of SIGBUS, without a line, and
    left its hidden folders."""
    monkeypatch.chdir(tmp_path)
    stages = [{**ONE_STAGE[0], "encoder": "frozen", "views": 16, "augment": True}]
    config = config_of(Path("tiny.yaml"), data=str(tiny_data), stages=stages)
    with pytest.raises(OSError, match=r"File too large: 'build/features/.*\.partial'"):
        train(config, read_manifest(tiny_data), Path("run"))
    assert sorted(os.listdir()) == ["build", "tiny.yaml"] and not os.listdir("build/features")


# --- the demo ---


@pytest.fixture
def demo(config, tiny_data, monkeypatch) -> Path:
    """A run of the demo, which here has the tiny config."""
    monkeypatch.setattr("training.demo.load_config", lambda *_, **__: config)
    train(config, read_manifest(tiny_data), Path("build/checkpoints/demo"))
    return Path("build/checkpoints/demo")


def test_the_demo_replaces_what_a_demo_made(demo, tiny_data):
    assert is_of_demo(demo) and is_of_demo(Path("absent"))
    for name in ("config.json", WEIGHTS_FILE):
        (demo / name).unlink()
    assert is_of_demo(demo)  # interrupted before its first validation


def test_the_demo_removes_no_earlier_run_of_a_user(demo, config, tiny_data, monkeypatch):
    """It lies beside the demo, which it became by --overwrite, and the next one removes it."""
    other = config_of(Path("other.yaml"), data=str(tiny_data), stages=ONE_STAGE, seed=7)
    train(other, read_manifest(tiny_data), demo, overwrite=True)
    train(config, read_manifest(tiny_data), demo, overwrite=True)
    monkeypatch.setattr("sys.argv", ["training.demo"])
    with pytest.raises(UserError, match=f"{demo}.previous: was not made by this demo"):
        training_demo()


@pytest.mark.parametrize(
    "own", ["other config", "other data", "import", "stripped", "export", "thesis", "file"]
)
def test_the_demo_replaces_nothing_else(own, demo, config, tiny_data, tmp_path, monkeypatch):
    """A run, an import or an export that a user called `demo` was replaced by the second demo."""
    place = demo
    training = {"imported_from": "x"}
    if own == "other data":
        shutil.copytree(tiny_data, "mine")
        train(
            dataclasses.replace(config, data="mine"),
            read_manifest(Path("mine")),
            demo,
            overwrite=True,
        )
    if own in ("other config", "stripped", "export"):
        config = config_of(Path("other.yaml"), data=str(tiny_data), stages=ONE_STAGE, seed=7)
        train(config, read_manifest(tiny_data), demo, overwrite=True)
        training = json.loads((demo / "config.json").read_text())["training"]
    if own == "export":
        place = Path("build/export/demo")
        demo.rename("build/checkpoints/mine")
    if own not in ("other config", "other data", "export"):
        shutil.rmtree(demo)
    if own == "file":
        demo.write_text("x")
    elif own == "thesis":
        demo.mkdir()
        (demo / "thesis.txt").write_text("x")
    elif own not in ("other config", "other data"):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"training": training}))
    monkeypatch.setattr("sys.argv", ["training.demo"])
    with pytest.raises(UserError, match=f"{place}: was not made by this demo; rename or remove"):
        training_demo()


# --- names of runs ---


@pytest.mark.parametrize(
    ("variables", "run"),
    [
        ([], "scenes"),
        (["DATA=scenes"], "scenes"),
        (["CONFIG=flickr8k_full", "DATA=flickr8k"], "flickr8k_full"),
        (["DATA=folder"], "folder"),
        (["CONFIG=flickr8k", "DATA=../my photos/pets/"], "pets"),
        (["DATA=folder", "RUN=mine"], "mine"),
        (["MODEL=Salesforce/blip-image-captioning-base"], "blip-image-captioning-base"),
    ],
)
def test_a_line_of_targets_agrees_on_the_name_of_the_run(variables, run):
    said = make_targets("train", "export", "mar", *variables)
    assert f"--run '{run}'" in said
    assert f"--checkpoint 'build/checkpoints/{run}' --out 'build/export/{run}'" in said
    assert f"--export 'build/export/{run}'" in said


@pytest.mark.parametrize(
    ("content", "data", "run"),
    [
        ("data: 'pets'  # mine", "pets", "own"),
        ('data: "pets"', "other", "other"),
        ("data: FOLDER", None, "own"),
        ("data: FOLDER", "FOLDER", "own"),
        ("name: pet names\ndata: pets", None, "pet names"),
    ],
)
@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_make_and_the_program_name_a_run_alike(
    content, data, run, suffix, tiny_data, tmp_path, monkeypatch
):
    """A config whose `data` was quoted, had a comment or was a folder gave two names."""
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tiny_data)
    for name in ("pets", "other"):
        folder = Path("build/data") / name
        write_manifest(folder, name, manifest.rows, manifest.image_root, [])
    content, data = (
        text and text.replace("FOLDER", f"{tmp_path}/build/data/pets") for text in (content, data)
    )
    path = tmp_path / f"own.{suffix}"
    fields = yaml.safe_dump({name: value for name, value in TINY.items() if name != "data"})
    path.write_text(f"{content}\n{fields}")
    variables = [f"CONFIG={path}", *([f"DATA={data}"] if data else [])]
    assert f"--run '{run}'" in make_targets("train", *variables)
    trained = []
    monkeypatch.setattr("training.train.train", lambda *given: trained.append(given[2].name))
    monkeypatch.setattr("training.train.keep_freed_memory", lambda: None)
    arguments = ["--config", str(path), *(["--data", data] if data else [])]
    monkeypatch.setattr("sys.argv", ["training.train", *arguments])
    training_main()
    assert trained == [run]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        # It trained a new toy into `good`.
        (["train", "CHECKPOINT=build/checkpoints/good", "DATA=mine"],
         "make train takes no CHECKPOINT=; RUN=NAME names what it trains"),
        (["import", "CHECKPOINT=build/checkpoints/good", "MODEL=a/b"],
         "make import takes no CHECKPOINT=; RUN=NAME names what it writes"),
        (["import"],
         "make import needs MODEL=NAME_OR_DIR: a name on the Hugging Face Hub, or a folder"),
    ],
)  # fmt: skip
def test_a_target_without_its_variable_or_with_anothers_is_refused(arguments, error):
    done = subprocess.run(
        ["make", "-o", "setup", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line == f"error: {error}"


@pytest.mark.parametrize(
    ("variables", "run"),
    [
        (["MODEL=Salesforce/blip-image-captioning-base"], "blip-image-captioning-base"),
        (["MODEL=../my models/git's/"], "git'\\''s"),
        (["MODEL=a/b", "RUN=mine"], "mine"),
        (["MODEL=a/b", "DATA=pets", "CONFIG=flickr8k"], "b"),
    ],
)
def test_a_model_that_is_imported_names_the_run_of_the_whole_line(variables, run):
    said = make_targets("import", "export", "mar", "evaluate", "serve", *variables)
    model = variables[0].removeprefix("MODEL=").replace("'", "'\\''")
    assert re.findall(r"python -m (\S+)", said) == [
        *("training.import_huggingface", "export.export", "export.archive"),
        *("training.evaluate", "handler.serve"),
    ]
    assert f"training.import_huggingface '{model}' --out 'build/checkpoints/{run}'" in said
    assert f"--checkpoint 'build/checkpoints/{run}' --out 'build/export/{run}'" in said
    assert f"--export 'build/export/{run}'" in said
    assert re.search(f"evaluate +--checkpoint 'build/checkpoints/{re.escape(run)}'", said)
