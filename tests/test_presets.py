"""The presets that no test machine can train: that their models build, from a hub's cache, and
step."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.fx.experimental._config
import yaml
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from handler.caption_tokenizer import CaptionTokenizer
from handler.errors import UserError
from training.checkpoint import load_captioner
from training.config import CONFIGS, TrainConfig, load_config
from training.data.captions import Captions
from training.data.manifest import Row, read_manifest
from training.loop.distributed import Processes
from training.loop.optimizer import Optimizer, set_checkpointing
from training.loop.start import make_model
from training.loop.train import train
from training.model import CaptioningModel
from training.objectives.cross_entropy import CrossEntropyLoss
from training.objectives.objective import Objective

PRESETS = {  # encoder's parameters in millions, patches
    "coco": (85.8, 14**2),
    "coco_large": (303.5, 24**2),
}
CAPTIONS = ("a red square", "the square on the left is red")


@pytest.fixture
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, "word", 100, 1)


def one_step(model: CaptioningModel, config: TrainConfig, tokenizer: CaptionTokenizer, device: str):
    """A step of the first stage on one random photo; returns the loss and the gradient's norm."""
    stage = config.stages[0]
    optimizer = Optimizer(model, stage, Processes())
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    set_checkpointing(model.train(), stage.gradient_checkpointing)
    row = Row("a", "a.png", CAPTIONS, "train")
    size = config.encoder.image_size
    batch = Captions([row], tokenizer, config.decoder.max_tokens).batch(
        torch.randn(1, 3, size, size), [0], [False]
    )
    objective = Objective(model, CrossEntropyLoss(stage.smoothing), False)
    total, _, _ = objective(batch.to(torch.device(device)), 0)
    total.backward()
    parameters = list(model.parameters())
    assert all(parameter.grad is not None for parameter in parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
    optimizer.step()
    set_checkpointing(model, False)
    return total, norm


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_s_model_builds_and_steps_at_its_true_size(name, tokenizer, monkeypatch):
    """On torch's meta device: every shape, no memory."""
    asked = []
    create = timm.create_model

    def without_weights(model: str, pretrained: bool, checkpoint_path: str) -> Any:
        asked.append((model, pretrained, checkpoint_path))
        return create(model)

    monkeypatch.setattr(timm, "create_model", without_weights)
    config = load_config(name)
    with torch.device("meta"):
        model, preprocessing = make_model(config, tokenizer, None)
    assert asked == [(config.encoder.pretrained.removeprefix("timm/"), True, "")]
    millions, patches = PRESETS[name]
    count = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    assert model.encoder_config.activation == "quick_gelu" and model.encoder_config.pre_norm
    assert preprocessing.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)  # CLIP's
    size = config.encoder.image_size
    memory = model.encoder(torch.empty(2, 3, size, size, device="meta"))
    assert memory.shape == (2, patches + 1, model.encoder_config.width)
    # There are no values here by which padding could be told from words.
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        assert one_step(model, config, tokenizer, "meta")[0].shape == ()
    assert get_pretrained_cfg(asked[0][0]).hf_hub_id.startswith("timm/")  # it is on the hub


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_steps_in_earnest(name, tokenizer, tmp_path):
    """The same with random weights, from a file; the large one takes some 7 GB of memory."""
    config = load_config(name)
    torch.manual_seed(0)
    encoder = timm.create_model(config.encoder.pretrained.removeprefix("timm/"))
    save_file(encoder.state_dict(), tmp_path / "random.safetensors")
    del encoder
    model, _ = make_model(config, tokenizer, tmp_path / "random.safetensors")
    before = model.encoder.blocks[-1].mlp.up.weight.detach().clone()
    total, norm = one_step(model, config, tokenizer, "cpu")
    assert total.isfinite() and norm.isfinite() and norm > 0
    assert not torch.equal(model.encoder.blocks[-1].mlp.up.weight, before)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_from_the_hub_s_cache(name, tiny_data, tmp_path, monkeypatch):
    """The whole program, both stages, a tenth of the size: the encoder, a small one of the same
    family, comes by name from where the hub's own client keeps what it has loaded."""
    small = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    hub = tmp_path / "hub"
    repository = hub / ("models--" + get_pretrained_cfg(small).hf_hub_id.replace("/", "--"))
    (repository / "snapshots/0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0")
    torch.manual_seed(0)
    weights = timm.create_model(small).state_dict()
    save_file(weights, repository / "snapshots/0/model.safetensors")

    preset = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    preset["encoder"] = {"pretrained": f"timm/{small}", "image_size": 64}
    preset["decoder"] |= {"width": 64, "layers": 2, "heads": 2}
    preset["tokenizer"] |= {"min_count": 1}
    preset["workers"] = 1
    for stage in preset["stages"]:
        stage["batch_photos"] = 4
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config("preset.yaml", epochs=1)
    train(config, read_manifest(tiny_data), Path("build/checkpoints/preset"))
    folder = tmp_path / "build/checkpoints/preset"
    captioner = load_captioner(folder)
    manifest = read_manifest(tiny_data)
    photo = Path(manifest.path(manifest.rows[0])).read_bytes()
    assert captioner.caption([photo])[0][0].text is not None
    # From the hub's file, not from nowhere: one step at a small rate leaves it near.
    ours = captioner.encoder.patch_embed.weight.detach()
    torch.testing.assert_close(ours, weights["patch_embed.proj.weight"], atol=1e-4, rtol=0)

    (repository / "snapshots/0/model.safetensors").unlink()
    with pytest.raises(UserError, match="could not be downloaded") as refused:
        train(config, manifest, Path("build/checkpoints/none"))
    assert "\n" not in str(refused.value) and not Path("build/checkpoints/none").exists()
