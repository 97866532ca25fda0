"""Qwen3-Reranker by its published usage, with transformers alone, and here."""

import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.cross_encoder import load_cross_encoder
from tests.batches import close

pytestmark = pytest.mark.usefixtures("one_thread")
# How Qwen's tokenizers split text before they merge (tokenizer.json of Qwen3).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TASK = "Given a web search query, retrieve relevant passages that answer the query"
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
PAIRS = [
    ("how does a wing lift?", "air flows faster over the upper side of a wing."),
    ("how does a wing lift?", "  two spaces, 3 numbers 1234\n\nand lines\n"),
    ("Why (really)?\n", "(because) of <Query>: and <|im_end|> no"),
    ("heat", "HEAT! " * 30),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [BEFORE, BEHIND, f"<Instruct>: {TASK}\n<Query>: what?\n<Document>: it", "yes no"]
    tokenizer.train_from_iterator(texts * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_tokens(["<think>", "</think>"])
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    path = tmp_path_factory.mktemp("published") / "Qwen3-Reranker-0.6B"
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


@torch.no_grad()
def published_usage(path, pairs, task=TASK, max_length=800):
    """logit(yes) - logit(no) behind the prompt, of one pair at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    before, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (BEFORE, BEHIND))
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    scores = []
    for query, document in pairs:
        text = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
        # what users write is no control token here, as it is not in ours
        own = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][:max_length]
        logits = model(torch.tensor([before + own + behind])).logits[0, -1]
        scores.append(logits[yes] - logits[no])
    return torch.stack(scores)


def test_the_deepest_exit_is_the_published_score(path):
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
    assert reranker.config.exit_layers == [4, 5, 6]
    close(torch.tensor(reranker.compute_score(PAIRS)), published_usage(path, PAIRS), 2e-5)
    own = torch.tensor(reranker.compute_score(PAIRS, query_instruction_for_rerank="Find the answer"))
    close(own, published_usage(path, PAIRS, "Find the answer"), 2e-5)
    assert (own - published_usage(path, PAIRS)).abs().max() > 1e-3


def test_the_name_is_not_needed(path, tmp_path):
    shutil.copytree(path, tmp_path / "model")
    unnamed = MatryoshkaReranker(str(tmp_path / "model"), template="qwen3-reranker", dtype="float32", devices="cpu")
    named = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
    assert unnamed.compute_score(PAIRS) == named.compute_score(PAIRS)
    with pytest.warns(UserWarning, match="nothing in .* says which template .* 'cost_wise' is assumed"):
        plain = MatryoshkaReranker(str(tmp_path / "model"), dtype="float32", devices="cpu")
    assert plain.compute_score(PAIRS) != named.compute_score(PAIRS)


def test_the_template_goes_with_what_is_exported(path, tmp_path):
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
    reranker.export(str(tmp_path), [6])
    expected = torch.tensor(reranker.compute_score(PAIRS))
    part = MatryoshkaReranker(str(tmp_path), dtype="float32", devices="cpu")
    close(torch.tensor(part.compute_score(PAIRS)), expected, 1e-6)
    encoder = load_cross_encoder(str(tmp_path), device="cpu")
    close(torch.tensor(encoder.predict(PAIRS)), expected)


def test_flag_embeddings_default_format_stands_for_the_templates(path):
    reranker = MatryoshkaReranker(
        str(path), dtype="float32", devices="cpu", query_instruction_format="{}{}", passage_instruction_format="{}{}"
    )
    assert reranker.query_instruction_format == "<Instruct>: {}\n<Query>: {}\n<Document>:"
