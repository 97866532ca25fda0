"""The command `store`, and `rank` of what it has written."""

import gzip
import json
import re

import pytest

from flagembedding_matryoshka.cli import rank, store
from tests.cli.conftest import TEXTS

CORPUS = [{"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(TEXTS)]
CORPUS[2]["title"] = "Wings"
SETTING = {"store_layer": 2, "compress_ratio": 4}
WORDS = [word for name, value in SETTING.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def stored(desk, tmp_path):
    """A desk and the command line of `store` for its corpus, which is compressed."""
    corpus, path = tmp_path / "corpus.jsonl.gz", tmp_path / "store"
    corpus.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in CORPUS).encode()))
    files = ["--input", str(corpus), "--output", str(path)]
    return desk, path, ["--model", desk.model, "--dtype", "float32", "--devices", "cpu", *files, *WORDS]


def test_ids_rank_as_the_texts_of_the_corpus(stored, reranker, capsys):
    desk, path, words = stored
    for _ in range(2):  # the second run finds all passages
        store.main(words)
        assert f"{path} has {len(TEXTS)} passages of" in capsys.readouterr().out
    texts = [f"{row['title']} {row['text']}".strip() for row in CORPUS]
    objects = [{"id": row["_id"], "rank": number} for number, row in enumerate(CORPUS)]
    mixed = [*objects[:2], {"id": "d2", "text": texts[2]}, "how does a wing lift and lift", {"text": texts[4]}]
    desk.write([{"query": "wing", "documents": objects}, {"query": "lift", "documents": mixed}])
    rank.main(desk.words("--store", str(path), "--top_k", "3"))
    first, second = (line["ranking"] for line in desk.read())
    for hits, expected in (
        (first, reranker.rank("wing", texts, top_k=3, **SETTING)),
        (second, reranker.rank("lift", [*texts[:3], TEXTS[3], texts[4]], top_k=3, **SETTING)),
    ):
        for hit, other in zip(hits, expected, strict=True):
            assert hit["corpus_id"] == other["corpus_id"] and hit["score"] == pytest.approx(other["score"], abs=1e-5)
    assert all(hit["id"] == f"d{hit['corpus_id']}" and hit["rank"] == hit["corpus_id"] for hit in first)
    assert all(("id" in hit) == (hit["corpus_id"] < 3) for hit in second)


def test_states_in_int8_take_fewer_bytes_and_are_ranked(stored, reranker, capsys):
    desk, path, words = stored
    store.main(words)
    (wide,) = re.findall(r"passages of (\d+) bytes", capsys.readouterr().out)
    in_int8 = [*words, "--state_quantization", "int8"]
    with pytest.raises(ValueError, match="was made with state_quantization=None, and not 'int8'"):
        store.main(in_int8)
    in_int8[words.index(str(path))] = narrow_path = str(path.with_name("narrow"))
    store.main(in_int8)
    (narrow,) = re.findall(r"passages of (\d+) bytes", capsys.readouterr().out)
    size = reranker.config.hidden_size
    assert int(narrow) == pytest.approx(int(wide) * (size + 2 * -(-size // 32)) / (4 * size), abs=1)
    ids = [row["_id"] for row in CORPUS]
    desk.write([{"query": "wing", "documents": [{"id": name} for name in ids]}])
    rank.main(desk.words("--store", narrow_path))
    ((line,), expected) = desk.read(), reranker.rank("wing", ids=ids, store=narrow_path)
    assert [hit["id"] for hit in line["ranking"]] == [hit["id"] for hit in expected]
    with pytest.raises(SystemExit):
        store.main([*words, "--state_quantization", "int4"])
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_what_a_store_refuses_names_its_row(stored):
    desk, path, words = stored
    store.main(words)
    for document, fault in (
        ({"id": "d99"}, "row 1 of the input: the store .* has no passage with the id 'd99'"),
        ({"id": "d1", "text": "other"}, "row 1 of the input: passage 0 has the id 'd1', under which the store"),
        ({"id": 7}, r"line 1: document 0 must be a string or an object with a text or an id, got \{'id': 7\}"),
        ({"text": None, "name": "d1"}, "line 1: document 0 must be a string or an object with a text or an id"),
    ):
        desk.write([["wing", document]])
        with pytest.raises(ValueError, match=fault):
            rank.main(desk.words("--store", str(path)))
        desk.output.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="line 1: document 0 must be a string or an object with a text, got"):
        desk.write([["wing", {"id": "d1"}]])
        rank.main(desk.words())


def test_options_that_contradict_a_store_end_the_process(stored, capsys):
    desk, path, words = stored
    desk.write([["wing", "a"]])
    for name, value in SETTING.items():
        with pytest.raises(SystemExit):
            rank.main(desk.words("--store", str(path), f"--{name}", str(value)))
        assert f"--{name} {value} and --store" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        store.main(words[: -len(WORDS)])
    assert "--store_layer must be" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"there is no store .*nothing"):
        rank.main(desk.words("--store", str(path.parent / "nothing")))
