"""A sentence-transformers bi-encoder, which finds candidates and teaches."""

from __future__ import annotations

import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from flagembedding_matryoshka.finetune.digests import digest_model, digest_texts
from flagembedding_matryoshka.text.output import FileOutput

SCORES_AT_ONCE = 2**26
TEXTS_AT_ONCE = 4096
"""Number of texts that are encoded and stored at a time."""


class BiEncoder:
    """Unit vectors of queries and passages, each with the prompt that the model has for them.

    Args:
        max_length: tokens of a text; the model's own limit if None.
        device: what sentence-transformers chooses if None.
        use_fp16, use_bf16: compute in float16 or bfloat16; vectors are float32 all the same.
        stored: file to which `lists` appends vectors, so that a later run continues after them; None stores nothing.
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
        stored: Path | None = None,
    ) -> None:
        from sentence_transformers import SentenceTransformer

        self.name, self.batch_size, self.stored = model, batch_size, stored
        dtype = torch.float16 if use_fp16 else torch.bfloat16 if use_bf16 else torch.float32
        self.model = SentenceTransformer(
            model, device=device, trust_remote_code=trust_remote_code, model_kwargs={"dtype": dtype}
        )
        self.settings = {
            "model": model,
            "max_length": max_length,
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
        }
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
            ValueError: if a vector is not finite, or `stored` has vectors of other texts or of another model.
        """
        progress = sys.stderr.isatty()
        if self.stored is None:
            passages, questions = self.passages(texts, progress), self.queries(queries, progress)
        else:
            passages, questions = self._stored_vectors(self.stored, texts, queries, progress)
        blocks = questions.split(max(1, SCORES_AT_ONCE // len(texts)))
        for block in tqdm(blocks, desc=self.name, unit="block", disable=None):
            yield from (block @ passages.T).topk(min(k, len(texts))).indices.tolist()

    def _stored_vectors(
        self, path: Path, texts: Sequence[str], queries: Sequence[str], progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Return vectors of passages and queries. Vectors that an earlier run has stored are read."""
        settings = {"texts": digest_texts(texts), "queries": digest_texts(queries), "weights": digest_model(self.name)}
        output = FileOutput(path, settings | self.settings)
        done = sum(1 for _ in output.lines())
        done -= done % TEXTS_AT_ONCE if done < len(texts) else (done - len(texts)) % TEXTS_AT_ONCE
        output.keep(done)
        for first, some, encode in ((0, texts, self.passages), (len(texts), queries, self.queries)):
            for start in range(max(0, done - first), len(some), TEXTS_AT_ONCE):
                vectors = encode(some[start : start + TEXTS_AT_ONCE], progress)
                output.append(b64encode(vector.tobytes()).decode() for vector in vectors.cpu().numpy())
        found = np.stack([np.frombuffer(b64decode(line), dtype=np.float32) for line in output.lines()])
        passages, questions = torch.from_numpy(found).to(self.model.device).split([len(texts), len(queries)])
        return passages, questions

    def _vectors(self, encode: Callable[..., Tensor], texts: Sequence[str], progress: bool) -> Tensor:
        vectors = encode(list(texts), batch_size=self.batch_size, show_progress_bar=progress, convert_to_tensor=True)
        vectors = normalize(vectors.float(), dim=-1)
        if not vectors.isfinite().all():
            raise ValueError(f"{self.name} gives vectors that are not finite")
        return vectors
