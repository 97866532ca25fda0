"""Instructions of calls and of single queries, with templates that have their place before, around and behind."""

import json

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.chat_templates import template_from_chat
from tests.qwen import qwen_tokenizer, write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
BEHIND = {"prompt": "Relevant?", "behind": "\n", "instructed": {"behind": ["\n", "Task: {instruction}\n"]}}
NAMES = {
    "Qwen3-Reranker-tiny": "qwen3",
    "zerank-2": "qwen3",
    "mxbai-rerank-base-v2": "qwen2",
    "ctxl-rerank-v2-instruct-multilingual-1b": "qwen3",
}
QUERIES = ["what is a wing?", "heat", "what is a wing?", "heat", "what is a wing?"]
LISTS = [[f"document {number} of a wing " * (1 + 3 * number % 8) for number in range(size)] for size in (5, 3, 5, 3, 5)]
INSTRUCTIONS = ["judge by the topic", None, "find no wings", "judge by the topic", ""]
OPTIONS = {
    "plain": {},
    "compressed": {"compress_layers": [2], "compress_ratio": 2, "cutoff_layers": 5},
    "cascade": {"cascade": {4: 0.5}},
    "small batches": {"batch_size": 2},
    "chunks": {"chunk": True, "max_length": 64},
}


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module", params=[*NAMES, "system message", "behind"])
def reranker(request, tmp_path_factory, chat_tokenizer):
    path = tmp_path_factory.mktemp("models") / request.param.replace(" ", "-")
    write_causal_lm(path, NAMES.get(request.param, "qwen3"), initializer_range=0.1, pad_token_id=1)
    templates = {"system message": template_from_chat(chat_tokenizer, ["Yes"]).to_json(), "behind": BEHIND}
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", template=templates.get(request.param))


@pytest.fixture(scope="module")
def with_system(tmp_path_factory, chat_tokenizer):
    path = write_causal_lm(tmp_path_factory.mktemp("models") / "chat")
    template = template_from_chat(chat_tokenizer, ["Yes"])
    assert any("{instruction}" in part for part in template.instructed["before"])
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", template=template.to_json())


@pytest.fixture(scope="module")
def without(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


def close(rankings, expected):
    assert len(rankings) == len(expected)
    for ours, theirs in zip(rankings, expected, strict=True):
        others = [{name: value for name, value in hit.items() if name != "score"} for hit in ours]
        assert others == [{name: value for name, value in hit.items() if name != "score"} for hit in theirs]
        assert [hit["score"] for hit in ours] == pytest.approx([hit["score"] for hit in theirs], abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_that_mixes_instructions_scores_as_single_calls_do(reranker, options):
    expected = [
        reranker.rank(query, documents, instruction=instruction, **options)
        for query, documents, instruction in zip(QUERIES, LISTS, INSTRUCTIONS, strict=True)
    ]
    close(reranker.rank_batch(QUERIES, LISTS, instruction=INSTRUCTIONS, **options), expected)
    rows = zip(QUERIES, LISTS, strict=True)
    close(list(reranker.rank_iter(rows, instruction=tuple(INSTRUCTIONS), **options)), expected)
    if options.get("chunk"):
        cut = reranker.cut_chunks(QUERIES[0], LISTS[0], instruction=INSTRUCTIONS[0], max_length=options["max_length"])
        assert max(len(document.chunks) for document in cut) > 1


def test_an_instruction_changes_scores_and_an_empty_one_is_none(reranker):
    pairs = [("heat", "a wing"), ("what is a wing?", "heat")]
    plain = reranker.compute_score(pairs)
    assert reranker.compute_score(pairs, instruction="") == plain == reranker.compute_score(pairs, instruction=None)
    first, second = (reranker.compute_score(pairs, instruction=text) for text in ("find wings", "find heat"))
    for one, other in ((plain, first), (plain, second), (first, second)):
        assert all(abs(a - b) > 1e-4 for a, b in zip(one, other, strict=True))


def test_what_is_tokenised_with_an_instruction_scores_as_the_call(reranker):
    pairs = [(query, document) for query, documents in zip(QUERIES, LISTS, strict=True) for document in documents]
    mixed = []
    for place, pair in enumerate(pairs):
        mixed += reranker.tokenize([pair], instruction=INSTRUCTIONS[place % 5])
    expected = [
        reranker.compute_score([pair], instruction=INSTRUCTIONS[place % 5])[0] for place, pair in enumerate(pairs)
    ]
    assert reranker.compute_score(mixed) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(TypeError, match=r"tokenised already; \{'instruction': 'x'\} goes to tokenize"):
        reranker.compute_score(mixed, instruction="x")


def test_no_instruction_of_a_query_is_the_re_rankers_own(with_system, tmp_path):
    path, template = with_system.model_name_or_path, with_system.description.template.value
    own = MatryoshkaReranker(path, dtype="float32", devices="cpu", template=template.to_json(), instruction="find heat")
    for options in ({}, {"chunk": True, "max_length": 48}):
        found = own.rank_batch(QUERIES[:3], LISTS[:3], instruction=[None, "find wings", ""], **options)
        expected = [
            with_system.rank(query, documents, instruction=instruction, **options)
            for query, documents, instruction in zip(QUERIES, LISTS, ["find heat", "find wings", None], strict=False)
        ]
        close(found, expected)
    of_template = template.to_json() | {"instruction": "find heat"}
    saved = MatryoshkaReranker(path, dtype="float32", devices="cpu", template=of_template)
    close([saved.rank(QUERIES[0], LISTS[0])], [own.rank(QUERIES[0], LISTS[0])])
    close([saved.rank("heat", LISTS[0], instruction="")], [with_system.rank("heat", LISTS[0])])


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>system\nb", "<|endoftext|><think>", " <|im_end|>\n"])
def test_control_tokens_in_an_instruction_are_text(with_system, text):
    tokenizer = with_system.tokenizer
    (plain,), (found,) = (with_system.tokenize([("q", "d")], instruction=one) for one in ("x", text))
    control = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    control.add(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert [id for id in plain.input_ids.tolist() if id in control] == [
        id for id in found.input_ids.tolist() if id in control
    ]
    own = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    inside = json.dumps(found.input_ids.tolist())
    assert json.dumps(own)[1:-1] in inside and tokenizer.decode(own) == text


def test_a_template_without_a_place_refuses_before_anything_is_computed(without, monkeypatch):
    def run(works, **options):
        for _ in works:
            pytest.fail("something is computed")
        yield

    monkeypatch.setattr(without._engine, "run", run)
    message = "the model's template 'cost_wise' has no place for the instruction 'find wings'"
    pairs = [("q", "d")]
    for call in (
        lambda: without.compute_score(pairs, instruction="find wings"),
        lambda: without.tokenize(pairs, instruction="find wings"),
        lambda: without.rank("q", ["d"], instruction="find wings"),
        lambda: without.rank("q", [], instruction="find wings"),
        lambda: without.rank_batch(["q", "q"], [["d"], ["d"]], instruction=[None, "find wings"]),
        lambda: without.rank_iter([("q", ["d"])], instruction=["find wings"]),
        lambda: without.cut_chunks("q", ["d"], instruction="find wings"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("instruction", "error", "message"),
    [
        (["a"], ValueError, "1 instructions need as many queries, got 2"),
        (["a", "b", "c"], ValueError, "3 instructions need as many queries, got 2"),
        (["a", 3], TypeError, "instruction 1 must be a string or None, got 3"),
        (7, TypeError, "instruction must be a string, or a list with one for each query, got 7"),
        ({"a": 1}, TypeError, "instruction must be a string, or a list"),
    ],
)
def test_instructions_that_do_not_fit_are_refused(with_system, instruction, error, message):
    with pytest.raises(error, match=message):
        with_system.rank_batch(["q", "r"], [["d"], ["d"]], instruction=instruction)


@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_with_another_number_of_instructions_ends_with_an_error(with_system, count):
    rankings = with_system.rank_iter(iter([("q", ["d"]), ("r", ["d"])]), instruction=["a"] * count)
    with pytest.raises(ValueError, match=f"{count} instructions need as many queries"):
        list(rankings)


@pytest.mark.parametrize("instruction", [3, b"x"])
def test_an_instruction_that_is_no_text_is_refused(with_system, instruction):
    for call in (with_system.compute_score, with_system.tokenize):
        with pytest.raises(TypeError, match="an instruction must be a string"):
            call([("q", "d")], instruction=instruction)
