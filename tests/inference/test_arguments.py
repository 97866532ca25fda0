"""The options of a command line against the signatures that they are read off."""

import argparse
import inspect
import sys

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.arguments import (
    add_ranking,
    add_reranker,
    explanations,
    given_options,
    given_ranking,
)
from flagembedding_matryoshka.parser import program


@pytest.fixture(scope="module")
def parser():
    parser = argparse.ArgumentParser()
    add_reranker(parser)
    add_ranking(parser)
    return parser


def test_every_parameter_is_an_option_and_is_explained(parser):
    parameters = set(inspect.signature(MatryoshkaReranker).parameters) - {"model_name_or_path"}
    parameters |= set(inspect.signature(MatryoshkaReranker.rank).parameters)
    parameters -= {"self", "query", "documents", "first_stage_scores", "ids", "store", "overrides"}
    actions = {action.dest: action for action in parser._actions}
    assert set(actions) == {"help", "model", *parameters}
    assert all(action.help for action in actions.values())
    parser.format_help()


def test_what_is_not_given_is_left_to_the_class(parser):
    options = parser.parse_args(["--model", "m"])
    assert given_options(options) == given_ranking(options) == {}


def test_values_have_the_kinds_that_the_class_takes(parser):
    line = "--model m --peft_path a b --cutoff_layers 9 12 --compress_layers 3 --compress_ratio 2 --budget 0.5"
    line += " --no-from_raw --normalize --quantization int8 --devices cpu --dtype float32 --template qwen3-reranker"
    line += " --fusion 0.35 --top_k 2 --return_documents --cascade 9:0.5 12:0.25 --first_stage order"
    options = parser.parse_args(line.split())
    assert given_options(options) == {
        "peft_path": ["a", "b"],
        "cutoff_layers": [9, 12],
        "compress_layers": [3],
        "compress_ratio": 2,
        "budget": 0.5,
        "from_raw": False,
        "normalize": True,
        "fusion": 0.35,
        "quantization": "int8",
        "devices": ["cpu"],
        "dtype": "float32",
        "template": "qwen3-reranker",
    }
    assert given_ranking(options) == {
        "top_k": 2,
        "return_documents": True,
        "cascade": {9: 0.5, 12: 0.25},
        "first_stage": "order",
    }
    assert given_options(parser.parse_args(["--model", "m", "--fusion", "auto"]))["fusion"] == "auto"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("--cutoff_layers nine", "invalid int value: 'nine'"),
        ("--quantization int4", "invalid choice: 'int4'"),
        ("--fusion automatic", "'automatic' must be a number or auto"),
        ("--first_stage scores", "invalid choice: 'scores'"),
        ("--cascade 9", "'9' must be EXIT:SHARE"),
        ("--cascade 9:0.5 9:0.2", "--cascade names an exit twice"),
    ],
)
def test_what_is_no_value(line, fault, parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "m", *line.split()])
    assert fault in capsys.readouterr().err


def test_a_type_that_no_command_line_can_express_is_refused():
    from flagembedding_matryoshka.inference.arguments import _kind

    with pytest.raises(TypeError, match="a command line cannot express"):
        _kind(dict[str, int])


def test_names_that_share_an_explanation():
    found = explanations(test_documented)
    assert found == {"one": "First: of all.", "other": "First: of all.", "third": "goes on in its next line."}


def test_documented():
    """What is read of a docstring.

    Args:
        one, other: First: of all.
        third: goes on
            in its next line.

    Returns:
        none: of these.
    """
    with pytest.raises(ValueError, match="explains no arguments"):
        explanations(test_names_that_share_an_explanation)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--normalize", {"normalize": True}),
        ("--no-normalize", {"normalize": False}),
        ("--normalize calibrated", {"normalize": "calibrated"}),
        ("--token hf_abc", {"token": "hf_abc"}),
        ("--token", {"token": True}),
        ("--no-token", {"token": False}),
        ("--no-use_bf16", {"use_bf16": False}),
        ("", {}),
    ],
)
def test_a_flag_has_an_opposite_and_may_take_a_value(words, expected, parser):
    assert given_options(parser.parse_args(["--model", "m", *words.split()])) == expected


def test_help_says_default_in_place_of_none_and_shows_a_cascade_as_it_is_typed(parser):
    said = " ".join(parser.format_help().split())
    assert "None is" not in said and "Default: the first accelerator" in said
    assert "`8:0.5 16:0.2` keeps" in said
    options = parser.parse_args(["--model", "m", "--cascade", "8:0.5", "16:0.2"])
    assert given_ranking(options) == {"cascade": {8: 0.5, 16: 0.2}}


@pytest.mark.parametrize(
    ("typed", "called"),
    [
        ("/somewhere/flagembedding_matryoshka/serve/__main__.py", "python -m some.module"),
        ("/bin/flagembedding-matryoshka-serve", "flagembedding-matryoshka-serve"),
        ("flagembedding-matryoshka serve", "flagembedding-matryoshka serve"),
    ],
)
def test_a_command_calls_itself_as_it_was_typed(typed, called, monkeypatch):
    monkeypatch.setattr(sys, "argv", [typed])
    assert program("some.module") == called
