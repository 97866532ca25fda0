"""Conversion of a GGUF file of the Llama architecture to a Mistral checkpoint with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerBase

VERSION = 1
"""Version of the result of `convert`. Results of other versions are converted again."""

ARCHITECTURES = ("llama",)
UNQUANTIZED = {"F16", "F32", "F64"}
MODEL_TENSORS = {"token_embd.weight", "output_norm.weight"}
LAYER_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")

# Names of rules for splitting text in llama.cpp (tokenizer.ggml.pre): GPT-2's rule, the same rule after a split at
# every digit, and rules that never merge a word that is a token. transformers knows the first and the third rule, and
# always merges.
GPT2_SPLIT = {"gpt-2"}
DIGIT_SPLIT = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
WORDS_BEFORE_MERGES = {"falcon3", "llama-bpe", "llama-v3", "llama3", "pixtral", "tekken"}


def convert(source: Path, output: Path) -> None:
    """Write the model and the tokenizer in the GGUF file `source` to the directory `output`.

    A Llama is a Mistral without a window, tensor by tensor. Quantised weights become bfloat16, whose rounding error is
    at most 1/512 of a value. That is half of the error of the largest value of a block in 8 bits, the finest
    quantisation. Other weights become float32, which represents them exactly.

    Raises:
        ImportError: if the package `gguf` is missing.
        ValueError: if the file is damaged, or has a model or a tokenizer that cannot be converted.
    """
    header = _read_header(source)
    architecture = _value(header, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{source} holds a model of architecture {architecture!r}; {list(ARCHITECTURES)} can be read.")
    _refuse_other_models(source, header)
    matrices = {tensor.tensor_type.name for tensor in header.tensors if len(tensor.shape) > 1}
    dtype = torch.float32 if matrices <= UNQUANTIZED else torch.bfloat16
    tokenizer = _read_tokenizer(source, header)
    _read_model(source, dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)


def _read_header(source: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"{source} is converted with the package gguf: pip install 'flagembedding_matryoshka[gguf]'"
        ) from error
    try:
        return GGUFReader(source)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{source} is truncated or damaged: {error}") from error


def _value(header: Any, key: str) -> Any:
    field = header.get_field(key)
    return None if field is None else field.contents()


def _refuse_other_models(source: Path, header: Any) -> None:
    """Refuse models of llama.cpp's architecture `llama` with biases, experts or scaled rotary embeddings."""
    scaling = _value(header, "llama.rope.scaling.type")
    if scaling not in (None, "none"):
        raise ValueError(
            f"{source} scales its rotary embedding (llama.rope.scaling.type is {scaling!r}), but only "
            "'none' can be read."
        )
    layers = range(_value(header, "llama.block_count"))
    expected = MODEL_TENSORS | {f"blk.{layer}.{name}.weight" for layer in layers for name in LAYER_TENSORS}
    found = {tensor.name for tensor in header.tensors}
    if unknown := sorted(found - expected - {"output.weight"}):
        raise ValueError(
            f"{source} has tensors that a Mistral has no place for: {unknown[:5]}. Biases, experts and "
            "scaled rotary embeddings (rope_freqs.weight) cannot be read."
        )
    if missing := sorted(expected - found):
        raise ValueError(f"{source} lacks the tensors {missing[:5]}. Of a split model, join the parts first.")


def _read_model(source: Path, dtype: torch.dtype) -> MistralForCausalLM:
    llama = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    read = llama.config
    config = MistralConfig(
        vocab_size=read.vocab_size,
        hidden_size=read.hidden_size,
        intermediate_size=read.intermediate_size,
        num_hidden_layers=read.num_hidden_layers,
        num_attention_heads=read.num_attention_heads,
        num_key_value_heads=read.num_key_value_heads,
        head_dim=read.head_dim,
        hidden_act=read.hidden_act,
        max_position_embeddings=read.max_position_embeddings,
        rms_norm_eps=read.rms_norm_eps,
        rope_parameters=dict(read.rope_parameters),
        sliding_window=None,
        tie_word_embeddings=read.tie_word_embeddings,
        bos_token_id=read.bos_token_id,
        eos_token_id=read.eos_token_id,
        pad_token_id=read.pad_token_id,
    )
    with torch.device("meta"):
        mistral: Any = MistralForCausalLM(config)
    mistral.load_state_dict(llama.state_dict(), assign=True)
    mistral.tie_weights()
    del llama
    return mistral.to(dtype)


def _read_tokenizer(source: Path, header: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer with transformers, and make it split texts as llama.cpp and the original tokenizer do."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    backend = tokenizer.backend_tokenizer
    if _value(header, "tokenizer.ggml.model") == "llama":
        # SentencePiece puts a space before every text, also before a text that begins with a space.
        prefix = [] if _value(header, "tokenizer.ggml.add_space_prefix") is False else [normalizers.Prepend("▁")]
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        return tokenizer
    split = _value(header, "tokenizer.ggml.pre")
    if split in DIGIT_SPLIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and split not in GPT2_SPLIT:
        known = sorted(GPT2_SPLIT | DIGIT_SPLIT | WORDS_BEFORE_MERGES)
        raise ValueError(
            f"{source} splits text in a way that is not known (tokenizer.ggml.pre is {split!r}). Known are {known} and "
            "those that transformers brings."
        )
    backend.model.ignore_merges = split in WORDS_BEFORE_MERGES
    return tokenizer
