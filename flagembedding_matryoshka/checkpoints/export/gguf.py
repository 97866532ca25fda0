"""One exit of a Qwen3 as a GGUF file, for rankings by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoints.export.chat_template import rendered_pieces
from flagembedding_matryoshka.checkpoints.export.layerwise import remove_written
from flagembedding_matryoshka.checkpoints.export.plain import (
    HEAD,
    Classifier,
    Exit,
    classifier_of,
    package_of,
    write_card,
)
from flagembedding_matryoshka.text.pairs import PairTokenizer

ARCHITECTURE = "qwen3"
GGUF_PRECISIONS = ("f32", "f16", "q8_0")
BLOCK = 32
"""Number of values that share a scale in q8_0. A matrix stays in f32 if its row length is no multiple of it."""
LABELS = ("yes", "no")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Name in llama.cpp of each module of transformers' Qwen3. Modules of a layer are named without its number."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern by which Qwen's tokenizers split text before merges. Its name in llama.cpp is "qwen2"."""


def export_gguf(exit: Exit, directory: str | Path, precision: str = "f32", allow_uncapped: bool = False) -> None:
    """Write an exit to `model-f32.gguf` or another precision, with a model card.

    llama.cpp answers with the softmax over two labels. The second label has the score 0, so the answer is the sigmoid
    of the first label's score.

    Args:
        precision: precision of the matrices, one of `GGUF_PRECISIONS`.
        allow_uncapped: as in `classifier_of`.

    Raises:
        ImportError: if the package `gguf` is missing.
        ValueError: as `classifier_of`, or if llama.cpp has no place for the model or its template.
    """
    with package_of("gguf"):
        import gguf
    classifier = classifier_of(exit, allow_uncapped)
    _refuse_other_models(classifier)
    words = rendered_words(exit)
    backend = _backend(exit.tokenizer)
    config: Any = classifier.model.config
    remove_written(directory)
    Path(directory).mkdir(parents=True, exist_ok=True)
    name = f"model-{precision}.gguf"
    writer = gguf.GGUFWriter(str(Path(directory, name)), ARCHITECTURE)
    writer.add_name(exit.source)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(LABELS)
    _add_tokenizer(writer, gguf, exit.tokenizer, backend, config.vocab_size)
    writer.add_string("tokenizer.chat_template.rerank", words)
    for key, value in classifier.model.state_dict().items():
        tensor = torch.cat([value, torch.zeros_like(value)]) if key == HEAD else value
        _add_tensor(writer, gguf, "cls.output.weight" if key == HEAD else _tensor_name(key), tensor, precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_card(exit, directory, "gguf", name)


def rendered_words(exit: Exit) -> str:
    """Return llama.cpp's form of a template: text with {query} and {document} in place of the texts.

    Raises:
        ValueError: if the template strips its texts, or its own words contain {query} or {document}.
    """
    template = exit.template.with_instruction(None)
    opening = str(exit.tokenizer.decode(PairTokenizer(exit.tokenizer, template).opening(template)))
    places = ("{query}", "{document}")
    words = opening + rendered_pieces(template, "", *places)
    if template.strip:
        raise ValueError(f"llama.cpp does not strip texts, but the template of {exit.source} strips {template.strip}.")
    if any(words.count(place) != 1 for place in places):
        raise ValueError(f"llama.cpp replaces {{query}} and {{document}}, which the words {words!r} hold more often.")
    return words


def _refuse_other_models(classifier: Classifier) -> None:
    """Raise ValueError if llama.cpp has no classifier of the model, or would compute something else."""
    config: Any = classifier.model.config
    source = classifier.exit.source
    if config.model_type != ARCHITECTURE:
        raise ValueError(
            f"llama.cpp reads a head (cls.output.weight) with architecture {ARCHITECTURE!r} alone, but {source} is a "
            f"{config.model_type!r}: its graphs of other decoders have no such tensor."
        )
    if classifier.has_seams:
        raise ValueError(
            f"the tokenizer of {source} joins texts with the words around them, and llama.cpp cannot split there: "
            "train with a template whose words are parted by control tokens, such as 'qwen3-reranker'."
        )
    others = {
        "sliding_window": config.sliding_window if "sliding_attention" in config.layer_types else None,
        "attention_bias": config.attention_bias or None,
        "rope_type": None if config.rope_parameters["rope_type"] == "default" else config.rope_parameters["rope_type"],
    }
    if given := {name: value for name, value in others.items() if value is not None}:
        raise ValueError(f"llama.cpp's {ARCHITECTURE} has no place for {given} in the config.json of {source}.")


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of a tokenizer's tokenizer.json.

    Raises:
        ValueError: if it does not split and merge text as Qwen's tokenizers do.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    if stored["model"]["type"] != "BPE" or json.dumps(SPLIT) not in json.dumps(stored["pre_tokenizer"]):
        raise ValueError(
            f"llama.cpp splits text by rules that it knows by name; of these, only Qwen's are written here, and the "
            f"tokenizer has {json.dumps(stored['pre_tokenizer'])[:200]}."
        )
    return stored


def _add_tokenizer(
    writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerBase, backend: dict[str, Any], rows: int
) -> None:
    words = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    tokens, types = [], []
    for index in range(rows):
        special = added.get(index)
        tokens.append(words.get(index, f"[PAD{index}]"))
        if special is not None:
            types.append(kinds.CONTROL if special.special else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL if index in words else kinds.UNUSED)
    merges = backend["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    for name in ("eos", "pad", "bos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)


def _tensor_name(key: str) -> str:
    """Return llama.cpp's name of a weight of transformers.

    >>> _tensor_name("model.layers.3.mlp.up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    module = key.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, number, part = module.split(".", 3)
    return f"blk.{number}.{NAMES[part]}.weight"


def _add_tensor(writer: Any, gguf: Any, name: str, tensor: Tensor, precision: str) -> None:
    values = tensor.float().numpy()
    is_matrix = values.ndim == 2 and name != "cls.output.weight"
    if is_matrix and precision == "f16":
        writer.add_tensor(name, values.astype(np.float16))
    elif is_matrix and precision == "q8_0" and values.shape[-1] % BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)
