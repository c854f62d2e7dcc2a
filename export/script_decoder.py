"""The decoder as TorchScript, by scripting: the very code of the eager step, compiled."""

import torch
from torch import nn

METHODS = ["begin", "new_cache", "step", "attention", "vocab_size", "max_positions"]


def script_decoder(decoder: nn.Module) -> torch.jit.ScriptModule:
    """Scripts a decoder in evaluation mode and freezes it, keeping the methods of the search."""
    return torch.jit.freeze(torch.jit.script(decoder.eval()), preserved_attrs=METHODS)
