"""FlagEmbedding's runner: loads model and data, trains, and saves the result."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
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
from flagembedding_matryoshka.checkpoints.gguf import locate
from flagembedding_matryoshka.checkpoints.loading import depth_of, inspect_checkpoint, load_model, load_tokenizer
from flagembedding_matryoshka.evaluation.candidates import Candidates
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.finetune.arguments import (
    BEST_METRIC,
    MatryoshkaDataArguments,
    MatryoshkaModelArguments,
    MatryoshkaTrainingArguments,
    convert_arguments,
    describe_run,
    evaluate_checkpoints,
)
from flagembedding_matryoshka.finetune.beir import (
    BEIR_METRIC,
    BeirEvaluation,
    parse_settings,
    read_candidates,
    resolve_settings,
)
from flagembedding_matryoshka.finetune.callbacks import EarlyStopping
from flagembedding_matryoshka.finetune.checkpoints import find_checkpoint, locked, refuse_impossible_average
from flagembedding_matryoshka.finetune.data import (
    MatryoshkaCollator,
    MatryoshkaEvalCollator,
    MatryoshkaEvalDataset,
    MatryoshkaTrainDataset,
    UnlabelledTrainDataset,
)
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS, TrainMethod
from flagembedding_matryoshka.finetune.modeling import (
    MatryoshkaRerankerModel,
    convert_target_modules,
    refuse_unknown_modules,
)
from flagembedding_matryoshka.finetune.rows import (
    InstructionCounts,
    count_instructions,
    load_files,
    refuse_instructions,
    template_of_rows,
)
from flagembedding_matryoshka.finetune.sharding import unsharded_loading
from flagembedding_matryoshka.finetune.trainer import MatryoshkaTrainer, ranking_metrics
from flagembedding_matryoshka.inference.device import follow_cpu_quota
from flagembedding_matryoshka.inference.memory import keep_freed_memory
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.quantization import use_nf4
from flagembedding_matryoshka.quiet import without_deprecation
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template

logger = logging.getLogger(__name__)

CONFIG_NAME = "run.yaml"
"""File in output_dir with the arguments of the run."""


class MatryoshkaRunner(AbsRerankerRunner):
    """FlagEmbedding's runner for Matryoshka re-rankers. All checks are made before the model is loaded.

    Args:
        model_args, data_args, training_args: our argument classes, or FlagEmbedding's. Values that differ from
            FlagEmbedding's defaults are kept; all others get our defaults.

    Raises:
        ValueError: on contradicting arguments, on arguments of FlagEmbedding's that are not supported, and on a
            training row with a fault.
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
        model_args = convert_arguments(MatryoshkaModelArguments, model_args)
        data_args = convert_arguments(MatryoshkaDataArguments, data_args)
        training_args = convert_arguments(MatryoshkaTrainingArguments, training_args)
        self.method = TRAIN_METHODS[training_args.train_method]
        _refuse_contradictions(self.method, model_args, data_args, training_args)
        data_args = copy.copy(data_args)
        data_args.knowledge_distillation = self.method.row_kind == "scores"
        with training_args.main_process_first(desc="reading the training files"):
            self._instructions, self._eval_instructions = self._read_instructions(data_args, training_args.seed)
        self._candidates: dict[str, Candidates] | None = None
        self._eval_settings = parse_settings(data_args.eval_settings)
        if data_args.eval_beir is not None:
            limits = data_args.eval_split, data_args.eval_top_k, data_args.eval_queries
            self._candidates = read_candidates(data_args.eval_beir, *limits)
        if data_args.eval_data is not None or data_args.eval_beir is not None:
            evaluate_checkpoints(training_args)
        if data_args.eval_data is None and training_args.metric_for_best_model == BEST_METRIC:
            training_args.metric_for_best_model = BEIR_METRIC
        _refuse_missing_evaluation(data_args, training_args)
        refuse_impossible_average(training_args)
        output_dir = Path(training_args.output_dir)
        training_args.resume_from_checkpoint = find_checkpoint(training_args.resume_from_checkpoint, output_dir)
        _refuse_used_output_dir(training_args)
        super().__init__(model_args, data_args, training_args)

    def _read_instructions(
        self, args: MatryoshkaDataArguments, seed: int
    ) -> tuple[InstructionCounts, InstructionCounts | None]:
        """Return the instructions in the training rows and in the evaluation rows.

        All files are parsed, so that a row with a fault is found before the model is loaded.
        """
        counts = count_instructions(self._dataset_class.load_sources(args, seed))
        if args.eval_data is None:
            return counts, None
        options = args.cache_path, args.skip_bad_lines
        return counts, count_instructions(load_files(args.eval_data, "labels", *options, mapping=args.column_mapping))

    def load_tokenizer_and_model(self) -> tuple[PreTrainedTokenizerBase, MatryoshkaRerankerModel]:
        """Return the tokenizer, with a pad token, and the model to train."""
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
            allow_pickle=args.allow_pickle,
            **self._hub,
        )
        # Layers above the deepest exit have no gradient.
        checkpoint.config.cut(checkpoint.config.exit_layers[-1])
        checkpoint.config.template = self._template(checkpoint.config).to_json()
        if checkpoint.from_raw:
            checkpoint.config.head_scale = args.head_scale or (1.0 if self.method.original else 0.1)
        for ratio in self.training_args.compress_ratios:
            layers = self.training_args.compress_layers
            Setting.resolve(checkpoint.config, compress_layers=layers, compress_ratio=ratio if layers else 1)
        for store in self.training_args.store_layers:
            Setting.resolve(checkpoint.config, store_layer=store)
        raw_peft = [locate(path) for path in args.raw_peft or []]
        if args.use_lora:
            self._refuse_to_replace([checkpoint.base, *checkpoint.adapters, *raw_peft])
        if args.use_lora and args.from_peft is None:
            targets = convert_target_modules(args.target_modules)
            refuse_unknown_modules(checkpoint.config, targets, args.modules_to_save)
        if self.training_args.device.type == "cpu":
            follow_cpu_quota()
            keep_freed_memory()
        with unsharded_loading(self.training_args):
            model = load_model(checkpoint, tokenizer, self._weights_dtype(), raw_peft, **self._hub)
        if args.load_in_4bit:
            use_nf4(model)
            model.to(self.training_args.device)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer enables it
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
            self.training_args.loss_terms,
            self.training_args.exit_weights,
        )
        if self.training_args.gradient_checkpointing and args.use_lora:
            cross_encoder.enable_input_require_grads()
        return tokenizer, cross_encoder

    def _refuse_to_replace(self, bases: Sequence[str]) -> None:
        """Raise ValueError if output_dir is a checkpoint that the new adapters are loaded on top of."""
        output_dir = Path(self.training_args.output_dir).resolve()
        for base in bases:
            if Path(base).resolve() in (output_dir, output_dir / MERGED):
                raise ValueError(
                    f"output_dir={self.training_args.output_dir} would replace {base}, which the new adapters are "
                    "loaded on top of: name another output_dir."
                )

    @property
    def _hub(self) -> dict[str, Any]:
        """Options of the hub for models, tokenizers and adapters."""
        given = {"cache_dir": self.model_args.cache_dir, "token": self.model_args.token}
        return {name: value for name, value in given.items() if value}

    def _template(self, config: CostWiseConfig) -> Template:
        """Return the template to save: the checkpoint's, with the texts of the arguments and of all rows."""
        args = self.data_args
        template = Template.load(config.template).replaced(
            query_instruction=args.query_instruction_for_rerank,
            query_format=args.query_instruction_format,
            between=args.sep_token,
            passage_instruction=args.passage_instruction_for_rerank,
            passage_format=args.passage_instruction_format,
            behind=args.sep_token,
        )
        if self._eval_instructions is not None:
            refuse_instructions(template, self._eval_instructions)
        return template_of_rows(template, self._instructions, warns=self.training_args.process_index == 0)

    def _compensation(self) -> dict[str, int | str] | None:
        """Return what the adapter compensates for, as the configuration stores it; None in the first stage."""
        if self.training_args.finetune_type is None:
            return None
        return {"axis": self.training_args.finetune_type, "compress_ratio": self.training_args.compress_ratios[0]}

    def _weights_dtype(self) -> torch.dtype:
        """Return the dtype of the weights: float32 if they are trained, otherwise the dtype of the computation."""
        if not self.model_args.use_lora:
            return torch.float32
        if self.training_args.bf16:
            return torch.bfloat16
        return torch.float16 if self.training_args.fp16 else torch.float32

    def _add_adapters(self, model: CostWiseForCausalLM, depth: int) -> PeftModel:
        args = self.model_args
        if args.from_peft is not None:
            adapter = read_adapter(locate(args.from_peft), args.allow_pickle, **self._hub)
            refuse_other_heads(adapter.path, model.config, **self._hub)
            refuse_other_head(adapter, "the model that learns")
            return attach(model, adapter, depth, is_trainable=True)
        more: Any = args.lora_options or {}
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=convert_target_modules(args.target_modules) or model.linear_names,
            modules_to_save=args.modules_to_save,
            **more,
        )
        with without_deprecation():
            return get_peft_model(model, config)

    @property
    def _dataset_class(self) -> type[MatryoshkaTrainDataset]:
        return UnlabelledTrainDataset if self.method.original else MatryoshkaTrainDataset

    def load_train_dataset(self) -> MatryoshkaTrainDataset:
        """Return the groups to train on."""
        template = Template.load(self.model.config.template)
        has_grades = self.training_args.label_loss != "contrastive"
        return self._dataset_class(self.data_args, self.tokenizer, self.training_args.seed, template, has_grades)

    def _load_eval_dataset(self) -> MatryoshkaEvalDataset | None:
        if self.data_args.eval_data is None:
            return None
        args = copy.copy(self.data_args)
        args.train_data, args.knowledge_distillation = self.data_args.eval_data, False
        args.data_weights = None
        return MatryoshkaEvalDataset(args, self.tokenizer, template=Template.load(self.model.config.template))

    def _load_beir_evaluation(self) -> BeirEvaluation | None:
        if self._candidates is None:
            return None
        return BeirEvaluation(self._candidates, resolve_settings(self._eval_settings, self.model.config))

    def load_data_collator(self) -> MatryoshkaCollator:
        """Return the collator, which packs groups."""
        return MatryoshkaCollator()

    def load_trainer(self) -> MatryoshkaTrainer:
        """Return the trainer."""
        args, patience = self.training_args, self.training_args.early_stopping_patience
        stops = [] if patience is None else [EarlyStopping(patience, args.early_stopping_threshold)]
        return MatryoshkaTrainer(
            model=self.model,
            args=args,
            callbacks=stops,
            train_dataset=self.train_dataset,
            data_collator=self.data_collator,
            processing_class=self.tokenizer,
            eval_dataset=self._load_eval_dataset(),
            eval_collator=MatryoshkaEvalCollator(),
            compute_metrics=partial(ranking_metrics, exits=self.model.config.exit_layers),
            compress_layers=args.compress_layers,
            compress_ratios=args.compress_ratios,
            store_layers=args.store_layers,
            one_source_per_batch=self.data_args.one_source_per_batch,
            beir=self._load_beir_evaluation(),
            lengths=(self.data_args.query_max_len, self.data_args.passage_max_len),
        )

    def _log_lengths(self) -> str:
        """Log the shares of truncated texts in a sample of rows, and return them in words."""
        queries, passages, rows = self.train_dataset.truncated_shares()
        truncated = f"{100 * queries:.1f} % of queries and {100 * passages:.1f} % of passages are truncated"
        is_reference = self.train_dataset.pair_tokenizer.template.has_reference_lengths
        logger.info(
            "%s (in %d rows): query_max_len=%d, passage_max_len=%d, %s.",
            truncated,
            rows,
            self.data_args.query_max_len,
            self.data_args.passage_max_len,
            "which include the template, as in the reference" if is_reference else "without the template",
        )
        return truncated

    def run(self) -> None:
        """Train, and save the model and the arguments to output_dir.

        Raises:
            ValueError: if another run writes to output_dir.
        """
        is_first = self.training_args.process_index == 0
        with locked(Path(self.training_args.output_dir)) if is_first else nullcontext():
            if is_first:
                truncated = self._log_lengths()
                config = describe_run(self.model_args, self.data_args, self.training_args)
                text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
                write_text(Path(self.training_args.output_dir) / CONFIG_NAME, text)
            super().run()
            speed = self.trainer.describe_speed()
            if is_first:
                logger.info("%s %s.", speed, truncated)
        if self.training_args.process_index == 0:
            write_sentence_transformers_files(self.training_args.output_dir)
        if self.model_args.save_merged_lora_model and self.training_args.process_index == 0:
            merged = Path(self.training_args.output_dir) / MERGED
            pickled = self.model_args.allow_pickle
            checkpoint = inspect_checkpoint(self.training_args.output_dir, allow_pickle=pickled, **self._hub)
            with unsharded_loading(self.training_args):
                model = load_model(checkpoint, self.tokenizer, self._weights_dtype(), **self._hub)
            model.config.raw_peft, model.config.base_exits = [], None
            remove_written(merged)
            model.save_pretrained(merged)
            self.tokenizer.save_pretrained(merged)
            write_sentence_transformers_files(merged)
            logger.info("Wrote the merged model to %s", merged)


def _refuse_contradictions(
    method: TrainMethod,
    model_args: MatryoshkaModelArguments,
    data_args: MatryoshkaDataArguments,
    training_args: MatryoshkaTrainingArguments,
) -> None:
    """Raise ValueError if arguments contradict the training method or the device."""
    needs_scores = method.row_kind == "scores"
    if data_args.random_negatives and needs_scores and training_args.distill_loss in ("mse", "margin_mse"):
        raise ValueError(
            f"random_negatives={data_args.random_negatives} contradicts distill_loss={training_args.distill_loss}, "
            "which compares raw scores: random negatives have no teacher score. Use ce or kl."
        )
    if data_args.knowledge_distillation and not needs_scores:
        using = [name for name, other in TRAIN_METHODS.items() if other.row_kind == "scores"]
        raise ValueError(
            f"knowledge_distillation=True, but train_method {training_args.train_method} uses no teacher scores. "
            f"Methods with teacher scores: {', '.join(using)}."
        )
    if data_args.knowledge_distillation is False and needs_scores:
        without = [name for name, other in TRAIN_METHODS.items() if other.row_kind != "scores"]
        raise ValueError(
            f"knowledge_distillation=False, but train_method {training_args.train_method} uses teacher scores. "
            f"Methods without teacher scores: {', '.join(without)}."
        )
    if method.original and (not model_args.use_lora or model_args.from_peft is not None):
        raise ValueError(
            f"train_method {training_args.train_method} learns from the model without adapters, so it needs new "
            f"adapters, but use_lora={model_args.use_lora} and from_peft={model_args.from_peft}. Use raw_peft to "
            "merge an adapter before training."
        )
    if model_args.use_flash_attn and not (training_args.device.type == "cuda" and _is_half(training_args)):
        raise ValueError(
            f"use_flash_attn=True needs a GPU and --bf16 or --fp16; this run is on {training_args.device}. Without "
            "the argument the fastest available kernel is used."
        )


def _refuse_missing_evaluation(data_args: MatryoshkaDataArguments, training_args: MatryoshkaTrainingArguments) -> None:
    """Raise ValueError if there is evaluation data without an evaluation, or an evaluation without data."""
    evaluates = training_args.eval_strategy != "no"
    given = [name for name in ("eval_data", "eval_beir") if getattr(data_args, name) is not None]
    if given and not evaluates:
        raise ValueError(
            f"{given[0]} is given, but save_strategy and eval_strategy are 'no': set one of them, or leave {given[0]} "
            "out."
        )
    if not given and evaluates:
        raise ValueError(
            f"eval_strategy={training_args.eval_strategy.value} and load_best_model_at_end="
            f"{training_args.load_best_model_at_end} need eval_data, lists to rank, or eval_beir."
        )


def _refuse_used_output_dir(args: MatryoshkaTrainingArguments) -> None:
    """Raise ValueError if output_dir has files that must not be overwritten."""
    output_dir = Path(args.output_dir)
    if args.overwrite_output_dir or args.resume_from_checkpoint is not None:
        return
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"output_dir {output_dir} is not empty, and overwrite_output_dir is False: name another directory."
        )


def _is_half(args: MatryoshkaTrainingArguments) -> bool:
    return bool(args.bf16 or args.fp16)
