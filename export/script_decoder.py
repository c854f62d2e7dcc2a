"""The decoder as TorchScript, by scripting: the very code of the eager step, compiled."""

import torch
from torch import nn


def script_decoder(decoder: nn.Module) -> torch.jit.ScriptModule:
    """Scripts a decoder in evaluation mode. It is frozen when it is loaded, with packed weights."""
    return torch.jit.script(decoder.eval())
