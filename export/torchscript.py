"""Encoder and decoder as TorchScript. The encoder is traced: its shapes depend on the batch size
alone, which stays free. The decoder is scripted: the very code of the eager step, compiled."""

import torch
from torch import nn


def trace_encoder(encoder: nn.Module, image_size: int) -> torch.jit.ScriptModule:
    """Traces an encoder in evaluation mode, images (B, 3, S, S) -> memory (B, P, D). Traced at
    batch 2, because batch 1 can be mistaken for a constant. It is frozen when it is loaded, with
    packed weights."""
    example_B3SS = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        return torch.jit.trace(encoder.eval(), example_B3SS)


def script_decoder(decoder: nn.Module) -> torch.jit.ScriptModule:
    """Scripts a decoder in evaluation mode. It is frozen when it is loaded, with packed weights."""
    return torch.jit.script(decoder.eval())
