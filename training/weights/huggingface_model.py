"""Hugging Face's `VisionEncoderDecoderModel` of ViT or DeiT and GPT-2, as our model.

Works on its parsed `config.json` and its state dict; transformers itself is not needed. What cannot
be represented exactly is refused by the name of its field.
"""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from handler.errors import UserError
from training.model import CaptioningModel, DecoderConfig, EncoderConfig
from training.weights.rename import fill, rename, their_names

VALUE = TypeVar("VALUE", int, float, bool, str)

# Which of ours computes an activation of theirs.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}

# The encoder's layers as files have them, and as transformers 5 has them in memory.
LAYER, NEW_LAYER = "encoder.encoder.layer.{i}", "encoder.layers.{i}"
BLOCK = "decoder.transformer.h.{i}"
NAMES = (
    ("encoder.embeddings.cls_token", "encoder.cls"),
    ("encoder.embeddings.distillation_token", "encoder.distillation"),
    ("encoder.embeddings.position_embeddings", "encoder.positions"),
    ("encoder.embeddings.patch_embeddings.projection.{p}", "encoder.patch_embed.{p}"),
    (f"{LAYER}.layernorm_before.{{p}}", "encoder.blocks.{i}.norm1.{p}"),
    (f"{LAYER}.attention.attention.query.{{p}}", "encoder.blocks.{i}.attention.q.{p}"),
    (f"{LAYER}.attention.attention.key.{{p}}", "encoder.blocks.{i}.attention.k.{p}"),
    (f"{LAYER}.attention.attention.value.{{p}}", "encoder.blocks.{i}.attention.v.{p}"),
    (f"{LAYER}.attention.output.dense.{{p}}", "encoder.blocks.{i}.attention.out.{p}"),
    (f"{LAYER}.layernorm_after.{{p}}", "encoder.blocks.{i}.norm2.{p}"),
    (f"{LAYER}.intermediate.dense.{{p}}", "encoder.blocks.{i}.mlp.up.{p}"),
    (f"{LAYER}.output.dense.{{p}}", "encoder.blocks.{i}.mlp.down.{p}"),
    (f"{NEW_LAYER}.layernorm_before.{{p}}", "encoder.blocks.{i}.norm1.{p}"),
    (f"{NEW_LAYER}.attention.q_proj.{{p}}", "encoder.blocks.{i}.attention.q.{p}"),
    (f"{NEW_LAYER}.attention.k_proj.{{p}}", "encoder.blocks.{i}.attention.k.{p}"),
    (f"{NEW_LAYER}.attention.v_proj.{{p}}", "encoder.blocks.{i}.attention.v.{p}"),
    (f"{NEW_LAYER}.attention.o_proj.{{p}}", "encoder.blocks.{i}.attention.out.{p}"),
    (f"{NEW_LAYER}.layernorm_after.{{p}}", "encoder.blocks.{i}.norm2.{p}"),
    (f"{NEW_LAYER}.mlp.fc1.{{p}}", "encoder.blocks.{i}.mlp.up.{p}"),
    (f"{NEW_LAYER}.mlp.fc2.{{p}}", "encoder.blocks.{i}.mlp.down.{p}"),
    ("encoder.layernorm.{p}", "encoder.norm.{p}"),
    ("encoder.pooler.dense.{p}", ""),  # made for classification; captioning reads all patches
    ("enc_to_dec_proj.{p}", "projection.{p}"),
    ("decoder.transformer.wte.weight", "decoder.token_embedding.weight"),
    ("decoder.transformer.wpe.weight", "decoder.position_embedding.weight"),
    (f"{BLOCK}.ln_1.{{p}}", "decoder.blocks.{i}.norm1.{p}"),
    (f"{BLOCK}.attn.c_attn.{{p}}", "decoder.blocks.{i}.self_attention.qkv.{p}"),
    (f"{BLOCK}.attn.c_proj.{{p}}", "decoder.blocks.{i}.self_attention.out.{p}"),
    (f"{BLOCK}.ln_cross_attn.{{p}}", "decoder.blocks.{i}.norm2.{p}"),
    (f"{BLOCK}.crossattention.q_attn.{{p}}", "decoder.blocks.{i}.cross_attention.q.{p}"),
    (f"{BLOCK}.crossattention.c_attn.{{p}}", "decoder.blocks.{i}.cross_attention.kv.{p}"),
    (f"{BLOCK}.crossattention.c_proj.{{p}}", "decoder.blocks.{i}.cross_attention.out.{p}"),
    (f"{BLOCK}.ln_2.{{p}}", "decoder.blocks.{i}.norm3.{p}"),
    (f"{BLOCK}.mlp.c_fc.{{p}}", "decoder.blocks.{i}.mlp.up.{p}"),
    (f"{BLOCK}.mlp.c_proj.{{p}}", "decoder.blocks.{i}.mlp.down.{p}"),
    # Causal masks, which old checkpoints hold as buffers.
    (f"{BLOCK}.attn.bias", ""),
    (f"{BLOCK}.attn.masked_bias", ""),
    (f"{BLOCK}.crossattention.bias", ""),
    (f"{BLOCK}.crossattention.masked_bias", ""),
    ("decoder.transformer.ln_f.{p}", "decoder.norm.{p}"),
    ("decoder.lm_head.weight", "decoder.head.weight"),
)


def model_configs(config: Mapping[str, Any]) -> tuple[EncoderConfig, DecoderConfig]:
    """Our shapes from a parsed `config.json`. Raises UserError naming the field that does not fit;
    a field that is absent has the value that transformers gives it."""
    kind = config.get("model_type")
    if kind != "vision-encoder-decoder":
        raise UserError(
            f"field 'model_type' is {kind!r}; give a VisionEncoderDecoderModel of ViT and GPT-2"
        )
    for part, kinds in (("encoder", ("vit", "deit")), ("decoder", ("gpt2",))):
        if not isinstance(config.get(part), dict):
            raise UserError(f"field {part!r} is missing")
        kind = config[part].get("model_type")
        if kind not in kinds:
            raise UserError(
                f"field '{part}.model_type' is {kind!r}; only {' and '.join(kinds)} can be imported"
            )
    encoder = _encoder_config(config["encoder"])
    return encoder, _decoder_config(config["decoder"], encoder)


def _encoder_config(section: Mapping[str, Any]) -> EncoderConfig:
    width = _value(section, "encoder", "hidden_size", 768)
    heads = _value(section, "encoder", "num_attention_heads", 12)
    _demand(section, "encoder", "num_channels", 3)
    _demand(section, "encoder", "head_dim", width // max(heads, 1))
    return EncoderConfig(
        width=width,
        layers=_value(section, "encoder", "num_hidden_layers", 12),
        heads=heads,
        mlp_width=_value(section, "encoder", "intermediate_size", 3072),
        image_size=_side(section, "image_size", 224),
        patch_size=_side(section, "patch_size", 16),
        prefix_tokens=2 if section["model_type"] == "deit" else 1,
        qkv_bias=_value(section, "encoder", "qkv_bias", True),
        activation=_activation(section, "encoder", "hidden_act", "gelu"),
        layer_norm_eps=_value(section, "encoder", "layer_norm_eps", 1e-12),
        dropout=_value(section, "encoder", "hidden_dropout_prob", 0.0),
    )


def _decoder_config(section: Mapping[str, Any], encoder: EncoderConfig) -> DecoderConfig:
    width = _value(section, "decoder", "n_embd", 768)
    _demand(section, "decoder", "scale_attn_weights", True)
    _demand(section, "decoder", "scale_attn_by_inverse_layer_idx", False)
    # reorder_and_upcast_attn says how to stay precise in 16 bits; in fp32 it changes nothing.
    if not _value(section, "decoder", "add_cross_attention", False):
        raise UserError("field 'decoder.add_cross_attention' is not true: it never sees the photo")
    return DecoderConfig(
        vocab_size=_value(section, "decoder", "vocab_size", 50257),
        max_positions=_value(section, "decoder", "n_positions", 1024),
        width=width,
        layers=_value(section, "decoder", "n_layer", 12),
        heads=_value(section, "decoder", "n_head", 12),
        mlp_width=_value(section, "decoder", "n_inner", 4 * width),
        memory_width=encoder.width,
        activation=_activation(section, "decoder", "activation_function", "gelu_new"),
        layer_norm_eps=_value(section, "decoder", "layer_norm_epsilon", 1e-5),
        dropout=_value(section, "decoder", "resid_pdrop", 0.1),
    )


def _value(section: Mapping[str, Any], part: str, name: str, default: VALUE) -> VALUE:
    """A field of the type of its default; absent or null, the default."""
    value = section.get(name)
    if value is None:
        return default
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        kind = type(default).__name__
        raise UserError(f"field '{part}.{name}' must be {kind}, not {value!r}")
    return value


def _demand(section: Mapping[str, Any], part: str, name: str, only: VALUE) -> None:
    if _value(section, part, name, only) != only:
        raise UserError(
            f"field '{part}.{name}' is {section[name]!r}; only {only!r} can be imported"
        )


def _side(section: Mapping[str, Any], name: str, default: int) -> int:
    """A size in pixels, given as a number or as the two sides of a square."""
    value = section.get(name, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or value < 1:
        raise UserError(f"field 'encoder.{name}' is {value!r}; only squares can be imported")
    return value


def _activation(section: Mapping[str, Any], part: str, name: str, default: str) -> str:
    theirs = _value(section, part, name, default)
    if theirs not in ACTIVATIONS:
        raise UserError(
            f"field '{part}.{name}' is {theirs!r}; only {', '.join(ACTIVATIONS)} can be imported"
        )
    return ACTIVATIONS[theirs]


@torch.no_grad()
def import_model(
    config: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> CaptioningModel:
    """Our model, in evaluation mode and float32, from a parsed `config.json` and a state dict.

    Raises UserError: for a field of the config as `model_configs` does, and for a parameter too
    many, too few or of another shape, beginning with `where` (the file that they are from).
    """
    encoder, decoder = model_configs(config)
    ours = {name: t.float() for name, t in rename(where, state, NAMES).items()}
    try:
        _join_prefix(ours, encoder, where)
        _join_heads(ours, where)
        for name, tensor in ours.items():
            if name.startswith("decoder.blocks.") and tensor.ndim == 2:
                ours[name] = tensor.T  # GPT-2's Conv1D keeps (in, out)
        if encoder.width != decoder.width:
            _fold_projection(ours, decoder.layers, where)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: parameters whose shapes do not fit ({reason})") from error
    _tie_head(ours, config["decoder"], where)
    _check_fit(encoder, decoder, ours, where)
    model = CaptioningModel(encoder, decoder)
    fill(where, model, ours, NAMES)
    return model.eval()


def _check_fit(
    encoder: EncoderConfig, decoder: DecoderConfig, ours: dict[str, Tensor], where: str
) -> None:
    """Refuses weights of other sizes than the config's before anything of those is allocated."""
    for part, layers in (("encoder", encoder.layers), ("decoder", decoder.layers)):
        if layers > len(ours):
            raise UserError(
                f"{where}: config.json gives the {part} {layers} layers; there are parameters "
                f"missing, the file holds {len(ours)}"
            )
    try:
        with torch.device("meta"):
            outline = CaptioningModel(encoder, decoder)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: config.json's sizes are impossible ({reason})") from error
    with warnings.catch_warnings():
        # Nothing is copied onto the meta device, which torch warns of; the shapes are compared.
        warnings.simplefilter("ignore", UserWarning)
        fill(where, outline, ours, NAMES)


def _take(ours: dict[str, Tensor], where: str, *names: str) -> list[Tensor]:
    """Takes tensors out, those that are to be made into others."""
    if missing := [name for name in names if name not in ours]:
        raise UserError(f"{where}: parameters missing: {', '.join(their_names(missing, NAMES))}")
    return [ours.pop(name) for name in names]


def _join_prefix(ours: dict[str, Tensor], encoder: EncoderConfig, where: str) -> None:
    tokens = ["encoder.cls", "encoder.distillation"][: encoder.prefix_tokens]
    ours["encoder.prefix"] = torch.cat(_take(ours, where, *tokens), dim=1)


def _join_heads(ours: dict[str, Tensor], where: str) -> None:
    """Query, key and value are one product here."""
    for name in [name for name in ours if ".attention.q." in name]:
        parts = [name.replace(".q.", f".{letter}.") for letter in "qkv"]
        ours[name.replace(".q.", ".qkv.")] = torch.cat(_take(ours, where, *parts))


def _fold_projection(ours: dict[str, Tensor], layers: int, where: str) -> None:
    """The decoder reads the memory through the keys and values alone, so that their product with
    the projection before them is exact: K (W x + b) + c = (K W) x + (K b + c)."""
    weight_DM, bias_D = _take(ours, where, "projection.weight", "projection.bias")
    for i in range(layers):
        name = f"decoder.blocks.{i}.cross_attention.kv"
        kv_weight, kv_bias = _take(ours, where, f"{name}.weight", f"{name}.bias")
        kv = kv_weight.double()
        ours[f"{name}.weight"] = (kv @ weight_DM.double()).float()
        ours[f"{name}.bias"] = (kv @ bias_D.double() + kv_bias.double()).float()


def _tie_head(ours: dict[str, Tensor], section: Mapping[str, Any], where: str) -> None:
    """The output head has to be the token embedding, said or stored."""
    embedding = ours.get("decoder.token_embedding.weight", torch.empty(0))
    head = ours.setdefault("decoder.head.weight", embedding)
    if head is embedding and not _value(section, "decoder", "tie_word_embeddings", True):
        raise UserError(
            f"{where}: decoder.lm_head.weight is missing, and config.json's field "
            "'decoder.tie_word_embeddings' is false"
        )
    if not torch.equal(head, embedding):
        raise UserError(
            f"{where}: decoder.lm_head.weight is not decoder.transformer.wte.weight; an output "
            "head of its own cannot be imported"
        )
