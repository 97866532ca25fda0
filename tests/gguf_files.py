"""GGUF files of tiny Llamas, written as llama.cpp's converter writes them."""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from sentencepiece import SentencePieceProcessor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The model's weights by their names in a GGUF, where pairs of rotated rows lie side by side."""
    config, weights = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        found["output.weight"] = weights["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for name, short in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                halves = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
            found[f"blk.{layer}.{short}.weight"] = weight
    return found


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast | SentencePieceProcessor,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    split: str = "smollm",
    more_tensors: dict[str, np.ndarray] | None = None,
    more_keys: dict[str, str | bool] | None = None,
) -> Path:
    """Write `model` with matrices of `kind`, its tokenizer, and what else the test wants in there."""
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        _add_byte_level(writer, tokenizer, split)
    else:
        _add_sentencepiece(writer, tokenizer)
    for key, value in (more_keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_bool)(key, value)
    for name, weight in (tensors(model) | (more_tensors or {})).items():
        stored = kind if weight.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_byte_level(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, split: str) -> None:
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(False)


def _add_sentencepiece(writer: GGUFWriter, processor: SentencePieceProcessor) -> None:
    numbers = range(processor.get_piece_size())
    types = [
        TokenType.UNKNOWN
        if processor.is_unknown(number)
        else TokenType.CONTROL
        if processor.is_control(number)
        else TokenType.BYTE
        if processor.is_byte(number)
        else TokenType.NORMAL
        for number in numbers
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(number) for number in numbers])
    writer.add_token_scores([processor.get_score(number) for number in numbers])
    writer.add_token_types(types)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
