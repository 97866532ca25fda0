"""The training loop's own parts: which sub-network a step runs, and what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from FlagEmbedding.abc.finetune.reranker import AbsRerankerTrainer
from torch import Tensor, nn

from flagembedding_matryoshka.finetune.sampling import sample_sub_network


class MatryoshkaTrainer(AbsRerankerTrainer):
    """FlagEmbedding's trainer, drawing a sub-network for every pass.

    Args:
        compress_layers, compress_ratios: what sub-networks are drawn from.
    """

    def __init__(
        self, *args: Any, compress_layers: Sequence[int] = (), compress_ratios: Sequence[int] = (1,), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.compress_layers = compress_layers
        self.compress_ratios = compress_ratios
        self._passes = (-1, 0)

    def _pass_number(self) -> int:
        """Passes before this one, counted from the optimizer step, so that a resumed run counts on."""
        step, done = self._passes
        done = done + 1 if step == self.state.global_step else 0
        self._passes = (self.state.global_step, done)
        return self.state.global_step * self.args.gradient_accumulation_steps + done

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one pass under a freshly drawn sub-network."""
        if model.training:
            sub_network = sample_sub_network(
                self.model.config,
                self.compress_layers,
                self.compress_ratios,
                self.args.seed,
                self._pass_number(),
                self.args.process_index,
            )
            inputs = {**inputs, "sub_network": sub_network}
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # `_save` writes the wrapped model's weights, under its own names.
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.model if model is None else model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        directory = output_dir or self.args.output_dir
        self.model.save(directory)
        self._save_processing_class(directory)
