"""Encoders of timm and torchvision with random weights: ours must say the same."""

import pytest
import timm
import torch
from torchvision import models

from handler.errors import UserError
from training.checkpoint import load_captioner
from training.weights.encoders import load_encoder


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2"]
)
@torch.inference_mode()
def test_timm_parity(name, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    if not isinstance(theirs, timm.models.vision_transformer.VisionTransformer):
        pytest.skip(f"{name} is another class in this timm")
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load_encoder(f"timm/{name}", tmp_path / "weights.pth").encoder.eval()
    size = ours.config.image_size
    images = torch.randn(1, 3, size, size)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_torchvision_parity(tmp_path):
    torch.manual_seed(0)
    theirs = models.vit_b_16().eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load_encoder("torchvision/vit_b_16", tmp_path / "weights.pth").encoder.eval()
    images = torch.randn(1, 3, 224, 224)
    x = theirs._process_input(images)
    expected = theirs.encoder(torch.cat([theirs.class_token, x], dim=1))
    torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_an_earlier_captioners_encoder(tiny_run):
    folder = tiny_run / "build/checkpoints/tiny"
    captioner = load_captioner(folder)
    found = load_encoder(f"checkpoint/{folder}")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.encoder.eval()(images), captioner.encoder(images))
    assert (found.mean, found.std) == (captioner.preprocessing.mean, captioner.preprocessing.std)
    larger = load_encoder(f"checkpoint/{folder}", image_size=48).encoder
    assert larger(torch.randn(1, 3, 48, 48)).size(1) == larger.config.memory_tokens
    with pytest.raises(UserError, match="leave"):
        load_encoder(f"checkpoint/{folder}", folder / "model.safetensors")


def test_a_parameter_too_many_is_named(tmp_path):
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.save({**state, "surplus": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match="surplus"):
        load_encoder("timm/vit_tiny_patch16_224", tmp_path / "more.pth")
    del state["norm.bias"]
    torch.save(state, tmp_path / "fewer.pth")
    with pytest.raises(UserError, match=r"norm\.bias"):
        load_encoder("timm/vit_tiny_patch16_224", tmp_path / "fewer.pth")


@pytest.mark.parametrize(
    "name", ["timm/no_such_model", "torchvision/resnet18", "vit_b_16", "checkpoint/none"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=r"encoder\.pretrained|none: no config\.json"):
        load_encoder(name)
