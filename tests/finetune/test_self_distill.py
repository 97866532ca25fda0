"""Training without labels: the model before training teaches its exits and widths."""

import json

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker, Setting
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from tests.checkpoints.test_classifiers import write_classifier
from tests.finetune.runs import close, runner, scores_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lists(training_file, tmp_path_factory):
    """The training rows without their labels."""
    path = tmp_path_factory.mktemp("lists") / "lists.jsonl"
    rows = [json.loads(line) for line in training_file.read_text().splitlines()]
    rows = [{"query": row["query"], "passages": [*row["neg"], *row["pos"]]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def one_exit(tiny_layerwise_path, tmp_path_factory):
    """A re-ranker with a single exit, the deepest."""
    path = tmp_path_factory.mktemp("one_exit")
    MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu").export(str(path), cutoff_layers=[6])
    return path


def distil(model, data, output_dir, model_args=(), data_args=(), **training):
    training = {"train_method": "self_distill", "logging_steps": 1} | training
    rank = {} if "from_peft" in dict(model_args) else {"lora_rank": 8}
    return runner(model, data, output_dir, rank | dict(model_args), data_args, **training)


def largest_gradient(run):
    batch = run.data_collator([run.train_dataset[item] for item in range(4)])
    output = run.model.train()(**batch)
    output.loss.backward()
    gradients = [value.grad for value in run.model.parameters() if value.requires_grad]
    return max(gradient.abs().max() for gradient in gradients), set(output.terms)


@pytest.mark.parametrize("distill_loss", ["ce", "kl", "mse", "margin_mse"])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(distill_loss, one_exit, lists, tmp_path):
    gradient, terms = largest_gradient(distil(one_exit, lists, tmp_path / "out", distill_loss=distill_loss))
    assert gradient < 1e-4 and terms == {"layer_6_original"}
    gradient, _ = largest_gradient(
        distil(one_exit, lists, tmp_path / "out", {"exits": [5, 6]}, distill_loss=distill_loss)
    )
    assert gradient > 0.1


def test_the_teacher_is_the_model_as_it_was_loaded_however_far_training_has_come(one_exit, lists, tmp_path):
    run = distil(one_exit, lists, tmp_path / "out", {"exits": [2, 4, 6]}, learning_rate=1e-2, max_steps=5)
    batch = run.data_collator([run.train_dataset[item] for item in range(4)])
    before = run.model.original_scores(batch["pair"])
    run.run()
    close(run.model.original_scores(batch["pair"]), before)
    learnt = run.model.train()(**batch).scores[-1]
    assert (learnt - before).abs().max() > 1e-3
    assert run.model.model.training


@pytest.mark.parametrize("setting", [Setting((4, 6), (2,), 4, store_layer=2), Setting((6,), store_layer=5)], ids=str)
def test_with_a_store_layer_every_exit_learns_and_every_adapter_has_a_gradient(setting, one_exit, lists, tmp_path):
    run = distil(one_exit, lists, tmp_path / "out", {"exits": [2, 4, 6]}, learning_rate=1e-2)
    batch = run.data_collator([run.train_dataset[item] for item in range(4)])
    trained = {name: value for name, value in run.model.named_parameters() if value.requires_grad}
    with torch.no_grad():  # of an adapter that is 0, one half has no gradient
        for name, value in trained.items():
            value += 0.05 * torch.randn_like(value) * ("lora_B" in name)
    run.model.train()(**batch, setting=setting).loss.backward()
    assert len(trained) == 2 * (6 * 7 + 3)
    assert [name for name, value in trained.items() if value.grad is None or not value.grad.any()] == []
    # Exits above the store layer have its mask, the others are those of a pass without one.
    masked, plain = (run.model.eval()(batch["pair"], setting=each).scores for each in (setting, None))
    below = sum(layer <= setting.store_layer for layer in (2, 4, 6))
    assert masked.shape == plain.shape and below in (1, 2)
    close(masked[:below], plain[:below])
    assert (masked[below:] - plain[below:]).abs().mean() > 1e-2


def test_the_full_width_of_a_store_layer_has_its_mask_and_exits_below_are_their_own(one_exit, lists, tmp_path):
    """As deeper exits teach, with other methods."""
    run = distil(one_exit, lists, tmp_path / "out", {"exits": [2, 4, 5, 6]})
    pair = run.data_collator([run.train_dataset[0]])["pair"]
    model = run.model.eval()
    scores, full_width = model.encode(pair, Setting((4, 5, 6), (3,), 4, store_layer=3), return_full_width=True)
    expected, _ = model.encode(pair, Setting((4, 5, 6), store_layer=3))
    close(full_width, expected)
    assert not full_width.requires_grad and scores.requires_grad
    close(scores[0], full_width[0])
    assert (scores[1:] - full_width[1:]).abs().mean() > 1e-2


def test_training_with_store_layers_logs_all_exits_in_each_step(one_exit, lists, tmp_path):
    options = {"store_layers": [2, 5], "compress_ratios": [1, 4], "max_steps": 8}
    run = distil(one_exit, lists, tmp_path / "out", {"exits": [2, 4, 6]}, **options)
    run.run()
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(history) == 8
    for entry in history:
        terms = [entry[f"loss_layer_{layer}_original"] for layer in (2, 4, 6)]
        assert entry["loss"] == pytest.approx(sum(terms), rel=1e-4)
    loaded = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert scores_of(loaded).isfinite().all()


@pytest.mark.slow
def test_new_exits_start_as_the_deepest_and_come_to_rank_as_it_does(one_exit, lists, tmp_path):
    options = {"compress_layers": [2], "compress_ratios": [1, 2], "learning_rate": 1e-2}
    run = distil(one_exit, lists, tmp_path / "out", {"exits": [2, 4, 6]}, max_steps=40, **options)
    heads = run.model.model.base_model.model.lm_head
    assert len(heads) == 3
    assert all(
        torch.equal(head.linear_head.base_layer.weight, heads[-1].linear_head.base_layer.weight) for head in heads
    )
    run.run()
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    for layer in (2, 4):
        losses = [entry[f"loss_layer_{layer}_original"] for entry in history]
        assert sum(losses[-8:]) < sum(losses[:8])
    assert all(entry[f"layer_{layer}_spread"] > 0 for entry in history for layer in (2, 4, 6))


@pytest.mark.slow
def test_what_is_written_brings_its_new_exits_along(one_exit, lists, tmp_path):
    run = distil(one_exit, lists, tmp_path / "out", {"exits": [2, 6], "save_merged_lora_model": True})
    run.run()
    loaded = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert loaded.config.exit_layers == [2, 6] and loaded.model.config.base_exits is None
    batch = run.data_collator([run.train_dataset[0]])
    pair = batch["pair"]
    learnt = run.model.eval()(pair=pair).scores
    setting = Setting((2, 6))
    states = loaded.model.model.embed(pair.token_ids, pair.packed)
    close(loaded.model.scores(states, setting), learnt)
    merged = MatryoshkaReranker(str(tmp_path / "out" / "merged_model"), dtype="float32", devices="cpu")
    close(scores_of(merged), scores_of(loaded))
    loaded.export(str(tmp_path / "whole"), cutoff_layers=[2, 6])
    close(scores_of(MatryoshkaReranker(str(tmp_path / "whole"), dtype="float32", devices="cpu")), scores_of(loaded))
    # A second stage on top of it finds the base's one head, too.
    distil(tmp_path / "out", lists, tmp_path / "second").run()
    second = MatryoshkaReranker(str(tmp_path / "second"), dtype="float32", devices="cpu")
    assert second.config.exit_layers == [2, 6] and scores_of(second).isfinite().all()


def test_exits_that_cannot_be_given_are_refused(one_exit, tiny_layerwise_path, lists, tmp_path):
    for exits, message in (
        ([2, 5], r"exits=\[2, 5\], but the deepest exit of .* is 6: it must be the last"),
        ([], r"exits=\[\], but the deepest exit"),
        ([4, 2, 6], r"exits \[4, 2, 6\] must be layers in ascending order"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_checkpoint(str(one_exit), exits=exits)
    own = inspect_checkpoint(str(tiny_layerwise_path), exits=[2, 3, 4, 5, 6]).config
    assert own.base_exits is None
    distil(one_exit, lists, tmp_path / "out", {"exits": [2, 6]}).run()
    with pytest.raises(ValueError, match=r"exits=\[3, 6\], but .* holds an adapter that was trained for \[2, 6\]"):
        inspect_checkpoint(str(tmp_path / "out"), exits=[3, 6])
    with pytest.raises(ValueError, match=r"max_layer=2: new exits of .* start as its deepest, 6"):
        inspect_checkpoint(str(tmp_path / "out"), max_layer=2)


def test_a_raw_model_keeps_the_scale_of_its_scores(tiny_raw_model_path, lists, tmp_path):
    run = distil(tiny_raw_model_path, lists, tmp_path / "out", {"start_layer": 2, "layer_sep": 2})
    pair = run.data_collator([run.train_dataset[0]])["pair"]
    raw = MatryoshkaReranker(str(tiny_raw_model_path), start_layer=2, dtype="float32", devices="cpu")
    states = raw.model.model.embed(pair.token_ids, pair.packed)
    close(run.model.original_scores(pair), raw.model.scores(states, Setting((6,)))[0])


@pytest.mark.parametrize("model_args", [{"use_lora": False}, {"from_peft": "somewhere"}])
def test_without_adapters_to_switch_off_there_is_no_teacher(model_args, one_exit, lists, tmp_path):
    with pytest.raises(ValueError, match="train_method self_distill learns from the model without adapters"):
        distil(one_exit, lists, tmp_path / "out", model_args)


def test_labelled_rows_and_random_passages_serve_as_well(one_exit, training_file, tmp_path):
    run = distil(one_exit, training_file, tmp_path / "out", {"exits": [2, 6]}, {"random_negatives": 0.5})
    run.run()
    assert len(run.trainer.state.log_history) > 1


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_sequence_classifier_gets_other_exits(use_lora, lists, tiny_tokenizer, tmp_path):
    path = write_classifier("qwen3", tiny_tokenizer, tmp_path / "classifier")
    model_args = {"exits": [2, 4, 6], "template": "question-passage", "use_lora": use_lora}
    method = {} if use_lora else {"train_method": "normal"}
    data = lists if use_lora else tmp_path / "train.jsonl"
    if not use_lora:
        rows = [json.loads(line)["passages"] for line in lists.read_text().splitlines()]
        texts = [{"query": passages[-1][:9], "pos": passages[-1:], "neg": passages[:-1]} for passages in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    run = distil(path, data, tmp_path / "out", model_args, learning_rate=1e-2, max_steps=4, **method)
    run.run()
    reranker = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert reranker.config.exit_layers == [2, 4, 6]
    assert reranker.description.template_name.value == "question-passage"
    scores = scores_of(reranker)
    assert scores.isfinite().all() and (scores[0] - scores[2]).abs().max() > 1e-3
    classifier = MatryoshkaReranker(str(path), template="question-passage", dtype="float32", devices="cpu")
    assert (scores[-1] - scores_of(classifier)).abs().max() > 1e-4


@pytest.mark.slow
def test_an_exported_classifier_becomes_elastic(tiny_layerwise_path, lists, tmp_path):
    source = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    source.export(str(tmp_path / "classifier"), cutoff_layers=6, format="transformers")
    assert inspect_checkpoint(str(tmp_path / "classifier")).config.exit_layers == [6]
    options = {"compress_layers": [2], "compress_ratios": [1, 2], "learning_rate": 1e-2}
    exits = {"exits": [2, 4, 6], "save_merged_lora_model": True}
    run = distil(tmp_path / "classifier", lists, tmp_path / "out", exits, max_steps=40, **options)
    run.run()
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    for layer in (2, 4):
        losses = [entry[f"loss_layer_{layer}_original"] for entry in history]
        assert sum(losses[-8:]) < sum(losses[:8])
    elastic = MatryoshkaReranker(str(tmp_path / "out" / "merged_model"), dtype="float32", devices="cpu")
    assert elastic.config.exit_layers == [2, 4, 6]
    pairs = [("wing", "a wing and a lift"), ("heat", "a wing"), ("heat", "a plate and its heat")]
    scores = torch.tensor(elastic.compute_score(pairs, cutoff_layers=[2, 4, 6]))
    narrow = torch.tensor(elastic.compute_score(pairs, cutoff_layers=4, compress_layers=2, compress_ratio=2))
    assert scores.shape == (3, 3) and scores.isfinite().all() and narrow.isfinite().all()
    assert (narrow - scores[1]).abs().max() > 0  # the passage was compressed
