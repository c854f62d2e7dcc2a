"""What an export computes in: float32, bfloat16, or int8 weights.

    fp32   packed float32
    bf16   packed bfloat16
    fp16   weights in float16, activations and products in float32
    int8   int8 weights, activations in 8 bits

In bf16 and int8 the output head's best words are looked at again in float32.

The residual stream, layer norms, attention and sums are float32 everywhere. A precision is tried in
several ways, the fastest first, until one keeps the captions: an encoder's rounding adds up over
all its layers before the first word, so it is the first part to go back to a finer precision. A
decoder in fp16 takes a step of a few rows as fast as one in bf16, and of many as slowly as in fp32.
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
        looked_at = RescoredHead(head, model.decoder.head)
        model.decoder.add_module("head", _scripted(looked_at))
    return model


def _replace(module: nn.Module, precision: str) -> None:
    gelus: dict[str, nn.GELU] = {}
    if isinstance(module, Mlp | HeadTransform) and isinstance(module.activation, nn.GELU):
        # Computed by the layer before it, in the same pass.
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
    """Scripted, so that a traced encoder keeps its `prepack` too."""
    return torch.jit.script(layer.eval())


def ways(precision: str) -> list[tuple[str, str, str]]:
    """(precision, encoder's, decoder's) to try in this order: those of the precision that was asked
    for, or for `auto` of each that this processor has instructions for, and of fp32."""
    asked = [precision]
    if precision == "auto":
        has = torch.cpu.get_capabilities()
        fast = {
            "int8": has.get("avx512_vnni") or has.get("avx_vnni") or has.get("amx_int8"),
            "bf16": has.get("avx512_bf16") or has.get("amx_bf16"),
        }
        asked = [*(name for name, supported in fast.items() if supported), "fp32"]
    return [(name, *parts) for name in asked for parts in WAYS[name]]
