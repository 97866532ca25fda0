"""Both sides' models, under the same adapters and with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from transformers import MistralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from benchmarks.training.jobs import Job
from benchmarks.training.padded import PaddedCrossEncoder, PaddedMistral
from flagembedding_matryoshka import CostWiseMistralForCausalLM
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel

METHOD = TRAIN_METHODS["distill_fix_layer_teacher"]
LORA_RANK, LORA_ALPHA = 32, 64


def adapted_model(model_class: type[MistralForCausalLM], job: Job) -> PeftModel:
    """A model with adapters as the runner adds them; its weights depend on their names alone, not on its class.

    The adapters have no dropout, under which two passes could not be compared.
    """
    with torch.device("meta"):
        model = model_class(copy.deepcopy(job.config)).to(job.dtype)
    model.to_empty(device=job.device)
    model.model.rotary_emb = MistralRotaryEmbedding(job.config).to(job.device)
    adapters = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_head"],
    )
    adapted = get_peft_model(model, adapters)
    generator = torch.Generator(job.device).manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1)  # norms
            else:
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5, generator=generator)
    return adapted


def any_tokenizer() -> PreTrainedTokenizerFast:
    """What FlagEmbedding's class asks for; batches hold ids already."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"Yes": 0}, unk_token="Yes")))


def build_ours(job: Job) -> MatryoshkaRerankerModel:
    return MatryoshkaRerankerModel(
        adapted_model(CostWiseMistralForCausalLM, job),
        method=METHOD,
        tokenizer=any_tokenizer(),
        train_batch_size=job.queries,
        train_group_size=job.group,
    )


def build_baseline(job: Job) -> PaddedCrossEncoder:
    return PaddedCrossEncoder(
        adapted_model(PaddedMistral, job),
        tokenizer=any_tokenizer(),
        train_batch_size=job.queries,
        train_group_size=job.group,
    )


SIDES: dict[str, Callable[[Job], AbsRerankerModel]] = {"ours": build_ours, "baseline": build_baseline}
