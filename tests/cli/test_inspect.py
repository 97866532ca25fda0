import json

import pytest

from flagembedding_matryoshka.cli.inspect import main
from tests.qwen import write_causal_lm


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_causal_lm(tmp_path_factory.mktemp("hub") / "models--Qwen--Qwen3-Reranker-0.6B" / "snapshots" / "0a")


def test_every_fact_is_printed_with_its_source(path, capsys):
    main([str(path)])
    printed = capsys.readouterr()
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in printed.out.splitlines()}
    assert lines["template"] == "template qwen3-reranker [the name: models--Qwen--Qwen3-Reranker-0.6B]"
    assert lines["head tokens"].startswith("head tokens 'yes' − 'no' [")
    assert lines["backbone"] == "backbone qwen3 [model_type in config.json]"
    assert "<Query>: {query}\\n<Document>: {passage}" in lines["words"] and not printed.err


def test_json_has_the_same_facts(path, capsys):
    main([str(path), "--json", "--template", "zerank"])
    found = json.loads(capsys.readouterr().out)
    assert found["template_name"] == {"value": "zerank", "source": "the caller"}
    assert found["exits"]["value"] == [4, 5, 6] and found["template"]["value"]["temperature"] == 5.0


def test_an_assumed_template_is_said(tiny_raw_model_path, capsys):
    main([str(tiny_raw_model_path)])
    printed = capsys.readouterr()
    assert "cost_wise  [assumed]" in printed.out and "--template" in printed.err


def test_what_cannot_be_loaded_ends_with_1_and_says_why(path, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "there is no checkpoint at"),
        ([str(path), "--template", "qwen4"], "there is no template 'qwen4'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1 and message in capsys.readouterr().err
