"""Scores of a teacher for training rows: what `--knowledge_distillation` learns from.

python -m flagembedding_matryoshka.finetune.teacher_scores --input train.jsonl --output scored.jsonl --model NAME

`flagembedding-matryoshka score` is another command: it scores pairs with a re-ranker.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flagembedding_matryoshka.finetune.hard_negatives import write_rows
from flagembedding_matryoshka.finetune.rows import row_fault
from flagembedding_matryoshka.finetune.teachers import (
    Scorer,
    bi_encoder_teacher,
    bm25_teacher,
    cross_encoder_teacher,
    flag_embedding_teacher,
)
from flagembedding_matryoshka.text.lines import good_rows

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
Row = dict[str, Any]
TEACHERS: dict[str, Callable[..., Scorer]] = {
    "flagembedding": flag_embedding_teacher,
    "sentence_transformers": cross_encoder_teacher,
    "bi_encoder": bi_encoder_teacher,
    "bm25": bm25_teacher,
}
MODEL_DEFAULTS = {
    "model": None,
    "batch_size": 64,
    "max_length": 512,
    "device": None,
    "use_fp16": False,
    "trust_remote_code": False,
}
# The options that a backend takes, as they are where they are not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "flagembedding": {**MODEL_DEFAULTS, "model_class": None},
    "sentence_transformers": MODEL_DEFAULTS,
    "bi_encoder": {**MODEL_DEFAULTS, "max_length": None, "scale": 20.0, "use_bf16": False},
    "bm25": {"scale": 1.0},
}


def add_scores(path: Path, scorer: Scorer, total: int, add: bool = False) -> Iterator[Row]:
    """The rows of a training file with `pos_scores` and `neg_scores`; other fields stay as they are.

    Args:
        total: how many rows there are.
        add: whether scores are added to those that the rows have; they replace them otherwise.

    Raises:
        ValueError: if the teacher gives anything but one finite number for each pair.
    """
    given = good_rows(path, partial(row_fault, reads="scores" if add else "labels"))
    with tqdm(total=total, desc="scoring", unit="row", disable=None) as progress:
        while rows := list(islice(given, ROWS_AT_ONCE)):
            pairs = [(row["query"], passage) for row in rows for passage in (*row["pos"], *row["neg"])]
            scores = np.asarray(scorer(pairs), dtype=np.float64)
            if scores.shape != (len(pairs),):
                raise ValueError(f"the teacher gave scores of shape {scores.shape} for {len(pairs)} pairs")
            for pair, score in zip(pairs, scores, strict=True):
                if not np.isfinite(score):
                    raise ValueError(f"the teacher gave {score} for {pair!r:.200}")
            if add:
                scores += [score for row in rows for score in (*row["pos_scores"], *row["neg_scores"])]
            rest = iter(scores.tolist())
            for row in rows:
                row["pos_scores"] = list(islice(rest, len(row["pos"])))
                row["neg_scores"] = list(islice(rest, len(row["neg"])))
                yield row
            progress.update(len(rows))


def drop_false_negatives(rows: Iterable[Row], margin: float) -> Iterator[Row]:
    """The rows without the negatives that score above their best positive's score - `margin`.

    A row that loses all of them is left out. How many of each there were is logged.

    Raises:
        ValueError: if all rows lose all of them.
    """
    read = left_out = negatives = dropped = 0
    for row in rows:
        limit = max(row["pos_scores"]) - margin
        kept = [place for place, score in enumerate(row["neg_scores"]) if score <= limit]
        read, negatives, dropped = read + 1, negatives + len(row["neg"]), dropped + len(row["neg"]) - len(kept)
        if not kept:
            left_out += 1
            continue
        yield {**row, **{name: [row[name][place] for place in kept] for name in ("neg", "neg_scores")}}
    if left_out == read:
        raise ValueError(f"all {read} rows lose all their negatives by a margin of {margin:g}")
    logger.info("%d of %d negatives are dropped, and %d of %d rows left out", dropped, negatives, left_out, read)


def raise_positives(rows: Iterable[Row], margin: float) -> Iterator[Row]:
    """The rows with every positive's score at least their best negative's + `margin`."""
    for row in rows:
        least = max(row["neg_scores"]) + margin
        yield {**row, "pos_scores": [max(score, least) for score in row["pos_scores"]]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a training file")
    parser.add_argument("--output", type=Path, required=True, help="the same with scores")
    parser.add_argument(
        "--backend", choices=list(TEACHERS), default="flagembedding", help="kind of teacher (default: %(default)s)"
    )
    parser.add_argument("--add", action="store_true", help="add the scores to those that the rows have")
    parser.add_argument(
        "--drop_margin",
        type=_finite,
        metavar="D",
        help="drop negatives that score above the row's best positive - D, and rows without any other",
    )
    parser.add_argument(
        "--raise_positive",
        type=_finite,
        metavar="M",
        help="raise, after that, every positive to at least the row's best negative + M",
    )
    teacher = parser.add_argument_group("of the teacher", argument_default=argparse.SUPPRESS)
    teacher.add_argument("--model", help="name or path, for every backend but bm25")
    teacher.add_argument("--model_class", help="FlagEmbedding's, such as encoder-only-base, if the name does not tell")
    teacher.add_argument("--scale", type=_finite, help="of bi_encoder's cosines (default: 20), of bm25's scores (1)")
    teacher.add_argument("--batch_size", type=int, help="pairs, or bi_encoder's texts, at once (default: 64)")
    teacher.add_argument(
        "--max_length", type=int, help="tokens of a pair (default: 512), of bi_encoder's text (the model's own limit)"
    )
    teacher.add_argument("--device", help="such as cpu or cuda:0; default: what the backend chooses")
    teacher.add_argument("--use_fp16", action="store_true", help="score in half precision, for GPUs")
    teacher.add_argument("--use_bf16", action="store_true", help="encode in bfloat16: bi_encoder's alone")
    teacher.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the teacher")
    options = parser.parse_args(arguments)
    if options.output.resolve() == options.input.resolve():
        parser.error(f"--output {options.output} is the input")
    settings = dict(DEFAULTS[options.backend])
    known = set().union(*DEFAULTS.values())
    given = {name: value for name, value in vars(options).items() if name in known}
    for name in given:
        if name not in settings:
            parser.error(f"--{name} is nothing that --backend {options.backend} takes")
    settings |= given
    if settings.get("model", "") is None:
        parser.error(f"--backend {options.backend} needs --model")
    read = partial(good_rows, options.input, partial(row_fault, reads="scores" if options.add else "labels"))
    total = sum(1 for _ in read())
    if not total:
        parser.error(f"--input {options.input} has no row")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.backend == "bm25":
        settings["texts"] = list(dict.fromkeys(text for row in read() for text in (*row["pos"], *row["neg"])))
    rows = add_scores(options.input, TEACHERS[options.backend](**settings), total, options.add)
    if options.drop_margin is not None:
        rows = drop_false_negatives(rows, options.drop_margin)
    if options.raise_positive is not None:
        rows = raise_positives(rows, options.raise_positive)
    count = write_rows(options.output, rows)
    print(f"Wrote {count} rows to {options.output}.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


if __name__ == "__main__":
    main()
