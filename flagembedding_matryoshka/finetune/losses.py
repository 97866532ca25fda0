"""Losses of labels and of teachers, pure functions of scores (arXiv 2501.16302, section on cascaded self-distillation).

Scores of a pass are (exits, queries, group): exits from the shallowest to the deepest, a positive first in a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flagembedding_matryoshka.mining.rows import RowKind

FIXED_TEACHER_STEP = 8
EPSILON = 1e-10
"""Least divisor in `lambda_loss` and `position_aware_list_mle`."""
LAMBDA_MU = 10.0
"""Weight of NDCGLoss2 beside LambdaRank in NDCGLoss2++ (Wang et al., CIKM 2018, section 6)."""


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


def rank_net(scores: Tensor, grades: Tensor) -> Tensor:
    """Return −mean log2 sigmoid(sᵢ − sⱼ) over all pairs with gradeᵢ > gradeⱼ (Burges et al., ICML 2005)."""
    return _pairwise_loss(scores, grades, 1.0)


def lambda_loss(scores: Tensor, grades: Tensor) -> Tensor:
    """Return LambdaLoss with the weights of NDCGLoss2++ and the gain 2^grade − 1 (Wang et al., CIKM 2018, eq. 17).

    The weight of a pair is what exchanging it changes in nDCG, at the ranks by the scores and at neighbouring ranks.
    """
    by_score = scores.detach().argsort(dim=-1, descending=True, stable=True)
    scores, grades = scores.gather(-1, by_score), grades.gather(-1, by_score)
    discounts = _discounts(scores)
    ideal = grades.sort(-1, descending=True).values
    ideal_dcg = ((ideal.exp2() - 1) * discounts).sum(-1, keepdim=True).clamp(min=EPSILON)
    gains = (grades.exp2() - 1) / ideal_dcg
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    distances = (ranks[:, None] - ranks).abs()
    # 1 / log2(1 + d) − 1 / log2(2 + d) for ranks that are d apart, 0 on the diagonal.
    neighbours = (discounts[(distances - 1).clamp(min=0)] - discounts[distances]).masked_fill(distances == 0, 0.0)
    exchanged = (discounts[:, None] - discounts).abs()
    weights = (LAMBDA_MU * neighbours + exchanged) * (gains[..., :, None] - gains[..., None, :]).abs()
    return _pairwise_loss(scores, grades, weights)


def list_net(scores: Tensor, grades: Tensor) -> Tensor:
    """Return −mean Σ softmax(grades) · log softmax(scores) (Cao et al., ICML 2007)."""
    return cross_entropy(scores, grades)


def position_aware_list_mle(scores: Tensor, grades: Tensor) -> Tensor:
    """Return −mean Σ wᵣ · log P(passage of rank r | those of rank ≥ r), ranks by grade (Lan et al., UAI 2014).

    P is the softmax over the scores, and wᵣ is proportional to 2^(group − r) − 1 with the sum 1. Passages with the same
    grade rank in the order of the group.
    """
    scores = scores.gather(-1, grades.argsort(dim=-1, descending=True, stable=True))
    normalizers = scores.flip(-1).logcumsumexp(-1).flip(-1)
    group = scores.shape[-1]
    # 2^(group − r) − 1 over 2^group: the same ratios, and finite for any group.
    weights = 2.0 ** -torch.arange(1, group + 1, device=scores.device, dtype=scores.dtype) - 2.0**-group
    weights = weights / (weights.sum() + EPSILON)
    return -(weights * (scores - normalizers)).sum(-1).mean()


def adr_mse(scores: Tensor, grades: Tensor) -> Tensor:
    """Return the mean of (rankᵢ − approximate rankᵢ)² / log2(1 + rankᵢ) (Schlatt et al., arXiv 2405.07920).

    rankᵢ is by grade; passages with the same grade have their mean rank. The approximate rank is
    1 + Σ sigmoid(sⱼ − sᵢ) over j ≠ i (Qin et al., 2010).
    """
    above = (grades[..., None, :] > grades[..., :, None]).sum(-1)
    equal = (grades[..., None, :] == grades[..., :, None]).sum(-1)
    ranks = above + (equal + 1) / 2
    approximate = 0.5 + (scores[..., None, :] - scores[..., :, None]).sigmoid().sum(-1)
    return ((ranks - approximate).square() / (ranks + 1).log2()).mean()


def binary_cross_entropy(scores: Tensor, grades: Tensor) -> Tensor:
    """Return the mean binary cross entropy of each passage's sigmoid and its grade; grades above 1 count as 1."""
    return F.binary_cross_entropy_with_logits(scores, grades.clamp(max=1.0))


def _discounts(scores: Tensor) -> Tensor:
    """Return 1 / log2(1 + rank) of each rank, (group,)."""
    return 1 / torch.arange(2, scores.shape[-1] + 2, device=scores.device, dtype=scores.dtype).log2()


def _pairwise_loss(scores: Tensor, grades: Tensor, weights: Tensor | float) -> Tensor:
    """Return −mean weight · log2 sigmoid(sᵢ − sⱼ) over all pairs of all groups with gradeᵢ > gradeⱼ; 0 without one.

    Args:
        scores, grades: (queries, group).
        weights: a number, or (queries, group, group).
    """
    margins = scores[..., :, None] - scores[..., None, :]
    is_ordered = grades[..., :, None] > grades[..., None, :]
    losses = (weights * F.logsigmoid(margins)).masked_fill(~is_ordered, 0.0)
    return -losses.sum() / is_ordered.sum().clamp(min=1) / math.log(2)


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


LabelLoss = Literal["contrastive", "ranknet", "lambda", "listnet", "plistmle", "adr_mse", "bce"]
GRADED_LOSSES: dict[LabelLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "ranknet": rank_net,
    "lambda": lambda_loss,
    "listnet": list_net,
    "plistmle": position_aware_list_mle,
    "adr_mse": adr_mse,
    "bce": binary_cross_entropy,
}
"""Losses of scores and grades, both (queries, group), with several positives in a group. A grade is at least 0, and 0
for an irrelevant passage. Beside them `contrastive_loss` needs no grades and has one positive in a group."""
DistillLoss = Literal["ce", "kl", "mse", "margin_mse"]
DISTILL_LOSSES: dict[DistillLoss, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "kl": kl_divergence,
    "mse": F.mse_loss,
    "margin_mse": margin_mse,
}
"""Losses between scores and a teacher's scores, both (queries, group). ce and kl compare the softmax over the group,
mse and margin_mse raw scores."""


@dataclass(frozen=True)
class LossTerms:
    """Losses of the terms and their weights.

    Attributes:
        label_loss: loss between an exit's scores and the labels.
        distill_loss: loss between an exit's scores and its teacher's. The teacher gets no gradient.
        distill_temperature: divisor of scores and teacher's scores in ce and kl. The loss is multiplied by its square,
            so that its gradients do not shrink (Hinton et al., arXiv 1503.02531).
        label_weight: weight of the term of the labels.
        distill_weight: weight of the terms `data_scores` and `original`.
        deeper_exit_weight: weight of the term `deeper_exit`.
    """

    label_loss: LabelLoss = "contrastive"
    distill_loss: DistillLoss = "ce"
    distill_temperature: float = 1.0
    label_weight: float = 1.0
    distill_weight: float = 1.0
    deeper_exit_weight: float = 1.0

    def label(self, scores: Tensor, grades: Tensor | None) -> Tensor:
        """Return the loss of the labels; `scores` and `grades` are (queries, group)."""
        if self.label_loss == "contrastive":
            return contrastive_loss(scores)
        assert grades is not None
        return GRADED_LOSSES[self.label_loss](scores, grades)

    def distillation(self, scores: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of a teacher; `scores` and `teacher` are (queries, group)."""
        temperature = self.distill_temperature
        loss = DISTILL_LOSSES[self.distill_loss]
        return temperature**2 * loss(scores / temperature, teacher.detach() / temperature)

    def weighted_sum(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of an exit's terms, each times its weight."""
        weights: dict[str, float] = {
            self.label_loss: self.label_weight,
            "data_scores": self.distill_weight,
            "original": self.distill_weight,
            "deeper_exit": self.deeper_exit_weight,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


DEFAULT_TERMS = LossTerms()


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
    loss_terms: LossTerms = DEFAULT_TERMS,
    original_scores: Tensor | None = None,
    grades: Tensor | None = None,
) -> list[dict[str, Tensor]]:
    """Return the terms of the loss at each exit, from the shallowest, without their weights.

    Args:
        method: the teachers.
        student: (exits, queries, group) scores of the trained pass.
        full_width: (exits, queries, group) scores of a pass without compression; needed if deeper exits teach.
        data_scores: (queries, group) teacher scores; needed if the data teaches.
        loss_terms: losses of the terms.
        original_scores: (queries, group) scores of the model before training; needed if it is the teacher.
        grades: (queries, group), 0 for irrelevant passages; needed by the losses in `GRADED_LOSSES`.

    Returns:
        For each exit, scalars by name: the name of the loss of the labels, and `data_scores` and `deeper_exit` if
        `method` has them. If the model before training is the teacher: `original` only.

    Raises:
        ValueError: if scores that `method` needs are missing or have another shape.
    """
    if method.deeper_exit != "none" and (full_width is None or full_width.shape != student.shape):
        raise ValueError(f"full_width must have the shape {tuple(student.shape)}, got {_shape(full_width)}.")
    if method.data_scores != "none" and (data_scores is None or data_scores.shape != student.shape[1:]):
        raise ValueError(f"data_scores must have the shape {tuple(student.shape[1:])}, got {_shape(data_scores)}.")
    if method.original:
        if original_scores is None or original_scores.shape != student.shape[1:]:
            raise ValueError(
                f"original_scores must have the shape {tuple(student.shape[1:])}, got {_shape(original_scores)}."
            )
        return [{"original": loss_terms.distillation(scores, original_scores)} for scores in student]
    if loss_terms.label_loss != "contrastive" and (grades is None or grades.shape != student.shape[1:]):
        raise ValueError(f"grades must have the shape {tuple(student.shape[1:])}, got {_shape(grades)}.")
    losses = []
    for index, scores in enumerate(student.flip(0)):
        terms: dict[str, Tensor] = {loss_terms.label_loss: loss_terms.label(scores, grades)}
        if data_scores is not None and (
            method.data_scores == "every" or (method.data_scores == "deepest" and not index)
        ):
            terms["data_scores"] = loss_terms.distillation(scores, data_scores)
        teacher = teaching_exit(method, index)
        if teacher is not None and full_width is not None:
            terms["deeper_exit"] = loss_terms.distillation(scores, full_width.flip(0)[teacher])
        losses.append(terms)
    return losses[::-1]


def _shape(scores: Tensor | None) -> str:
    return "none" if scores is None else str(tuple(scores.shape))
