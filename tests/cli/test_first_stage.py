"""Rankings of files, fused with the first stage's scores."""

import json
import shutil

import pytest

from flagembedding_matryoshka.cli import score, work
from flagembedding_matryoshka.cli.rank import main
from flagembedding_matryoshka.inference.plan import PLAN_NAME, Measurement, Plan
from flagembedding_matryoshka.setting import Setting
from tests.cli.conftest import TEXTS

FIRST = [2.5, None, -1.0, 7.25, 0.5, 3]
QUERIES = ["wing", "lift", "air"]
OBJECTS = [
    {
        "id": number,
        "query": query,
        "documents": [
            {"text": text, "name": f"d{place}"} | ({} if first is None else {"bm25": first})
            for place, (text, first) in enumerate(zip(TEXTS[number:], FIRST[number:], strict=True))
        ],
    }
    for number, query in enumerate(QUERIES)
]
STRINGS = [
    {"id": number, "query": query, "documents": TEXTS[number:], "bm25": FIRST[number:]}
    for number, query in enumerate(QUERIES)
]
FUSED = ("--first_stage_field", "bm25", "--fusion", "0.6")


def ranked(desk, rows, *words):
    desk.write(rows)
    main(desk.words(*words))
    return [line["ranking"] for line in desk.read()]


def expected(reranker, number, **options):
    options = {"first_stage_scores": FIRST[number:], "fusion": 0.6} | options
    return reranker.rank(QUERIES[number], TEXTS[number:], **options)


def like(hits, others):
    """Return whether hits equal the library's, up to rounding."""
    assert len(hits) == len(others)
    for hit, other in zip(hits, others, strict=True):
        numbers = {name: pytest.approx(other[name], abs=1e-4) for name in ("score", "fused_score")}
        assert {name: hit[name] for name in other} == other | numbers


@pytest.mark.parametrize("rows", [OBJECTS, STRINGS], ids=["documents", "row"])
@pytest.mark.parametrize("options", [{}, {"cascade": {2: 0.5, 4: 0.3}}])
def test_scores_are_read_from_documents_or_from_the_row(desk, reranker, rows, options, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 7)
    words = ["--cascade", "2:0.5", "4:0.3"] if options else []
    rankings = ranked(desk, rows, *FUSED, *words)
    for number, hits in enumerate(rankings):
        like(hits, expected(reranker, number, **options))
    places = [hit["corpus_id"] for hit in rankings[0]]
    if rows is STRINGS:
        assert [line["bm25"] for line in desk.read()] == [row["bm25"] for row in STRINGS]
    else:
        assert [hit["name"] for hit in rankings[0]] == [f"d{place}" for place in places]
        assert [hit.get("bm25") for hit in rankings[0]] == [FIRST[place] for place in places]
    assert places != [hit["corpus_id"] for hit in reranker.rank(QUERIES[0], TEXTS, **options)]


def test_the_field_may_be_called_score(desk, reranker):
    rows = [
        row | {"documents": [{"text": one["text"], "score": one.get("bm25")} for one in row["documents"]]}
        for row in OBJECTS
    ]
    for number, hits in enumerate(ranked(desk, rows, "--first_stage_field", "score", "--fusion", "0.6")):
        like(hits, expected(reranker, number))


def test_the_order_of_any_rows_is_a_first_stage(desk, reranker):
    rows = [STRINGS[0], {"query": QUERIES[1], "passages": TEXTS[1:]}, OBJECTS[2]]
    own = {"first_stage_scores": None, "first_stage": "order"}
    for number, hits in enumerate(ranked(desk, rows, "--first_stage", "order", "--fusion", "0.6")):
        like(hits, expected(reranker, number, **own))


@pytest.fixture
def planned(desk, tmp_path):
    """The desk with a model whose plan has a weight."""
    desk.model = str(shutil.copytree(desk.model, tmp_path / "model"))
    measured = (Measurement(Setting(6), 1.0, 1.0, 1.0),)
    Plan((2, 3, 4, 5, 6), (), "d/test", 9, "all", measured, fusion=0.6).write(tmp_path / "model" / PLAN_NAME)
    return desk


@pytest.mark.filterwarnings("ignore:.*names no weights")
@pytest.mark.parametrize("words", [("--fusion", "auto"), ("--budget", "1")])
def test_the_weight_of_the_plan(planned, reranker, words):
    for number, hits in enumerate(ranked(planned, STRINGS, "--first_stage_field", "bm25", *words)):
        like(hits, expected(reranker, number))


def test_a_truncated_output_resumes_only_with_the_same_options(desk, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 1)
    ranked(desk, OBJECTS, *FUSED)
    noted = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (noted["first_stage_field"], noted["fusion"]) == ("bm25", 0.6)
    whole = desk.output.read_bytes()
    desk.output.write_bytes(whole[: len(whole) // 2])
    main(desk.words(*FUSED))
    assert desk.output.read_bytes() == whole
    for others, fault in (
        (("--first_stage", "order", "--fusion", "0.6"), "first_stage_field was 'bm25' and is None"),
        (("--first_stage_field", "bm25", "--fusion", "0.7"), "fusion was 0.6 and is 0.7"),
        ((), "fusion was 0.6 and is None"),
    ):
        with pytest.raises(ValueError, match=fault):
            main(desk.words(*others))
        assert desk.output.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (
            ("--fusion", "0.5"),
            "--fusion 0.5 needs the first stage's scores: give --first_stage_field, or",
        ),
        (("--fusion", "auto"), "--fusion auto needs the first stage's scores"),
        (("--first_stage_field", "bm25"), "the first stage's scores need a weight: give --fusion"),
        (("--first_stage", "order"), "the first stage's scores need a weight: give --fusion"),
        ((*FUSED, "--first_stage", "order"), "--first_stage_field bm25 and --first_stage order: give one of them"),
        (("--first_stage", "ranks", "--fusion", "1"), "argument --first_stage: invalid choice: 'ranks'"),
        (("--first_stage", "order", "--fusion", "best"), "'best' must be a number or auto"),
    ],
)
def test_contradicting_options_are_refused(desk, words, fault, capsys):
    desk.write(OBJECTS)
    with pytest.raises(SystemExit):
        main(desk.words(*words))
    assert fault in capsys.readouterr().err and not desk.output.exists()


def test_a_row_without_scores_is_named_before_computation(desk):
    desk.write([*OBJECTS, STRINGS[0], ["wing", *TEXTS]])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 5: neither the row nor one of its documents has"):
        main(desk.words(*FUSED))
    assert not desk.output.exists()


@pytest.mark.parametrize("words", [("--fusion", "0.5"), ("--first_stage", "order"), ("--first_stage_field", "bm25")])
def test_score_refuses_options_of_rankings(desk, words, capsys):
    desk.write([["wing", "air"]])
    with pytest.raises(SystemExit):
        score.main(desk.words(*words))
    assert f"{words[0]} changes the order of a query's documents, and score does not rank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        score.main(["--help"])
    assert words[0] not in capsys.readouterr().out
