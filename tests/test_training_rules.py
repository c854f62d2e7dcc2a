"""What training promises of rates, averages and patience; a change of any was seen by no test."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import config_of

from handler.errors import UserError
from training.config import Stage
from training.data.manifest import read_manifest
from training.loop.distributed import Processes
from training.loop.muon import Muon, orthogonalised
from training.loop.optimizer import Optimizer, learning_rate_factor, update_average
from training.loop.train import train
from training.model import CaptioningModel, DecoderConfig, EncoderConfig


def tiny_model() -> CaptioningModel:
    encoder = EncoderConfig(width=8, layers=1, heads=2, mlp_width=16, image_size=16, patch_size=8)
    decoder = DecoderConfig(
        vocab_size=7, max_positions=5, width=8, layers=1, heads=2, mlp_width=16, memory_width=8
    )
    return CaptioningModel(encoder, decoder)


def test_the_average_of_the_weights_follows_slowly():
    """A copy of the newest weights in its place passed every test."""
    average, model = tiny_model(), tiny_model()
    names = [name for name, _ in model.named_parameters()]
    expected = {name: p.detach().clone() for name, p in average.named_parameters()}
    for step in range(1, 60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        update_average(average, model, 0.9, step)
        # Short-sighted at first, so that the random beginning is soon forgotten.
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    averaged = dict(average.named_parameters())
    for name in names:
        assert torch.allclose(averaged[name], expected[name], atol=1e-4), name
    newest = dict(model.named_parameters())
    assert not any(torch.allclose(averaged[name], newest[name], atol=0.1) for name in names)


def test_the_checkpoint_holds_the_averaged_weights(tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = [{"name": "a", "epochs": 1, "batch_photos": 4, "ema": 0.9}]
    config = config_of(Path("c.yaml"), data=str(tiny_data), stages=stages)
    train(config, read_manifest(tiny_data), Path("run"))
    state = torch.load("run/train_state.pt", weights_only=True)
    saved = load_file("run/model.safetensors")
    differs = 0
    for name, tensor in saved.items():
        assert torch.equal(tensor, state["average"][name]), name
        differs += not torch.equal(tensor, state["model"][name])
    assert differs > 10


def test_the_rate_rises_and_then_falls_as_half_a_cosine():
    steps, warmup = 200, 0.1
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    expected = [0.5 * (1 + math.cos(math.pi * (step - 20) / 180)) for step in range(20, steps)]
    assert factors[20:] == pytest.approx(expected)
    assert factors[-1] < 1e-3


def test_the_rates_of_a_run_are_those_of_the_schedule(tiny_data, tmp_path, monkeypatch):
    """A constant rate passed every test."""
    monkeypatch.chdir(tmp_path)
    stages = [{"name": "a", "epochs": 3, "batch_photos": 4, "decoder_lr": 1e-3, "warmup": 0.25}]
    config = config_of(Path("c.yaml"), data=str(tiny_data), stages=stages)
    train(config, read_manifest(tiny_data), Path("run"))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([1e-3 * learning_rate_factor(s, 12, 0.25) for s in range(12)])
    # AdamW moves a weight by about the rate of its group: those of the optimizer are these.
    state = torch.load("run/train_state.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    last = learning_rate_factor(11, 12, 0.25)
    assert groups and all(g["lr"] == pytest.approx(last * g["base_lr"]) for g in groups)


def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest():
    """Muon's update is a matrix whose singular values are about equal, with the size of AdamW's."""
    encoder = EncoderConfig(32, 2, 2, 64, image_size=32, patch_size=8)
    model = CaptioningModel(encoder, DecoderConfig(50, 12, 32, 2, 2, 64, 32))
    stage = Stage("x", 1, optimizer="muon", decoder_lr=1e-2, encoder_lr=1e-2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, stage, Processes())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * torch.rand(parameter.shape[-1])
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    optimizer.step()
    steps = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    matrices = {n for n, step in steps.items() if step.ndim == 2 and ".blocks." in n}
    assert "decoder.blocks.1.mlp.up.weight" in matrices and len(matrices) == 2 * 4 + 2 * 7
    for name, step in steps.items():
        if name in matrices:
            singular = torch.linalg.svdvals(step)
            assert singular.quantile(0.1) > 0.4 * singular.max(), name
            assert 1e-3 < step.square().mean().sqrt() < 4e-3, name
        else:  # the first step of AdamW: the rate, whatever the gradient
            assert step.abs().max() == pytest.approx(1e-2, rel=1e-3), name


def test_muon_is_torchs():
    """Step by step; torch orthogonalises in bfloat16."""
    shapes = [(24, 96), (24, 96), (96, 24), (24, 24), (72, 24)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [
        Muon([{"params": ours, **options}], Processes()),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options),
    ]
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in ours]
        for our, their in zip(ours, theirs, strict=True):
            their.data.copy_(our.data)
            our.grad = torch.randn(our.shape) * torch.logspace(0, -2, our.size(1))
            their.grad = our.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for our, their, old in zip(ours, theirs, before, strict=True):
            assert (our - their).norm() < 0.02 * (our - old).norm()


def test_orthogonalising_is_the_quintic_iteration():
    """As it is written in the paper, in float64, for singular values from 1 to 1e-6."""
    x_kmn = torch.randn(3, 20, 50, dtype=torch.float64)
    u_kmm, _, v_kmn = torch.linalg.svd(x_kmn, full_matrices=False)
    x_kmn = u_kmm * torch.logspace(0, -6, 20, dtype=torch.float64) @ v_kmn
    expected = x_kmn / x_kmn.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        square = expected @ expected.mT
        change = -4.775 * square + 2.0315 * square @ square
        expected = 3.4445 * expected + change @ expected
    for x, y in ((x_kmn, expected), (x_kmn.mT, expected.mT)):
        assert torch.allclose(orthogonalised(x.float()), y.float(), atol=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_data, tmp_path, monkeypatch):
    """The loss may be finite beside it. The weights became NaN, and a save kept them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "training.loop.stage.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(math.inf)
    )
    steps: list[int] = []
    monkeypatch.setattr(Optimizer, "step", lambda _: steps.append(1))
    stages = [{"name": "a", "epochs": 1, "batch_photos": 8}]
    config = config_of(Path("c.yaml"), data=str(tiny_data), stages=stages)
    with pytest.raises(UserError, match="the gradient's norm is inf at step 0 of stage 'a'"):
        train(config, read_manifest(tiny_data), Path("run"))
    assert not steps


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (2, 3), (3, 4)])
def test_training_stops_after_its_patience(patience, epochs, tiny_data, tmp_path, monkeypatch):
    """Patience that never stopped, or at once, passed every test: validations get worse from the
    first on, and equal ones are no better."""
    monkeypatch.chdir(tmp_path)
    figures = iter([0.5, 0.4, 0.5, 0.3, 0.2, 0.1])
    monkeypatch.setattr("training.loop.validation.LEAST_PHOTOS_FOR_CIDER", 1)
    monkeypatch.setattr(
        "training.loop.validation.score",
        lambda *_, **__: {"BLEU-4": 0.0, "CIDEr": next(figures)},
    )
    stages = [{"name": "a", "epochs": 6, "batch_photos": 8}]
    validation = {"num_beams": 1, "patience": patience}
    config = config_of(Path("c.yaml"), data=str(tiny_data), stages=stages, validation=validation)
    train(config, read_manifest(tiny_data), Path("run"))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert sum("val" in line for line in lines) == epochs


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_kept_memory_is_released_before_a_fork():
    code = """
import psutil, torch
from training.loop.allocator import keep_freed_memory, release_freed_memory
keep_freed_memory()
blocks = [torch.ones(5_000_000) for _ in range(10)]
end = torch.ones(10)  # nothing before it can be returned by a lower end of the heap
del blocks
sizes = [psutil.Process().memory_info().rss]
release_freed_memory()
sizes.append(psutil.Process().memory_info().rss)
print(sizes[0] - sizes[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150_000_000
