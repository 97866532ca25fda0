"""The training loop's own parts: which sub-network a step runs, and what is saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerTrainer
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers.trainer_utils import TrainOutput

from flagembedding_matryoshka.checkpoints.export import remove_written
from flagembedding_matryoshka.finetune.averaging import SavedSteps, average_weights
from flagembedding_matryoshka.finetune.balancing import BalancedSampler
from flagembedding_matryoshka.finetune.collapse import CollapseGuard, ExitState
from flagembedding_matryoshka.finetune.collators import MatryoshkaEvalCollator
from flagembedding_matryoshka.finetune.effort import Effort
from flagembedding_matryoshka.finetune.evaluation import PADDING
from flagembedding_matryoshka.finetune.resuming import DataOrder, seed_workers_apart
from flagembedding_matryoshka.finetune.sampling import sample_setting
from flagembedding_matryoshka.finetune.sharding import keep_loss_in_float32

logger = logging.getLogger(__name__)


class MatryoshkaTrainer(AbsRerankerTrainer):
    """FlagEmbedding's trainer, drawing a sub-network for every pass.

    Args:
        compress_layers, compress_ratios: what sub-networks are drawn from.
        eval_collator: joins the lists that are ranked when it evaluates.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        compress_layers: Sequence[int] = (),
        compress_ratios: Sequence[int] = (1,),
        eval_collator: MatryoshkaEvalCollator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.is_fsdp2:
            keep_loss_in_float32(self.accelerator.state.fsdp_plugin)
        self.add_callback(DataOrder())
        self.add_callback(SavedSteps())
        if self.args.average_last > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"average_last={self.args.average_last} does not work with FSDP and DeepSpeed, whose checkpoints are "
                "shards: leave it out."
            )
        self.eval_collator = eval_collator
        self.compress_layers = compress_layers
        self.compress_ratios = compress_ratios
        self._passes = (-1, 0)
        self._noted: list[dict[str, Tensor]] = []
        self._guard: CollapseGuard | None = None
        trains_all_weights = not isinstance(self.model.model, PeftModel)
        method = self.model.method
        self._effort = Effort(self.model.config, trains_all_weights, method.deeper_exit != "none", method.original)

    def _pass_number(self) -> int:
        """Passes before this one, counted from the optimizer step, so that a resumed run counts on."""
        step, done = self._passes
        done = done + 1 if step == self.state.global_step else 0
        self._passes = (self.state.global_step, done)
        return self.state.global_step * self.args.gradient_accumulation_steps + done

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        # Where transformers would draw a random order. One process that accumulates passes takes it, too: which rows
        # meet in a pass, and so under a sub-network, is then the same in any number of processes.
        sampler = super()._get_train_sampler(train_dataset)
        args = self.args
        if args.world_size * args.gradient_accumulation_steps == 1 or not isinstance(sampler, RandomSampler):
            return sampler
        seed = args.seed if args.data_seed is None else args.data_seed
        batch_size, passes = args.train_batch_size, args.gradient_accumulation_steps
        rows: Any = sampler.data_source
        return BalancedSampler(rows, seed, batch_size, args.world_size, passes)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of transformers, with a random generator of its own for the seeds of workers."""
        return seed_workers_apart(super().get_train_dataloader())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers, then average `average_last` states, and evaluate the mean if there is `eval_data`."""
        output = super().train(*args, **kwargs)
        count = self.args.average_last
        if count > 1:
            saved = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, SavedSteps))
            checkpoints = saved.checkpoints(self.args, self.state.global_step)
            learnt = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            average_weights(learnt, checkpoints, self._load_from_checkpoint)
            names = ", ".join(path.name for path in reversed(checkpoints))
            logger.info("The weights are the mean of %s and of step %d.", names, self.state.global_step)
            if self.eval_dataset is not None:
                self.evaluate(metric_key_prefix="average")
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would take one more step if a checkpoint of the last step, within an epoch, is resumed.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass, under autocast without peft's own cast of each adapter's input.

        That one goes to the adapter's float32, from where autocast comes back: a second copy, kept for the gradient.
        """
        is_mixed = self.accelerator.mixed_precision in ("bf16", "fp16")
        with disable_input_dtype_casting(self.model, active=is_mixed):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one pass under a freshly drawn sub-network."""
        setting = sample_setting(
            self.model.config,
            self.compress_layers,
            self.compress_ratios,
            self.args.seed,
            self._pass_number(),
        )
        self._effort.add(inputs["pair"].packed, self.model.train_group_size, setting)
        loss, outputs = super().compute_loss(model, {**inputs, "setting": setting}, True, **kwargs)
        spreads = zip(self.model.config.exit_layers, outputs.spreads, strict=True)
        self._noted.append(
            {f"loss_{name}": term for name, term in outputs.terms.items()}
            | {f"layer_{layer}_spread": spread for layer, spread in spreads}
        )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, beside the loss, what it is the sum of: means over the passes since the last time, of all processes."""
        if "loss" in logs and self._noted:
            names = list(self._noted[0])
            means = torch.stack([torch.stack([noted[name] for noted in self._noted]).mean() for name in names])
            means = self.accelerator.reduce(means, reduction="mean")
            found = dict(zip(names, means.tolist(), strict=True))
            logs |= found
            self._noted.clear()
            self._look_for_collapse(found, logs.get("grad_norm"))
        if "loss" in logs or "train_runtime" in logs:
            counts = self.accelerator.reduce(self._effort.counts(self.args.device), reduction="sum")
            logs |= self._effort.totals(self._history, counts)
        super().log(logs, start_time)

    def _look_for_collapse(self, found: Mapping[str, float], gradient_norm: float | None) -> None:
        if self._guard is None:
            warmup = self.args.get_warmup_steps(self.state.max_steps)
            self._guard = CollapseGuard(self.model.train_group_size, warmup, self.args.stop_on_collapse)
        # Shares in the group are compared by these alone, and scores that say nothing give ln(group).
        compares_shares = "contrastive" if not self.model.method.original else "original"
        is_share = not self.model.method.original or self.model.distill_loss == "ce"
        exits = {}
        for layer in self.model.config.exit_layers:
            terms = [value for name, value in found.items() if name.startswith(f"loss_layer_{layer}_")]
            chance = found[f"loss_layer_{layer}_{compares_shares}"] if is_share else None
            exits[layer] = ExitState(sum(terms), found[f"layer_{layer}_spread"], chance)
        self._guard.check(self.state.global_step, exits, gradient_norm)

    @cached_property
    def _history(self) -> list[dict[str, Any]]:
        """What had been logged when this part of the run began."""
        return list(self.state.log_history)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Whole lists instead of training's groups, and all of them, whatever training drops."""
        training = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            return seed_workers_apart(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator, self.args.dataloader_drop_last = training

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Scores (queries, longest list, exits) and labels (queries, longest list), both PADDING behind a list.

        The list stands second, where `Trainer` pads batches whose longest lists differ.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(**inputs).scores
        lists = scores.new_full((len(scores), *labels.shape), PADDING)
        lists[:, labels != PADDING] = scores
        return None, lists.permute(1, 2, 0).contiguous(), labels

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # `_save` writes the wrapped model's weights, under its own names.
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.model if model is None else model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            # As above: the inherited method looks for the weights of the module around the model.
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        # trainer_state.json comes next: no checkpoint that has it lacks a file of another process.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; what a run leaves behind is whole, where its checkpoints may be shards."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Every process comes here, and the weights of shards have been gathered in the first alone.
        if not self.args.should_save:
            return
        directory = output_dir or self.args.output_dir
        remove_written(directory)
        self.model.save(directory, state_dict)
        self._save_processing_class(directory)
