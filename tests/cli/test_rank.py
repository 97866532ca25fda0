import pytest

from flagembedding_matryoshka.cli import work
from flagembedding_matryoshka.cli.rank import main
from tests.cli.conftest import TEXTS

LISTS = [
    {"id": number, "query": query, "documents": [f"{text} {number}" for text in TEXTS[number:]]}
    for number, query in enumerate(("wing", "lift", "air"))
]


def test_lines_have_what_rank_returns_to_the_last_bit(desk, reranker):
    rows = desk.write(LISTS)
    main(desk.words("--top_k", "2", "--return_documents", "--cascade", "3:0.9", "4:0.5", "--compress_layers", "2"))
    for row, line in zip(rows, desk.read(), strict=True):
        ranking = reranker.rank(
            row["query"],
            row["documents"],
            top_k=2,
            return_documents=True,
            cascade={3: 0.9, 4: 0.5},
            compress_layers=[2],
        )
        for hit, expected in zip(line.pop("ranking"), ranking, strict=True):
            assert hit == expected | {"score": pytest.approx(expected["score"], abs=1e-5)}
        assert line == {"id": row["id"], "query": row["query"]}


def test_a_window_ends_with_the_list_that_fills_it(desk, reranker, monkeypatch):
    rows = desk.write([*LISTS, {"query": "side", "documents": []}, *LISTS])
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 7)
    main(desk.words())
    lines = desk.read()
    assert [line["query"] for line in lines] == [row["query"] for row in rows] and lines[3]["ranking"] == []
    for row, line in zip(rows, lines, strict=True):
        expected = [hit["corpus_id"] for hit in reranker.rank(row["query"], row["documents"])]
        assert [hit["corpus_id"] for hit in line["ranking"]] == expected


def test_documents_that_are_objects_keep_what_they_have(desk, reranker):
    documents = [{"id": f"d{number}", "text": text, "score": "first stage's"} for number, text in enumerate(TEXTS)]
    rankings = []
    for row in ({"query": "wing", "passages": documents}, ["wing", *TEXTS]):  # each alone, in the same batch
        desk.write([row])
        main(desk.words())
        rankings += [line["ranking"] for line in desk.read()]
        desk.output.unlink()
    objects, strings = rankings
    assert [hit["id"] for hit in objects] == [f"d{hit['corpus_id']}" for hit in objects]
    assert [{name: hit[name] for name in ("corpus_id", "score")} for hit in objects] == strings
    assert [hit["corpus_id"] for hit in strings] == [hit["corpus_id"] for hit in reranker.rank("wing", TEXTS)]


def test_a_list_that_is_refused_is_named_and_those_before_it_are_there(desk, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 1)
    desk.write([LISTS[0], LISTS[0], LISTS[2]])
    fault = "row 3 of the input: cascade .* keeps 2 of the 4 candidates of query 0"
    with pytest.raises(ValueError, match=fault):
        main(desk.words("--top_k", "3", "--cascade", "3:0.5"))
    assert len(desk.read()) == 2


def test_what_the_ranking_refuses_is_not_written(desk):
    desk.write(LISTS)
    with pytest.raises(ValueError, match=r"exits are \[2, 3, 4, 5, 6\]"):
        main(desk.words("--cutoff_layers", "99"))
    assert desk.output.read_text() == ""
