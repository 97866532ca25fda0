import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from flagembedding_matryoshka import CostWiseMistralForCausalLM
from flagembedding_matryoshka.finetune.losses import (
    DISTILL_LOSSES,
    TRAIN_METHODS,
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
    terms = layer_wise_losses(method, *scores, distill_loss="mse")[0]
    assert terms["deeper_exit"] == pytest.approx(((scores[0][0] - scores[1][1]) ** 2).mean().item())


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
