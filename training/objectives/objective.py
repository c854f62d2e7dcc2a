"""What a stage of training learns, as one module: its batch, its loss and its mode.

Dimension key: B photos, P memory tokens, D width, Q packed tokens of a photo.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from training.config import Stage
from training.data.captions import Batch
from training.data.manifest import Row
from training.model import CaptioningModel, Decoder
from training.objectives.cross_entropy import CrossEntropyLoss
from training.objectives.distillation import DistillationLoss, Student, load_teachers
from training.objectives.self_critical import SelfCriticalLoss


class Loss(Protocol):
    """`dropout` says whether the model trains with dropout. A call returns the loss summed over
    tokens, how many tokens there are, and figures for the log."""

    dropout: bool

    def __call__(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


class Objective(nn.Module):
    """A stage's loss in one forward pass, as DistributedDataParallel needs it. With `frozen` a
    batch's photos are the encoder's outputs (B, P, D), otherwise images (B, 3, S, S)."""

    def __init__(self, model: CaptioningModel, loss: Loss, frozen: bool) -> None:
        super().__init__()
        self.model, self.loss, self.frozen = model, loss, frozen

    def set_mode(self) -> None:
        self.model.train(self.loss.dropout)

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        memory_BPD = batch.photos if self.frozen else self.model.encoder(batch.photos)
        return self.loss(self.model.decoder, memory_BPD, batch, epoch)


def make_loss(stage: Stage, student: Student, rows: Sequence[Row], seed: int) -> Loss:
    """The loss of a stage that trains `student` on `rows`. Raises UserError for teachers that do
    not fit."""
    if stage.distillation is not None:
        frozen = stage.encoder == "frozen"
        teachers = load_teachers(stage, student, frozen)
        return DistillationLoss(stage.distillation, teachers, stage.smoothing, frozen)
    if stage.self_critical is not None:
        longest = student.max_tokens - 1
        return SelfCriticalLoss(stage.self_critical, rows, student.tokenizer, longest, seed)
    return CrossEntropyLoss(stage.smoothing)
