"""Options from a file. Every command has `--config`: tests/cli/test_main.py."""

import argparse

import pytest
import yaml

from flagembedding_matryoshka.cli import inspect, rank
from flagembedding_matryoshka.evaluation.arguments import build_parser
from flagembedding_matryoshka.parser import Parser


@pytest.fixture
def write(tmp_path):
    def written(values):
        path = tmp_path / "run.yaml"
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        path.write_bytes(text.encode(errors="surrogateescape"))
        return ["--config", str(path)]

    return written


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cascade": {3: 0.5, 4: 0.25}, "top_k": 2}, ["--cascade", "3:0.5", "4:0.25", "--top_k", "2"]),
        ({"cutoff_layers": 3, "compress_layers": [1, 2]}, ["--cutoff_layers", "3", "--compress_layers", "1", "2"]),
        ({"normalize": True, "return_documents": True}, ["--normalize", "--return_documents"]),
        ({"normalize": False, "return_documents": False}, ["--no-normalize", "--no-return_documents"]),
        ({"normalize": "calibrated", "fusion": "auto"}, ["--normalize", "calibrated", "--fusion", "auto"]),
        ({"min_score": -1.5, "instruction": "a b: 'ü'"}, ["--min_score", "-1.5", "--instruction", "a b: 'ü'"]),
        ({"min_score": None}, []),
    ],
)
def test_a_file_says_what_can_be_typed(values, words, write):
    parse = rank.build_parser().parse_args
    found = vars(parse(write({"model": "m", **values})))
    assert found == vars(parse(["--model", "m", *words]))


def test_options_that_may_be_repeated_and_arguments_without_a_name(write):
    values = {
        "data": "d",
        "model": "m",
        "cascade": [{3: 0.5}, {3: 0.5, 4: 0.2}],
        "bi_encoder": [["a", "x"], ["b", "y"]],
        "random_order": True,
        "write_plan": False,
        "fusion": [],
    }
    found = build_parser().parse_args(write(values))
    assert found.cascade == [[(3, 0.5)], [(3, 0.5), (4, 0.2)]] and found.bi_encoder == values["bi_encoder"]
    assert (found.random_order, found.write_plan, found.fusion) == (True, False, [])
    assert inspect.build_parser().parse_args(write({"path": "m", "json": True})).path == "m"


@pytest.mark.parametrize("words", [["--cascade", "5:0.1"], ["--cascade=5:0.1"]])
def test_the_command_line_replaces_what_the_file_says(words, write):
    config = write({"data": "d", "model": "m", "cascade": [{3: 0.5}], "top_k": 7})
    found = build_parser().parse_args([*words, *config, "--model", "other"])
    assert (found.cascade, found.model, found.top_k) == ([[(5, 0.1)]], "other", 7)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [", "is not YAML"),
        ("model: \udce4", "is not YAML"),
        ("- a", r"must be a mapping .* got \['a'\]"),
        ("modle: m", r"'modle' is no option of try\. See try --help"),
        ("1: m", "1 is no option of try"),
        ("config: other.yaml", "'config' is no option of try"),
    ],
)
def test_a_fault_of_the_file_is_named(text, fault, write):
    with pytest.raises(ValueError, match=rf"--config .*run\.yaml:? {fault}"):
        Parser(prog="try").parse_args(write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        Parser(prog="try").parse_args(["--config", str(tmp_path / "missing.yaml")])


def test_a_value_is_checked_as_a_typed_one(write, capsys):
    parser = Parser(prog="try")
    parser.add_argument("--number", type=int, required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(write({"number": "many"}))
    assert "try: error: argument --number: invalid int value: 'many'" in capsys.readouterr().err
    assert parser.parse_args(write({"number": 3})) == argparse.Namespace(number=3)
