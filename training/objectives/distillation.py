"""Word-level distillation: a student learns the teachers' distribution of the next word in addition
to the word in the human caption (Hinton et al. 2015, arXiv:1503.02531; for sequences Kim and Rush
2016, arXiv:1606.07947, section 3.1).

    loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teachers || student)

over every token of every caption. Several teachers are combined into one by the mean of their
distributions (ensemble distillation). Both sides of the divergence are softened by the temperature
T; the factor T^2 keeps the size of its gradient independent of T (Hinton et al.). Their
cross-entropy with the teachers is replaced by the divergence, which has the same gradient and is 0
for a student that equals its teachers.

Teachers run without dropout and without gradient, on the same tensors as the student. For
sequence-level distillation see `training.distil_captions`, which writes the teachers' captions into
a dataset.

Dimension key: B photos, Q packed tokens of a photo, N the tokens of all captions of a batch, P
memory tokens, D width, S image side, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import Distillation
from training.data.captions import IGNORED, Batch
from training.model import Decoder
from training.objectives.ensemble import Ensemble


class DistillationLoss:
    """The objective of a stage with `distillation`. With `frozen`, the photos of a batch are
    features of the encoder that student and teachers share; otherwise they are images
    (B, 3, S, S), which the teachers encode as well.

    This is no nn.Module, so that the teachers' weights are not parameters of the trained model.
    """

    dropout = True

    def __init__(
        self, choice: Distillation, teachers: Ensemble, smoothing: float, frozen: bool
    ) -> None:
        self.choice, self.teachers = choice, teachers
        self.smoothing, self.frozen = smoothing, frozen

    def __call__(
        self, decoder: Decoder, memory_BPD: Tensor, batch: Batch, epoch: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss summed over the caption tokens of a batch, the number of these tokens, and the
        mean of both terms in nats per token."""
        weight, temperature = self.choice.weight, self.choice.temperature
        real_BQ = batch.targets != IGNORED
        with torch.no_grad():
            memories = [memory_BPD] if self.frozen else self.teachers.encode(batch.photos)
            teachers_BQV = self.teachers.log_probs(
                batch.tokens, batch.positions, batch.mask, memories, temperature
            )
            teachers_MV = teachers_BQV[real_BQ]
        hidden_MD = decoder.hidden(batch.tokens, batch.positions, batch.mask, memory_BPD, real_BQ)
        targets_M, learnt_N = batch.learnt(real_BQ)
        if learnt_N is not None:
            teachers_MV, hidden_MD = teachers_MV[learnt_N], hidden_MD[learnt_N]
        logits_MV = decoder.head(hidden_MD).float()
        truth = F.cross_entropy(
            logits_MV, targets_M, label_smoothing=self.smoothing, reduction="sum"
        )
        student_MV = (logits_MV / temperature).log_softmax(-1)
        divergence = temperature**2 * F.kl_div(
            student_MV, teachers_MV, reduction="sum", log_target=True
        )
        tokens = (real_BQ if learnt_N is None else learnt_N).sum()
        figures = {
            "cross_entropy": truth.detach() / tokens,
            "divergence": divergence.detach() / tokens,
        }
        return (1 - weight) * truth + weight * divergence, tokens, figures
