"""From arguments to a trained model on disk."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerRunner,
    AbsRerankerTrainingArguments,
)
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoints.adapters import attach, read_adapter, refuse_other_head, refuse_other_heads
from flagembedding_matryoshka.checkpoints.export import MERGED, remove_written, write_sentence_transformers_files
from flagembedding_matryoshka.checkpoints.loading import depth_of, inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.checkpoints.shipped import locate
from flagembedding_matryoshka.finetune.adoption import adopt
from flagembedding_matryoshka.finetune.averaging import refuse_impossible_average
from flagembedding_matryoshka.finetune.checkpoints import resolve
from flagembedding_matryoshka.finetune.collators import MatryoshkaCollator, MatryoshkaEvalCollator
from flagembedding_matryoshka.finetune.data import (
    MatryoshkaEvalDataset,
    MatryoshkaTrainDataset,
    UnlabelledTrainDataset,
)
from flagembedding_matryoshka.finetune.data_arguments import MatryoshkaDataArguments
from flagembedding_matryoshka.finetune.evaluation import rank_checkpoints, ranking_metrics
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.model_arguments import MatryoshkaModelArguments
from flagembedding_matryoshka.finetune.modeling import MatryoshkaRerankerModel
from flagembedding_matryoshka.finetune.rows import load_files, sampled
from flagembedding_matryoshka.finetune.sharding import whole_while_loading
from flagembedding_matryoshka.finetune.targets import as_peft_takes_them, refuse_unknown_modules
from flagembedding_matryoshka.finetune.trainer import MatryoshkaTrainer
from flagembedding_matryoshka.finetune.training_arguments import MatryoshkaTrainingArguments
from flagembedding_matryoshka.finetune.words import count_words, refuse_misplaced, template_of_rows
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.quantization import use_nf4
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template

logger = logging.getLogger(__name__)


class MatryoshkaRunner(AbsRerankerRunner):
    """FlagEmbedding's runner for Matryoshka re-rankers.

    Takes FlagEmbedding's argument classes too: what they set is kept, what they leave at its default gets ours.

    Raises:
        ValueError: on contradicting arguments, arguments of FlagEmbedding's that have no meaning here, and training
            rows that are wrong, before the model is loaded.
    """

    model_args: MatryoshkaModelArguments
    data_args: MatryoshkaDataArguments
    training_args: MatryoshkaTrainingArguments

    def __init__(
        self,
        model_args: AbsRerankerModelArguments,
        data_args: AbsRerankerDataArguments,
        training_args: AbsRerankerTrainingArguments,
    ) -> None:
        model_args = adopt(MatryoshkaModelArguments, model_args)
        data_args = adopt(MatryoshkaDataArguments, data_args)
        training_args = adopt(MatryoshkaTrainingArguments, training_args)
        self.method = TRAIN_METHODS[training_args.train_method]
        needs_scores = self.method.reads == "scores"
        if data_args.random_negatives and needs_scores and training_args.distill_loss in ("mse", "margin_mse"):
            raise ValueError(
                f"random_negatives={data_args.random_negatives} have no teacher score that "
                f"distill_loss={training_args.distill_loss} could compare raw scores with: use ce or kl."
            )
        if data_args.knowledge_distillation and not needs_scores:
            using = [name for name, method in TRAIN_METHODS.items() if method.reads == "scores"]
            raise ValueError(
                f"knowledge_distillation=True, but train_method {training_args.train_method} reads no teacher scores. "
                f"These do: {', '.join(using)}."
            )
        data_args.knowledge_distillation = needs_scores
        if self.method.original and (not model_args.use_lora or model_args.from_peft is not None):
            raise ValueError(
                f"train_method {training_args.train_method} learns from the model as it was loaded, which is what is "
                f"left where adapters are switched off: use_lora={model_args.use_lora} and from_peft="
                f"{model_args.from_peft} contradict it. Merge an adapter first, with raw_peft."
            )
        if model_args.use_flash_attn and not (training_args.device.type == "cuda" and _is_half(training_args)):
            raise ValueError(
                f"use_flash_attn=True needs a GPU and --bf16 or --fp16; this run is on {training_args.device}. Without "
                "the argument attention takes the fastest kernel that runs."
            )
        with training_args.main_process_first(desc="reading the training files"):
            options = data_args.cache_path, data_args.skip_bad_lines
            min_negatives = self._dataset_class.min_negatives(data_args)
            files = load_files(data_args.train_data, self.method.reads, *options, min_negatives)
            limit = data_args.max_example_num_per_dataset
            used = (
                sampled(rows, path, limit, training_args.seed)
                for path, rows in zip(data_args.train_data, files, strict=True)
            )
            self._words_of_rows = count_words(used)
            self._words_of_eval_rows = None
            if data_args.eval_data is not None:
                self._words_of_eval_rows = count_words(load_files(data_args.eval_data, "labels", *options))
        if data_args.eval_data is not None:
            rank_checkpoints(training_args)
            if training_args.eval_strategy == "no":
                raise ValueError(
                    "eval_data is given, but save_strategy and eval_strategy are 'no': nothing would be evaluated."
                )
        elif training_args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={training_args.eval_strategy.value} and load_best_model_at_end="
                f"{training_args.load_best_model_at_end} need eval_data: lists to rank."
            )
        refuse_impossible_average(training_args)
        output_dir = Path(training_args.output_dir)
        training_args.resume_from_checkpoint = resolve(training_args.resume_from_checkpoint, output_dir)
        resumed = training_args.resume_from_checkpoint is not None
        if not training_args.overwrite_output_dir and not resumed and output_dir.is_dir() and any(output_dir.iterdir()):
            raise ValueError(f"{output_dir} is not empty, and overwrite_output_dir=False.")
        super().__init__(model_args, data_args, training_args)

    def load_tokenizer_and_model(self) -> tuple[PreTrainedTokenizerBase, MatryoshkaRerankerModel]:
        """The tokenizer, with a pad token, and the model that learns."""
        args = self.model_args
        tokenizer = load_tokenizer(
            args.tokenizer_name or args.model_name_or_path,
            args.trust_remote_code,
            use_fast=args.use_fast_tokenizer,
            **self._hub,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

        from_raw = {"from_raw_model": True, "from_finetuned_model": False}.get(args.model_type)
        checkpoint = inspect_checkpoint(
            args.model_name_or_path,
            from_raw,
            args.start_layer,
            args.layer_sep,
            args.max_layer,
            args.exits,
            args.template,
            **self._hub,
        )
        # What no exit reads does not learn, and need not be there.
        checkpoint.config.cut(checkpoint.config.exit_layers[-1])
        checkpoint.config.template = self._template(checkpoint.config).to_json()
        if checkpoint.from_raw:
            checkpoint.config.head_scale = args.head_scale or (1.0 if self.method.original else 0.1)
        for ratio in self.training_args.compress_ratios:
            layers = self.training_args.compress_layers
            Setting.resolve(checkpoint.config, compress_layers=layers, compress_ratio=ratio if layers else 1)
        raw_peft = [locate(path) for path in args.raw_peft or []]
        if args.use_lora:
            self._refuse_to_replace([checkpoint.base, *checkpoint.adapters, *raw_peft])
        if args.use_lora and args.from_peft is None:
            targets = as_peft_takes_them(args.target_modules)
            refuse_unknown_modules(checkpoint.config, targets, args.modules_to_save)
        with whole_while_loading(self.training_args):
            model = load_model(checkpoint, tokenizer, self._weights_dtype(), raw_peft, **self._hub)
        if args.load_in_4bit:
            use_nf4(model)
            model.to(self.training_args.device)
            model = prepare_model_for_kbit_training(model, self.training_args.gradient_checkpointing)
        if args.use_lora:
            model.config.raw_peft = [*checkpoint.adapters, *raw_peft]
            model.config.base_exits = checkpoint.config.base_exits
        model.config.compensation = self._compensation()
        cross_encoder = MatryoshkaRerankerModel(
            self._add_adapters(model, depth_of(checkpoint, **self._hub)) if args.use_lora else model,
            tokenizer,
            self.method,
            self.training_args.per_device_train_batch_size,
            self.data_args.train_group_size,
            self.training_args.distill_loss,
            self.training_args.exit_weights,
        )
        if self.training_args.gradient_checkpointing and args.use_lora:
            cross_encoder.enable_input_require_grads()
        return tokenizer, cross_encoder

    def _refuse_to_replace(self, places: Sequence[str]) -> None:
        """Raise ValueError if what the new adapters are loaded with lies where they are written."""
        output_dir = Path(self.training_args.output_dir).resolve()
        for place in places:
            if Path(place).resolve() in (output_dir, output_dir / MERGED):
                raise ValueError(
                    f"output_dir={self.training_args.output_dir} is where {place} lies, which the new adapters need: "
                    "they are loaded on top of it. Name another output_dir."
                )

    @property
    def _hub(self) -> dict[str, Any]:
        """How names are found on the hub, by everything that reads a model, a tokenizer or an adapter."""
        given = {"cache_dir": self.model_args.cache_dir, "token": self.model_args.token}
        return {name: value for name, value in given.items() if value}

    def _template(self, config: CostWiseConfig) -> Template:
        """The checkpoint's, with what the arguments and all rows say: it is saved beside what is trained."""
        args = self.data_args
        template = Template.load(config.template).replaced(
            query_instruction=args.query_instruction_for_rerank,
            query_format=args.query_instruction_format,
            between=args.sep_token,
            passage_instruction=args.passage_instruction_for_rerank,
            passage_format=args.passage_instruction_format,
            behind=args.sep_token,
        )
        if self._words_of_eval_rows is not None:
            refuse_misplaced(template, self._words_of_eval_rows)
        return template_of_rows(template, self._words_of_rows, warns=self.training_args.process_index == 0)

    def _compensation(self) -> dict[str, int | str] | None:
        """What the adapter makes up for: a note that is saved beside it."""
        if self.training_args.finetune_type is None:
            return None
        return {"axis": self.training_args.finetune_type, "compress_ratio": self.training_args.compress_ratios[0]}

    def _weights_dtype(self) -> torch.dtype:
        """Frozen weights can lie in the format that is computed in; weights that learn stay in float32."""
        if not self.model_args.use_lora:
            return torch.float32
        if self.training_args.bf16:
            return torch.bfloat16
        return torch.float16 if self.training_args.fp16 else torch.float32

    def _add_adapters(self, model: CostWiseForCausalLM, depth: int) -> PeftModel:
        args = self.model_args
        if args.from_peft is not None:
            adapter = read_adapter(locate(args.from_peft), **self._hub)
            refuse_other_heads(adapter.path, model.config, **self._hub)
            refuse_other_head(adapter, "the model that learns")
            return attach(model, adapter, depth, is_trainable=True)
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=as_peft_takes_them(args.target_modules) or model.linear_names,
            modules_to_save=args.modules_to_save,
        )
        return get_peft_model(model, config)

    @property
    def _dataset_class(self) -> type[MatryoshkaTrainDataset]:
        return UnlabelledTrainDataset if self.method.original else MatryoshkaTrainDataset

    def load_train_dataset(self) -> MatryoshkaTrainDataset:
        """Groups of pairs."""
        template = Template.load(self.model.config.template)
        return self._dataset_class(self.data_args, self.tokenizer, self.training_args.seed, template)

    def _load_eval_dataset(self) -> MatryoshkaEvalDataset | None:
        if self.data_args.eval_data is None:
            return None
        args = copy.copy(self.data_args)
        args.train_data, args.knowledge_distillation = self.data_args.eval_data, False
        return MatryoshkaEvalDataset(args, self.tokenizer, template=Template.load(self.model.config.template))

    def load_data_collator(self) -> MatryoshkaCollator:
        """Packs groups into a batch."""
        return MatryoshkaCollator()

    def load_trainer(self) -> MatryoshkaTrainer:
        """The training loop."""
        return MatryoshkaTrainer(
            model=self.model,
            args=self.training_args,
            train_dataset=self.train_dataset,
            data_collator=self.data_collator,
            processing_class=self.tokenizer,
            eval_dataset=self._load_eval_dataset(),
            eval_collator=MatryoshkaEvalCollator(),
            compute_metrics=partial(ranking_metrics, exits=self.model.config.exit_layers),
            compress_layers=self.training_args.compress_layers,
            compress_ratios=self.training_args.compress_ratios,
        )

    def _log_lengths(self) -> None:
        queries, passages, rows = self.train_dataset.cut_shares()
        is_reference = self.train_dataset.pair_tokenizer.template.has_reference_lengths
        logger.info(
            "%.1f %% of queries and %.1f %% of passages are cut (in %d rows): query_max_len=%d, passage_max_len=%d, "
            "%s.",
            100 * queries,
            100 * passages,
            rows,
            self.data_args.query_max_len,
            self.data_args.passage_max_len,
            "which count the template too, as the reference does" if is_reference else "the template on top",
        )

    def run(self) -> None:
        """Train, and save what was learnt to output_dir."""
        if self.training_args.process_index == 0:
            self._log_lengths()
        super().run()
        if self.training_args.process_index == 0:
            write_sentence_transformers_files(self.training_args.output_dir)
        if self.model_args.save_merged_lora_model and self.training_args.process_index == 0:
            merged = Path(self.training_args.output_dir) / MERGED
            checkpoint = inspect_checkpoint(self.training_args.output_dir, **self._hub)
            with whole_while_loading(self.training_args):
                model = load_model(checkpoint, self.tokenizer, self._weights_dtype(), **self._hub)
            model.config.raw_peft, model.config.base_exits = [], None
            remove_written(merged)
            model.save_pretrained(merged)
            self.tokenizer.save_pretrained(merged)
            write_sentence_transformers_files(merged)
            logger.info("Wrote the merged model to %s", merged)


def _is_half(args: MatryoshkaTrainingArguments) -> bool:
    return bool(args.bf16 or args.fp16)
