"""The commands of README and docs, word for word but for --use_cpu, with names of tiny models and collections."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import MistralConfig, MistralForCausalLM

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cli.inspect import main
from tests.collection import QUERIES, write_collection
from tests.encoders import save_bi_encoder, save_cross_encoder
from tests.pages import PAGES, blocks, commands, run_command
from tests.shipped import needs_smollm2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMANDS = [command for page in PAGES if page != "docs/elastic.md" for command in commands(page)]


def run(*commands):
    for command in commands:
        run_command(command)


def commands_of(start, count, page=None):
    found = [command for command in (COMMANDS if page is None else commands(page)) if command.startswith(start)]
    assert len(found) == count, found
    return found


@pytest.fixture
def workplace(tmp_path, tiny_tokenizer, monkeypatch):
    """A directory that holds what the pages call Mistral-7B, bge-reranker-v2-m3, all-MiniLM-L6-v2 and DIR."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "mistralai" / "Mistral-7B-v0.1"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    MistralForCausalLM(MistralConfig(vocab_size=len(tiny_tokenizer), num_hidden_layers=32, **shape)).save_pretrained(
        base
    )
    tiny_tokenizer.save_pretrained(base)
    save_cross_encoder(tmp_path / "BAAI" / "bge-reranker-v2-m3", labels=1)
    save_bi_encoder(tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2")
    judgements = [(query["_id"], f"p{2 + place}", 1) for place, query in enumerate(QUERIES)]
    for split in ("train", "test"):
        write_collection(tmp_path / "DIR", judgements=judgements, split=split)
    return tmp_path


def test_what_inspect_shows_is_what_it_prints(capsys):
    main(["smollm2"])
    (shown,) = (block for block in blocks("docs/backbones.md", "text") if block.startswith("backbone"))
    assert capsys.readouterr().out == shown


@needs_smollm2
def test_rank_and_score_write_what_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = "docs/commands.md"
    lists, ranked, scored, retrieved = blocks(page, "json")
    (pairs,) = blocks(page, "text")
    (config,) = blocks(page, "yaml")
    files = {"lists.jsonl": lists, "retrieved.jsonl": retrieved, "pairs.tsv": pairs, "rank.yaml": config}
    for name, text in files.items():
        Path(name).write_text(text)
    run(*commands_of("flagembedding-matryoshka rank ", 3, page), *commands_of("flagembedding-matryoshka score ", 1))

    (found,), (expected,) = read_rows(Path("ranked.jsonl").read_text()), read_rows(ranked)
    assert found | {"ranking": 0} == expected | {"ranking": 0}
    for hit, shown in zip(found["ranking"], expected["ranking"], strict=True):
        assert hit == pytest.approx(shown, abs=0.15)
    (best,) = read_rows(Path("best.jsonl").read_text())
    assert [hit["corpus_id"] for hit in best["ranking"]] == [1, 2] and best["ranking"][0]["score"] < 1
    for found, expected in zip(read_rows(Path("scored.jsonl").read_text()), read_rows(scored), strict=True):
        assert found == expected | {"score": pytest.approx(expected["score"], abs=0.15)}
    fused = [row["ranking"] for row in read_rows(Path("fused.jsonl").read_text())]
    assert [[hit["corpus_id"] for hit in hits] for hits in fused] == [[1, 2, 0]] * 2
    assert {hit["first_stage_score"] for hits in fused for hit in hits} == {7.1, 9.4}


@needs_smollm2
def test_stored_passages_rank_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = "docs/stored.md"
    for name, text in zip(("corpus.jsonl", "lists.jsonl"), blocks(page, "json"), strict=True):
        Path(name).write_text(text)
    run(*commands_of("flagembedding-matryoshka ", 2, page))
    (row,) = read_rows(Path("ranked.jsonl").read_text())
    assert sorted(hit["corpus_id"] for hit in row["ranking"]) == [0, 1, 2]
    assert {hit["corpus_id"]: hit.get("id") for hit in row["ranking"]} == {0: "open", 1: "sort", 2: None}


def read_rows(text):
    return [json.loads(line) for line in text.splitlines()]


@needs_smollm2
def test_the_first_training_prints_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = "docs/training.md"
    Path("train.jsonl").write_text(blocks(page, "json")[0])
    command, check = commands_of("flagembedding-matryoshka finetune ", 2)
    shown = [re.findall(r"'(\w+)': '([^']*)'", line) for line in blocks(page, "text")[0].splitlines()]
    run(f"{command} --use_cpu")
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{'loss'")]
    for found, fields in zip(printed, shown, strict=True):
        assert found.keys() > dict(fields).keys()
        counted = ("learning_rate", "lists", "tokens", "operations", "epoch")
        assert {name: found[name] for name in counted} == {name: dict(fields)[name] for name in counted}
    shutil.copy("train.jsonl", "dev.jsonl")
    run(check)
    assert "a query of the evaluation data: 4 of 4 rows" in capsys.readouterr().out.splitlines()
    with MatryoshkaReranker("tuned", devices="cpu") as reranker:
        assert len(reranker.rank("join paths", ["Join path segments.", "Sort the list."])) == 2


def test_from_a_collection_to_a_plan(workplace):
    *before, second_round = sorted(
        commands_of("python -m flagembedding_matryoshka.finetune.", 6), key=lambda command: "--model output" in command
    )
    run(*before)
    shutil.move("scored.jsonl", "train.jsonl")
    first_stage = commands_of("torchrun --nproc_per_node 1", 1)[0] + " --use_cpu"
    run(first_stage)
    evaluation, fusion = commands_of("python -m flagembedding_matryoshka.evaluation", 2)
    run(evaluation)

    settings = json.loads(Path("evaluation_output/results.json").read_text())["settings"]
    assert len(settings) > 9
    with MatryoshkaReranker("output", budget=0.4, devices="cpu") as reranker:
        assert reranker.planned.depth <= 24
        assert len(reranker.rank("wing", ["wing lift", "heat"])) == 2
    run(fusion)
    with MatryoshkaReranker("output", devices="cpu") as reranker:
        hits = reranker.rank("wing", ["wing lift", "heat"], first_stage_scores=[2.0, 0.0], fusion="auto")
    assert {"first_stage_score", "fused_score"} <= hits[0].keys()

    run(second_round + " --device cpu")
    taught, scored = (Path(name).read_text().splitlines() for name in ("taught.jsonl", "scored.jsonl"))
    assert len(taught) == len(scored) and taught != scored

    Path("output").rename("stage1")
    widths = r" --compress_(?:layers|ratios)(?: \d+)+"
    again = re.sub(widths, "", first_stage)
    second_stage = commands_of("torchrun …", 3)
    run(*(command.replace("torchrun …", again) for command in second_stage))
    base, adapters = "mistralai/Mistral-7B-v0.1", ["stage1", "layer", "token_2", "token_4"]
    with MatryoshkaReranker(base, peft_path=adapters, devices="cpu", dtype="float32") as reranker:
        scores = [
            reranker.compute_score(("wing", "wing lift"), compress_layers=[8], compress_ratio=ratio)
            for ratio in (1, 2, 4)
        ]
    assert len({score for (score,) in scores}) == 3
