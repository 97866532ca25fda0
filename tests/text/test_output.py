import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagembedding_matryoshka.text.output import FileOutput

SETTINGS = {"command": "score", "model": "m", "cutoff_layers": [3]}


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), max_size=5), st.data())
def test_a_truncated_file_continues_after_its_last_complete_line(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("output") / "deep" / "out.jsonl"
    FileOutput(path, SETTINGS).append(lines)
    whole = path.read_bytes()
    assert whole == "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    again = FileOutput(path, SETTINGS)
    done = len(list(again.lines()))
    assert [line.rstrip("\n") for line in again.lines()] == lines[:done]
    again.append(lines[done:])
    assert path.read_bytes() == whole


def test_a_line_longer_than_a_read_block(tmp_path):
    path = tmp_path / "out.jsonl"
    FileOutput(path, SETTINGS).append(["a"])
    with path.open("a") as file:
        file.write("x" * (2**21 + 3))
    assert list(FileOutput(path, SETTINGS).lines()) == ["a\n"]
    path.write_text("x" * (2**21 + 3))
    assert list(FileOutput(path, SETTINGS).lines()) == [] and path.read_bytes() == b""


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "out.jsonl"
    FileOutput(path, SETTINGS).append(["a"])
    for other, said in (
        ({**SETTINGS, "cutoff_layers": [4]}, r"cutoff_layers was \[3\] and is \[4\]"),
        ({"command": "score", "model": "m"}, r"cutoff_layers was \[3\] and is None"),
        ({**SETTINGS, "top_k": 1}, "top_k was None and is 1"),
    ):
        with pytest.raises(ValueError, match=said):
            FileOutput(path, other)
    assert path.read_text() == "a\n"
    path.unlink()
    FileOutput(path, other)
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text()) == other


def test_the_same_settings_in_another_layout_are_the_same(tmp_path):
    path, beside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.settings.json"
    FileOutput(path, SETTINGS).append(["a"])
    beside.write_text(json.dumps(dict(reversed(SETTINGS.items()))))
    assert list(FileOutput(path, SETTINGS).lines()) == ["a\n"]
    for text, said in (("{", "is not JSON"), ("[]", "must be a JSON object of settings")):
        beside.write_text(text)
        with pytest.raises(ValueError, match=said):
            FileOutput(path, SETTINGS)


def test_a_file_without_settings_is_not_changed(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("not ours")
    with pytest.raises(ValueError, match=r"out\.jsonl exists without out\.jsonl\.settings\.json"):
        FileOutput(path, SETTINGS)
    assert path.read_text() == "not ours"


def test_a_second_writer_of_a_file_is_noticed(tmp_path):
    one, other = (FileOutput(tmp_path / "out.jsonl", SETTINGS) for _ in range(2))
    one.append(["a"])
    with pytest.raises(ValueError, match="has 2 bytes instead of 0: another process"):
        other.append(["a"])


def test_an_unknown_dtype_is_not_compared_and_weights_are(tmp_path):
    path, weights = tmp_path / "out.jsonl", {"weights": "a"}
    FileOutput(path, SETTINGS | weights | {"resolved_dtype": "float32"}).append(["a"])
    assert list(FileOutput(path, SETTINGS | weights).lines()) == ["a\n"]
    for other, said in ((weights | {"resolved_dtype": "bfloat16"}, "dtype was 'float32'"), ({"weights": "b"}, "'a'")):
        with pytest.raises(ValueError, match=said):
            FileOutput(path, SETTINGS | other)


def test_the_first_lines_can_be_kept_and_the_file_removed(tmp_path):
    path = tmp_path / "out.jsonl"
    output = FileOutput(path, SETTINGS)
    output.append(["ä", "b", "c"])
    output.keep(2)
    output.append(["d"])
    assert path.read_text(encoding="utf-8") == "ä\nb\nd\n"
    output.keep(9)
    assert list(output.lines()) == ["ä\n", "b\n", "d\n"]
    output.remove()
    assert list(tmp_path.iterdir()) == []
