"""The data types of an export: float32, bfloat16, or int8.

    fp32   packed float32
    bf16   packed bfloat16
    fp16   weights in float16, activations and products in float32
    int8   int8 weights, activations in 8 bits

In bf16 and int8, the best words of the output head are recomputed in float32.

The residual stream, layer norms, attention and sums are always float32. A precision is tried in
several ways (data types of encoder and decoder), the fastest first, until one keeps the captions.
The rounding of the encoder accumulates over all layers before the first word, so the encoder is the
first part to get a finer precision. In fp16, a decoder is as fast as in bf16 for steps with few
rows, and as slow as in fp32 for many.
"""

import copy

import torch
from torch import nn

from export.layers import HalfLinear, Int8Linear, PackedLinear, RescoredHead
from training.model import CaptioningModel, HeadTransform, Mlp

# The ways to try, (encoder, decoder).
WAYS = {
    "fp32": (("fp32", "fp32"),),
    "bf16": (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp16")),
    "int8": (("int8", "int8"), ("bf16", "int8"), ("fp32", "int8")),
}


def in_precision(model: CaptioningModel, encoder: str, decoder: str) -> CaptioningModel:
    """A copy of `model` for inference whose linear layers are those of `export.layers`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _replace(model.encoder, encoder)
    if model.decoder.prompt_encoder is not None:  # which runs once a photo, as an encoder does
        _replace(model.decoder.prompt_encoder, encoder)
    head = model.decoder.head
    _replace(model.decoder, decoder)
    if decoder in ("bf16", "int8"):
        rescored = RescoredHead(head, model.decoder.head)
        model.decoder.add_module("head", _scripted(rescored))
    return model


def _replace(module: nn.Module, precision: str) -> None:
    gelus: dict[str, nn.GELU] = {}
    if isinstance(module, Mlp | HeadTransform) and isinstance(module.activation, nn.GELU):
        # The layer before it computes the activation in the same pass.
        before = "up" if isinstance(module, Mlp) else "dense"
        gelus[before], module.activation = module.activation, nn.Identity()
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _layer(child, precision, gelus.get(name)))
        else:
            _replace(child, precision)


def _layer(linear: nn.Linear, precision: str, gelu: nn.GELU | None) -> nn.Module:
    if precision == "int8":
        return _scripted(Int8Linear(linear, gelu))
    if precision == "fp16":
        return _scripted(HalfLinear(linear, gelu))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return _scripted(PackedLinear(linear, dtype, gelu))


def _scripted(layer: nn.Module) -> torch.jit.ScriptModule:
    """Scripted, so that `prepack` is kept in a traced encoder as well."""
    return torch.jit.script(layer.eval())


def ways(precision: str) -> list[tuple[str, str, str]]:
    """(precision, data type of the encoder, of the decoder) in the order in which to try them. For
    `auto`, these are the ways of each precision for which this processor has instructions, and of
    fp32."""
    names = [precision]
    if precision == "auto":
        has = torch.cpu.get_capabilities()
        fast = {
            "int8": has.get("avx512_vnni") or has.get("avx_vnni") or has.get("amx_int8"),
            "bf16": has.get("avx512_bf16") or has.get("amx_bf16"),
        }
        names = [*(name for name, supported in fast.items() if supported), "fp32"]
    return [(name, *parts) for name in names for parts in WAYS[name]]
