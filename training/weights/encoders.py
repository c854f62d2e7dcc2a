"""Loads pretrained Vision Transformers from timm, from torchvision and from our own checkpoints.

Names are `timm/NAME` (timm's name, with or without its tag), `torchvision/NAME` (such as
`vit_b_16`) and `checkpoint/DIR`, the encoder of a captioner trained here: a student can have its
teacher's encoder, so that both use the same cached features. timm and torchvision build their model
and load the weights from a local file or their own download. Then each parameter is renamed; an
unknown or missing parameter is an error that names it. The mean and the standard deviation that the
encoder was trained with are returned as well.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handler.errors import UserError
from handler.image_preprocess import Interpolation, PreprocessConfig
from training.checkpoint import load_model
from training.model import Encoder, EncoderConfig, ImageEncoder, interpolate_positions
from training.weights.rename import Names, fill, rename

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TIMM_NAMES = (
    ("cls_token", ""),  # concatenated to `prefix`, below
    ("dist_token", ""),
    ("reg_token", ""),
    ("pos_embed", "positions"),
    ("patch_embed.proj.{p}", "patch_embed.{p}"),
    ("norm_pre.{p}", "norm_pre.{p}"),
    ("norm.{p}", "norm.{p}"),
    ("fc_norm.{p}", "norm.{p}"),
    ("blocks.{i}.norm1.{p}", "blocks.{i}.norm1.{p}"),
    ("blocks.{i}.attn.qkv.{p}", "blocks.{i}.attention.qkv.{p}"),
    ("blocks.{i}.attn.proj.{p}", "blocks.{i}.attention.out.{p}"),
    ("blocks.{i}.ls1.gamma", "blocks.{i}.scale1"),
    ("blocks.{i}.norm2.{p}", "blocks.{i}.norm2.{p}"),
    ("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.up.{p}"),
    ("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.down.{p}"),
    ("blocks.{i}.ls2.gamma", "blocks.{i}.scale2"),
)
LAYER = "encoder.layers.encoder_layer_{i}"
TORCHVISION_NAMES = (
    ("class_token", ""),
    ("encoder.pos_embedding", "positions"),
    ("conv_proj.{p}", "patch_embed.{p}"),
    ("encoder.ln.{p}", "norm.{p}"),
    (f"{LAYER}.ln_1.{{p}}", "blocks.{i}.norm1.{p}"),
    (f"{LAYER}.self_attention.in_proj_{{p}}", "blocks.{i}.attention.qkv.{p}"),
    (f"{LAYER}.self_attention.out_proj.{{p}}", "blocks.{i}.attention.out.{p}"),
    (f"{LAYER}.ln_2.{{p}}", "blocks.{i}.norm2.{p}"),
    (f"{LAYER}.mlp.0.{{p}}", "blocks.{i}.mlp.up.{p}"),
    (f"{LAYER}.mlp.3.{{p}}", "blocks.{i}.mlp.down.{p}"),
)
PREFIXES = ("cls_token", "dist_token", "reg_token", "class_token")
CLASSIFIERS = ("head.", "head_dist.", "heads.", "attn_pool.")


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder and the preprocessing that it was trained with."""

    encoder: ImageEncoder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation


def load_encoder(
    name: str, weights: Path | None = None, image_size: int | None = None
) -> PretrainedEncoder:
    """Builds the encoder `name` with pretrained weights from the file `weights`, or from the
    download of its library if that is None. If `image_size` differs from the pretrained one, the
    position embeddings are interpolated.

    Raises UserError naming the model, the file and the parameters that do not match.
    """
    library, _, model_name = name.partition("/")
    if library == "checkpoint":
        if weights is not None:
            raise UserError(
                f"encoder.pretrained {name!r} includes its weights; leave {weights} out"
            )
        return _from_checkpoint(Path(model_name), image_size)
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"{weights}: no such file; give a file with the weights of {name}")
    if library == "timm":
        return _from_timm(model_name, weights, image_size)
    if library == "torchvision":
        return _from_torchvision(model_name, weights, image_size)
    raise UserError(
        f"encoder.pretrained {name!r}: use timm/NAME, torchvision/NAME or checkpoint/DIR "
        "(timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, torchvision/vit_b_16)"
    )


def _from_checkpoint(folder: Path, image_size: int | None) -> PretrainedEncoder:
    model, config, _ = load_model(folder)
    preprocessing = PreprocessConfig.from_dict(config["preprocessing"])
    if preprocessing.resize_to is not None:
        raise UserError(
            f"{folder}: its photos are resized to {preprocessing.resize_to} pixels and cropped, "
            "which training does not support; name the same encoder as timm/NAME"
        )
    encoder = model.encoder
    if image_size not in (None, encoder.config.image_size):
        if not isinstance(encoder, Encoder):
            raise UserError(
                f"{folder}: its encoder only supports photos of {encoder.config.image_size} "
                "pixels; leave encoder.image_size out"
            )
        shape, state = _at_size(encoder.config, encoder.state_dict(), image_size)
        encoder = Encoder(shape)
        encoder.load_state_dict(state)
    return PretrainedEncoder(
        encoder, preprocessing.mean, preprocessing.std, preprocessing.interpolation
    )


def _from_timm(name: str, weights: Path | None, image_size: int | None) -> PretrainedEncoder:
    import timm  # slow to import and only needed here
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise UserError(f"encoder.pretrained: timm {timm.__version__} has no model {name!r}")
    try:
        model = timm.create_model(
            name, pretrained=weights is None, checkpoint_path=str(weights) if weights else ""
        )
    except Exception as error:  # a download, a file and a state dict raise many types
        raise UserError(_cannot_load(name, weights, error)) from error
    if not isinstance(model, VisionTransformer):
        raise UserError(f"encoder.pretrained: {name} is a {type(model).__name__}, not a plain ViT")
    state = dict(model.state_dict())
    prefix = [state[key] for key in PREFIXES if key in state]
    block: Any = model.blocks[0]
    patch = model.patch_embed.patch_size[0]
    patches = state["pos_embed"].size(1)
    prefix_count = sum(tensor.size(1) for tensor in prefix)
    grid = model.patch_embed.grid_size[0]
    config = EncoderConfig(
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        image_size=grid * patch,
        patch_size=patch,
        prefix_tokens=prefix_count,
        prefix_positions=prefix_count > 0 and patches == grid * grid + prefix_count,
        pre_norm="norm_pre.weight" in state,
        final_norm="norm.weight" in state or "fc_norm.weight" in state,
        layer_scale="blocks.0.ls1.gamma" in state,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        activation=_activation(block.mlp.act),
        layer_norm_eps=block.norm1.eps,
    )
    cfg: Any = model.pretrained_cfg
    return PretrainedEncoder(
        _rename(name, config, state, prefix, TIMM_NAMES, image_size),
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
    )


def _from_torchvision(name: str, weights: Path | None, image_size: int | None) -> PretrainedEncoder:
    from torchvision import models
    from torchvision.models.vision_transformer import VisionTransformer

    if name not in models.list_models(module=models) or not name.startswith("vit_"):
        raise UserError(f"encoder.pretrained: torchvision has no Vision Transformer {name!r}")
    default = models.get_model_weights(name).DEFAULT
    try:
        model = models.get_model(name, weights=default if weights is None else None)
        if weights is not None:
            model.load_state_dict(read_weights(weights))
    except Exception as error:
        raise UserError(_cannot_load(name, weights, error)) from error
    assert isinstance(model, VisionTransformer)
    config = EncoderConfig(
        width=model.hidden_dim,
        layers=len(model.encoder.layers),
        heads=model.encoder.layers[0].num_heads,
        mlp_width=model.mlp_dim,
        image_size=model.image_size,
        patch_size=model.patch_size,
        prefix_tokens=1,
        layer_norm_eps=1e-6,
    )
    state = dict(model.state_dict())
    encoder = _rename(name, config, state, [state["class_token"]], TORCHVISION_NAMES, image_size)
    return PretrainedEncoder(encoder, IMAGENET_MEAN, IMAGENET_STD, "bilinear")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from a safetensors file, or from a torch file with only tensors in it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state.get("model", state))


def _rename(
    name: str,
    config: EncoderConfig,
    state: dict[str, Tensor],
    prefix: list[Tensor],
    names: Names,
    image_size: int | None,
) -> Encoder:
    """Our encoder with the other library's parameters, all of which must match one of ours, apart
    from the classifier's."""
    state = {key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIERS)}
    ours = rename(name, state, names)
    if prefix:
        ours["prefix"] = torch.cat(prefix, dim=1)
    config, ours = _at_size(config, ours, image_size)
    encoder = Encoder(config)
    fill(name, encoder, ours, names)
    return encoder


def _at_size(
    config: EncoderConfig, state: dict[str, Tensor], image_size: int | None
) -> tuple[EncoderConfig, dict[str, Tensor]]:
    """The config and the parameters for photos of another size, unless `image_size` is None."""
    if image_size is None or image_size == config.image_size:
        return config, state
    config = replace(config, image_size=image_size)
    prefix = config.prefix_tokens if config.prefix_positions else 0
    positions = interpolate_positions(state["positions"], prefix, config.grid)
    return config, {**state, "positions": positions}


def _activation(module: torch.nn.Module) -> str:
    if "quick" in type(module).__name__.lower():
        return "quick_gelu"
    if getattr(module, "approximate", "none") == "tanh" or "Tanh" in type(module).__name__:
        return "gelu_tanh"
    if "gelu" in type(module).__name__.lower():
        return "gelu"
    raise UserError(f"encoder.pretrained: activation {type(module).__name__} is not supported")


def _cannot_load(name: str, weights: Path | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    if weights is None:
        return f"{name}: its pretrained weights could not be downloaded ({reason}); give a file"
    return f"{weights}: does not contain the weights of {name} ({reason})"
