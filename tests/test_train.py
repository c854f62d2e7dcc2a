"""The training loop from outside: what it writes, how it resumes, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, run_program
from PIL import Image
from safetensors.torch import load_file
from tiny_training import config_of, train_killed

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError, run_command
from handler.image_preprocess import PreprocessConfig, resize, to_tensor
from training.checkpoint import load_captioner, load_model
from training.config import Stage, load_config
from training.data.captions import mirrored, pack_captions
from training.data.features import FeatureCache, FrozenEncoder
from training.data.manifest import read_manifest
from training.data.photos import Augment, epoch_order
from training.loop.distributed import Processes, processes_for, threads_of_all
from training.loop.optimizer import learning_rate, set_checkpointing
from training.loop.train import train
from training.model import CaptioningModel, DecoderConfig, EncoderConfig
from training.train import main


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


# Every kind of stage, two steps an epoch.
STAGES = [
    {"name": "whole", "epochs": 1, "batch_photos": 8, "augment": True, "flip": True,
     "encoder_layer_decay": 0.8, "gradient_checkpointing": True},
    {"name": "frozen", "encoder": "frozen", "epochs": 1, "batch_photos": 8, "views": 2,
     "flip": True, "optimizer": "muon"},
    {"name": "rewarded", "encoder": "frozen", "epochs": 1, "batch_photos": 8, "decoder_lr": 1e-4,
     "optimizer": "muon", "self_critical": {"samples": 3, "baseline": "greedy"}},
    {"name": "rewarded whole", "epochs": 1, "batch_photos": 4, "accumulate": 2, "flip": True,
     "self_critical": {"samples": 3, "cross_entropy": 0.5}, "logit_adjustment": 0.2},
]  # fmt: skip


def distilled(tiny_run: Path, epochs: int) -> dict[str, Any]:
    """One more kind, taught by the tiny captioner."""
    teacher = str(tiny_run / "build/checkpoints/tiny")
    return {
        "name": "distilled", "epochs": epochs, "batch_photos": 8, "augment": True, "flip": True,
        "distillation": {"teachers": [teacher], "temperature": 2.0},
    }  # fmt: skip


def test_every_kind_of_stage_resumes_exactly(tiny_run, tiny_data, tmp_path, monkeypatch):
    """Killed again and again, after every fourth saved state, in the middle of epochs too; compared
    with a run that was left alone."""
    manifest = read_manifest(tiny_data)
    every = [*STAGES, distilled(tiny_run, epochs=2)]
    config = config_of(tmp_path / "tiny.yaml", stages=every)
    monkeypatch.chdir(tmp_path)
    train(config, manifest, Path("left-alone"), None, resume=False)

    assert train_killed(config, manifest, Path("killed"), 4, monkeypatch) == 6
    whole, killed = (
        torch.load(f"{name}/train_state.pt", weights_only=True) for name in ("left-alone", "killed")
    )
    for part in ("model", "average"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, killed[part][name]), name
    logs = [
        [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("left-alone", "killed")
    ]
    for line in sum(logs, []):
        line.pop("photos_per_second", None)
        line.pop("seconds", None)
    assert logs[0] == logs[1]
    for stage, figure in (("rewarded", "reward"), ("distilled", "divergence")):
        lines = [line for line in logs[0] if line["stage"] == stage]
        assert {figure in line for line in lines} == {True, False}
    stages = [
        json.loads(Path(name, "config.json").read_text())["training"]["stages"]
        for name in ("left-alone", "killed")
    ]
    assert [{**s, "minutes": 0} for s in stages[0]] == [{**s, "minutes": 0} for s in stages[1]]
    assert [s["name"] for s in stages[0]] == [s["name"] for s in every]
    assert [s["CIDEr_before"] for s in stages[0]] == [
        None,
        *(s["CIDEr_after"] for s in stages[0][:-1]),
    ]


def test_a_finished_run_may_get_further_stages(tiny_run, tiny_data, tmp_path, monkeypatch):
    """Its earlier stages must be as they were."""
    shutil.copytree(tiny_run / "build/checkpoints/tiny", tmp_path / "longer")
    more = [*TINY["stages"], {**STAGES[2], "name": "more"}]
    data = str(tiny_data)
    config = config_of(tmp_path / "longer.yaml", data=data, stages=more)
    other = [more[0], {**more[1], "flip": False}, more[2]]
    changed = config_of(tmp_path / "x.yaml", data=data, stages=other)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="field 'stages' of the config has changed"):
        train(changed, read_manifest(tiny_data), Path("longer"), None, resume=True)
    train(config, read_manifest(tiny_data), Path("longer"), None, resume=True)
    training = json.loads(Path("longer/config.json").read_text())["training"]
    assert [stage["name"] for stage in training["stages"]] == ["scratch", "frozen", "more"]
    state = torch.load("longer/train_state.pt", weights_only=True)
    for saved in state["config"]["stages"]:  # as before the field was added
        del saved["logit_adjustment"]
    torch.save(state, "longer/train_state.pt")
    train(config, read_manifest(tiny_data), Path("longer"), None, resume=True)
    del state["best_before"]  # as an earlier version wrote it
    torch.save(state, "longer/train_state.pt")
    with pytest.raises(
        UserError, match="field 'best_before' is missing; train again with --overwrite"
    ):
        train(config, read_manifest(tiny_data), Path("longer"), None, resume=True)


def test_several_processes_make_the_steps_of_one(tiny_run, tiny_data, tmp_path):
    """Two: the same weights but for the order in which floats are added. Biases of attention keys
    are left out: they change nothing (softmax does not see them), so their gradient is rounding
    alone, which Adam blows up to steps of full size."""
    still = {**TINY["decoder"], "dropout": 0.0}
    stages = [*(STAGES[n] for n in (0, 1, 3)), distilled(tiny_run, epochs=1)]
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "decoder": still, "stages": stages, "precision": "fp32"})
    )
    command = ["--config", "tiny.yaml", "--data", str(tiny_data), "--run"]
    one = run_program("training.train", *command, "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = run_program("training.train", *command, "two", "--processes", "2", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    folders = [tmp_path / "build/checkpoints" / name for name in ("one", "two")]
    # Only the first process writes: as many lines as from one.
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert [(line["stage"], line["step"]) for line in logs[0]] == [
        (line["stage"], line["step"]) for line in logs[1]
    ]
    for mine, theirs in zip(*logs, strict=True):
        assert mine.get("loss") == pytest.approx(theirs.get("loss"), abs=2e-4)
    assert two.stdout.count("best validation loss") == 1
    states = [torch.load(folder / "train_state.pt", weights_only=True) for folder in folders]
    for name, tensor in states[0]["model"].items():
        other = states[1]["model"][name]
        if name.endswith("qkv.bias"):
            width = len(tensor) // 3
            tensor[width : 2 * width] = other[width : 2 * width] = 0
        elif name.endswith("cross_attention.kv.bias"):
            tensor[: len(tensor) // 2] = other[: len(tensor) // 2] = 0
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_processes_end_with_the_first(tiny_data, tmp_path):
    """What the first refuses is one line, and nobody waits for it."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "build/checkpoints/run").mkdir(parents=True)
    (tmp_path / "build/checkpoints/run/thesis.txt").write_text("mine")
    command = ["--config", "tiny.yaml", "--data", str(tiny_data), "--run", "run"]
    done = run_program("training.train", *command, "--processes", "2", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr


def test_a_process_that_ends_before_it_has_joined_is_named(tiny_data, tmp_path):
    """The first one waited six hours for it."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    # Every process but the first dies as soon as it has read its program.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK', '0') != '0':\n    print('no memory', flush=True)\n"
        "    os._exit(1)\n"
    )
    command = ["--config", "tiny.yaml", "--data", str(tiny_data), "--run", "run"]
    places = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = run_program(
        "training.train", *command, "--processes", "2", cwd=tmp_path, PYTHONPATH=places
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("error: process 1 of 2 ended with status 1: no memory\n")
    assert not (tmp_path / "build/checkpoints/run").exists()


def test_processes_end_whose_first_was_killed_before_it_had_joined(tiny_data, tmp_path):
    """They waited six hours for it."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-W", "ignore", "-m", "training.train", "--config", "tiny.yaml"]
    first = subprocess.Popen(
        [*command, "--data", str(tiny_data), "--processes", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (others := psutil.Process(first.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    _, alive = psutil.wait_procs(others, timeout=60)
    for other in alive:
        other.kill()
    assert others and not alive


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert [processes_for(cuda, "auto", n) for n in (1, 2, 3)] == [1, 2, 2]
    assert [processes_for(cuda, "cuda:0", n) for n in (1, 3)] == [1, 1]
    assert processes_for(cpu, "auto", 3) == 3


def test_more_processes_than_photos_replace_no_run(tiny_run, tiny_data, tmp_path):
    """A run of this name had been renamed, and the one before it removed."""
    shutil.copytree(tiny_run / "build", tmp_path / "build")
    stages = [{**TINY["stages"][0], "batch_photos": 2}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "stages": stages}))
    before = (tmp_path / "build/checkpoints/tiny/train_state.pt").read_bytes()
    command = ["--data", str(tiny_data), "--run", "tiny", "--overwrite", "--processes", "3"]
    command += ["--from", "start", "--config", "tiny.yaml"]
    (tmp_path / "build/checkpoints/tiny").rename(tmp_path / "start")
    shutil.copytree(tmp_path / "start", tmp_path / "build/checkpoints/tiny")
    done = run_program("training.train", *command, cwd=tmp_path)
    assert done.returncode == 2
    assert "3 processes for a batch of 2 photos" in done.stderr, done.stderr
    assert (tmp_path / "build/checkpoints/tiny/train_state.pt").read_bytes() == before
    assert [p.name for p in (tmp_path / "build/checkpoints").iterdir()] == ["tiny"]


def test_a_run_goes_on_without_its_log_and_with_a_moved_dataset(
    tiny_run, tiny_data, tmp_path, monkeypatch, capsys
):
    """Each was a traceback, or a demand for a folder that is no more."""
    monkeypatch.chdir(tmp_path)
    first = {**TINY["stages"][0], "epochs": 1}
    shutil.copytree(tiny_data, "data")
    config = config_of(Path("tiny.yaml"), stages=[first], data="data")
    train(config, read_manifest(Path("data")), Path("run"), None)
    second = {**first, "name": "more"}
    config = config_of(Path("tiny.yaml"), stages=[first, second], data="moved")
    Path("data").rename("moved")
    Path("run/metrics.jsonl").unlink()
    state = torch.load("run/train_state.pt", weights_only=True)
    state["machine"]["processes"] = 3
    torch.save(state, "run/train_state.pt")
    train(config, read_manifest(Path("moved")), Path("run"), None, resume=True)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"more"}
    assert "resumed with processes 1, but begun with 3" in capsys.readouterr().out


def test_layers_further_down_learn_more_slowly():
    stage = Stage("x", 1, encoder_lr=1.0, decoder_lr=3.0, encoder_layer_decay=0.5)
    rates = {
        "encoder.norm.weight": 1.0,
        "encoder.blocks.11.mlp.up.weight": 0.5,
        "encoder.blocks.0.norm1.bias": 0.5**12,
        "encoder.patch_embed.weight": 0.5**13,
        "encoder.positions": 0.5**13,
        "decoder.blocks.0.mlp.up.weight": 3.0,
        # GIT's and Florence-2's, behind the blocks, had the rate of the lowest layer.
        "encoder.projection.0.weight": 1.0,
        "encoder.grid_positions": 1.0,
    }
    assert {name: learning_rate(name, stage, 12) for name in rates} == rates
    entries = {"encoder.entries.0.conv.weight": 0.5**13, "encoder.entries.3.conv.bias": 0.5**2}
    assert {name: learning_rate(name, stage, 12, (1, 1, 9, 1)) for name in entries} == entries


@pytest.mark.parametrize(
    "family",
    [{}, {"norm": "post", "embedding_norm": True}, {"norm": "post", "memory": "prefix"}],
    ids=["GPT-2", "BERT", "GIT"],
)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(family):
    model = CaptioningModel(
        EncoderConfig(32, 3, 2, 64, image_size=32, patch_size=8),
        DecoderConfig(50, 12, 32, 2, 2, 64, 32, dropout=0.2, **family),
    )
    images, tokens = torch.randn(4, 3, 32, 32), torch.randint(50, (4, 10))
    positions, mask = torch.arange(10).expand(4, -1), torch.ones(4, 10, 10, dtype=torch.bool).tril()

    def gradients(on: bool) -> tuple[list[torch.Tensor], int]:
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        set_checkpointing(model, on)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(images, tokens, positions, mask).logsumexp(-1).sum()
        model.zero_grad()
        total.backward()
        return [parameter.grad.clone() for parameter in model.parameters()], kept

    (plain, all_kept), (saving, some_kept) = gradients(False), gradients(True)
    assert some_kept < all_kept / 2
    for one, other in zip(plain, saving, strict=True):
        torch.testing.assert_close(one, other)
    set_checkpointing(model, False)
    assert "forward" not in vars(model.encoder.blocks[0])


def test_faults_are_one_line_and_status_2(tiny_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**TINY, "stages": [{"name": "x"}]}))
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({**TINY, "decodr": {}}))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--config", "nothing"], "no such config"),
        (["--config", "wrong.yaml"], "epochs: missing"),
        (["--config", "typo.yaml"], "decodr: unknown field"),
        (["--config", "tiny.yaml", "--data", "nowhere"], "nowhere"),
        (["--config", "tiny.yaml", "--data", str(tiny_data), "--resume"], "nothing to resume"),
        (["--config", "tiny.yaml", "--data", str(tiny_data), "--encoder-weights", "x"], "scratch"),
        (["--wrong-option"], "--wrong-option"),
    ):
        monkeypatch.setattr("sys.argv", ["training.train", *arguments])
        with pytest.raises(SystemExit) as end:
            run_command(main)
        error = capsys.readouterr().err
        assert end.value.code == 2, (arguments, error)
        assert words in error and error.count("\n") == 1, error


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
    one_shard = torch.zeros(70, dtype=torch.long)
    order = epoch_order(one_shard, 32, seed=1, epoch=0)
    assert sorted(sum(order, [])) == list(range(70)) and [len(b) for b in order] == [32, 38]
    assert order == epoch_order(one_shard, 32, seed=1, epoch=0)
    assert order != epoch_order(one_shard, 32, seed=1, epoch=1)


def test_processes_share_each_batch():
    batches = [[1, 2, 3, 4, 5], [6, 7, 8]]
    shares = [Processes(rank, 3).share(batches) for rank in range(3)]
    assert shares == [[[1, 4], [6]], [[2, 5], [7]], [[3], [8]]]
    with pytest.raises(UserError, match="4 processes for a batch of 3 photos"):
        Processes(0, 4).share(batches)


def test_the_first_process_computes_in_all_threads_while_the_others_wait(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert Processes().one_first(torch.get_num_threads) == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert Processes().one_first(torch.get_num_threads) == 2
        with pytest.raises(ZeroDivisionError), threads_of_all():
            print(torch.get_num_threads() / 0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_two_runs_make_the_same_features_once(tiny_data, tmp_path):
    manifest = read_manifest(tiny_data)
    rows = manifest.split("train")
    preprocessing = PreprocessConfig(image_size=8)
    encoded = []

    def encode(images):
        encoded.append(len(images))
        return images.flatten(1).unsqueeze(1)

    def make(_):
        augment = Augment(preprocessing, augment=True, flip=True)
        encoder = FrozenEncoder("encoder", encode, (1, 192))
        return FeatureCache(tmp_path, encoder, manifest, rows, 2, augment, seed=0, workers=0)

    with ThreadPoolExecutor() as runs:
        first, second = runs.map(make, range(2))
    assert sum(encoded) == 2 * len(rows)
    assert torch.equal(first.memory, second.memory) and first.memory.any()
    assert [path.suffix for path in tmp_path.iterdir()] == [".bf16"]


def test_an_augmented_photo_is_cut_as_every_other():
    """It was made as small as the cut, of which the middle was then blown up again."""
    preprocessing = PreprocessConfig(image_size=8, resize_to=12)
    augment = Augment(preprocessing, augment=True, flip=False)
    whole = augment.transform.transforms[0]
    whole.scale = whole.ratio = (1.0, 1.0)
    augment.transform = whole
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    cut = to_tensor(resize(photo, preprocessing), preprocessing)
    torch.testing.assert_close(augment(photo, seed=0)[0], cut)


def test_mirrored_captions_swap_sides_and_nothing_else():
    assert mirrored("Left of a right leftover") == "right of a left leftover"
    assert mirrored("r\u0131ght of a left one") == "r\u0131ght of a right one"


@pytest.mark.parametrize(
    "name", ["scenes", "scenes_full", "flickr8k", "flickr8k_full", "coco", "coco_large"]
)
def test_presets_are_valid(name):
    assert load_config(name).name == name
