"""A tiny random causal language model with a tokenizer that splits text as Qwen's does."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

# How Qwen's tokenizers split text before they merge (tokenizer.json of Qwen3).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "yes no Yes No 1 0",
    "<Instruct>: task\n<Query>: what?\n<Document>: it",
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided.",
    "You are a search relevance expert who evaluates how well documents match search queries.\nRelevance:",
    "Check whether a given document contains information helpful to answer the query.",
    "system user assistant query document instruction: ?\n.\n!\n :\n",
    "question: is it a passage: it is",
]
CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "mistral": MistralConfig}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.add_tokens(["<think>", "</think>"])
    return fast


def write_causal_lm(path: Path, model_type: str = "qwen3", auto=AutoModelForCausalLM, tokenizer=None, **values) -> Path:
    """A random model of 6 layers, 32 wide, with its tokenizer."""
    tokenizer = qwen_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if model_type == "qwen2":
        del common["head_dim"]
    auto.from_config(CONFIGS[model_type](**common | values)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
