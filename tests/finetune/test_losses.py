import json

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses as cross_encoder_losses
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from flagembedding_matryoshka import CostWiseMistralForCausalLM
from flagembedding_matryoshka.finetune.losses import (
    DISTILL_LOSSES,
    GRADED_LOSSES,
    TRAIN_METHODS,
    LossTerms,
    contrastive_loss,
    layer_wise_losses,
    teaching_exit,
)

EXITS, QUERIES, GROUP = 10, 3, 4


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    student, full = torch.randn(2, EXITS, QUERIES, GROUP, generator=generator)
    return student, full, torch.randn(QUERIES, GROUP, generator=generator)


def layer_wise_loss(*args, **options):
    return sum(term for terms in layer_wise_losses(*args, **options) for term in terms.values())


def slow_loss(name, student, full, data, original):
    """The reference's definition of each method, term by term."""
    total = 0.0
    deepest_first, full = student.flip(0), full.flip(0)
    for i, exit_scores in enumerate(deepest_first):
        for query in range(QUERIES):
            log_probability = torch.log(torch.exp(exit_scores[query]) / torch.exp(exit_scores[query]).sum())
            teachers = []
            if name == "self_distill":
                teachers.append(original[query])
            else:
                total -= log_probability[0] / QUERIES
            if name.endswith("_teacher") or (name not in ("normal", "self_distill") and i == 0):
                teachers.append(data[query])
            if i > 0 and name == "distill_final_layer":
                teachers.append(full[0][query])
            if i > 0 and name.startswith("distill_last_layer"):
                teachers.append(full[i - 1][query])
            if i > 0 and name.startswith("distill_fix_layer"):
                teachers.append(full[max(anchor for anchor in (0, 8, 16) if anchor < i)][query])
            for teacher in teachers:
                total -= (torch.exp(teacher) / torch.exp(teacher).sum() * log_probability).sum() / QUERIES
    return total


@pytest.mark.parametrize("name", TRAIN_METHODS)
def test_equals_the_table_term_by_term(name, scores):
    original = scores[2].flip(1)
    loss = layer_wise_loss(TRAIN_METHODS[name], *scores, original_scores=original)
    torch.testing.assert_close(loss, slow_loss(name, *scores, original))


def test_teachers_of_a_deep_model():
    method = TRAIN_METHODS["distill_fix_layer"]
    assert [teaching_exit(method, index) for index in (0, 1, 8, 9, 16, 17)] == [None, 0, 0, 8, 8, 16]


def test_no_gradient_reaches_a_teacher(scores):
    student, full, data = (value.requires_grad_() for value in scores)
    layer_wise_loss(TRAIN_METHODS["distill_fix_layer_teacher"], student, full, data).backward()
    assert full.grad is None and data.grad is None
    assert student.grad.isfinite().all()


def test_terms_are_those_of_the_method_from_the_shallowest_exit(scores):
    losses = layer_wise_losses(TRAIN_METHODS["distill_last_layer"], *scores)
    assert [sorted(terms) for terms in losses] == [["contrastive", "deeper_exit"]] * 9 + [
        ["contrastive", "data_scores"]
    ]
    assert losses[0]["contrastive"] == contrastive_loss(scores[0][0])
    losses = layer_wise_losses(TRAIN_METHODS["distill_teacher"], *scores)
    assert [sorted(terms) for terms in losses] == [["contrastive", "data_scores"]] * EXITS


@pytest.mark.parametrize("name", DISTILL_LOSSES)
def test_distillation_is_least_where_student_and_teacher_agree(name, scores):
    student, _, teacher = scores
    loss = DISTILL_LOSSES[name]
    agreeing = teacher.clone().requires_grad_()
    loss(agreeing, teacher).backward()
    assert agreeing.grad.abs().max() < 1e-6
    assert all(loss(teacher, teacher) < loss(other, teacher) for other in student)


def test_distill_losses_against_their_formulas(scores):
    student, teacher = scores[0][0], scores[2]
    share, wanted = student.softmax(-1), teacher.softmax(-1)
    assert DISTILL_LOSSES["ce"](student, teacher) == pytest.approx(-(wanted * share.log()).sum().item() / QUERIES)
    assert DISTILL_LOSSES["kl"](student, teacher) == pytest.approx(
        (wanted * (wanted / share).log()).sum().item() / QUERIES, rel=1e-5
    )
    assert DISTILL_LOSSES["mse"](student, teacher) == pytest.approx(((student - teacher) ** 2).mean().item())
    margins = [
        ((student[q, 0] - student[q, n]) - (teacher[q, 0] - teacher[q, n])).item() ** 2
        for q in range(QUERIES)
        for n in range(1, GROUP)
    ]
    assert DISTILL_LOSSES["margin_mse"](student, teacher) == pytest.approx(sum(margins) / len(margins))


def test_the_loss_is_a_choice(scores):
    method = TRAIN_METHODS["distill_last_layer"]
    terms = layer_wise_losses(method, *scores, loss_terms=LossTerms(distill_loss="mse"))[0]
    assert terms["deeper_exit"] == pytest.approx(((scores[0][0] - scores[1][1]) ** 2).mean().item())


class GivenScores(CrossEncoder):
    """A CrossEncoder without a network, whose scores are given."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores):
        nn.Module.__init__(self)
        self.scores = scores.flatten()

    def preprocess(self, pairs, **options):
        return {"number": torch.tensor([number for _, number in pairs])}

    def forward(self, features):
        return {"scores": self.scores[features["number"]]}


THEIRS = {
    "ranknet": cross_encoder_losses.RankNetLoss,
    "lambda": cross_encoder_losses.LambdaLoss,
    "listnet": cross_encoder_losses.ListNetLoss,
    "plistmle": lambda model: cross_encoder_losses.PListMLELoss(model, respect_input_order=False),
    "adr_mse": cross_encoder_losses.ADRMSELoss,
    "bce": cross_encoder_losses.BinaryCrossEntropyLoss,
}


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("name", GRADED_LOSSES)
def test_losses_of_grades_equal_those_of_sentence_transformers(name, scale):
    generator = torch.Generator().manual_seed(1)
    shape = (5, 7)
    scores = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).float().requires_grad_()
    grades = torch.randint(0, 4, shape, generator=generator).float()
    if name == "bce":
        grades = grades.clamp(max=1)
    elif name == "plistmle":  # their order of equal grades is arbitrary
        grades = torch.rand(shape, generator=generator).argsort(-1).float()
    theirs_of = scores.detach().clone().requires_grad_()
    queries, numbers = ["q"] * len(scores), torch.arange(scores.numel()).view(shape)
    if name == "bce":
        inputs = [["q"] * scores.numel(), numbers.flatten().tolist()], grades.flatten()
    else:
        inputs = [queries, numbers.tolist()], list(grades)
    theirs = THEIRS[name](GivenScores(theirs_of))(*inputs)
    ours = GRADED_LOSSES[name](scores, grades)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(scores.grad, theirs_of.grad, atol=1e-6, rtol=1e-5)


def test_a_group_without_a_better_passage_adds_nothing_to_pairwise_losses(scores):
    student, grades = scores[0][0].requires_grad_(), torch.ones(QUERIES, GROUP)
    for name in ("ranknet", "lambda"):
        loss = GRADED_LOSSES[name](student, grades)
        loss.backward()
        assert loss == 0 and student.grad.abs().max() == 0


def test_position_aware_weights_are_finite_in_a_long_list():
    scores = torch.zeros(1, 300, requires_grad=True)
    loss = GRADED_LOSSES["plistmle"](scores, torch.arange(300.0)[None])
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


def test_grades_teach_every_exit_in_place_of_the_first_positive(scores):
    grades = torch.tensor([[2.0, 1, 0, 0], [1, 0, 0, 0], [3, 1, 1, 0]])
    terms = LossTerms(label_loss="listnet")
    exits = layer_wise_losses(TRAIN_METHODS["distill_last_layer"], *scores, terms, grades=grades)
    assert [sorted(losses) for losses in exits] == [["deeper_exit", "listnet"]] * 9 + [["data_scores", "listnet"]]
    for losses, student in zip(exits, scores[0], strict=True):
        assert losses["listnet"] == GRADED_LOSSES["listnet"](student, grades)
    with pytest.raises(ValueError, match=r"grades must have the shape \(3, 4\), got none"):
        layer_wise_losses(TRAIN_METHODS["normal"], *scores, terms)


def test_each_term_has_a_weight(scores):
    terms = LossTerms(label_weight=0.5, distill_weight=2.0, deeper_exit_weight=3.0)
    exits = layer_wise_losses(TRAIN_METHODS["distill_fix_layer_teacher"], *scores, terms)
    shallow = exits[0]
    expected = 0.5 * shallow["contrastive"] + 2 * shallow["data_scores"] + 3 * shallow["deeper_exit"]
    torch.testing.assert_close(terms.weighted_sum(shallow), expected)


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_a_temperature_softens_both_sides_and_keeps_the_size_of_gradients(name, scores):
    student, teacher = scores[0][0], scores[2]
    softened = LossTerms(distill_loss=name, distill_temperature=4.0).distillation(student, teacher)
    torch.testing.assert_close(softened, 16 * DISTILL_LOSSES[name](student / 4, teacher / 4))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("distill_last_layer", "full", r"full_width must have the shape \(10, 3, 4\), got none"),
        ("distill_final_layer_teacher", "data", r"data_scores must have the shape \(3, 4\), got none"),
        ("self_distill", "original", r"original_scores must have the shape \(3, 4\), got none"),
    ],
)
def test_missing_teachers_are_named(name, missing, message, scores):
    student, full, data = scores
    with pytest.raises(ValueError, match=message):
        layer_wise_loss(
            TRAIN_METHODS[name], student, None if missing == "full" else full, None if missing == "data" else data
        )


@pytest.mark.parametrize("case", range(21))
def test_golden_losses_and_gradients(shared_parity, case):
    golden = json.loads((shared_parity / "loss.json").read_text())
    expected = golden["cases"][case]
    model = CostWiseMistralForCausalLM.from_pretrained(shared_parity / "layerwise_model", dtype=torch.float32)
    rows = [torch.tensor(row) for row in golden["input_ids"]]
    input_ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    def group_scores(**width):
        parts = {name: golden[name] for name in ("query_lengths", "prompt_lengths", "cutoff_layers")}
        logits = model(input_ids, mask, **parts, **width).logits
        return torch.stack(logits).view(-1, golden["batch_size"], golden["group_size"])

    student = group_scores(compress_layers=expected["compress_layers"], compress_ratio=expected["compress_ratio"])
    teacher = torch.tensor(golden["teacher_scores"]).view_as(student[0])
    loss = layer_wise_loss(TRAIN_METHODS[expected["train_method"]], student, group_scores().detach(), teacher)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    # Rows differ in length after the first compression. The reference then reads the attention of a pad token, a fault
    # that scores of single pairs do not show. With that fault put into a padded model, its gradient norms are met to
    # 1e-6; ours differ from them by up to 2e-3.
    tolerance = 2.5e-3 if expected["compress_layers"] == [2, 4, 6] else 1e-4
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, norm in expected["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=tolerance), name
