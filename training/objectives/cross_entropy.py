"""Teacher-forced cross-entropy with label smoothing, summed over tokens, computed one slice of the
logits at a time.

The logits are the largest tensor of a training step: thousands of tokens by the vocabulary.
`torch.nn.functional.cross_entropy` makes about ten passes over them in float32 and keeps several
copies. A slice fits into the processor's cache, and only the logits are kept for the backward pass.

Dimension key: B photos, P memory tokens, D width, Q packed tokens of a photo, N tokens without
padding, n those of a slice, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from handler.caption_tokenizer import CaptionTokenizer
from training.data.captions import IGNORED, Batch
from training.data.manifest import Row
from training.model import Decoder

# Elements in a slice: half a megabyte of float32.
SLICE = 2**17


class CrossEntropyLoss:
    """The default objective: predict the next token of each caption of a photo.

    With an `adjustment` (V,) added to the logits, a token whose entry is t log p becomes less
    likely in inference, where it is not added, by p to the power t: the logit-adjusted loss of
    Menon et al. 2021 (arXiv:2007.07314), with p a token's share of the captions."""

    dropout = True

    def __init__(self, smoothing: float, adjustment: Tensor | None = None) -> None:
        self.smoothing, self.adjustment_V = smoothing, adjustment

    def __call__(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Cross-entropy summed over the caption tokens of a batch, and the number of these tokens;
        padding and prompts do not count."""
        real_BQ = batch.targets != IGNORED
        hidden_ND = decoder.hidden(batch.tokens, batch.positions, batch.mask, memory_BPD, real_BQ)
        targets_M, learnt_N = batch.learnt(real_BQ)
        hidden_MD = hidden_ND if learnt_N is None else hidden_ND[learnt_N]
        logits_MV = decoder.head(hidden_MD)
        if self.adjustment_V is not None:
            logits_MV = logits_MV + self.adjustment_V.to(logits_MV)
        total = summed_cross_entropy(logits_MV, targets_M, self.smoothing)
        tokens = real_BQ if learnt_N is None else learnt_N
        return total, tokens.sum(), {}


def log_shares(rows: Sequence[Row], tokenizer: CaptionTokenizer, vocabulary: int) -> Tensor:
    """The log of each token's share of the captions of `rows` and their ends, (V,); a token that
    does not occur counts as if it occurred once."""
    captions = [tokenizer.encode(caption) for row in rows for caption in row.captions]
    tokens = torch.tensor([*itertools.chain(*captions), *[tokenizer.end_id] * len(captions)])
    counts_V = tokens.bincount(minlength=vocabulary).clamp(min=1)
    return (counts_V / counts_V.sum()).log()


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor, smoothing: float) -> Tensor:
    """`F.cross_entropy(..., label_smoothing=smoothing, reduction="sum")` of float32 logits, equal
    up to rounding. The gradient has the data type of the logits."""
    total: Tensor = _SummedCrossEntropy.apply(logits_NV, targets_N, smoothing)  # type: ignore[no-untyped-call]
    return total


def _slices(logits_NV: Tensor) -> Iterator[slice]:
    tokens, size = len(logits_NV), max(1, SLICE // logits_NV.size(1))
    return (slice(start, start + size) for start in range(0, tokens, size))


class _SummedCrossEntropy(torch.autograd.Function):
    """With smoothing s, target y and log-probabilities l: - (1 - s) l_y - s mean(l)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, smoothing: float) -> Tensor:
        total = logits_NV.new_zeros((), dtype=torch.float32)
        for part in _slices(logits_NV):
            log_probs_nV = logits_NV[part].float().log_softmax(1)
            total -= (1 - smoothing) * log_probs_nV.gather(1, targets_N[part, None]).sum()
            if smoothing:
                total -= smoothing / log_probs_nV.size(1) * log_probs_nV.sum()
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for part in _slices(logits_NV):
            x_nV = logits_NV[part].float().softmax(1).sub_(ctx.smoothing / logits_NV.size(1))
            targets_n1 = targets_N[part, None]
            x_nV.scatter_add_(1, targets_n1, x_nV.new_full(targets_n1.shape, ctx.smoothing - 1))
            gradient_NV[part] = x_nV.mul_(scale)
        return gradient_NV, None, None
