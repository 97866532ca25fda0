"""A cut model in each runtime."""

import json

import pytest

from benchmarks import runtimes
from tests.collection import write_collection
from tests.exports import SHORT, write_reranker

NAMES = ["this package, float32", "transformers, float32"]


@pytest.mark.slow
def test_a_runtime_is_compared_and_its_table_is_written_into_the_page(tmp_path, one_thread, capsys):
    model = write_reranker("mistral", tmp_path, SHORT)
    data = write_collection(tmp_path / "beir", judgements=[("q1", "p2", 1), ("q3", "p5", 1)])
    page, output = tmp_path / "page.md", tmp_path / "runtimes.json"
    page.write_text(f"before\n\n{runtimes.BEGIN}\nold\n{runtimes.END}\n\nbehind\n")
    given = ["--model", model, "--layers", 3, "--runtimes", *NAMES, "--data", data, "--split", "train"]
    runtimes.main(list(map(str, [*given, "--output", output, "--page", page])))
    report = json.loads(output.read_text())
    ours, theirs = report["rows"]
    assert [(row["layers"], row["runtime"]) for row in report["rows"]] == [(3, name) for name in NAMES]
    assert ours["largest_difference"] == 0 < theirs["largest_difference"] < 1e-4
    assert ours["nDCG@10"] == theirs["nDCG@10"] > 0
    assert ours["pairs_per_second"] > 0 and theirs["megabytes"] > 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\n\nbehind\n") and "old" not in text
    assert text.count("| transformers, float32 |") == 1
    assert runtimes.table(report) in capsys.readouterr().out


def test_a_page_without_the_place_for_the_table_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{runtimes.BEGIN}\n")
    with pytest.raises(ValueError, match=r"must have <!-- benchmarks\.runtimes --> and .* each once"):
        runtimes.write_page(page, "| table |")
    assert page.read_text() == f"{runtimes.BEGIN}\n"
