"""The objective of a training stage as one module: its batch, its loss and its mode.

Dimension key: B photos, P memory tokens, D width, Q packed tokens of a photo.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from handler.caption_tokenizer import CaptionTokenizer
from training.config import Stage
from training.data.captions import Batch
from training.data.manifest import Row
from training.model import CaptioningModel, Decoder
from training.objectives.cross_entropy import CrossEntropyLoss, log_shares
from training.objectives.distillation import DistillationLoss
from training.objectives.ensemble import Ensemble
from training.objectives.self_critical import SelfCriticalLoss


class Loss(Protocol):
    """`dropout` is whether the model is trained with dropout. A call returns the loss summed over
    tokens, the number of tokens, and figures for the log. A loss of several terms, each a mean over
    its own tokens, returns a vector of sums and one of numbers."""

    dropout: bool

    def __call__(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


class BesideCrossEntropy:
    """The mean of a loss over its tokens, plus `weight` times the mean cross-entropy of people's
    captions. A reward alone is earned best by what is true of many photos, and rare words are lost;
    Wu et al. 2016 (arXiv:1609.08144) mix the two for translation."""

    def __init__(self, loss: Loss, cross_entropy: CrossEntropyLoss, weight: float) -> None:
        self.loss, self.cross_entropy, self.weight = loss, cross_entropy, weight
        self.dropout = loss.dropout

    def __call__(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, tokens, figures = self.loss(decoder, memory_BPD, batch, epoch)
        nll, count, _ = self.cross_entropy(decoder, memory_BPD, batch, epoch)
        figures["cross_entropy"] = (nll / count).detach()
        return torch.stack([total, self.weight * nll]), torch.stack([tokens, count]), figures


class Objective(nn.Module):
    """The loss of a stage in one forward pass, as DistributedDataParallel requires. With `frozen`,
    the photos of a batch are outputs of the encoder (B, P, D); otherwise images (B, 3, S, S)."""

    def __init__(self, model: CaptioningModel, loss: Loss, frozen: bool) -> None:
        super().__init__()
        self.model, self.loss, self.frozen = model, loss, frozen

    def set_mode(self) -> None:
        self.model.train(self.loss.dropout)

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        memory_BPD = batch.photos if self.frozen else self.model.encoder(batch.photos)
        return self.loss(self.model.decoder, memory_BPD, batch, epoch)


def make_loss(
    stage: Stage,
    teachers: Ensemble | None,
    rows: Sequence[Row],
    tokenizer: CaptionTokenizer,
    max_new_tokens: int,
    seed: int,
    prompt: Sequence[int],
    vocabulary: int,
) -> Loss:
    """The loss of a stage that trains on `rows`, whose captions follow the ids of a `prompt`, a
    decoder with a `vocabulary` of that size. `teachers` are required for distillation."""
    if stage.distillation is not None:
        assert teachers is not None
        frozen = stage.encoder == "frozen"
        return DistillationLoss(stage.distillation, teachers, stage.smoothing, frozen)
    adjustment_V = None
    if stage.logit_adjustment:
        adjustment_V = stage.logit_adjustment * log_shares(rows, tokenizer, vocabulary)
    cross_entropy = CrossEntropyLoss(stage.smoothing, adjustment_V)
    if stage.self_critical is None:
        return cross_entropy
    samples = SelfCriticalLoss(stage.self_critical, rows, tokenizer, max_new_tokens, seed, prompt)
    weight = stage.self_critical.cross_entropy
    return BesideCrossEntropy(samples, cross_entropy, weight) if weight else samples
