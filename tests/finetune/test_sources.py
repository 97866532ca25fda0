import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flagembedding_matryoshka.finetune import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.data import MatryoshkaTrainDataset
from flagembedding_matryoshka.finetune.rows import load_rows
from flagembedding_matryoshka.finetune.sources import NamedDataset, map_columns, parse_columns
from tests.lines import ROW, write


def rows_of(tmp_path, count=3):
    return [{**ROW, "query": f"Größe {number}", "instruction": "find" if number else None} for number in range(count)]


@pytest.fixture
def sources(tmp_path):
    """The same rows in each form."""
    rows = rows_of(tmp_path)
    plain = write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, kept in (("train", rows), ("test", rows[:1])):
        pq.write_table(pa.Table.from_pylist(kept), folder / f"{split}.parquet")
    files = [str(tmp_path / name) for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet")]
    return [*files, f"dataset:{folder}", f"dataset:{folder}:train"]


def test_every_form_gives_the_same_rows(sources, tmp_path):
    cache = str(tmp_path / "cache")
    expected = load_rows(sources[0], "scores", cache)[:]
    assert expected["instruction"] == [None, "find", "find"]
    for source in sources[1:]:
        assert load_rows(source, "scores", cache)[:] == expected
    assert len(load_rows(f"{sources[3]}:test", "labels", cache)) == 1
    with pytest.raises(ValueError, match="nosuch"):
        load_rows(f"{sources[3]}:nosuch", "labels", cache)


def test_a_changed_data_set_is_read_again(sources, tmp_path):
    cache = str(tmp_path / "cache")
    assert len(load_rows(sources[3], "labels", cache)) == 3
    pq.write_table(pa.Table.from_pylist(rows_of(tmp_path, 5)), tmp_path / "folder" / "train.parquet")
    assert len(load_rows(sources[3], "labels", cache)) == 5


def test_faults_name_the_row_of_a_parquet_file_and_files_that_are_none(tmp_path):
    path, cache = tmp_path / "bad.parquet", str(tmp_path / "cache")
    pq.write_table(pa.Table.from_pylist([ROW, {**ROW, "pos": []}]), path)
    with pytest.raises(ValueError, match=r"bad\.parquet, row 2: pos must be a list of at least one string"):
        load_rows(str(path), "labels", cache)
    assert len(load_rows(str(path), "labels", cache, skip_bad_lines=True)) == 1
    path.write_text("x" * 20)
    with pytest.raises(ValueError, match=r"bad\.parquet is not a Parquet file, or is damaged"):
        load_rows(str(path), "labels", cache)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("dataset:a/b", NamedDataset("a/b")),
        ("dataset:a/b:test", NamedDataset("a/b", None, "test")),
        ("dataset:a/b:triplet:test", NamedDataset("a/b", "triplet", "test")),
    ],
)
def test_names_of_data_sets(source, expected):
    assert NamedDataset.parse(source) == expected


@pytest.mark.parametrize("source", ["dataset:", "dataset:a:", "dataset:a:b:c:d"])
def test_names_of_another_form_are_refused(source):
    with pytest.raises(ValueError, match="must be dataset:NAME, dataset:NAME:SPLIT or"):
        MatryoshkaDataArguments(train_data=[source])


def test_columns_of_triplets_are_read_under_our_names(tmp_path):
    path = tmp_path / "triplets.jsonl"
    path.write_text(json.dumps({"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "query": "x"}))
    pairs = ["query=anchor", "pos=positive", "neg=negative_1", "neg=negative_2"]
    rows = load_rows(str(path), "labels", str(tmp_path / "cache"), mapping=parse_columns(pairs))
    assert [rows[name][0] for name in ("query", "pos", "neg")] == ["q", ["p"], ["n", "m"]]
    with pytest.raises(ValueError, match="line 1: pos must be a list of at least one string, got None"):
        load_rows(str(path), "labels", str(tmp_path / "cache"))


def test_names_can_be_exchanged_and_rows_without_the_columns_stay():
    columns = parse_columns(["pos=neg", "neg=pos"])
    assert map_columns({"pos": ["a"], "neg": ["b"], "query": None}, columns) == {"pos": ["b"], "neg": ["a"]}
    assert map_columns({"pos": ["a"]}, parse_columns(["pos=positive"])) == {"pos": ["a"]}


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        (["query"], "'query' must be NAME=THEIRS"),
        (["query="], "'query=' must be NAME=THEIRS"),
        (["text=a"], "'text=a' must be NAME=THEIRS, where NAME is one of query, prompt"),
        (["query=a", "query=b"], "query is one text, but is read from a, b"),
    ],
)
def test_columns_that_cannot_be_are_refused(pairs, fault, training_file):
    with pytest.raises(ValueError, match=f"columns: {fault}"):
        MatryoshkaDataArguments(train_data=[str(training_file)], columns=pairs)


def test_files_are_mixed_in_an_epoch_and_draw_random_negatives_of_their_own(tmp_path, tiny_tokenizer):
    sizes = {"a": 6, "b": 3}
    paths = [
        write(
            tmp_path / f"{name}.jsonl", *({**ROW, "query": f"{name} {n}", "pos": [f"{name} {n}"]} for n in range(size))
        )
        for name, size in sizes.items()
    ]
    options = {"cache_path": str(tmp_path / "cache"), "train_group_size": 2, "random_negatives": 1.0}
    args = MatryoshkaDataArguments(train_data=list(map(str, paths)), data_weights=[1, 2], **options)
    rows = MatryoshkaTrainDataset(args, tiny_tokenizer)
    assert rows.files == [(0, 3), (3, 6)]
    assert [row["query"][0] for row in rows.dataset] == ["a"] * 3 + ["b"] * 6
    for item in (0, 8):
        source = rows.dataset[item]["query"][0]
        assert f"B: {source} " in tiny_tokenizer.decode(rows[item].pairs[1].input_ids)
    for weights in ([1], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match=r"data_weights are .* one number above 0 for each of .*a\.jsonl, .*b"):
            MatryoshkaDataArguments(train_data=list(map(str, paths)), data_weights=weights)
