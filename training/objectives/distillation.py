"""Word-level distillation: a student learns the words that its teachers would say next, and how
probable each is, beside the one that the person wrote (Hinton et al. 2015, arXiv:1503.02531; for
sequences Kim and Rush 2016, arXiv:1606.07947, section 3.1).

    loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teachers || student)

over every token of every caption. Several teachers speak as one, by the mean of their distributions
(an ensemble distilled into one). Both sides of the divergence are softened by the temperature T;
T^2 keeps its gradient as large as that of the cross-entropy, as Hinton et al. advise. Where they
take the teachers' cross-entropy, the divergence stands here: the gradient is the same, and it is 0
for a student that has nothing left to learn from them.

Teachers run without dropout and without gradient, on the very tensors that the student sees. The
sequence level is `training.distil_captions`, ordinary training on what teachers wrote.

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
    """The objective of a stage. With `frozen` a batch's photos are features of the one encoder that
    student and teachers share, otherwise images (B, 3, S, S), which the teachers encode too.

    No module, so that the teachers are no parameters of the model that is trained.
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
        """The loss summed over the caption tokens of a batch, their number, and the mean of both
        of its terms, in nats a token."""
        weight, temperature = self.choice.weight, self.choice.temperature
        said_BQ = batch.targets != IGNORED
        with torch.no_grad():
            memories = [memory_BPD] if self.frozen else self.teachers.encode(batch.photos)
            teachers_BQV = self.teachers.log_probs(
                batch.tokens, batch.positions, batch.mask, memories, temperature
            )
            teachers_NV = teachers_BQV[said_BQ]
        logits_NV = decoder.head(
            decoder.hidden(batch.tokens, batch.positions, batch.mask, memory_BPD, said_BQ)
        ).float()
        truth = F.cross_entropy(
            logits_NV, batch.targets[said_BQ], label_smoothing=self.smoothing, reduction="sum"
        )
        student_NV = (logits_NV / temperature).log_softmax(-1)
        divergence = temperature**2 * F.kl_div(
            student_NV, teachers_NV, reduction="sum", log_target=True
        )
        tokens = said_BQ.sum()
        figures = {
            "cross_entropy": truth.detach() / tokens,
            "divergence": divergence.detach() / tokens,
        }
        return (1 - weight) * truth + weight * divergence, tokens, figures
