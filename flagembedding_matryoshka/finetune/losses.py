"""Self-distillation losses, pure functions of scores (arXiv 2501.16302, section on cascaded self-distillation).

Scores of a pass are (exits, queries, group): exits from the shallowest to the deepest, the positive first in a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flagembedding_matryoshka.mining.rows import RowKind

FIXED_TEACHER_STEP = 8


@dataclass(frozen=True)
class TrainMethod:
    """Teachers of the exits, in addition to the labels.

    Attributes:
        deeper_exit: the deeper exit of the full-width pass that teaches an exit. "every_8th" is the nearest deeper one
            among the deepest exit, the 8th from it, the 16th, and so on.
        data_scores: exits that learn from the teacher scores in the data.
        original: True if the only teacher of every exit is the model before training, at its deepest exit and full
            width. Labels are then ignored.
    """

    deeper_exit: Literal["none", "deepest", "next", "every_8th"]
    data_scores: Literal["none", "deepest", "every"]
    original: bool = False

    @property
    def row_kind(self) -> RowKind:
        """The kind of training row that the method needs."""
        if self.original:
            return "passages"
        return "labels" if self.data_scores == "none" else "scores"


TrainMethodName = Literal[
    "normal",
    "distill",
    "distill_teacher",
    "distill_final_layer",
    "distill_last_layer",
    "distill_fix_layer",
    "distill_last_layer_teacher",
    "distill_fix_layer_teacher",
    "distill_final_layer_teacher",
    "self_distill",
]
TRAIN_METHODS: dict[TrainMethodName, TrainMethod] = {
    "normal": TrainMethod("none", "none"),
    "distill": TrainMethod("none", "deepest"),
    "distill_teacher": TrainMethod("none", "every"),
    "distill_final_layer": TrainMethod("deepest", "deepest"),
    "distill_last_layer": TrainMethod("next", "deepest"),
    "distill_fix_layer": TrainMethod("every_8th", "deepest"),
    "distill_last_layer_teacher": TrainMethod("next", "every"),
    "distill_fix_layer_teacher": TrainMethod("every_8th", "every"),
    "distill_final_layer_teacher": TrainMethod("none", "every"),
    "self_distill": TrainMethod("none", "none", original=True),
}


def contrastive_loss(scores: Tensor) -> Tensor:
    """Return the mean cross entropy of the positive, the first of its group; `scores` is (queries, group)."""
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))


def cross_entropy(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return −mean Σ softmax(teacher) · log softmax(scores)."""
    return -(teacher.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()


def kl_divergence(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return mean Σ softmax(teacher) · (log softmax(teacher) − log softmax(scores)).

    Its gradients equal those of `cross_entropy`.
    """
    return F.kl_div(scores.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def margin_mse(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of the positive's margins (Hofstätter et al., arXiv 2010.02666, eq. 2)."""
    return F.mse_loss(scores[:, :1] - scores[:, 1:], teacher[:, :1] - teacher[:, 1:])


DistillLoss = Literal["ce", "kl", "mse", "margin_mse"]
DISTILL_LOSSES: dict[DistillLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "kl": kl_divergence,
    "mse": F.mse_loss,
    "margin_mse": margin_mse,
}
"""Losses between scores and a teacher's scores, both (queries, group). ce and kl compare the softmax over the group,
mse and margin_mse raw scores."""


def teaching_exit(method: TrainMethod, index: int) -> int | None:
    """Return the deeper exit that teaches exit `index`, None without one. Both count from 0, the deepest exit."""
    if index == 0 or method.deeper_exit == "none":
        return None
    if method.deeper_exit == "deepest":
        return 0
    if method.deeper_exit == "next":
        return index - 1
    return (index - 1) // FIXED_TEACHER_STEP * FIXED_TEACHER_STEP


def layer_wise_losses(
    method: TrainMethod,
    student: Tensor,
    full_width: Tensor | None = None,
    data_scores: Tensor | None = None,
    distill_loss: DistillLoss = "ce",
    original_scores: Tensor | None = None,
) -> list[dict[str, Tensor]]:
    """Return the terms of the loss at each exit, from the shallowest. The loss is the sum of all terms.

    Args:
        method: the teachers.
        student: (exits, queries, group) scores of the trained pass.
        full_width: (exits, queries, group) scores of a pass without compression; needed if deeper exits teach.
        data_scores: (queries, group) teacher scores; needed if the data teaches.
        distill_loss: loss between an exit's scores and its teacher's. The teacher gets no gradient.
        original_scores: (queries, group) scores of the model before training; needed if it is the teacher.

    Returns:
        For each exit, scalars by name: `contrastive`, and `data_scores` and `deeper_exit` if `method` has them. If the
        model before training is the teacher: `original` only.

    Raises:
        ValueError: if scores that `method` needs are missing or have another shape.
    """
    if method.deeper_exit != "none" and (full_width is None or full_width.shape != student.shape):
        raise ValueError(f"full_width must have the shape {tuple(student.shape)}, got {_shape(full_width)}.")
    if method.data_scores != "none" and (data_scores is None or data_scores.shape != student.shape[1:]):
        raise ValueError(f"data_scores must have the shape {tuple(student.shape[1:])}, got {_shape(data_scores)}.")
    distillation = DISTILL_LOSSES[distill_loss]
    if method.original:
        if original_scores is None or original_scores.shape != student.shape[1:]:
            raise ValueError(
                f"original_scores must have the shape {tuple(student.shape[1:])}, got {_shape(original_scores)}."
            )
        return [{"original": distillation(scores, original_scores.detach())} for scores in student]
    losses = []
    for index, scores in enumerate(student.flip(0)):
        terms = {"contrastive": contrastive_loss(scores)}
        if data_scores is not None and (
            method.data_scores == "every" or (method.data_scores == "deepest" and not index)
        ):
            terms["data_scores"] = distillation(scores, data_scores.detach())
        teacher = teaching_exit(method, index)
        if teacher is not None and full_width is not None:
            terms["deeper_exit"] = distillation(scores, full_width.flip(0)[teacher].detach())
        losses.append(terms)
    return losses[::-1]


def _shape(scores: Tensor | None) -> str:
    return "none" if scores is None else str(tuple(scores.shape))
