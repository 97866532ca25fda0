"""Self-distillation losses, pure functions on scores (arXiv 2501.16302, section on cascaded self-distillation).

Scores of one pass are (exits, queries, group): exits from the shallowest to the deepest, the positive first in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

FIXED_TEACHER_STEP = 8


@dataclass(frozen=True)
class TrainMethod:
    """Who teaches an exit, beside the label.

    Attributes:
        deeper_exit: which deeper exit of the full-width pass teaches an exit: none, the deepest, the next deeper one,
            or the nearest deeper one of the deepest, the 8th from it, the 16th, …
        data_scores: which exits learn from the teacher scores in the data.
    """

    deeper_exit: Literal["none", "deepest", "next", "every_8th"]
    data_scores: Literal["none", "deepest", "every"]


TRAIN_METHODS = {
    "normal": TrainMethod("none", "none"),
    "distill_final_layer": TrainMethod("deepest", "deepest"),
    "distill_last_layer": TrainMethod("next", "deepest"),
    "distill_fix_layer": TrainMethod("every_8th", "deepest"),
    "distill_last_layer_teacher": TrainMethod("next", "every"),
    "distill_fix_layer_teacher": TrainMethod("every_8th", "every"),
    "distill_final_layer_teacher": TrainMethod("none", "every"),
}


def contrastive_loss(scores: Tensor) -> Tensor:
    """Cross entropy of the positive, the first of its group; `scores` (queries, group)."""
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))


def distillation_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """−mean Σ softmax(teacher) · log softmax(scores); both (queries, group). No gradient reaches `teacher`."""
    return -(teacher.detach().softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()


def teaching_exit(method: TrainMethod, index: int) -> int | None:
    """The deeper exit that teaches exit `index`, both counted from the deepest (0) up; None where none does."""
    if index == 0 or method.deeper_exit == "none":
        return None
    if method.deeper_exit == "deepest":
        return 0
    if method.deeper_exit == "next":
        return index - 1
    return (index - 1) // FIXED_TEACHER_STEP * FIXED_TEACHER_STEP


def layer_wise_loss(
    method: TrainMethod, student: Tensor, full_width: Tensor | None = None, data_scores: Tensor | None = None
) -> Tensor:
    """The sum over all exits of the contrastive term and the terms that `method` adds.

    Args:
        student: (exits, queries, group) scores of the pass that learns.
        full_width: (exits, queries, group) scores of a pass without compression; needed where deeper exits teach.
        data_scores: (queries, group) teacher scores; needed where the data teaches.

    Raises:
        ValueError: if scores that `method` needs are missing or have another shape.
    """
    if method.deeper_exit != "none" and (full_width is None or full_width.shape != student.shape):
        raise ValueError(f"full_width scores must be {tuple(student.shape)}, got {_shape(full_width)}.")
    if method.data_scores != "none" and (data_scores is None or data_scores.shape != student.shape[1:]):
        raise ValueError(f"data_scores must be {tuple(student.shape[1:])}, got {_shape(data_scores)}.")
    loss = student.new_zeros(())
    for index, scores in enumerate(student.flip(0)):
        loss = loss + contrastive_loss(scores)
        if data_scores is not None and (
            method.data_scores == "every" or (method.data_scores == "deepest" and not index)
        ):
            loss = loss + distillation_loss(scores, data_scores)
        teacher = teaching_exit(method, index)
        if teacher is not None and full_width is not None:
            loss = loss + distillation_loss(scores, full_width.flip(0)[teacher])
    return loss


def _shape(scores: Tensor | None) -> str:
    return "none" if scores is None else str(tuple(scores.shape))
