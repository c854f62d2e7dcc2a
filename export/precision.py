"""What an export computes in: float32, bfloat16, or int8 weights.

    precision   encoder                   decoder                      output head
    fp32        packed float32            packed float32               packed float32
    bf16        packed bfloat16           packed bfloat16              packed float32
    int8        int8, 8-bit activations   int8, 16-bit activations     int8, 16-bit activations

The residual stream, layer norms and sums are float32 everywhere. The output head's logits decide
between words that are nearly as good; rounded to bfloat16 they would tie.
"""

import copy

import torch
from torch import nn

from export.packed_linear import GELUS, Int8Linear, PackedLinear
from training.model import CaptioningModel, Mlp

PRECISIONS = ("fp32", "bf16", "int8")


def in_precision(model: CaptioningModel, precision: str) -> CaptioningModel:
    """A copy of `model` for inference whose linear layers are those of `export.packed_linear`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _replace(model.encoder, precision, fine=False)
    head = model.decoder.head
    _replace(model.decoder, precision, fine=True)
    if precision == "bf16":
        model.decoder.add_module("head", _scripted(PackedLinear(head)))
    return model


def _replace(module: nn.Module, precision: str, fine: bool) -> None:
    activations: dict[str, str] = {}
    if isinstance(module, Mlp) and module.activation in GELUS:
        activations["up"], module.activation = module.activation, "done by up"
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, _layer(child, precision, fine, activations.get(name, "")))
        else:
            _replace(child, precision, fine)


def _layer(linear: nn.Linear, precision: str, fine: bool, activation: str) -> nn.Module:
    if precision == "int8":
        return _scripted(Int8Linear(linear, fine, activation))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return _scripted(PackedLinear(linear, dtype, activation))


def _scripted(layer: nn.Module) -> torch.jit.ScriptModule:
    """Scripted, so that a traced encoder keeps its `prepack` too."""
    return torch.jit.script(layer.eval())


def candidates(precision: str) -> tuple[str, ...]:
    """The precisions to try, best first: the one that was asked for, or for `auto` the fastest that
    this processor has instructions for, then slower ones."""
    if precision != "auto":
        return (precision,)
    has = torch.cpu.get_capabilities()
    fast = {
        "int8": has.get("avx512_vnni") or has.get("avx_vnni") or has.get("amx_int8"),
        "bf16": has.get("avx512_bf16") or has.get("amx_bf16"),
    }
    return (*(name for name, supported in fast.items() if supported), "fp32")
