"""Published re-rankers by their published usage, with transformers alone, and here."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flagembedding_matryoshka import MatryoshkaReranker
from tests.batches import close
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = "Find the passage that answers"
PAIRS = [
    ("how does a wing lift?", "air flows faster over the upper side of a wing."),
    ("how does a wing lift?", "  two spaces, 3 numbers 1234\n\nand lines\n"),
    ("Why (really)?\n", "(because) of <Query>: and <|im_end|> no"),
    (" heat ", "HEAT! " * 30),
    ("what is heat", ""),
]
CHATML = "<|im_start|>{}\n", "<|im_end|>\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
MXBAI = (
    "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:"
)
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
WEB = "Given a web search query, retrieve relevant passages that answer the query"


def zerank(query, document, task):
    query = query.strip() if task is None else f"<query>{query.strip()}</query>\n<instruction>{task}</instruction>"
    yield "<|im_start|>", True
    yield f"system\n{query}", False
    yield "<|im_end|>\n<|im_start|>", True
    yield f"user\n{document.strip()}", False
    yield "<|im_end|>\n<|im_start|>assistant\n", True


def mxbai(query, document, task):
    yield QWEN + "<|im_start|>user\n", True
    instruction = "" if task is None else f"instruction: {task}\n"
    yield f"{instruction}query: {query}\ndocument: {document}{MXBAI}", False
    yield "<|im_end|>\n<|im_start|>assistant\n", True


def ctxl(query, document, task):
    text = "Check whether a given document contains information helpful to answer the query.\n"
    yield f"{text}<Document> {document}\n<Query> {query}{'' if task is None else f' {task}'} ??", False


def qwen3(query, document, task):
    yield JUDGE, True
    yield f"<Instruct>: {WEB if task is None else task}\n<Query>: {query}\n<Document>: {document}", False
    yield "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", True


PUBLISHED = {
    "zerank-1-small": ("qwen3", zerank, ["Yes"]),
    "mxbai-rerank-base-v2": ("qwen2", mxbai, ["1", "0"]),
    "ctxl-rerank-v2-instruct-multilingual-1b": ("qwen3", ctxl, [0]),
    "Qwen3-Reranker-0.6B": ("qwen3", qwen3, ["yes", "no"]),
}


@torch.no_grad()
def published_usage(path, words, head, pairs, task):
    """The published score of each whole text; what users write is no control token here, as it is not in ours."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    rows = [token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token) for token in head]
    scores = []
    for query, document in pairs:
        ids = []
        for text, is_control in words(query, document, task):
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=not is_control)["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, -1]
        scores.append(logits[rows[0]] - (logits[rows[1]] if len(rows) == 2 else 0))
    return torch.stack(scores)


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    model_type, words, head = PUBLISHED[request.param]
    # the row of the pad token, id 0, is zero where it is also an embedding
    tied = head != [0]
    path = tmp_path_factory.mktemp("published") / request.param
    write_causal_lm(path, model_type, tie_word_embeddings=tied)
    return path, words, head


@pytest.mark.parametrize("task", [None, TASK])
def test_the_deepest_exit_is_the_published_score(published, task):
    path, *usage = published
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
    expected = published_usage(path, *usage, PAIRS, task)
    close(torch.tensor(reranker.compute_score(PAIRS, instruction=task)), expected, 2e-5)
    other = published_usage(path, *usage, PAIRS, TASK if task is None else None)
    assert (expected - other).abs().max() > 1e-3


def spelt(path, name):
    """Names of one checkpoint in the places where people keep it."""
    return {
        "snapshot": f"models--Somebody--{name}/snapshots/0123abc",
        "lower case": name.lower(),
        "own fine-tune": f"my-{name.lower()}-finance",
    }


@pytest.mark.parametrize("place", ["snapshot", "lower case", "own fine-tune"])
def test_a_name_is_known_wherever_it_stands_in_a_path(published, place, tmp_path):
    path, *usage = published
    folder = tmp_path / spelt(path, path.name)[place]
    shutil.copytree(path, folder)
    (folder / "model.gguf").write_bytes(b"beside")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    expected = published_usage(path, *usage, PAIRS, None)
    for spelling in (str(folder), f"{folder}/", str(tmp_path / "link")):
        reranker = MatryoshkaReranker(spelling, dtype="float32", devices="cpu")
        close(torch.tensor(reranker.compute_score(PAIRS)), expected, 2e-5)


def test_a_sharded_snapshot_of_links_into_a_cache(published, tmp_path):
    path, *usage = published
    blobs, snapshot = tmp_path / "blobs", tmp_path / f"models--Somebody--{path.name}" / "snapshots" / "9c8d"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(blobs, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(path).save_pretrained(blobs)
    assert len(list(blobs.glob("*.safetensors"))) > 1
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    reranker = MatryoshkaReranker(str(snapshot), dtype="float32", devices="cpu")
    close(torch.tensor(reranker.compute_score(PAIRS)), published_usage(path, *usage, PAIRS, None), 2e-5)


def test_zeranks_sigmoid_is_of_a_fifth(published):
    path, words, _ = published
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
    raw, shown = (torch.tensor(reranker.compute_score(PAIRS, normalize=value)) for value in (False, True))
    close(shown, (raw / (5 if words is zerank else 1)).sigmoid(), 1e-6)
