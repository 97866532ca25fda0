"""Instructions in training rows, and the template that is saved."""

import json
import logging

import numpy as np
import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.data import MatryoshkaTrainDataset
from flagembedding_matryoshka.finetune.rows import count_instructions, load_rows, sample_rows, template_of_rows
from flagembedding_matryoshka.text.templates import TEMPLATES, Template
from tests.finetune.runs import runner
from tests.lines import ROW, write

pytestmark = pytest.mark.usefixtures("one_thread")
HEAT = "Is it about heat?"


def rows_of(path, *words):
    return write(path, *({**ROW, "query": f"wing {number}", **own} for number, own in enumerate(words)))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, {"prompt": "Is it?"}),
        (None, {"query_prompt": "Q: "}),
        (None, {"passage_prompt": "D: ", "prompt": "Is it?", "query_prompt": "Q: "}),
        ("mxbai-v2", {"instruction": HEAT}),
        ("qwen3-reranker", {"instruction": HEAT, "passage_prompt": "D: "}),
        ("qwen3-reranker", {"query_prompt": HEAT}),
        ("zerank", {"instruction": HEAT, "prompt": "Is it?"}),
        ("question-passage", {"query_prompt": "Q: "}),
    ],
)
def test_a_model_is_scored_with_the_words_that_all_rows_agree_on(
    template, words, tiny_raw_model_path, tmp_path, caplog
):
    data = rows_of(tmp_path / "rows.jsonl", words, words)
    model_args = {"start_layer": 2, "template": template}
    run = runner(tiny_raw_model_path, data, tmp_path / "out", model_args, max_steps=1)
    run.run()
    plain = Template.load(template or "cost_wise")
    trained = run.train_dataset[0][0][0].input_ids
    texts = ("wing 0", "p")
    reranker = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu")
    np.testing.assert_array_equal(reranker.tokenize(texts)[0].input_ids, trained)
    other = MatryoshkaReranker(str(tmp_path / "out"), dtype="float32", devices="cpu", template=plain.to_json())
    assert not np.array_equal(other.tokenize(texts)[0].input_ids, trained)
    assert "saved template" not in caplog.text


def test_where_rows_differ_one_warning_says_so_and_none_of_their_words_is_saved(tiny_raw_model_path, tmp_path, caplog):
    words = [{"prompt": "Is it?"}, {"prompt": "Is it?"}, {"prompt": "Was it?", "query_prompt": "Q: "}, {"prompt": ""}]
    data = rows_of(tmp_path / "rows.jsonl", *words)
    run = runner(tiny_raw_model_path, data, tmp_path / "out", {"start_layer": 2}, max_steps=1)
    run.run()
    (said,) = (record.message for record in caplog.records if "saved template" in record.message)
    assert said.startswith("3 of 4 rows have 2 different values of prompt (saved: 'Predict whether")
    assert "; 1 of 4 rows have 1 different values of query_prompt (saved: 'A: ')" in said
    assert inspect_checkpoint(tmp_path / "out").description.template.value == Template()
    ends = {run.tokenizer.decode(run.train_dataset[item][0][0].prompt_ids) for item in range(4)}
    assert ends == {"\nIs it?", "\nWas it?", f"\n{Template().prompt}"}


def test_an_instruction_needs_a_place_and_the_place_is_taken_once(tiny_raw_model_path, training_file, tmp_path):
    instructed = rows_of(tmp_path / "rows.jsonl", {"instruction": HEAT}, {})
    start = {"start_layer": 2}
    with pytest.raises(ValueError, match=r"1 of 2 rows have an instruction, but the template has no place for one"):
        runner(tiny_raw_model_path, instructed, tmp_path / "out", start)
    with pytest.raises(ValueError, match=r"1 of 2 rows have an instruction, but the template has no place for one"):
        options = {"save_strategy": "steps", "save_steps": 1}
        evaluated = {"eval_data": [str(instructed)]}
        runner(tiny_raw_model_path, training_file, tmp_path / "out", start, evaluated, **options)
    both = rows_of(tmp_path / "both.jsonl", {"instruction": HEAT}, {"query_prompt": "Q: "})
    with pytest.raises(ValueError, match="1 of 2 rows have a query_prompt and 1 of them an instruction: with this"):
        runner(tiny_raw_model_path, both, tmp_path / "out", {**start, "template": "qwen3-reranker"})
    template = {**TEMPLATES["qwen3-reranker"].to_json(), "instruction": HEAT}
    (tmp_path / "template.json").write_text(json.dumps(template))
    prompted = rows_of(tmp_path / "prompted.jsonl", {"query_prompt": "Q: "})
    with pytest.raises(ValueError, match=f"1 of 1 rows have a query_prompt and the template has '{HEAT[:-1]}"):
        runner(tiny_raw_model_path, prompted, tmp_path / "out", {**start, "template": str(tmp_path / "template.json")})


def test_words_are_counted_in_the_rows_that_are_used(tiny_tokenizer, tmp_path):
    words = [{"prompt": "a"}] * 3 + [{"prompt": "b", "instruction": HEAT}, {"prompt": None}, {"prompt": ""}, {}]
    path = rows_of(tmp_path / "rows.jsonl", *words)
    with path.open("a") as file:
        file.write("{\n")
    rows = load_rows(str(path), "labels", str(tmp_path / "cache"), skip_bad_lines=True)
    counts = count_instructions([rows, rows])
    assert counts["prompt"] == {"a": 6, "b": 2, "": 6} and counts["instruction"] == {HEAT: 2, "": 12}
    args = MatryoshkaDataArguments(
        train_data=[str(path)],
        cache_path=str(tmp_path / "cache"),
        skip_bad_lines=True,
        max_example_num_per_dataset=2,
        train_group_size=2,
    )
    used = sample_rows(rows, str(path), 2, seed=1)
    assert sum(count_instructions([used])["prompt"].values()) == 2
    assert used["query"][:] == MatryoshkaTrainDataset(args, tiny_tokenizer, seed=1).dataset["query"][:]


def test_rows_may_agree_on_what_the_template_has(caplog):
    counts = {name: {"": 2} for name in ("query_prompt", "passage_prompt", "instruction")}
    assert template_of_rows(Template(), {**counts, "prompt": {Template().prompt: 2}}) == Template()
    assert not caplog.records


@pytest.mark.parametrize("name", ["qwen3-reranker", "zerank", "mxbai-v2", "ctxl-v2", "question-passage"])
def test_lengths_count_the_users_text(name, tiny_tokenizer, tmp_path):
    query, passage = "how does a wing lift and a wing lift", "air flows faster over the upper side of a wing."
    path = write(tmp_path / "rows.jsonl", {"query": query, "pos": [passage], "neg": ["n"]})
    lengths = [len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (query, passage)]
    assert min(lengths) > 4

    def pair(query_max_len, passage_max_len):
        args = MatryoshkaDataArguments(
            train_data=[str(path)],
            cache_path=str(tmp_path / "cache"),
            train_group_size=2,
            query_max_len=query_max_len,
            passage_max_len=passage_max_len,
        )
        rows = MatryoshkaTrainDataset(args, tiny_tokenizer, template=TEMPLATES[name])
        return rows[0][0][0], rows.truncated_shares()

    near = 2  # tokens that texts and words beside them may make together
    whole, shares = pair(lengths[0] + near, lengths[1] + near)
    assert not whole.is_cut and shares == (0.0, 0.0, 1)
    cut, shares = pair(lengths[0] - near, lengths[1] + near)
    assert cut.query_is_cut and shares == (1.0, 0.0, 1)
    cut, shares = pair(lengths[0] + near, lengths[1] - near)
    assert cut.passage_is_cut and not cut.query_is_cut and shares == (0.0, 0.5, 1)


@pytest.mark.slow
def test_the_first_line_of_a_run_says_what_is_cut(tiny_raw_model_path, tmp_path, caplog):
    rows = [{**ROW, "query": "wing " * (100 if number % 4 == 0 else 1)} for number in range(8)]
    data = write(tmp_path / "rows.jsonl", *rows)
    run = runner(tiny_raw_model_path, data, tmp_path / "out", {"start_layer": 2, "template": "mxbai-v2"}, max_steps=1)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run.run()
    assert caplog.records[0].message == (
        "25.0 % of queries and 0.0 % of passages are truncated (in 8 rows): query_max_len=64, passage_max_len=192, "
        "without the template."
    )


def test_training_uses_the_default_instruction_of_a_checkpoint(tiny_raw_model_path, tmp_path):
    data = rows_of(tmp_path / "rows.jsonl", {"instruction": HEAT})
    runner(tiny_raw_model_path, data, tmp_path / "first", {"start_layer": 2, "template": "mxbai-v2"}).run()
    run = runner(tmp_path / "first", rows_of(tmp_path / "plain.jsonl", {}), tmp_path / "second")
    assert HEAT in run.tokenizer.decode(run.train_dataset[0][0][0].input_ids)
