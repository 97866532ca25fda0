"""A sentence-transformers bi-encoder, which finds candidates and teaches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

SCORES_AT_ONCE = 2**26


class BiEncoder:
    """Unit vectors of queries and passages, each with the prompt that the model has for them.

    Args:
        max_length: tokens of a text; the model's own limit if None.
        device: what sentence-transformers chooses if None.
        use_fp16, use_bf16: compute in float16 or bfloat16; vectors are float32 all the same.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 64,
        max_length: int | None = None,
        device: str | None = None,
        use_fp16: bool = False,
        use_bf16: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        from sentence_transformers import SentenceTransformer

        self.name, self.batch_size = model, batch_size
        self.model = SentenceTransformer(
            model,
            device=device,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32},
        )
        if max_length is not None:
            self.model.max_seq_length = max_length

    def queries(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Vectors (texts, width), float32, of length 1, on the model's device.

        Raises:
            ValueError: if the model gives one that is not finite.
        """
        return self._vectors(self.model.encode_query, texts, progress)

    def passages(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """The same for passages."""
        return self._vectors(self.model.encode_document, texts, progress)

    def lists(self, texts: Sequence[str], queries: Sequence[str], k: int) -> Iterator[Sequence[int]]:
        """For each query the places of the k texts with the highest cosine, best first, by exact search.

        Raises:
            ValueError: if the model gives vectors that are not finite.
        """
        progress = sys.stderr.isatty()
        passages, questions = self.passages(texts, progress), self.queries(queries, progress)
        blocks = questions.split(max(1, SCORES_AT_ONCE // len(texts)))
        for block in tqdm(blocks, desc=self.name, unit="block", disable=None):
            yield from (block @ passages.T).topk(min(k, len(texts))).indices.tolist()

    def _vectors(self, encode: Callable[..., Tensor], texts: Sequence[str], progress: bool) -> Tensor:
        vectors = encode(list(texts), batch_size=self.batch_size, show_progress_bar=progress, convert_to_tensor=True)
        vectors = normalize(vectors.float(), dim=-1)
        if not vectors.isfinite().all():
            raise ValueError(f"{self.name} gives vectors that are not finite")
        return vectors
