"""Converts Hugging Face's Vision Transformers: ViT, DeiT, CLIP, DINOv2 with and without registers,
and ViT-MAE if it does not mask patches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from handler.errors import UserError
from training.model import EncoderConfig, interpolate_positions
from training.weights.family import Weights
from training.weights.fields import Section
from training.weights.rename import Names


@dataclass(frozen=True)
class Vision:
    """One kind of encoder: a function from a section of the config to our config, a function from a
    prefix to the table of names, and a function that converts the renamed tensors. With `free_size`
    the image processor determines the size of photos, and the position embeddings are interpolated
    to it."""

    config: Callable[[Section], EncoderConfig]
    names: Callable[[str], Names]
    arrange: Callable[[Weights, EncoderConfig], None]
    free_size: bool = False


def _vit_config(section: Section) -> EncoderConfig:
    width = section.value("hidden_size", 768)
    heads = section.value("num_attention_heads", 12)
    section.demand("num_channels", 3)
    section.demand("head_dim", width // max(heads, 1))
    return EncoderConfig(
        width=width,
        layers=section.value("num_hidden_layers", 12),
        heads=heads,
        mlp_width=section.value("intermediate_size", 3072),
        image_size=section.side("image_size", 224),
        patch_size=section.side("patch_size", 16),
        prefix_tokens=2 if section.values["model_type"] == "deit" else 1,
        qkv_bias=section.value("qkv_bias", True),
        activation=section.activation("hidden_act", "gelu"),
        layer_norm_eps=section.value("layer_norm_eps", 1e-12),
        dropout=section.value("hidden_dropout_prob", 0.0),
    )


def _mae_config(section: Section) -> EncoderConfig:
    # Not `demand`, because an absent field means 0.75.
    if section.value("mask_ratio", 0.75) != 0:
        raise UserError(
            f"field '{section.prefix}mask_ratio' is not 0: a ViTMAEModel drops patches at random"
        )
    return _vit_config(section)


def _vit_names(prefix: str) -> Names:
    # The names of layers in files, and those in a model of transformers 5.
    layer, new_layer = f"{prefix}encoder.layer.{{i}}", f"{prefix}layers.{{i}}"
    block = "encoder.blocks.{i}"
    return (
        (f"{prefix}embeddings.cls_token", "encoder.cls"),
        (f"{prefix}embeddings.distillation_token", "encoder.distillation"),
        (f"{prefix}embeddings.mask_token", ""),
        (f"{prefix}embeddings.position_embeddings", "encoder.positions"),
        (f"{prefix}embeddings.patch_embeddings.projection.{{p}}", "encoder.patch_embed.{p}"),
        (f"{layer}.layernorm_before.{{p}}", f"{block}.norm1.{{p}}"),
        (f"{layer}.attention.attention.query.{{p}}", f"{block}.attention.q.{{p}}"),
        (f"{layer}.attention.attention.key.{{p}}", f"{block}.attention.k.{{p}}"),
        (f"{layer}.attention.attention.value.{{p}}", f"{block}.attention.v.{{p}}"),
        (f"{layer}.attention.output.dense.{{p}}", f"{block}.attention.out.{{p}}"),
        (f"{layer}.layernorm_after.{{p}}", f"{block}.norm2.{{p}}"),
        (f"{layer}.intermediate.dense.{{p}}", f"{block}.mlp.up.{{p}}"),
        (f"{layer}.output.dense.{{p}}", f"{block}.mlp.down.{{p}}"),
        (f"{new_layer}.layernorm_before.{{p}}", f"{block}.norm1.{{p}}"),
        (f"{new_layer}.attention.q_proj.{{p}}", f"{block}.attention.q.{{p}}"),
        (f"{new_layer}.attention.k_proj.{{p}}", f"{block}.attention.k.{{p}}"),
        (f"{new_layer}.attention.v_proj.{{p}}", f"{block}.attention.v.{{p}}"),
        (f"{new_layer}.attention.o_proj.{{p}}", f"{block}.attention.out.{{p}}"),
        (f"{new_layer}.layernorm_after.{{p}}", f"{block}.norm2.{{p}}"),
        (f"{new_layer}.mlp.fc1.{{p}}", f"{block}.mlp.up.{{p}}"),
        (f"{new_layer}.mlp.fc2.{{p}}", f"{block}.mlp.down.{{p}}"),
        (f"{prefix}layernorm.{{p}}", "encoder.norm.{p}"),
        (f"{prefix}pooler.dense.{{p}}", ""),  # only for classification
    )


def _arrange_vit(weights: Weights, encoder: EncoderConfig) -> None:
    weights.join_prefix(["encoder.cls", "encoder.distillation"][: encoder.prefix_tokens])


def clip_config(section: Section, patch_size: int = 32, **settings: Any) -> EncoderConfig:
    """The config of a CLIP encoder. `patch_size` is the default of its field; `settings` override
    ours, for variants of CLIP."""
    section.demand("num_channels", 3)
    shape = EncoderConfig(
        width=section.value("hidden_size", 768),
        layers=section.value("num_hidden_layers", 12),
        heads=section.value("num_attention_heads", 12),
        mlp_width=section.value("intermediate_size", 3072),
        image_size=section.side("image_size", 224),
        patch_size=section.side("patch_size", patch_size),
        pre_norm=True,
        final_norm=False,  # `post_layernorm` is not applied to `last_hidden_state`
        activation=section.activation("hidden_act", "quick_gelu"),
        layer_norm_eps=section.value("layer_norm_eps", 1e-5),
    )
    return replace(shape, **settings)


def clip_names(prefix: str, final_norm: str = "") -> Names:
    layer, block = f"{prefix}encoder.layers.{{i}}", "encoder.blocks.{i}"
    return (
        (f"{prefix}embeddings.class_embedding", "encoder.cls"),
        (f"{prefix}embeddings.patch_embedding.weight", "encoder.patch_embed.weight"),
        (f"{prefix}embeddings.position_embedding.weight", "encoder.positions"),
        (f"{prefix}embeddings.position_ids", ""),  # a buffer in old checkpoints
        (f"{prefix}pre_layrnorm.{{p}}", "encoder.norm_pre.{p}"),
        (f"{layer}.layer_norm1.{{p}}", f"{block}.norm1.{{p}}"),
        (f"{layer}.self_attn.q_proj.{{p}}", f"{block}.attention.q.{{p}}"),
        (f"{layer}.self_attn.k_proj.{{p}}", f"{block}.attention.k.{{p}}"),
        (f"{layer}.self_attn.v_proj.{{p}}", f"{block}.attention.v.{{p}}"),
        (f"{layer}.self_attn.out_proj.{{p}}", f"{block}.attention.out.{{p}}"),
        (f"{layer}.layer_norm2.{{p}}", f"{block}.norm2.{{p}}"),
        (f"{layer}.mlp.fc1.{{p}}", f"{block}.mlp.up.{{p}}"),
        (f"{layer}.mlp.fc2.{{p}}", f"{block}.mlp.down.{{p}}"),
        (f"{prefix}post_layernorm.{{p}}", final_norm),
    )


def arrange_clip(weights: Weights, encoder: EncoderConfig) -> None:
    weights.join_prefix(["encoder.cls"])
    (positions_PD,) = weights.take("encoder.positions")
    weights.ours["encoder.positions"] = positions_PD.unsqueeze(0)


def _dino_config(section: Section) -> EncoderConfig:
    width = section.value("hidden_size", 768)
    registers = 0
    patch = 14
    if section.values["model_type"] == "dinov2_with_registers":
        registers, patch = section.value("num_register_tokens", 4), 16
    section.demand("num_channels", 3)
    section.demand("use_swiglu_ffn", False)
    return EncoderConfig(
        width=width,
        layers=section.value("num_hidden_layers", 12),
        heads=section.value("num_attention_heads", 12),
        mlp_width=width * section.value("mlp_ratio", 4),
        image_size=section.side("image_size", 224),
        patch_size=section.side("patch_size", patch),
        prefix_tokens=1 + registers,
        prefix_positions=False,
        layer_scale=True,
        qkv_bias=section.value("qkv_bias", True),
        activation=section.activation("hidden_act", "gelu"),
        layer_norm_eps=section.value("layer_norm_eps", 1e-6),
        dropout=section.value("hidden_dropout_prob", 0.0),
    )


def _dino_names(prefix: str) -> Names:
    layer, block = f"{prefix}encoder.layer.{{i}}", "encoder.blocks.{i}"
    return (
        (f"{prefix}embeddings.cls_token", "encoder.cls"),
        (f"{prefix}embeddings.mask_token", ""),  # only used in its training
        (f"{prefix}embeddings.register_tokens", "encoder.registers"),
        (f"{prefix}embeddings.position_embeddings", "encoder.positions"),
        (f"{prefix}embeddings.patch_embeddings.projection.{{p}}", "encoder.patch_embed.{p}"),
        (f"{layer}.norm1.{{p}}", f"{block}.norm1.{{p}}"),
        (f"{layer}.attention.attention.query.{{p}}", f"{block}.attention.q.{{p}}"),
        (f"{layer}.attention.attention.key.{{p}}", f"{block}.attention.k.{{p}}"),
        (f"{layer}.attention.attention.value.{{p}}", f"{block}.attention.v.{{p}}"),
        (f"{layer}.attention.output.dense.{{p}}", f"{block}.attention.out.{{p}}"),
        # The names in a model of transformers 5.
        (f"{layer}.attention.q_proj.{{p}}", f"{block}.attention.q.{{p}}"),
        (f"{layer}.attention.k_proj.{{p}}", f"{block}.attention.k.{{p}}"),
        (f"{layer}.attention.v_proj.{{p}}", f"{block}.attention.v.{{p}}"),
        (f"{layer}.attention.o_proj.{{p}}", f"{block}.attention.out.{{p}}"),
        (f"{layer}.layer_scale1.lambda1", f"{block}.scale1"),
        (f"{layer}.norm2.{{p}}", f"{block}.norm2.{{p}}"),
        (f"{layer}.mlp.fc1.{{p}}", f"{block}.mlp.up.{{p}}"),
        (f"{layer}.mlp.fc2.{{p}}", f"{block}.mlp.down.{{p}}"),
        (f"{layer}.layer_scale2.lambda1", f"{block}.scale2"),
        (f"{prefix}layernorm.{{p}}", "encoder.norm.{p}"),
    )


def _arrange_dino(weights: Weights, encoder: EncoderConfig) -> None:
    """Adds the position embedding of the class token to that token; registers have none. The other
    position embeddings are interpolated once, here; the original does so in each forward pass."""
    tokens, positions_1PD = weights.take("encoder.cls", "encoder.positions")
    weights.ours["encoder.cls"] = tokens + positions_1PD[:, :1]
    registers = encoder.prefix_tokens > 1
    weights.join_prefix(["encoder.cls", *(["encoder.registers"] if registers else [])])
    weights.ours["encoder.positions"] = interpolate_positions(
        positions_1PD[:, 1:].contiguous(), 0, encoder.grid, antialias=registers
    )


VIT = Vision(_vit_config, _vit_names, _arrange_vit)
DINO = Vision(_dino_config, _dino_names, _arrange_dino, free_size=True)
CLIP = Vision(clip_config, clip_names, arrange_clip)
# Keys are the config's `model_type`.
ENCODERS = {
    "vit": VIT,
    "deit": VIT,
    "vit_mae": Vision(_mae_config, _vit_names, _arrange_vit),
    "clip_vision_model": CLIP,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
}
