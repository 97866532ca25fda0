"""FlagEmbedding's trainer with a setting drawn for every pass, evaluation of every exit, and costs in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list
from FlagEmbedding.abc.finetune.reranker import AbsRerankerTrainer
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from flagembedding_matryoshka.checkpoints.export import remove_written
from flagembedding_matryoshka.finetune.beir import BeirEvaluation, TrainedReranker
from flagembedding_matryoshka.finetune.callbacks import DataOrder, SavedSteps
from flagembedding_matryoshka.finetune.checkpoints import average_weights
from flagembedding_matryoshka.finetune.collapse import CollapseGuard, ExitState
from flagembedding_matryoshka.finetune.data import PADDING, MatryoshkaEvalCollator
from flagembedding_matryoshka.finetune.folding import fold_adapters
from flagembedding_matryoshka.finetune.sampling import BalancedSampler, OneSourceSampler, sample_setting
from flagembedding_matryoshka.finetune.sharding import keep_loss_in_float32
from flagembedding_matryoshka.metrics import ndcg, rank_grades, reciprocal_rank
from flagembedding_matryoshka.models.batch import PackedBatch
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.flops import estimate_flops
from flagembedding_matryoshka.models.onednn import product, use_onednn
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.templates import Template

logger = logging.getLogger(__name__)

COSTS = ("lists", "tokens", "operations", "seconds")
"""Names of the costs in the log."""
DETAILED_LOGS = 1000
"""Number of latest entries of the log history that keep the terms of every exit. Each checkpoint has the history."""


class MatryoshkaTrainer(AbsRerankerTrainer):
    """FlagEmbedding's trainer with a setting drawn for every pass.

    Args:
        args, kwargs: as in transformers' `Trainer`.
        compress_layers, compress_ratios, store_layers: layers and ratios that the settings are drawn from.
        eval_collator: packs lists in evaluation.
        one_source_per_batch: fill each pass of all processes with rows of one file.
        beir: collections to rank at each evaluation; None is none.
        lengths: tokens of a query and of a passage in these collections.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        compress_layers: Sequence[int] = (),
        compress_ratios: Sequence[int] = (1,),
        store_layers: Sequence[int] = (),
        eval_collator: MatryoshkaEvalCollator | None = None,
        one_source_per_batch: bool = False,
        beir: BeirEvaluation | None = None,
        lengths: tuple[int, int] = (32, 192),
        **kwargs: Any,
    ) -> None:
        if beir is not None and kwargs.get("eval_dataset") is None:
            kwargs["eval_dataset"] = []
        super().__init__(*args, **kwargs)
        if self.accelerator.is_fsdp2:
            keep_loss_in_float32(self.accelerator.state.fsdp_plugin)
        self.add_callback(DataOrder())
        self.add_callback(SavedSteps())
        if self.args.average_last > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"average_last={self.args.average_last} does not work with FSDP and DeepSpeed, whose checkpoints are "
                "sharded: leave it out."
            )
        if beir is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("eval_beir does not work with FSDP and DeepSpeed, which shard the model: leave it out.")
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # weights are gathered by the layers' own hooks
        if self.args.device.type == "cpu" and not is_sharded:
            use_onednn(self.model.model, packs=False)
            if isinstance(self.model.model, PeftModel):
                fold_adapters(self.model.model)
        self.beir, self.lengths = beir, lengths
        self.eval_collator = eval_collator
        self.one_source_per_batch = one_source_per_batch
        self.compress_layers = compress_layers
        self.compress_ratios = compress_ratios
        self.store_layers = store_layers
        self._passes = (-1, 0)
        self._term_names: list[str] = []
        self._term_sums: Tensor | None = None  # (terms,) over the passes since the last log
        self._summed_passes = 0
        self._guard: CollapseGuard | None = None
        trains_all_weights = not isinstance(self.model.model, PeftModel)
        method = self.model.method
        self._cost = TrainingCost(self.model.config, trains_all_weights, method.deeper_exit != "none", method.original)

    def _pass_number(self) -> int:
        """Return the number of passes before this one, also those before the run was resumed."""
        step, done = self._passes
        done = done + 1 if step == self.state.global_step else 0
        self._passes = (self.state.global_step, done)
        return self.state.global_step * self.args.gradient_accumulation_steps + done

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        # In place of transformers' random order. A single process that accumulates passes uses it, too: the rows of a
        # pass, which share a setting, are then the same for any number of processes.
        sampler = super()._get_train_sampler(train_dataset)
        args = self.args
        is_one_pass = args.world_size * args.gradient_accumulation_steps == 1
        if not isinstance(sampler, RandomSampler) or (is_one_pass and not self.one_source_per_batch):
            return sampler
        seed = args.seed if args.data_seed is None else args.data_seed
        batch_size, passes = args.train_batch_size, args.gradient_accumulation_steps
        rows: Any = sampler.data_source
        if self.one_source_per_batch:
            order = OneSourceSampler(rows.files, batch_size * args.world_size, seed)
            return BalancedSampler(rows, order, batch_size, args.world_size)
        order = SeedableRandomSampler(rows, data_seed=seed)
        return BalancedSampler(rows, order, batch_size, args.world_size, passes)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return transformers' loader, with a separate random generator for the seeds of its workers."""
        return seed_workers_apart(super().get_train_dataloader())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers, then average `average_last` states, and evaluate the mean if there is `eval_data`."""
        output = super().train(*args, **kwargs)
        count = self.args.average_last
        if count > 1:
            saved = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, SavedSteps))
            checkpoints = saved.checkpoints(self.args, self.state.global_step)
            trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            average_weights(trained, checkpoints, self._load_from_checkpoint)
            names = ", ".join(path.name for path in reversed(checkpoints))
            logger.info("The weights are the mean of %s and of step %d.", names, self.state.global_step)
            if self.eval_dataset is not None:
                self.evaluate(metric_key_prefix="average")
        return output

    def describe_speed(self) -> str:
        """Return a sentence on the speed of the run since it was started or resumed, of all processes together.

        Every process must call this. The peak is that of a matrix product on each process's device, measured now.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
        seconds = time.monotonic() - self._cost.started
        measured = [*self._cost.counts(self.args.device).tolist(), product_peak(self.args.device, dtype)]
        spent = torch.tensor(measured, dtype=torch.float64, device=self.args.device)
        _, tokens, operations, peak = self.accelerator.reduce(spent, reduction="sum").tolist()
        name = str(dtype).removeprefix("torch.")
        return (
            f"{tokens / seconds:,.0f} tokens/s in {seconds:.0f} s, {operations / seconds:.3g} operations/s: "
            f"{100 * operations / seconds / peak:.0f} % of the peak of a matrix product in {name}. "
            f"Queries that pairs share save {100 * self._cost.shared_share:.0f} % of the tokens."
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would train one more step if a checkpoint of the last step, within an epoch, is resumed.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a forward and backward pass. Under autocast, peft does not cast the adapters' inputs.

        peft casts an input to the adapter's float32 and autocast casts it back. The second copy would be kept for the
        gradient.
        """
        is_mixed = self.accelerator.mixed_precision in ("bf16", "fp16")
        with disable_input_dtype_casting(self.model, active=is_mixed):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the loss of a pass at a newly drawn setting."""
        setting = sample_setting(
            self.model.config,
            self.compress_layers,
            self.compress_ratios,
            self.args.seed,
            self._pass_number(),
            self.store_layers,
        )
        self._cost.add(inputs["pair"].packed, self.model.train_group_size, setting)
        loss, outputs = super().compute_loss(model, {**inputs, "setting": setting}, True, **kwargs)
        self._term_names = [f"loss_{name}" for name in outputs.terms]
        self._term_names += [f"layer_{layer}_spread" for layer in self.model.config.exit_layers]
        terms = torch.cat([torch.stack(list(outputs.terms.values())), outputs.spreads])
        self._term_sums = terms if self._term_sums is None else self._term_sums + terms
        self._summed_passes += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss with its terms, their means over passes since the last log and processes, and the costs."""
        if "loss" in logs and self._term_sums is not None:
            means = self.accelerator.reduce(self._term_sums / self._summed_passes, reduction="mean")
            term_means = dict(zip(self._term_names, means.tolist(), strict=True))
            logs |= term_means
            self._term_sums, self._summed_passes = None, 0
            self._check_collapse(term_means, logs.get("grad_norm"))
        if "loss" in logs or "train_runtime" in logs:
            counts = self.accelerator.reduce(self._cost.counts(self.args.device), reduction="sum")
            logs |= self._cost.totals(self._history, counts)
        super().log(logs, start_time)
        history = self.state.log_history
        if len(history) > DETAILED_LOGS:
            place = -DETAILED_LOGS - 1
            names = set(self._term_names)
            history[place] = {name: value for name, value in history[place].items() if name not in names}

    def _check_collapse(self, means: Mapping[str, float], gradient_norm: float | None) -> None:
        if self._guard is None:
            warmup = self.args.get_warmup_steps(self.state.max_steps)
            self._guard = CollapseGuard(self.model.train_group_size, warmup, self.args.stop_on_collapse)
        # Only these terms compare the softmax over the group: for equal scores they are ln(group).
        softmax_term = "contrastive" if not self.model.method.original else "original"
        losses = self.model.loss_terms
        if self.model.method.original:
            has_softmax = losses.distill_loss == "ce" and losses.distill_temperature == 1
        else:
            has_softmax = losses.label_loss == "contrastive"
        exits = {}
        for layer in self.model.config.exit_layers:
            terms = [value for name, value in means.items() if name.startswith(f"loss_layer_{layer}_")]
            chance = means[f"loss_layer_{layer}_{softmax_term}"] if has_softmax else None
            exits[layer] = ExitState(sum(terms), means[f"layer_{layer}_spread"], chance)
        self._guard.check(self.state.global_step, exits, gradient_norm)

    @cached_property
    def _history(self) -> list[dict[str, Any]]:
        """The log before the run was started or resumed."""
        return list(self.state.log_history)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return a loader of whole lists. No list is dropped, whatever `dataloader_drop_last` says for training."""
        training = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            return seed_workers_apart(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator, self.args.dataloader_drop_last = training

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Rank the lists of `eval_dataset`, if there are any, and the collections of `beir`."""
        output = EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics={}, num_samples=0)
        if len(self.eval_dataset):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.beir is not None and output.metrics is not None:
            measured = [self._rank_collections(self.beir)] if self.is_world_process_zero() else [{}]
            measured = broadcast_object_list(measured)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured[0].items()})
        return output

    def _rank_collections(self, beir: BeirEvaluation) -> dict[str, float]:
        model: Any = self.model.model.get_base_model() if isinstance(self.model.model, PeftModel) else self.model.model
        template = Template.load(self.model.config.template)
        reranker = TrainedReranker(model, self.processing_class, template, *self.lengths)
        self.model.eval()  # as transformers' evaluation; `training_step` changes it back
        with self.compute_loss_context_manager():
            return beir.measure(reranker)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return scores (queries, longest list, exits) and labels (queries, longest list).

        Both are PADDING after the end of a list. Passages are the second dimension, because `Trainer` pads that
        dimension if the longest lists of batches differ.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(**inputs).scores
        lists = scores.new_full((len(scores), *labels.shape), PADDING)
        lists[:, labels != PADDING] = scores
        return None, lists.permute(1, 2, 0).contiguous(), labels

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # `_save` writes the weights of the wrapped model, under the names that it has there.
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.model if model is None else model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            # As above: the inherited method expects the weights of the wrapping module.
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        # trainer_state.json is written next: a checkpoint with it has the files of all processes.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers. With FSDP, checkpoints may be sharded, but the final model is whole."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Every process calls this, but only the first one has the gathered weights.
        if not self.args.should_save:
            return
        directory = output_dir or self.args.output_dir
        remove_written(directory)
        self.model.save(directory, state_dict)
        self._save_processing_class(directory)


class TrainingCost:
    """Cost of the passes of one process since the run was started or resumed.

    Transformers' own counts, `total_flos` and `num_input_tokens_seen`, have neither lists nor seconds, and depend on
    neither the setting nor the teaching passes.

    Args:
        config: configuration of the model.
        trains_all_weights: True if all weights are trained: their gradients cost as much as a forward pass.
        full_width_teacher: True if each pass with compression also runs without compression, without gradients.
        original_teacher: True if each pass also runs the model before training, without gradients.
    """

    def __init__(
        self, config: CostWiseConfig, trains_all_weights: bool, full_width_teacher: bool, original_teacher: bool = False
    ) -> None:
        self.config = config
        self.passes = 3 if trains_all_weights else 2
        self.full_width_teacher = full_width_teacher
        self.original_teacher = original_teacher
        self.started = time.monotonic()
        self.lists = self.tokens = self.operations = self.packed_tokens = 0

    def add(self, packed: PackedBatch, group: int, setting: Setting) -> None:
        """Count a forward and backward pass over groups of `group` pairs. Adapters are small and left out."""
        prompt = packed.prompt_lengths[packed.sequences]
        passage = packed.passage_lengths[packed.sequences]
        query = packed.sequence_lengths - passage - prompt
        parts = (query, passage, prompt)
        shares_prefix = torch.arange(len(query)) % group > 0
        deepest = (setting.depth,)
        self.lists += len(query) // group
        self.tokens += int(packed.sequence_lengths.sum())
        self.packed_tokens += int(packed.cu_seqlens[-1])
        self.operations += self.passes * estimate_flops(self.config, setting, *parts, shares_prefix, read_alone=deepest)
        if below := tuple(layer for layer in self.config.exit_layers if layer <= setting.store_layer):
            without = Setting(below)
            self.operations += self.passes * estimate_flops(
                self.config, without, *parts, shares_prefix, read_alone=(without.depth,)
            )
        if self.original_teacher:
            self.operations += estimate_flops(self.config, Setting.resolve(self.config), *parts, shares_prefix)
        first = next((layer for layer in setting.compress_layers if setting.compresses_after(layer)), None)
        if self.full_width_teacher and first is not None:
            full = Setting(setting.cutoff_layers)
            self.operations += estimate_flops(
                self.config, full, *parts, shares_prefix, layers_run=first, read_alone=deepest
            )

    def totals(self, history: Sequence[Mapping[str, Any]], counts: Tensor) -> dict[str, float]:
        """Return lists, tokens, floating-point operations and seconds since the first step of the run.

        Args:
            history: the log before the run was resumed.
            counts: (3,) values of `counts`, summed over all processes.
        """
        logged = (logs for logs in reversed(history) if all(name in logs for name in COSTS))
        before: Mapping[str, Any] = next(logged, {})
        spent = [*counts.tolist(), time.monotonic() - self.started]
        return {name: float(before.get(name, 0)) + value for name, value in zip(COSTS, spent, strict=True)}

    @property
    def shared_share(self) -> float:
        """The fraction of the tokens that are not computed, because pairs share a query."""
        return 1 - self.packed_tokens / max(1, self.tokens)

    def counts(self, device: torch.device) -> Tensor:
        """Return lists, tokens and operations of this process since the run was started or resumed, (3,) float64."""
        return torch.tensor([self.lists, self.tokens, self.operations], dtype=torch.float64, device=device)


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of three."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(matrix, matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def ranking_metrics(prediction: EvalPrediction, exits: Sequence[int]) -> dict[str, float]:
    """Return MRR@10 and nDCG@10 of each exit, `layer_{exit}_MRR@10`, and their means over the exits, `MRR@10`.

    Among equal scores, irrelevant passages rank first.

    Args:
        prediction: scores (queries, longest list, exits) and labels (queries, longest list), 1 on relevant passages.

    Raises:
        ValueError: if a score is NaN; names its exit, query and passage.
    """
    scores, labels = np.asarray(prediction.predictions, dtype=float), np.asarray(prediction.label_ids)
    is_padding = labels == PADDING
    unordered = np.argwhere(np.isnan(scores) & ~is_padding[..., None])
    if len(unordered):
        query, place, number = unordered[0].tolist()
        raise ValueError(
            f"passage {place} of query {query} of the evaluation data (both counted from 0) has the score NaN at layer "
            f"{exits[number]}, and {len(unordered) - 1} more scores are NaN: the model has diverged. Lower the "
            "learning rate, or resume from an earlier checkpoint."
        )
    metrics: dict[str, float] = {}
    for number, layer in enumerate(exits):
        ranked = rank_grades(scores[..., number], labels, is_padding)
        metrics[f"layer_{layer}_MRR@10"] = float(reciprocal_rank(ranked, 10).mean())
        metrics[f"layer_{layer}_nDCG@10"] = float(ndcg(ranked, 10).mean())
    for name in ("MRR@10", "nDCG@10"):
        metrics[name] = sum(metrics[f"layer_{layer}_{name}"] for layer in exits) / len(exits)
    return metrics


def seed_workers_apart(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Give the loader a random generator for the seeds of its worker processes.

    Otherwise PyTorch's global generator draws these seeds whenever workers start. A resumed run starts persistent
    workers once more than an uninterrupted run, so its dropout would differ.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()
    return loader
