"""Every backbone is trained with adapters, all weights and in 4 bits. The saved model scores as the trained one."""

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from tests.backbones import FIRST, THOROUGH, write_raw
from tests.batches import TokenSequence, collate
from tests.finetune.runs import WIDTHS, close, runner, scores_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def raw_path(backbone, tiny_tokenizer, tmp_path_factory):
    return write_raw(backbone, tiny_tokenizer, tmp_path_factory.mktemp(backbone))


@THOROUGH
@pytest.mark.parametrize("kind", ["adapters", "all_weights", "adapters_on_4_bits"])
def test_what_is_written_scores_as_what_was_trained(kind, raw_path, training_file, tmp_path):
    model_args = {"start_layer": 2, "use_lora": kind != "all_weights", "load_in_4bit": kind == "adapters_on_4_bits"}
    if model_args["load_in_4bit"]:
        pytest.importorskip("bitsandbytes")
    width = {"compress_layers": [2, 4], "compress_ratios": [1, 2]}
    run = runner(raw_path, training_file, tmp_path / "out", model_args, logging_steps=1, **width)
    before = {name: value.detach().clone() for name, value in run.model.named_parameters() if value.requires_grad}
    run.run()
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in run.trainer.state.log_history if "loss" in entry)
    moved = {name for name, value in run.model.named_parameters() if name in before and not value.equal(before[name])}
    assert len(moved) > 0.9 * len(before)
    if model_args["load_in_4bit"]:
        return  # the weights that were trained on are not those that are loaded
    reranker = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    assert reranker.config.exit_layers == [2, 3, 4, 5, 6]
    if kind == "adapters":
        adapted = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in before}
        assert adapted == set(reranker.model.linear_names)
    trained = run.model.eval()
    groups = [run.train_dataset[item] for item in range(4)]
    padded = collate(
        [TokenSequence(p.input_ids.tolist(), p.query_length, p.prompt_length) for group in groups for p in group.pairs]
    )
    with torch.no_grad():
        expected = trained(pair=run.data_collator(groups)["pair"]).scores
        model = reranker.model
        actual = torch.stack(model(**padded, cutoff_layers=model.config.exit_layers).logits)
    close(actual, expected)
    for width in WIDTHS:
        assert scores_of(reranker, **width).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FIRST, scope="module")
@pytest.mark.parametrize("use_lora", [True, False])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(use_lora, raw_path, training_file, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}
    histories = []
    for resume_from in (None, str(tmp_path / "out" / "checkpoint-1")):
        arguments = (raw_path, training_file, tmp_path / "out", {"start_layer": 2, "use_lora": use_lora})
        run = runner(*arguments, resume_from_checkpoint=resume_from, **options)
        run.run()
        histories.append([entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry])
    assert len(histories[0]) == 2
    assert histories[1] == pytest.approx(histories[0], rel=1e-5)
