import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from flagembedding_matryoshka import CostWiseMistralForCausalLM
from flagembedding_matryoshka.losses import (
    TRAIN_METHODS,
    contrastive_loss,
    distillation_loss,
    layer_wise_loss,
    teaching_exit,
)

EXITS, QUERIES, GROUP = 10, 3, 4


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    student, full = torch.randn(2, EXITS, QUERIES, GROUP, generator=generator)
    return student, full, torch.randn(QUERIES, GROUP, generator=generator)


def slow_loss(name, student, full, data):
    """The table of the reference, a term at a time."""
    total = 0.0
    deepest_first, full = student.flip(0), full.flip(0)
    for i, exit_scores in enumerate(deepest_first):
        for query in range(QUERIES):
            log_probability = torch.log(torch.exp(exit_scores[query]) / torch.exp(exit_scores[query]).sum())
            total -= log_probability[0] / QUERIES
            teachers = []
            if name.endswith("_teacher") or (name.startswith("distill") and i == 0):
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
    torch.testing.assert_close(layer_wise_loss(TRAIN_METHODS[name], *scores), slow_loss(name, *scores))


def test_teachers_of_a_deep_model():
    method = TRAIN_METHODS["distill_fix_layer"]
    assert [teaching_exit(method, index) for index in (0, 1, 8, 9, 16, 17)] == [None, 0, 0, 8, 8, 16]


def test_no_gradient_reaches_a_teacher(scores):
    student, full, data = (value.requires_grad_() for value in scores)
    layer_wise_loss(TRAIN_METHODS["distill_fix_layer_teacher"], student, full, data).backward()
    assert full.grad is None and data.grad is None
    assert student.grad.isfinite().all()


def test_distillation_is_least_where_student_and_teacher_agree(scores):
    _, _, teacher = scores
    assert distillation_loss(teacher + 5.0, teacher) < distillation_loss(teacher.flip(-1), teacher)
    assert contrastive_loss(torch.tensor([[9.0, 0.0]])) < contrastive_loss(torch.tensor([[0.0, 9.0]]))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("distill_last_layer", "full", r"full_width scores must be \(10, 3, 4\), got none"),
        ("distill_final_layer_teacher", "data", r"data_scores must be \(3, 4\), got none"),
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
