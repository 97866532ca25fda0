import codecs
import json
import os

import pytest

from flagembedding_matryoshka.text.lines import good_lines, good_rows, read_rows

ROWS = [{"text": "wing"}, {"text": "Größe \u2028 \x85 \U0001f600"}, {"text": "x" * 9}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def right(row):
    return None if isinstance(row.get("text"), str) else "text is wanted"


def faults(path):
    return {number: fault for number, _, fault in read_rows(path, right) if fault}


@pytest.mark.parametrize(
    "data",
    [
        "\n".join(LINES).encode(),
        "\r\n".join(LINES).encode() + b"\r\n",
        codecs.BOM_UTF8 + "\n".join(LINES).encode(),
        "\r\n".join(LINES).encode("utf-16"),
        codecs.BOM_UTF16_BE + "\n".join(LINES).encode("utf-16-be"),
        "\n".join(LINES).encode("utf-32"),
        "\n".join(json.dumps(row) for row in ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        codecs.BOM_UTF8 + json.dumps(ROWS).encode(),
        json.dumps(ROWS, ensure_ascii=False, indent="\t").encode("utf-16"),
    ],
    ids=[
        "plain",
        "crlf",
        "bom",
        "utf-16",
        "utf-16-be",
        "utf-32",
        "escapes",
        "array",
        "array in a line",
        "utf-16 array",
    ],
)
def test_one_content_in_many_forms(data, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    assert list(good_rows(path, right)) == ROWS


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "Größe"}'.encode("latin-1"), 'not UTF-8: byte 0xF6 after \'{"text": "Gr\'. Convert the file'),
        (b'{"text": "a \\ud83d b"}', "half a surrogate pair, U+D83D, after "),
        (b"{", "not JSON (Expecting"),
        (b"[1]", "a row must be a JSON object, got [1]"),
        (b"[" * 100_000, "not JSON (maximum recursion depth"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
        ('{"text": "x"}'.encode("utf-16-le"), "Is it UTF-16 without a byte order mark"),
        (b'{"text": 1}', "text is wanted"),
    ],
    ids=["latin-1", "surrogate", "json", "array", "deep", "long number", "no mark", "check"],
)
def test_each_fault_has_its_line_and_can_be_passed_over(line, fault, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    found = faults(path)
    assert list(found) == [3] and fault in found[3]
    assert [row.value for row in read_rows(path, right) if row.value] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: "):
        list(good_rows(path, right))


def test_half_a_pair_in_utf_16_is_a_fault_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "a"}\n{"text": "\ud83d"}\n'.encode("utf-16-le", errors="surrogatepass"))
    assert faults(path) == {2: 'half a surrogate pair, U+D83D, after \'{"text": "\''}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rows\.jsonl begins with the byte order mark of utf-16.* and is not"):
        faults(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[\n{"text": "a"},\n{"text": }]', r"is not a JSON array: Expecting value: line 3"),
        ('[\n{"text": "a"}\n{"text": "b"}]', r"line 2: an item must be followed by , or \]"),
        ('[{"text": "a"}] x', r"has text after its array: x"),
        ("[", r"is not a JSON array: Expecting value"),
        ('[{"text": "a"},\n3]', r"line 2: a row must be a JSON object, got 3"),
    ],
)
def test_what_is_wrong_with_an_array(text, fault, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.json.* {fault}"):
        list(good_rows(path, right))


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "[\n]\n"])
def test_files_without_an_object(text, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert list(read_rows(path, right)) == []


def test_lines_of_tables(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(codecs.BOM_UTF8 + "a\tb\r\n\r\nGröße\tc\r\n".encode())
    assert list(good_lines(path)) == [(1, "a\tb\r\n"), (3, "Größe\tc\r\n")]
    path.write_bytes("a\nGröße\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"table\.tsv, line 2: not UTF-8: byte 0xF6 after 'Gr'"):
        list(good_lines(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_is_read_from_its_start(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writes = os.open(path, os.O_RDWR)
    lines = "".join(f"line {number}\n" for number in range(3000)).encode("utf-16")
    assert os.write(writes, lines) == len(lines)
    found = good_lines(path)
    first = next(found)
    os.close(writes)
    assert [first, *found] == [(number + 1, f"line {number}\n") for number in range(3000)]
