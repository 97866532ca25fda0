"""Both sides' models, under the same adapters and with the same weights, and the batches they take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.training import flag_embedding, padded
from benchmarks.training.jobs import Job
from flagembedding_matryoshka.finetune.data import Group, MatryoshkaCollator
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel
from flagembedding_matryoshka.models.backbones import causal_lm_class

LORA_RANK, LORA_ALPHA = 32, 64
METHODS = {"research code": "distill_fix_layer_teacher", "FlagEmbedding": "distill_final_layer_teacher"}
"""What each comparison learns: every exit from the label and the data's scores, the first also from deeper exits."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        build: its model.
        collate: its batch, on the CPU.
    """

    build: Callable[[Job], AbsRerankerModel]
    collate: Callable[[Sequence[Group]], dict[str, Any]]


def empty_model(model_class: type[PreTrainedModel], job: Job) -> PreTrainedModel:
    """A model without values in its weights, which lie in the job's dtype, but for the heads, in float32."""
    with torch.device("meta"):
        model: Any = model_class(copy.deepcopy(job.config)).to(job.dtype)
    model.lm_head.float()
    model.to_empty(device=job.device)
    model.model.rotary_emb = type(model.model.rotary_emb)(job.config).to(job.device)
    return model


def adapted(model: PreTrainedModel, job: Job) -> PeftModel:
    """`model` with adapters as the runner adds them; its weights then depend on their names alone, not on its class.

    The adapters have no dropout, under which two passes could not be compared.
    """
    adapters = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_head"],
    )
    found = get_peft_model(model, adapters)
    generator = torch.Generator(job.device).manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(found.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1)  # norms
            else:
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5, generator=generator)
    return found


def any_tokenizer() -> PreTrainedTokenizerFast:
    """What FlagEmbedding's classes ask for; batches hold ids already."""
    words = Tokenizer(models.WordLevel({"Yes": 0}, unk_token="Yes"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="Yes", padding_side="left")


def build_ours(job: Job) -> MatryoshkaRerankerModel:
    return MatryoshkaRerankerModel(
        adapted(empty_model(causal_lm_class(job.config), job), job),
        method=TRAIN_METHODS[METHODS[job.compared]],
        tokenizer=any_tokenizer(),
        train_batch_size=job.queries,
        train_group_size=job.group,
    )


def build_padded(job: Job) -> padded.PaddedCrossEncoder:
    return padded.PaddedCrossEncoder(
        adapted(empty_model(padded.PaddedMistral, job), job),
        tokenizer=any_tokenizer(),
        train_batch_size=job.queries,
        train_group_size=job.group,
    )


def build_flag_embedding(job: Job) -> flag_embedding.CrossDecoder:
    model = flag_embedding.minicpm_model(job.config).to(job.device)
    return flag_embedding.CrossDecoder(adapted(model, job), tokenizer=any_tokenizer(), train_batch_size=job.queries)


OURS = Side(build_ours, MatryoshkaCollator())
COMPARISONS = {
    "research code": {"ours": OURS, "baseline": Side(build_padded, padded.collate)},
    "FlagEmbedding": {
        "ours": OURS,
        "baseline": Side(build_flag_embedding, lambda groups: flag_embedding.collate(groups, any_tokenizer())),
    },
}
