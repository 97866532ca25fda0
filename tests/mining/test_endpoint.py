"""A small server speaks OpenAI's chat completions. It judges and ranks by the words that query and passage share."""

import json
import math
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("openai")
import openai

from flagembedding_matryoshka.mining import scores as teacher_scores
from flagembedding_matryoshka.mining.endpoint import Endpoint, _window_ends
from flagembedding_matryoshka.mining.scores import main
from tests.encoders import WORDS
from tests.lines import write
from tests.pages import commands

KEY = "sk-nobody-may-see-this"


def shared(query, passage):
    return len(set(query.split()) & set(passage.split()))


def judged(query, passage):
    """The first token's log-probabilities: two spellings of Yes, one of No, and another word."""
    yes = 1 / (1 + math.exp(-(shared(query, passage) - 1.5)))
    probabilities = {"Yes": 0.6 * yes * 0.9, " yes": 0.4 * yes * 0.9, "No": (1 - yes) * 0.9, "The": 0.1}
    return {token: math.log(value) for token, value in probabilities.items()}


def ranked(query, listed):
    passages = dict(re.findall(r"\[(\d+)\] (.*)", listed))
    order = sorted(passages, key=lambda number: (-shared(query, passages[number]), passages[number]))
    return " > ".join(f"[{number}]" for number in order)


@pytest.fixture
def server(monkeypatch):
    """The server: `faults` are answers of the next requests, `seen` the bodies, `busiest` the most at a time."""
    state = SimpleNamespace(faults=[], seen=[], active=0, busiest=0, judged=judged, ranked=ranked, barrier=None)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.headers["Authorization"] == f"Bearer {KEY}" and self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.seen.append(body)
                fault = state.faults.pop(0) if state.faults else None
                state.active += 1
                state.busiest = max(state.busiest, state.active)
            if state.barrier is not None:
                state.barrier.wait(30)
            query, text = re.fullmatch(r"Query: (.*?)\n\n(.*)", body["messages"][1]["content"], re.DOTALL).groups()
            choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "Yes"}}
            if body.get("logprobs"):
                assert body["max_tokens"] == 1 and body["temperature"] == 0
                values = state.judged(query, text.removeprefix("Passage: "))
                top = [{"token": token, "logprob": value, "bytes": None} for token, value in values.items()]
                choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}] if top else [], "refusal": None}
            else:
                choice["message"]["content"] = state.ranked(query, text)
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
            with lock:
                state.active -= 1
            data = json.dumps({"error": {"message": "busy"}} if fault else answer).encode()
            self.send_response(fault or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def rows():
    draw = random.Random(0)
    texts = [" ".join(draw.sample(WORDS, draw.randint(2, 6))) for _ in range(400)]
    texts = list(dict.fromkeys(texts))[:300]
    return [{"query": texts.pop(), "pos": [texts.pop()], "neg": [texts.pop() for _ in range(3)]} for _ in range(7)]


@pytest.fixture
def taught(server, rows, tmp_path):
    path = write(tmp_path / "train.jsonl", *rows)

    def run(*words):
        output = tmp_path / "scored.jsonl"
        options = ["--input", path, "--output", output, "--backend", "openai", "--model", "m", "--url", server.url]
        main([*map(str, options), *words])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_scores_are_the_difference_of_yes_and_no(taught, server, rows):
    for row, source in zip(taught("--scale", "2"), rows, strict=True):
        expected = [2 * (shared(source["query"], text) - 1.5) for text in (*source["pos"], *source["neg"])]
        assert row["pos_scores"] + row["neg_scores"] == pytest.approx(expected)
    assert len(server.seen) == 28 and {body["model"] for body in server.seen} == {"m"}


def test_the_command_of_the_page_runs(server, rows, tmp_path, monkeypatch):
    (command,) = (command for command in commands("docs/training.md") if "--backend openai" in command)
    variable, program, name, *words = command.split()
    assert variable.startswith("OPENAI_API_KEY=") and (program, name) == ("flagembedding-matryoshka", "teach")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", *rows)
    words[words.index("--url") + 1] = server.url
    main(words)
    assert (tmp_path / "scored.jsonl").read_text().count("\n") == 7


def test_a_word_that_is_not_listed_counts_as_the_least_listed(server):
    teach = Endpoint("m", server.url)
    server.judged = lambda query, passage: {"Yes": -0.25, "Maybe": -3.0}
    assert teach([("wing", "lift")]) == pytest.approx([2.75])
    server.judged = lambda query, passage: {"No": -0.5, "Maybe": -3.0}
    assert teach([("wing", "lift")]) == pytest.approx([-2.5])
    for values, fault in (({"Maybe": -0.5}, "but 'Maybe'"), ({}, "but no log-probabilities")):
        server.judged = lambda query, passage, values=values: values
        with pytest.raises(ValueError, match=rf"m answers neither Yes nor No for \('wing', 'lift'\), {fault}"):
            teach([("wing", "lift")])


def test_an_order_gives_minus_the_ranks(taught, server, rows):
    for row, source in zip(taught("--answer", "order"), rows, strict=True):
        passages = [*source["pos"], *source["neg"]]
        best = sorted(passages, key=lambda text: (-shared(source["query"], text), text))
        assert row["pos_scores"] + row["neg_scores"] == [-best.index(text) for text in passages]
    assert len(server.seen) == 7
    # The relevant passage is not always the first that the model reads.
    first = [re.search(r"\[1\] (.*)", body["messages"][1]["content"])[1] for body in server.seen]
    assert 0 < sum(text in {row["pos"][0] for row in rows} for text in first) < 7


def test_long_lists_are_ordered_in_windows_whose_best_come_first(server):
    draw = random.Random(1)
    texts = [f"{' '.join(draw.sample(WORDS, 3))} {number}" for number in range(45)]
    texts[30] += f" {' '.join(WORDS)}"
    query = " ".join(WORDS)
    found = Endpoint("m", server.url, answer="order")([(query, text) for text in texts])
    assert sorted(found) == list(range(-44, 1)) and found[30] == 0
    assert len(server.seen) == len(_window_ends(45)) == 4 and _window_ends(45) == [45, 35, 25, 20]
    assert (_window_ends(20), _window_ends(21), _window_ends(1)) == ([20], [21, 20], [1])


def test_an_order_may_lack_passages_or_name_them_twice(server):
    server.ranked = lambda query, listed: "[2], [2] and [9]"
    found = Endpoint("m", server.url, answer="order")([("wing", text) for text in ("a", "b", "c")])
    assert sorted(found) == [-2, -1, 0]
    listed = re.findall(r"\[\d\] (.)", server.seen[0]["messages"][1]["content"])
    assert found["abc".index(listed[1])] == 0 and found["abc".index(listed[0])] == -1
    server.ranked = lambda query, listed: "The second one."
    with pytest.raises(ValueError, match=r"m names no passage such as \[1\] for 'wing', but 'The second one\.'"):
        Endpoint("m", server.url, answer="order")([("wing", "a"), ("wing", "b")])


def test_failed_requests_are_repeated(taught, server):
    expected = taught()
    server.seen.clear()
    server.faults = [429, 500, 503, 429]
    assert taught() == expected and len(server.seen) == 32
    server.faults = [500] * 99
    with pytest.raises(openai.InternalServerError):
        taught("--retries", "1", "--concurrency", "1")


def test_requests_run_side_by_side(server):
    server.barrier = threading.Barrier(4)  # no answer before four requests wait
    Endpoint("m", server.url, concurrency=4)([("wing", word) for word in WORDS[:8]])
    assert server.busiest == 4


def test_a_stopped_run_continues(taught, server, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_scores, "ROWS_AT_ONCE_REQUESTED", 2)
    expected = taught()
    server.seen.clear()
    server.judged = lambda query, text: {} if query == rows[4]["query"] else judged(query, text)
    with pytest.raises(ValueError, match="answers neither"):
        taught()
    assert (tmp_path / "scored.jsonl.partial").read_text().count("\n") == 4
    server.judged = judged
    server.seen.clear()
    assert taught("--concurrency", "2") == expected and len(server.seen) == 12


def test_a_key_is_needed_and_never_stored(taught, server, tmp_path, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    server.faults = [401]
    with pytest.raises(openai.AuthenticationError) as error:
        taught("--concurrency", "1")
    files = "".join(path.read_text() for path in tmp_path.iterdir())
    assert KEY not in f"{error.value}{files}{caplog.text}"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="needs the variable OPENAI_API_KEY"):
        taught()


def test_scores_are_in_the_order_of_the_pairs(server):
    pairs = [("wing lift", "wing lift"), ("heat", "wing"), ("wing lift", "wing"), ("heat", "heat")]
    assert Endpoint("m", server.url)(pairs) == pytest.approx(np.array([2, 0, 1, 1]) - 1.5)
    assert Endpoint("m", server.url, answer="order")(pairs).tolist() == [0, 0, 0, 0]  # four lists
