import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model

from flagembedding_matryoshka import Setting
from flagembedding_matryoshka.finetune.data import PADDING, MatryoshkaCollator, MatryoshkaEvalCollator
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from tests.batches import TokenSequence, collate, random_sequences, tokenized_pair

pytestmark = pytest.mark.usefixtures("one_thread")
EXITS = (2, 3, 4, 5, 6)
WIDTHS = [Setting(EXITS), Setting(EXITS, (2,), 2), Setting(EXITS, (1, 3, 5), 4)]


def pairs(query, passages, seed):
    """Pairs of one query with a prompt of 3 tokens."""
    sequences = random_sequences([(0, passage, 3) for passage in passages], seed)
    own = random_sequences([(query, 0, 0)], seed + 1)[0].ids
    return [tokenized_pair(own + sequence.ids, query, 3) for sequence in sequences]


GROUPS = [(pairs(5, (4, 17, 1), 0), [1.0, 0.5, 0.0]), (pairs(9, (30, 2, 8), 2), [2.0, 0.0, 1.0])]


def test_a_group_shares_its_query_and_nothing_is_padded():
    batch = MatryoshkaCollator()(GROUPS)
    packed = batch["pair"].packed
    everything = [pair for group, _ in GROUPS for pair in group]
    assert batch["pair"].token_ids.shape == (1, sum(len(pair) for pair in everything) - 2 * 5 - 2 * 9)
    assert packed.sequence_lengths.tolist() == [len(pair) for pair in everything]
    assert packed.passage_lengths[packed.sequences].tolist() == [pair.passage_length for pair in everything]
    assert batch["teacher_scores"].tolist() == [1.0, 0.5, 0.0, 2.0, 0.0, 1.0]
    assert MatryoshkaCollator()([(group, None) for group, _ in GROUPS])["teacher_scores"] is None


def test_lists_of_different_lengths_are_joined_for_evaluation():
    batch = MatryoshkaEvalCollator()([(GROUPS[0][0][:2], [1.0, 0.0]), (GROUPS[1][0], [1.0, 0.0, 0.0])])
    assert len(batch["pair"].packed.sequences) == 5
    assert batch["labels"].tolist() == [[1.0, 0.0, PADDING], [1.0, 0.0, 0.0]]


def test_a_batch_moves_as_a_tensor_does_and_through_a_pipe():
    batch = send_to_device(pickle.loads(pickle.dumps(MatryoshkaCollator()(GROUPS))), torch.device("meta"))
    assert batch["pair"].token_ids.is_meta and batch["teacher_scores"].is_meta
    assert batch["pair"].packed.position_ids.is_meta and not batch["pair"].packed.lengths.is_meta


def learner(model: CostWiseForCausalLM, tokenizer, method="distill_fix_layer_teacher"):
    return MatryoshkaRerankerModel(model, tokenizer, TRAIN_METHODS[method], 2, 3).train()


@pytest.mark.parametrize("setting", WIDTHS)
def test_scores_are_those_of_the_padded_batch(setting, layerwise_model, tiny_tokenizer):
    sequences = [pair for group, _ in GROUPS for pair in group]
    padded = collate(
        [TokenSequence(pair.input_ids.tolist(), pair.query_length, pair.prompt_length) for pair in sequences]
    )
    expected = layerwise_model(
        **padded,
        cutoff_layers=setting.cutoff_layers,
        compress_layers=setting.compress_layers,
        compress_ratio=setting.compress_ratio,
    )
    scores = learner(layerwise_model, tiny_tokenizer).eval()(MatryoshkaCollator()(GROUPS)["pair"], setting=setting)
    torch.testing.assert_close(scores.scores, torch.stack(expected.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", TRAIN_METHODS)
@pytest.mark.parametrize("setting", WIDTHS)
def test_a_pass_never_asks_the_device(setting, method, checkpointing, layerwise_model, tiny_tokenizer):
    """A tensor on "meta" has no values: reading one, or shapes that depend on one, is an error."""
    with torch.device("meta"):
        model = type(layerwise_model)(layerwise_model.config)
        if TRAIN_METHODS[method].original:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=model.linear_names))
    model = learner(model, tiny_tokenizer, method)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(**send_to_device(MatryoshkaCollator()(GROUPS), torch.device("meta")), setting=setting).loss
    loss.backward()
    assert all(weight.grad.is_meta for weight in model.parameters() if weight.grad is not None)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        loss.item()


@pytest.mark.gpu
@pytest.mark.parametrize("setting", WIDTHS)
def test_a_pass_does_not_wait_for_a_gpu(setting, tiny_layerwise_path, layerwise_model, tiny_tokenizer):
    model = learner(type(layerwise_model).from_pretrained(tiny_layerwise_path).cuda(), tiny_tokenizer)
    batch = send_to_device(MatryoshkaCollator()(GROUPS), torch.device("cuda"))
    model(**batch, setting=setting).loss.backward()
    batch = send_to_device(MatryoshkaCollator()(GROUPS), torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch, setting=setting).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
