"""From arguments to a trained model on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerRunner
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoint import inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.configuration import SubNetwork
from flagembedding_matryoshka.finetune.arguments import (
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaTrainingArguments,
)
from flagembedding_matryoshka.finetune.data import MatryoshkaCollator, MatryoshkaTrainDataset, check_training_file
from flagembedding_matryoshka.finetune.modeling import MatryoshkaCrossEncoder
from flagembedding_matryoshka.finetune.trainer import MatryoshkaTrainer
from flagembedding_matryoshka.losses import TRAIN_METHODS
from flagembedding_matryoshka.modeling import CostWiseMistralForCausalLM

logger = logging.getLogger(__name__)


class MatryoshkaRunner(AbsRerankerRunner):
    """FlagEmbedding's runner for Matryoshka re-rankers.

    Raises:
        ValueError: on contradicting arguments and on training rows that are wrong, before the model is loaded.
    """

    model_args: MatryoshkaModelArguments
    data_args: MatryoshkaDataArguments
    training_args: MatryoshkaTrainingArguments

    def __init__(
        self,
        model_args: MatryoshkaModelArguments,
        data_args: MatryoshkaDataArguments,
        training_args: MatryoshkaTrainingArguments,
    ) -> None:
        self.method = TRAIN_METHODS[training_args.train_method]
        needs_scores = self.method.data_scores != "none"
        if data_args.knowledge_distillation and not needs_scores:
            using = [name for name, method in TRAIN_METHODS.items() if method.data_scores != "none"]
            raise ValueError(
                f"knowledge_distillation=True, but train_method {training_args.train_method} reads no teacher scores. "
                f"These do: {', '.join(using)}."
            )
        data_args.knowledge_distillation = needs_scores
        for path in data_args.train_data:
            check_training_file(path, needs_scores)
        super().__init__(model_args, data_args, training_args)

    def load_tokenizer_and_model(self) -> tuple[PreTrainedTokenizerBase, MatryoshkaCrossEncoder]:
        """The tokenizer, with a pad token, and the model that learns."""
        args = self.model_args
        hub = {name: value for name, value in (("cache_dir", args.cache_dir), ("token", args.token)) if value}
        tokenizer = load_tokenizer(
            args.tokenizer_name or args.model_name_or_path,
            args.trust_remote_code,
            use_fast=args.use_fast_tokenizer,
            **hub,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

        from_raw = {"from_raw_model": True, "from_finetuned_model": False}.get(args.model_type)
        checkpoint = inspect_checkpoint(args.model_name_or_path, from_raw, args.start_layer, args.layer_sep, **hub)
        for ratio in self.training_args.compress_ratios:
            layers = self.training_args.compress_layers
            SubNetwork.resolve(checkpoint.config, compress_layers=layers, compress_ratio=ratio if layers else 1)
        raw_peft = args.raw_peft or []
        model = load_model(checkpoint, tokenizer, self._weights_dtype(), raw_peft, **hub)
        model.config.raw_peft = [*checkpoint.adapters, *raw_peft] if args.use_lora else []
        cross_encoder = MatryoshkaCrossEncoder(
            self._add_adapters(model) if args.use_lora else model,
            tokenizer,
            self.method,
            self.training_args.per_device_train_batch_size,
            self.data_args.train_group_size,
        )
        if self.training_args.gradient_checkpointing and args.use_lora:
            cross_encoder.enable_input_require_grads()
        return tokenizer, cross_encoder

    def _weights_dtype(self) -> torch.dtype:
        """Frozen weights can lie in the format that is computed in; weights that learn stay in float32."""
        if not self.model_args.use_lora:
            return torch.float32
        if self.training_args.bf16:
            return torch.bfloat16
        return torch.float16 if self.training_args.fp16 else torch.float32

    def _add_adapters(self, model: CostWiseMistralForCausalLM) -> PeftModel:
        args = self.model_args
        if args.from_peft is not None:
            return PeftModel.from_pretrained(model, args.from_peft, is_trainable=True)
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.target_modules,
            modules_to_save=args.modules_to_save,
        )
        return get_peft_model(model, config)

    def load_train_dataset(self) -> MatryoshkaTrainDataset:
        """Groups of pairs."""
        return MatryoshkaTrainDataset(args=self.data_args, tokenizer=self.tokenizer)

    def load_data_collator(self) -> MatryoshkaCollator:
        """Pads groups into a batch."""
        return MatryoshkaCollator(
            tokenizer=self.tokenizer,
            query_max_len=self.data_args.query_max_len,
            passage_max_len=self.data_args.passage_max_len,
            pad_to_multiple_of=self.data_args.pad_to_multiple_of,
        )

    def load_trainer(self) -> MatryoshkaTrainer:
        """The training loop."""
        return MatryoshkaTrainer(
            model=self.model,
            args=self.training_args,
            train_dataset=self.train_dataset,
            data_collator=self.data_collator,
            processing_class=self.tokenizer,
            compress_layers=self.training_args.compress_layers,
            compress_ratios=self.training_args.compress_ratios,
        )

    def run(self) -> None:
        """Train, and save what was learnt to output_dir."""
        super().run()
        if self.model_args.save_merged_lora_model and self.training_args.process_index == 0:
            merged = Path(self.training_args.output_dir) / "merged_model"
            checkpoint = inspect_checkpoint(self.training_args.output_dir)
            model = load_model(checkpoint, self.tokenizer, self._weights_dtype())
            model.config.raw_peft = []
            model.save_pretrained(merged)
            self.tokenizer.save_pretrained(merged)
            logger.info("Wrote the merged model to %s", merged)
