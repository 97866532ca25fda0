"""Instructions of a command and of single rows, and least scores."""

import json

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cli import work
from flagembedding_matryoshka.cli.rank import main as rank
from flagembedding_matryoshka.cli.score import main as score
from tests.cli.conftest import TEXTS, Desk
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = [None, "judge by the topic", "find heat", "", None, "judge by the topic"]
PLACELESS = "template 'cost_wise' has no place for the instruction 'find heat'"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_causal_lm(tmp_path_factory.mktemp("models") / "Qwen3-Reranker-tiny", initializer_range=0.1)


@pytest.fixture(scope="module")
def instructed(path):
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", instruction="find wings")


@pytest.fixture
def qwen(path, tmp_path):
    return Desk(str(path), tmp_path / "rows.jsonl", tmp_path / "out.jsonl")


def with_own(row, instruction):
    return row if instruction is None else row | {"instruction": instruction}


@pytest.fixture(params=[4096, 7], ids=["one window", "several windows"])
def windows(request, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", request.param)


@pytest.mark.usefixtures("windows")
def test_a_rows_own_instruction_goes_before_the_commands_in_a_ranking(qwen, instructed):
    rows = [{"query": f"wing {number}", "documents": TEXTS[: 2 + number]} for number in range(6)]
    rows = qwen.write([*map(with_own, rows, OWN), {"query": "q", "documents": ["d"], "instruction": None}])
    rank(qwen.words("--instruction", "find wings"))
    for row, line in zip(rows, qwen.read(), strict=True):
        expected = instructed.rank(row["query"], row["documents"], instruction=row.get("instruction"))
        assert line.pop("ranking") == [hit | {"score": pytest.approx(hit["score"], abs=1e-6)} for hit in expected]
        assert line == {name: value for name, value in row.items() if name != "documents"}


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("layers", [["5"], ["4", "6"]])
def test_a_rows_own_instruction_goes_before_the_commands_in_scores(qwen, instructed, layers):
    rows = [{"query": f"wing {place % 2}", "passage": text} for place, text in enumerate(TEXTS)]
    rows = qwen.write([*map(with_own, rows, OWN), {"query": "q", "document": "d", "instruction": None}])
    score(qwen.words("--instruction", "find wings", "--cutoff_layers", *layers))
    for row, line in zip(rows, qwen.read(), strict=True):
        pair = (row["query"], row.get("passage", row.get("document")))
        options = {"instruction": row.get("instruction"), "cutoff_layers": list(map(int, layers))}
        expected = instructed.compute_score([pair], **options)
        found = line.pop("score")
        flat = [one for (one,) in expected] if len(layers) > 1 else expected[0]
        assert found == pytest.approx(flat, abs=1e-6) and line == row


def test_another_default_does_not_continue_an_output(qwen):
    rows = qwen.write([{"query": "wing", "passage": text, "instruction": "find heat"} for text in TEXTS])
    score(qwen.words("--instruction", "find wings"))
    assert json.loads(qwen.output.with_name("out.jsonl.settings.json").read_text())["instruction"] == "find wings"
    qwen.write([*rows, *rows])
    for other in ([], ["--instruction", "find heat"]):
        with pytest.raises(ValueError, match="instruction"):
            score(qwen.words(*other))
    score(qwen.words("--instruction", "find wings"))
    assert len(qwen.read()) == 12


def test_lines_of_other_instructions_are_not_continued(qwen):
    rows = qwen.write([{"query": "wing", "passage": text, "instruction": "find heat"} for text in TEXTS])
    score(qwen.words())
    qwen.write([row | {"instruction": "find wings"} for row in rows])
    with pytest.raises(ValueError, match="line 1 is not of row 1"):
        score(qwen.words())


@pytest.mark.parametrize("command", [rank, score])
def test_a_template_without_a_place_refuses_the_command_or_the_row(desk, command):
    row = {"query": "wing", **({"documents": TEXTS} if command is rank else {"passage": "a wing"})}
    desk.write([row])
    with pytest.raises(ValueError, match=PLACELESS):
        command(desk.words("--instruction", "find heat"))
    desk.output.unlink()
    desk.output.with_name("out.jsonl.settings.json").unlink()
    desk.write([row, row | {"instruction": "find heat"}])
    with pytest.raises(ValueError, match=f"^row 2 of the input: .*{PLACELESS}"):
        command(desk.words())
    assert desk.output.read_text() == ""


@pytest.mark.parametrize("command", [rank, score])
@pytest.mark.parametrize("instruction", [3, ["a"], {"a": "b"}])
def test_an_instruction_that_is_no_text_is_named_before_anything_is_computed(qwen, command, instruction):
    row = {"query": "wing", **({"documents": TEXTS} if command is rank else {"passage": "a wing"})}
    qwen.write([row, row | {"instruction": instruction}])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: instruction must be a string, got"):
        command(qwen.words())
    assert not qwen.output.exists()


def test_min_score_leaves_hits_out_of_each_ranking(desk, reranker):
    rows = desk.write([{"query": query, "documents": TEXTS} for query in ("wing", "lift")])
    least = reranker.rank("wing", TEXTS, normalize=True)[2]["score"] - 1e-6
    rank(desk.words("--min_score", str(least), "--normalize"))
    found = [[(hit["corpus_id"], hit["score"]) for hit in line["ranking"]] for line in desk.read()]
    expected = [reranker.rank(row["query"], TEXTS, normalize=True, min_score=least) for row in rows]
    assert found == [[(hit["corpus_id"], pytest.approx(hit["score"], abs=1e-6)) for hit in one] for one in expected]
    assert len(found[0]) == 3
    with pytest.raises(ValueError, match="min_score"):
        rank(desk.words("--min_score", "0.1", "--normalize"))
    desk.output.unlink()
    desk.output.with_name("out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match=r"min_score=0.1 beside cascade=\{3: 0.5\}"):
        rank(desk.words("--min_score", "0.1", "--cascade", "3:0.5"))
