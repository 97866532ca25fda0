"""A FlagEmbedding re-ranker whose model lies on one device or several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from FlagEmbedding.abc.inference import AbsReranker
from typing_extensions import Self

from flagembedding_matryoshka.inference.engine import Engine, Task
from flagembedding_matryoshka.inference.pool.pool import WorkerPool
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM


class HostedReranker(AbsReranker):
    """Owns the model's engine, or its worker processes; a context manager that ends them.

    Attributes:
        target_devices: what it computes on.
    """

    target_devices: list[str]

    def _host(self, model: CostWiseForCausalLM, compile: bool) -> None:
        self.model = model
        self._engine: Engine | WorkerPool
        if len(self.target_devices) == 1:
            model.to(self.target_devices[0])  # type: ignore[arg-type]
            self._engine = Engine(model, compile)
        else:
            self._engine = WorkerPool(model, self.target_devices, compile)

    def _run(self, tasks: Iterator[Task], device: str | None = None) -> Generator[tuple[int, Any], None, None]:
        """(number, result) of each task, on `device` or all of them."""
        if isinstance(self._engine, WorkerPool):
            return self._engine.run(tasks, device)
        return self._engine.run(tasks)

    @contextmanager
    def calling_between_batches(self, callback: Callable[[], None]) -> Iterator[None]:
        """Cascades that start inside, and what runs until a deadline, call `callback` before each of their batches;
        what it raises ends them. Meanwhile the model may compute something else."""
        engine: Any = self._engine
        before, engine.between_batches = engine.between_batches, callback
        try:
            yield
        finally:
            engine.between_batches = before

    def compute_score_single_gpu(
        self,
        sentence_pairs: Any,
        *,
        device: str | None = None,
        use_dataloader: bool | None = None,
        num_workers: int | None = None,
        **overrides: Any,
    ) -> Any:
        """FlagEmbedding's name for `compute_score` on one device, by default the first.

        Args:
            use_dataloader, num_workers: of FlagEmbedding's layer-wise class. They ask for what is done in any case:
                pairs are tokenised while others are computed.
        """
        return self.compute_score(sentence_pairs, device=device or self.target_devices[0], **overrides)

    def close(self) -> None:
        """End the worker processes of several devices; the next call starts new ones."""
        close = getattr(self._engine, "close", None)  # at the interpreter's end the class may be gone
        if close is not None:
            close()

    def stop_self_pool(self) -> None:
        """FlagEmbedding's name for `close`."""
        if hasattr(self, "_engine"):  # FlagEmbedding calls it for an object whose construction failed, too
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
