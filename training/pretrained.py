"""Pretrained Vision Transformers into ours: timm's and torchvision's.

Names are `timm/NAME` (timm's own, with or without its tag) and `torchvision/NAME` (`vit_b_16` and
its siblings). The other library builds its model and reads the weights, from a local file or its
own download; here its parameters are renamed one by one, and a parameter too many or too few is an
error that names it. The normalisation that the encoder was trained with comes along.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handler.errors import UserError
from training.model import Encoder, EncoderConfig, interpolate_positions

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TIMM_NAMES = (
    (r"cls_token|dist_token|reg_token", ""),  # joined into `prefix`, below
    (r"pos_embed", "positions"),
    (r"patch_embed\.proj\.(\w+)", r"patch_embed.\1"),
    (r"norm_pre\.(\w+)", r"norm_pre.\1"),
    (r"(?:fc_)?norm\.(\w+)", r"norm.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.down.\2"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.scale\2"),
)
TORCHVISION_NAMES = (
    (r"class_token", ""),
    (r"encoder\.pos_embedding", "positions"),
    (r"conv_proj\.(\w+)", r"patch_embed.\1"),
    (r"encoder\.ln\.(\w+)", r"norm.\1"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)",
        r"blocks.\1.attention.qkv.\2",
    ),
    (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)",
        r"blocks.\1.attention.out.\2",
    ),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.(\w+)", r"blocks.\1.mlp.up.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.(\w+)", r"blocks.\1.mlp.down.\2"),
)
PREFIXES = ("cls_token", "dist_token", "reg_token", "class_token")
CLASSIFIERS = ("head.", "head_dist.", "heads.", "attn_pool.")


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder and the preprocessing that it was trained with."""

    encoder: Encoder
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


def load_encoder(
    name: str, weights: Path | None = None, image_size: int | None = None
) -> PretrainedEncoder:
    """Builds the encoder `name` with pretrained weights, from the file `weights` or, without one,
    from its library's own download. `image_size` other than the pretrained one resamples the
    position embeddings.

    Raises UserError naming the model, the file and the parameters that do not fit.
    """
    library, _, model_name = name.partition("/")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"{weights}: no such file; give the encoder's weights of {name}")
    if library == "timm":
        return _from_timm(model_name, weights, image_size)
    if library == "torchvision":
        return _from_torchvision(model_name, weights, image_size)
    raise UserError(
        f"encoder.pretrained {name!r}: write timm/NAME or torchvision/NAME "
        "(timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, torchvision/vit_b_16)"
    )


def _from_timm(name: str, weights: Path | None, image_size: int | None) -> PretrainedEncoder:
    import timm  # slow to import, and only needed here
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise UserError(f"encoder.pretrained: timm {timm.__version__} has no model {name!r}")
    try:
        model = timm.create_model(
            name, pretrained=weights is None, checkpoint_path=str(weights) if weights else ""
        )
    except Exception as error:  # a download, a file and a state dict fail in many ways
        raise UserError(_cannot_load(name, weights, error)) from error
    if not isinstance(model, VisionTransformer):
        raise UserError(f"encoder.pretrained: {name} is a {type(model).__name__}, no plain ViT")
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
        cfg["interpolation"] if cfg["interpolation"] in ("bicubic", "bilinear") else "bicubic",
    )


def _from_torchvision(name: str, weights: Path | None, image_size: int | None) -> PretrainedEncoder:
    from torchvision import models
    from torchvision.models.vision_transformer import VisionTransformer

    if name not in models.list_models(module=models) or not name.startswith("vit_"):
        raise UserError(f"encoder.pretrained: torchvision has no Vision Transformer {name!r}")
    default = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
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
        heads=model.encoder.layers[0].num_heads,  # type: ignore[index,union-attr]
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
    """A state dict from a safetensors file or a torch file that holds tensors alone."""
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
    names: tuple[tuple[str, str], ...],
    image_size: int | None,
) -> Encoder:
    """Our encoder with the other library's parameters; every one must find its place."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        if key.startswith(CLASSIFIERS):
            continue  # the classifier is not part of the encoder
        for pattern, replacement in names:
            match = re.fullmatch(pattern, key)
            if match:
                if replacement:
                    ours[match.expand(replacement)] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"{name}: parameters that our encoder has no place for: {_few(unknown)}")
    if prefix:
        ours["prefix"] = torch.cat(prefix, dim=1)
    if image_size is not None and image_size != config.image_size:
        config = EncoderConfig(**{**config.__dict__, "image_size": image_size})
        ours["positions"] = interpolate_positions(
            ours["positions"], config.prefix_tokens if config.prefix_positions else 0, config.grid
        )
    encoder = Encoder(config)
    expected = set(encoder.state_dict())
    if missing := sorted(expected - set(ours)):
        raise UserError(f"{name}: parameters missing: {_few(missing)}")
    if extra := sorted(set(ours) - expected):
        raise UserError(f"{name}: parameters that our encoder has no place for: {_few(extra)}")
    try:
        encoder.load_state_dict(ours)
    except RuntimeError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    return encoder


def _activation(module: torch.nn.Module) -> str:
    if "quick" in type(module).__name__.lower():
        return "quick_gelu"
    if getattr(module, "approximate", "none") == "tanh" or "Tanh" in type(module).__name__:
        return "gelu_tanh"
    if "gelu" in type(module).__name__.lower():
        return "gelu"
    raise UserError(f"encoder.pretrained: activation {type(module).__name__} is not supported")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _cannot_load(name: str, weights: Path | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400]
    if weights is None:
        return f"{name}: its pretrained weights could not be downloaded ({reason}); give a file"
    return f"{weights}: these are not the weights of {name} ({reason})"
