"""Cross-entropy with label smoothing, summed over tokens, a slice of the logits at a time.

The logits are the largest tensor of a decoder's step: some thousand tokens by the vocabulary.
`torch.nn.functional.cross_entropy` goes over all of them about ten times, in float32, and keeps
them twice; slices stay in the processor's cache, and only the logits themselves are kept.

Dimension key: N tokens, n those of a slice, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in a slice: half a megabyte of float32.
SLICE = 2**17


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor, smoothing: float) -> Tensor:
    """As `F.cross_entropy(..., label_smoothing=smoothing, reduction="sum")` of float32 logits, to
    the rounding; the gradient comes in the type of the logits."""
    return _SummedCrossEntropy.apply(logits_NV, targets_N, smoothing)


def _slices(logits_NV: Tensor) -> Iterator[slice]:
    tokens, size = len(logits_NV), max(1, SLICE // logits_NV.size(1))
    return (slice(start, start + size) for start in range(0, tokens, size))


class _SummedCrossEntropy(torch.autograd.Function):
    """With smoothing s and target y: log(sum exp(x)) - (1 - s) x_y - s mean(x)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, smoothing: float) -> Tensor:
        normaliser_N1 = logits_NV.new_empty((len(logits_NV), 1), dtype=torch.float32)
        total = normaliser_N1.new_zeros(())
        for part in _slices(logits_NV):
            x_nV = logits_NV[part].float()
            normaliser_N1[part] = x_nV.logsumexp(1, keepdim=True)
            target_n1 = x_nV.gather(1, targets_N[part, None])
            total += (normaliser_N1[part] - (1 - smoothing) * target_n1).sum()
            total -= smoothing / x_nV.size(1) * x_nV.sum()
        ctx.save_for_backward(logits_NV, targets_N, normaliser_N1)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, normaliser_N1 = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for part in _slices(logits_NV):
            x_nV = (logits_NV[part].float() - normaliser_N1[part]).exp_()
            x_nV -= ctx.smoothing / x_nV.size(1)
            targets_n1 = targets_N[part, None]
            share_n1 = x_nV.new_full(targets_n1.shape, ctx.smoothing - 1)
            x_nV.scatter_add_(1, targets_n1, share_n1)
            gradient_NV[part] = x_nV.mul_(scale)
        return gradient_NV, None, None
