import pickle
import random

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model

from flagembedding_matryoshka import Setting
from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.data import (
    PADDING,
    Group,
    MatryoshkaCollator,
    MatryoshkaEvalCollator,
    MatryoshkaEvalDataset,
    MatryoshkaTrainDataset,
    UnlabelledTrainDataset,
)
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel
from flagembedding_matryoshka.models.batch import row_indices
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.text.templates import Template
from tests.batches import TokenSequence, collate, random_sequences, tokenized_pair
from tests.lines import ROW, write

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(path, tokenizer, **options):
    args = MatryoshkaDataArguments(train_data=[str(path)], cache_path=str(path.parent / "cache"), **options)
    return MatryoshkaTrainDataset(args, tokenizer)


def test_files_with_other_columns_and_number_types_are_joined(tmp_path, tiny_tokenizer):
    write(tmp_path / "a.jsonl", {**ROW, "id": 1, "pos_scores": [1], "neg_scores": [0, 2]})
    write(tmp_path / "b.jsonl", {**ROW, "id": "x", "prompt": "Yes?"})
    rows = dataset(tmp_path, tiny_tokenizer, train_group_size=2, knowledge_distillation=True)
    assert [rows[item][1][0] for item in (0, 1)] == [1.0, 1.0]


def test_a_group_is_the_positive_then_negatives_with_their_scores(tmp_path, tiny_tokenizer):
    rows = dataset(write(tmp_path / "a.jsonl", ROW), tiny_tokenizer, train_group_size=3, knowledge_distillation=True)
    sequences, scores, _ = rows[0]
    texts = [tiny_tokenizer.decode(sequence.input_ids) for sequence in sequences]
    assert f"A: q\nB: p\n{Template().prompt}" in texts[0]
    assert scores[0] == 1.0
    assert {text[text.index("B: ") + 3]: score for text, score in zip(texts, scores, strict=True)} == {
        "p": 1.0,
        "n": 0.0,
        "m": 0.5,
    }


GRADED = {"query": "q", "passages": ["a", "b", "c", "d", "e"], "labels": [0, 3, -1, 1, 2]}


def test_a_group_has_several_positives_with_their_grades(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", {**GRADED, "scores": [0.1, 0.9, 0.2, 0.5, 0.7]})
    grades_of = dict(zip(GRADED["passages"], (0.0, 3.0, 0.0, 1.0, 2.0), strict=True))
    scores_of = dict(zip(GRADED["passages"], (0.1, 0.9, 0.2, 0.5, 0.7), strict=True))
    # Half of a group of 4; 6 have all passages and one negative again; 5 random negatives leave place for one positive.
    for size, positives in ((2, 1), (4, 2), (5, 3), (6, 3)):
        args = dataset(path, tiny_tokenizer, train_group_size=size, knowledge_distillation=True).args
        rows = MatryoshkaTrainDataset(args, tiny_tokenizer, has_grades=True)
        for epoch in range(3):
            rows.start_epoch(epoch)
            texts, _ = passage_texts(rows, 0)
            group = rows[0]
            assert group.grades == [grades_of[text] for text in texts]
            assert group.scores == [scores_of[text] for text in texts]
            assert [grade > 0 for grade in group.grades] == [True] * positives + [False] * (size - positives)
            assert len(set(texts)) == min(size, 5)
    assert MatryoshkaTrainDataset(args, tiny_tokenizer)[0].grades is None


def test_random_negatives_have_the_grade_0_and_leave_place_for_a_positive(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", *({**GRADED, "query": f"q {number}"} for number in range(2)),
                 {"query": "q", "pos": ["w", "x", "y", "z"], "neg": ["n"], "pos_labels": [2, 1, 1, 1]},
                 {"query": "r", "pos": ["u"], "neg": ["n"]})  # fmt: skip
    for share, grades in ((1.0, 1), (0.5, 2)):
        args = dataset(path, tiny_tokenizer, train_group_size=5, random_negatives=share).args
        group = MatryoshkaTrainDataset(args, tiny_tokenizer, has_grades=True)[0]
        assert [grade > 0 for grade in group.grades] == [True] * grades + [False] * (5 - grades)


def test_evaluation_has_the_grades(tmp_path, tiny_tokenizer):
    args = dataset(write(tmp_path / "a.jsonl", GRADED, ROW), tiny_tokenizer).args
    lists = MatryoshkaEvalDataset(args, tiny_tokenizer)
    assert [lists[item].grades for item in (0, 1)] == [[3.0, 1.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_fewer_negatives_than_wanted_are_drawn_again(tmp_path, tiny_tokenizer):
    rows = dataset(write(tmp_path / "a.jsonl", ROW), tiny_tokenizer, train_group_size=8)
    sequences, scores, _ = rows[0]
    assert len(sequences) == 8 and scores is None


def test_lengths_are_cut_as_the_reference_cuts_them(tmp_path, tiny_tokenizer):
    long = {"query": "wing " * 100, "pos": ["air " * 300], "neg": ["a"]}
    path = write(tmp_path / "a.jsonl", long)
    rows = dataset(path, tiny_tokenizer, train_group_size=2, query_max_len=16, passage_max_len=96)
    first, short = rows[0][0]
    prompt = len(tiny_tokenizer(Template().prompt, add_special_tokens=False)["input_ids"])
    assert first.query_length == 1 + 16 + 1
    assert first.prompt_length == prompt + 1
    # bos, query, separator and passage hold query_max_len + passage_max_len - prompt - separator tokens
    assert len(first) - first.prompt_length == 16 + 96 - prompt - 1
    assert len(short) < len(first)


def test_a_row_brings_its_own_prompt(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", {**ROW, "prompt": "Yes?"}, {**ROW, "prompt": None})
    rows = dataset(path, tiny_tokenizer, train_group_size=2)
    assert tiny_tokenizer.decode(rows[0][0][0].input_ids).endswith("\nYes?")
    assert tiny_tokenizer.decode(rows[1][0][0].input_ids).endswith(Template().prompt)


def test_what_is_drawn_depends_on_seed_epoch_and_item_alone(tmp_path, tiny_tokenizer):
    row = {"query": "q", "pos": [f"pos {i}" for i in range(5)], "neg": [f"neg {i}" for i in range(20)]}
    path = write(tmp_path / "rows.jsonl", *[{**row, "query": f"q {i}"} for i in range(4)])
    first, other = (dataset(path, tiny_tokenizer, train_group_size=4) for _ in range(2))
    assert [first[item] for item in (0, 1, 2, 3)] == [other[item] for item in (3, 2, 1, 0)][::-1]
    epoch_0 = first[0]
    first.start_epoch(1)
    assert first[0] != epoch_0
    first.start_epoch(0)
    assert first[0] == epoch_0
    assert MatryoshkaTrainDataset(first.args, tiny_tokenizer, seed=7)[0] != epoch_0


def test_a_share_of_the_positives_comes_in_another_order(tmp_path, tiny_tokenizer):
    text = " ".join(["first"] * 20 + ["second"] * 20 + ["third"] * 20)
    path = write(tmp_path / "long.jsonl", *[{"query": f"q {i}", "pos": [text], "neg": ["n"]} for i in range(40)])
    plain, shuffled = (dataset(path, tiny_tokenizer, train_group_size=2, shuffle_ratio=ratio) for ratio in (0.0, 0.5))
    changed = sum(plain[item][0][0] != shuffled[item][0][0] for item in range(40))
    assert 5 < changed < 35
    assert all(plain[item][0][1] == shuffled[item][0][1] for item in range(40))


def test_random_negatives_are_passages_of_other_rows_of_the_same_file(tmp_path, tiny_tokenizer):
    for name in "ab":
        rows = [{**ROW, "query": f"q {name} {i}", "pos": [f"pos {name} {i}"]} for i in range(6)]
        write(tmp_path / f"{name}.jsonl", *rows)
    rows = dataset(tmp_path, tiny_tokenizer, train_group_size=5, random_negatives=0.5, knowledge_distillation=True)
    for item, (name, number) in enumerate((name, number) for name in "ab" for number in range(6)):
        sequences, scores, _ = rows[item]
        texts = [tiny_tokenizer.decode(sequence.input_ids) for sequence in sequences]
        drawn = [text[text.index("B: ") + 3 : text.index(f"\n{Template().prompt}")] for text in texts]
        assert drawn[0] == f"pos {name} {number}"
        assert sorted(drawn[1:3]) == ["m", "n"]
        assert all(text.startswith(f"pos {name} ") and text != drawn[0] for text in drawn[3:])
        assert scores[3:] == [-10.0, -10.0]
    again = dataset(tmp_path, tiny_tokenizer, train_group_size=5, random_negatives=0.5, knowledge_distillation=True)
    assert again[3] == rows[3]
    again.start_epoch(1)
    assert again[3] != rows[3]


def passage_texts(rows, item):
    """The drawn passages of a group, in order."""
    drawn, build = [], rows._pairs
    rows._pairs = lambda row, passages: drawn.extend(passages) or build(row, passages)
    _, scores, _ = rows[item]
    rows._pairs = build
    return drawn, scores


def normalized(text):
    return " ".join(text.lower().split())


@pytest.mark.parametrize("kind", [MatryoshkaTrainDataset, UnlabelledTrainDataset])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_random_negatives_differ_from_each_other_and_from_the_row(kind, share, tmp_path, tiny_tokenizer):
    # Few texts, which rows share as positives, negatives and queries, in several spellings.
    draw = random.Random(0)
    texts = [f"text {number}" for number in range(14)]
    spellings = (str, str.upper, str.title, lambda text: f" {text.replace(' ', '  ')}\n")
    rows = []
    for _ in range(25):
        query, *passages = (draw.choice(spellings)(text) for text in draw.sample(texts, 6))
        rows.append({"query": query, "pos": passages[:2], "neg": passages[2:]})
        rows[-1] |= {"pos_scores": [3.0, 2.0], "neg_scores": [1.0, 0.0, -1.0]}
    path = write(tmp_path / "rows.jsonl", *rows)
    options = {"train_group_size": 9, "random_negatives": share, "knowledge_distillation": True}
    args = MatryoshkaDataArguments(train_data=[str(path)], cache_path=str(tmp_path / "cache"), **options)
    groups = kind(args, tiny_tokenizer)
    count = round(8 * share)
    for epoch in range(8):
        groups.start_epoch(epoch)
        for item, row in enumerate(rows):
            passages, scores = passage_texts(groups, item)
            own = [normalized(text) for text in (row["query"], *row["pos"], *row["neg"])]
            others = [normalized(text) for text in passages[-count:]]
            assert len(passages) == 9
            assert {normalized(text) for text in passages[:-count]} <= set(own[1:])
            assert len({*others, *own}) == count + 6
            if scores is not None:
                score_of = dict(zip([*row["pos"], *row["neg"]], [3.0, 2.0, 1.0, 0.0, -1.0], strict=True))
                assert scores == [score_of.get(text, -11.0) for text in passages]


def test_rows_without_negatives_get_negatives_from_other_rows(tmp_path, tiny_tokenizer):
    rows = [{"query": f"q {i}", "pos": [f"pos {i}"], "neg": [], "pos_scores": [i]} for i in range(5)]
    path = write(tmp_path / "rows.jsonl", *rows)
    options = {"train_group_size": 4, "knowledge_distillation": True}
    groups = dataset(path, tiny_tokenizer, random_negatives=1.0, **options)
    passages, scores = passage_texts(groups, 2)
    assert passages[0] == "pos 2" and set(passages[1:]) < {"pos 0", "pos 1", "pos 3", "pos 4"}
    assert scores == [2.0, -8.0, -8.0, -8.0]
    with pytest.raises(ValueError, match="line 1: neg must be a list of at least one string"):
        dataset(path, tiny_tokenizer, random_negatives=0.8, **{**options, "train_group_size": 9})


def test_a_file_with_too_few_texts_for_random_negatives_is_refused(tmp_path, tiny_tokenizer):
    row = {"query": "q", "pos": ["x", "y", " X"], "neg": ["n"]}
    path = write(tmp_path / "one.jsonl", ROW, row)
    options = {"train_group_size": 3, "random_negatives": 1.0}
    message = (
        r"random_negatives=1\.0 takes 2 passages of other rows into a group of 3, but .*one\.jsonl has 1 that are not "
        r"in row 1 itself \(rows counted from 0; query 'q'\)"
    )
    with pytest.raises(ValueError, match=message):
        dataset(path, tiny_tokenizer, **options)
    write(path, ROW, row, {**ROW, "pos": ["z"], "pos_scores": None})
    assert len(dataset(path, tiny_tokenizer, **options)[1][0]) == 3
    with pytest.raises(ValueError, match=r"random_negatives is 1\.5, but must be a share from 0 to 1"):
        dataset(tmp_path / "one.jsonl", tiny_tokenizer, random_negatives=1.5)


def test_rows_without_labels_give_any_of_their_passages_and_rows_with_labels_all_of_theirs(tmp_path, tiny_tokenizer):
    plain = {"query": "q", "passages": ["a", "b", "c"]}
    path = write(tmp_path / "rows.jsonl", plain, {"query": "q", "pos": ["a"], "neg": ["b", "c"]})
    args = MatryoshkaDataArguments(train_data=[str(path)], cache_path=str(tmp_path / "cache"), train_group_size=3)
    rows = UnlabelledTrainDataset(args, tiny_tokenizer)
    for item in (0, 1):
        sequences, scores, _ = rows[item]
        texts = [tiny_tokenizer.decode(sequence.input_ids) for sequence in sequences]
        assert sorted(text[text.index("B: ") + 3] for text in texts) == ["a", "b", "c"] and scores is None
    assert rows[0] == UnlabelledTrainDataset(args, tiny_tokenizer)[0]
    epoch_0 = [rows[0]]
    for epoch in range(1, 6):
        rows.start_epoch(epoch)
        epoch_0.append(rows[0])
    assert any(drawn != epoch_0[0] for drawn in epoch_0)


def test_files_without_a_row_are_refused_and_one_beside_others_is_not(tmp_path, tiny_tokenizer):
    empty = write(tmp_path / "a.jsonl", "")
    with pytest.raises(ValueError, match=r"there is no row in .*a\.jsonl"):
        dataset(empty, tiny_tokenizer, train_group_size=2)
    write(tmp_path / "b.jsonl", ROW)
    assert len(dataset(tmp_path, tiny_tokenizer, train_group_size=2)) == 1


EXITS = (2, 3, 4, 5, 6)
WIDTHS = [Setting(EXITS), Setting(EXITS, (2,), 2), Setting(EXITS, (1, 3, 5), 4)]


def pairs(query, passages, seed):
    """Pairs of one query with a prompt of 3 tokens."""
    sequences = random_sequences([(0, passage, 3) for passage in passages], seed)
    own = random_sequences([(query, 0, 0)], seed + 1)[0].ids
    return [tokenized_pair(own + sequence.ids, query, 3) for sequence in sequences]


GROUPS = [Group(pairs(5, (4, 17, 1), 0), [1.0, 0.5, 0.0]), Group(pairs(9, (30, 2, 8), 2), [2.0, 0.0, 1.0])]


def test_a_group_shares_its_query_and_nothing_is_padded():
    batch = MatryoshkaCollator()(GROUPS)
    packed = batch["pair"].packed
    everything = [pair for group in GROUPS for pair in group.pairs]
    assert batch["pair"].token_ids.shape == (1, sum(len(pair) for pair in everything) - 2 * 5 - 2 * 9)
    assert packed.sequence_lengths.tolist() == [len(pair) for pair in everything]
    assert packed.passage_lengths[packed.sequences].tolist() == [pair.passage_length for pair in everything]
    assert batch["teacher_scores"].tolist() == [1.0, 0.5, 0.0, 2.0, 0.0, 1.0]
    assert MatryoshkaCollator()([Group(group.pairs) for group in GROUPS])["teacher_scores"] is None


def test_lists_of_different_lengths_are_joined_for_evaluation():
    batch = MatryoshkaEvalCollator()(
        [Group(GROUPS[0].pairs[:2], grades=[1.0, 0.0]), Group(GROUPS[1].pairs, grades=[1.0, 0.0, 0.0])]
    )
    assert len(batch["pair"].packed.sequences) == 5
    assert batch["labels"].tolist() == [[1.0, 0.0, PADDING], [1.0, 0.0, 0.0]]


def test_a_batch_moves_as_a_tensor_does_and_through_a_pipe():
    batch = send_to_device(pickle.loads(pickle.dumps(MatryoshkaCollator()(GROUPS))), torch.device("meta"))
    assert batch["pair"].token_ids.is_meta and batch["teacher_scores"].is_meta
    assert batch["pair"].packed.indices(row_indices).position_ids.is_meta and not batch["pair"].packed.lengths.is_meta


def learner(model: CostWiseForCausalLM, tokenizer, method="distill_fix_layer_teacher"):
    return MatryoshkaRerankerModel(model, tokenizer, TRAIN_METHODS[method], 2, 3).train()


@pytest.mark.parametrize("setting", WIDTHS)
def test_scores_are_those_of_the_padded_batch(setting, layerwise_model, tiny_tokenizer):
    sequences = [pair for group in GROUPS for pair in group.pairs]
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
    """A tensor on "meta" has no values: an operation that needs a value raises an error."""
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
