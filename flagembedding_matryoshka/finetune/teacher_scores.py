"""Scores of a teacher for training rows: what `--knowledge_distillation` learns from.

python -m flagembedding_matryoshka.finetune.teacher_scores --input train.jsonl --output scored.jsonl --model NAME
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flagembedding_matryoshka.finetune.data import check_training_file
from flagembedding_matryoshka.finetune.hard_negatives import write_rows

ROWS_AT_ONCE = 256
Scorer = Callable[[list[tuple[str, str]]], Sequence[float] | np.ndarray]


def flag_embedding_scorer(model: str, batch_size: int, max_length: int, device: str | None, **options: Any) -> Scorer:
    """Raw scores of a FlagEmbedding re-ranker, found by its name as `FlagAutoReranker` does.

    Args:
        options: further arguments of `FlagAutoReranker.from_finetuned`, such as `model_class`.

    Raises:
        ValueError: if the name says nothing and `model_class` is missing, or the model has several labels.
    """
    from FlagEmbedding import FlagAutoReranker, FlagReranker

    reranker = FlagAutoReranker.from_finetuned(
        model, devices=device, batch_size=batch_size, max_length=max_length, normalize=False, **options
    )
    if isinstance(reranker, FlagReranker) and reranker.model.config.num_labels != 1:
        # FlagReranker would take the labels of the first pairs for the scores of all.
        raise ValueError(f"{model} has {reranker.model.config.num_labels} labels: a re-ranker has one")
    return reranker.compute_score


def sentence_transformers_scorer(
    model: str,
    batch_size: int,
    max_length: int,
    device: str | None,
    use_fp16: bool = False,
    trust_remote_code: bool = False,
) -> Scorer:
    """Raw scores of a sentence-transformers `CrossEncoder`, no sigmoid applied."""
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(
        model,
        max_length=max_length,
        device=device,
        trust_remote_code=trust_remote_code,
        activation_fn=torch.nn.Identity(),
        model_kwargs={"dtype": torch.float16 if use_fp16 else torch.float32},
    )
    return lambda pairs: encoder.predict(pairs, batch_size=batch_size, show_progress_bar=False)


def add_scores(path: Path, scorer: Scorer, total: int) -> Iterator[dict[str, Any]]:
    """The rows of a training file with `pos_scores` and `neg_scores`; other fields stay as they are.

    Raises:
        ValueError: if the teacher gives anything but one finite number for each pair.
    """
    with path.open(encoding="utf-8") as file, tqdm(total=total, desc="scoring", unit="row", disable=None) as progress:
        lines = (line for line in file if line.strip())
        while rows := [json.loads(line) for line in islice(lines, ROWS_AT_ONCE)]:
            pairs = [(row["query"], passage) for row in rows for passage in (*row["pos"], *row["neg"])]
            scores = np.asarray(scorer(pairs), dtype=np.float64)
            if scores.shape != (len(pairs),):
                raise ValueError(f"the teacher gave scores of shape {scores.shape} for {len(pairs)} pairs")
            for pair, score in zip(pairs, scores, strict=True):
                if not np.isfinite(score):
                    raise ValueError(f"the teacher gave {score} for {pair!r:.200}")
            rest = iter(scores.tolist())
            for row in rows:
                row["pos_scores"] = list(islice(rest, len(row["pos"])))
                row["neg_scores"] = list(islice(rest, len(row["neg"])))
                yield row
            progress.update(len(rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a training file")
    parser.add_argument("--output", type=Path, required=True, help="the same with scores")
    parser.add_argument("--model", required=True, help="the teacher's name or path")
    parser.add_argument("--backend", choices=["flagembedding", "sentence_transformers"], default="flagembedding")
    parser.add_argument("--model_class", help="FlagEmbedding's, such as encoder-only-base, if the name does not say it")
    parser.add_argument("--batch_size", type=int, default=64, help="pairs at once (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a pair (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:0; default: what the backend chooses")
    parser.add_argument("--use_fp16", action="store_true", help="score in half precision, for GPUs")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the teacher")
    options = parser.parse_args(arguments)
    if options.output.resolve() == options.input.resolve():
        parser.error(f"--output {options.output} is the input")
    if options.model_class is not None and options.backend != "flagembedding":
        parser.error("--model_class is FlagEmbedding's")
    total = check_training_file(str(options.input), needs_scores=False)
    if not total:
        parser.error(f"--input {options.input} has no row")
    settings = (options.model, options.batch_size, options.max_length, options.device)
    switches = {"use_fp16": options.use_fp16, "trust_remote_code": options.trust_remote_code}
    if options.backend == "flagembedding":
        scorer = flag_embedding_scorer(*settings, model_class=options.model_class, **switches)
    else:
        scorer = sentence_transformers_scorer(*settings, **switches)
    count = write_rows(options.output, add_scores(options.input, scorer, total))
    print(f"Wrote {count} rows to {options.output}.")


if __name__ == "__main__":
    main()
