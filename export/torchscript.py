"""Encoder and decoder as TorchScript. The encoder is traced: its shapes depend only on the batch
size, which stays dynamic. The decoder is scripted: the same code as the eager step, compiled."""

import torch
from torch import nn


def trace_encoder(encoder: nn.Module, image_size: int) -> torch.jit.ScriptModule:
    """Traces an encoder in evaluation mode, images (B, 3, S, S) -> memory (B, P, D). It is traced
    with batch size 2, because 1 may be recorded as a constant. It is frozen after loading, when its
    weights are packed."""
    example_B3SS = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        return torch.jit.trace(encoder.eval(), example_B3SS)


def script_decoder(decoder: nn.Module) -> torch.jit.ScriptModule:
    """Scripts a decoder in evaluation mode. It is frozen after loading, with packed weights."""
    return torch.jit.script(decoder.eval())
