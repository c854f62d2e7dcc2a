"""The training loop from outside: what it writes, how it resumes, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, run_program
from safetensors.torch import load_file

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError
from training.checkpoint import load_captioner, load_model
from training.config import load_config
from training.dataset import epoch_order, mirrored, pack_captions


def test_a_run_leaves_a_whole_checkpoint(tiny_run, tiny_data):
    folder = tiny_run / "build/checkpoints/tiny"
    config = json.loads((folder / "config.json").read_text())
    assert {"model", "preprocessing", "training", "tokenizer", "decoding"} <= set(config)
    captioner = load_captioner(folder)
    photo = (tiny_data / "images/16.png").read_bytes()
    caption = captioner.caption([photo])[0][0]
    assert caption.text == " ".join(caption.tokens)
    assert len(caption.token_log_probs) in (len(caption.ids), len(caption.ids) + 1)
    assert caption.log_prob == pytest.approx(sum(caption.token_log_probs))
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("val" in line for line in log) and any("loss" in line for line in log)


def test_a_killed_run_ends_with_the_same_weights(tiny_run, tiny_data, tmp_path):
    """Killed after its first epoch, resumed, and compared with the uninterrupted run's state."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["training.train", "--config", "tiny.yaml", "--data", str(tiny_data)]
    state = tmp_path / "build/checkpoints/tiny/train_state.pt"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = torch.load(state, weights_only=True)
    assert (stopped["stage"], stopped["epoch"]) != (1, 2), "it was killed too late to show anything"
    done = run_program(*command, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = torch.load(tiny_run / "build/checkpoints/tiny/train_state.pt", weights_only=True)
    resumed = torch.load(state, weights_only=True)
    for part in ("model", "average"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), name
    best = load_file(tiny_run / "build/checkpoints/tiny/model.safetensors")
    again = load_file(tmp_path / "build/checkpoints/tiny/model.safetensors")
    assert all(torch.equal(best[name], again[name]) for name in best)


def test_faults_are_one_line_and_status_2(tiny_data, tmp_path):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**TINY, "stages": [{"name": "x"}]}))
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**TINY, "decodr": {}}))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    for arguments, words in (
        (["--config", "nothing"], "no such config"),
        (["--config", "wrong.yaml"], "epochs: missing"),
        (["--config", "typo.yaml"], "decodr: unknown field"),
        (["--config", "tiny.yaml", "--data", "nowhere"], "nowhere"),
        (["--config", "tiny.yaml", "--data", str(tiny_data), "--resume"], "nothing to resume"),
        (["--config", "tiny.yaml", "--data", str(tiny_data), "--encoder-weights", "x"], "scratch"),
        (["--wrong-option"], "--wrong-option"),
    ):
        done = run_program("training.train", *arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_damaged_checkpoints_are_refused_by_file(tiny_run, tmp_path):
    source = tiny_run / "build/checkpoints/tiny"
    for name, damage in (
        ("model.safetensors", b"x" * 99),
        ("config.json", b"{"),
        ("tokenizer.json", b""),
    ):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (folder / name).write_bytes(damage)
        with pytest.raises(UserError, match=name):
            load_model(folder)


def test_packing_keeps_captions_apart():
    tokenizer = CaptionTokenizer.train(["a b c d"], "word", 100, 1)
    begin, end = tokenizer.begin_id, tokenizer.end_id
    tokens, positions, targets, mask = pack_captions([[[4, 5], [6]], [[7, 4, 5, 6]]], tokenizer, 4)
    assert tokens.tolist() == [[begin, 4, 5, begin, 6], [begin, 7, 4, 5, tokenizer.pad_id]]
    assert targets.tolist() == [[4, 5, end, 6, end], [7, 4, 5, 6, -100]]  # cut: no end to learn
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert mask[0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]
    ]  # fmt: skip
    assert mask.any(-1).all()


def test_every_photo_is_seen_once_an_epoch():
    order = epoch_order(70, 32, seed=1, epoch=0)
    assert sorted(sum(order, [])) == list(range(70)) and [len(b) for b in order] == [32, 38]
    assert order == epoch_order(70, 32, seed=1, epoch=0) != epoch_order(70, 32, seed=1, epoch=1)


def test_mirrored_captions_swap_sides_and_nothing_else():
    assert mirrored("Left of a right leftover") == "right of a left leftover"


@pytest.mark.parametrize("name", ["scenes", "scenes_full", "flickr8k"])
def test_presets_are_valid(name):
    assert load_config(name).name == name
