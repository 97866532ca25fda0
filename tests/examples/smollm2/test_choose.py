import pytest
from choose import join

from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import write_collection


def test_kinds_are_joined_under_ids_of_their_own(tmp_path):
    for kind in ("code", "glosses"):
        write_collection(tmp_path / kind, judgements=[("q1", "p2", 1)], split="dev")
    output = tmp_path / "choose"
    assert join(tmp_path, output) == 2
    assert join(tmp_path, output) == 2
    joined = read_collection(output, "dev")
    assert joined.relevant == {f"{kind}-q1": {f"{kind}-p2": 1} for kind in ("code", "glosses")}
    one = read_collection(tmp_path / "code", "dev")
    assert len(joined.passages) == 2 * len(one.passages)
    assert joined.queries["glosses-q1"] == one.queries["q1"]


def test_a_text_may_hold_line_breaks_that_json_does_not_escape(tmp_path):
    write_collection(tmp_path / "code", judgements=[("q1", "p2", 1)], split="dev")
    corpus = tmp_path / "code" / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + '{"_id": "p99", "text": "a\u2028b\x85c"}\n', encoding="utf-8")
    join(tmp_path, tmp_path / "choose")
    assert read_collection(tmp_path / "choose", "dev").passages["code-p99"] == "a\u2028b\x85c"


def test_a_folder_without_collections_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \*/qrels/dev\.tsv"):
        join(tmp_path, tmp_path / "choose")
