import json
import random
from collections import Counter

import pytest

from flagembedding_matryoshka.mining import lists, negatives, resuming
from flagembedding_matryoshka.mining.resuming import Outcome, Shard, parse_shard, write_outcomes
from tests.encoders import WORDS, save_bi_encoder


@pytest.fixture
def many(collection):
    """A collection of 20 judged queries, of which one finds nothing."""
    draw = random.Random(0)
    texts = list({" ".join(draw.sample(WORDS, 4)): None for _ in range(80)})[:60]
    corpus = [{"_id": str(i), "text": text} for i, text in enumerate(texts)]
    queries = [{"_id": str(i), "text": "unheard" if i == 3 else texts[i]} for i in range(20)]
    return collection(corpus, queries, [(str(i), str(i + 20), 1) for i in range(20)])


class Killed(BaseException):
    """Like SIGKILL: no handler catches it."""


def run(module, directory, name, *words):
    output = directory.parent / name
    module.main(["--data", str(directory), "--output", str(output), *map(str, words)])
    return output.read_bytes()


@pytest.mark.parametrize("module", [negatives, lists])
def test_a_stopped_run_continues(module, many, monkeypatch, caplog):
    expected = run(module, many, "whole.jsonl")
    monkeypatch.setattr(resuming, "QUERIES_AT_ONCE", 4)
    asked, limit = [], [9]
    name = "mine" if module is negatives else "make_lists"
    original = getattr(module, name)

    def counted(data, queries, *args, **options):
        for number, outcome in enumerate(original(data, queries, *args, **options)):
            if number == limit[0]:
                raise Killed
            asked.append(queries[number])
            yield outcome

    monkeypatch.setattr(module, name, counted)
    with pytest.raises(Killed):
        run(module, many, "out.jsonl")
    partial = many.parent / "out.jsonl.partial"
    assert partial.read_text().count("\n") == 8 and not (many.parent / "out.jsonl").exists()
    partial.write_bytes(partial.read_bytes()[:-5])  # killed while it wrote the last line
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial was written with other settings"):
        run(module, many, "out.jsonl", "--shard", "1/2")
    asked.clear()
    limit[0] = None
    caplog.clear()
    assert run(module, many, "out.jsonl") == expected and len(asked) == 13
    assert "1" in caplog.text.split("Left out are", 1)[1]  # query 3, which the first run left out
    assert {path.name for path in many.parent.iterdir()} == {"beir", "whole.jsonl", "out.jsonl"}


@pytest.mark.parametrize("module", [negatives, lists])
def test_other_data_is_not_continued(module, many, monkeypatch):
    monkeypatch.setattr(resuming, "write_rows", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run(module, many, "out.jsonl")
    corpus = many / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("wing", "tail", 1))
    with pytest.raises(ValueError, match=r"other settings.* data was"):
        run(module, many, "out.jsonl")


@pytest.mark.parametrize("module", [negatives, lists])
def test_shards_concatenate_to_the_whole(module, many):
    shards = [run(module, many, f"{number}.jsonl", "--shard", f"{number}/3") for number in (1, 2, 3)]
    assert b"".join(shards) == run(module, many, "whole.jsonl") and all(shards)


def test_shards_share_the_vectors_of_the_passages(many, tmp_path, caplog):
    encoder = save_bi_encoder(tmp_path / "encoder")
    words = ["--miner", "bi_encoder", "--bi_encoder", encoder, "--vectors", tmp_path / "vectors", "--device", "cpu"]
    caplog.set_level("INFO")
    shards = [run(negatives, many, f"{number}.jsonl", *words, "--shard", f"{number}/2") for number in (1, 2)]
    assert caplog.text.count("has the vectors of 60 of 60 passages") == 1
    assert b"".join(shards) == run(negatives, many, "whole.jsonl", *words)
    assert len(list((tmp_path / "vectors").glob("*.f32"))) == 1


def test_the_places_of_shards_are_those_of_the_whole():
    for total in (0, 1, 7, 20):
        parts = [place for number in range(1, 7) for place in Shard(number, 6).places(total)]
        assert parts == list(range(total)) and Shard().places(total) == range(total)
    assert parse_shard("2/8") == Shard(2, 8) and str(Shard(2, 8)) == "2/8"
    for text in ("0/3", "4/3", "1", "a/b", "1/2/3", ""):
        with pytest.raises(Exception, match="is not I/N"):
            parse_shard(text)


def test_an_error_before_the_first_outcome_leaves_no_file(tmp_path):
    def broken(done):
        raise RuntimeError("no retriever")

    with pytest.raises(RuntimeError, match="no retriever"):
        write_outcomes(tmp_path / "out.jsonl", {"weights": None}, 3, broken)
    assert not list(tmp_path.iterdir())
    count = write_outcomes(
        tmp_path / "out.jsonl", {"weights": None}, 2, lambda done: iter([Outcome({"a": 1}, Counter())] * 2)
    )
    assert count == 2 and [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == [{"a": 1}] * 2
