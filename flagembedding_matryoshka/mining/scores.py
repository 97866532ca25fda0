"""Teacher scores of training rows, for `--knowledge_distillation`.

flagembedding-matryoshka teach --input train.jsonl --output scored.jsonl --model NAME

Scores are appended to OUTPUT.partial. If the command is stopped, the same command continues there.

`flagembedding-matryoshka score` is another command: it scores pairs with a re-ranker.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from flagembedding_matryoshka.mining.digests import digest_files, digest_model
from flagembedding_matryoshka.mining.endpoint import Answer, Endpoint
from flagembedding_matryoshka.mining.pickles import ALLOW_PICKLE
from flagembedding_matryoshka.mining.resuming import add_shard, partial_path
from flagembedding_matryoshka.mining.rows import (
    clean_row,
    describe_counts,
    keep_passages,
    row_fault,
    split_by_label,
    write_rows,
)
from flagembedding_matryoshka.mining.teachers import (
    Scorer,
    bi_encoder_teacher,
    bm25_teacher,
    cross_encoder_teacher,
    flag_embedding_teacher,
    matryoshka_teacher,
)
from flagembedding_matryoshka.parser import Parser
from flagembedding_matryoshka.text.lines import good_rows
from flagembedding_matryoshka.text.output import FileOutput

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
"""Number of rows that are scored and stored at a time."""
ROWS_AT_ONCE_REQUESTED = 16
"""The same for a teacher behind an endpoint, whose scores take longer and may cost money."""
Row = dict[str, Any]
Scores = dict[str, list[float]]
"""`pos_scores` and `neg_scores` of a row."""
TEACHERS: dict[str, Callable[..., Scorer]] = {
    "flagembedding": flag_embedding_teacher,
    "cross_encoder": cross_encoder_teacher,
    "bi_encoder": bi_encoder_teacher,
    "bm25": bm25_teacher,
    "matryoshka": matryoshka_teacher,
    "openai": Endpoint,
}
ALIASES = {"sentence_transformers": "cross_encoder"}
"""Other accepted names of backends."""
MODEL_DEFAULTS = {
    "model": None,
    "batch_size": 64,
    "max_length": 512,
    "device": None,
    "use_fp16": False,
    "trust_remote_code": False,
    "allow_pickle": False,
}
RERANKER_DEFAULTS = {
    **MODEL_DEFAULTS,
    "max_length": None,
    "query_max_length": None,
    "scale": 1.0,
    "use_bf16": False,
    "cutoff_layers": None,
    "compress_layers": None,
    "compress_ratio": 1,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "flagembedding": {**MODEL_DEFAULTS, "model_class": None},
    "cross_encoder": RERANKER_DEFAULTS,
    "matryoshka": RERANKER_DEFAULTS,
    "bi_encoder": {**MODEL_DEFAULTS, "max_length": None, "scale": 20.0, "use_bf16": False},
    "bm25": {"scale": 1.0},
    "openai": {"model": None, "url": None, "answer": "yes_no", "concurrency": 8, "retries": 5, "scale": 1.0},
}
"""Options of each backend, with their defaults."""
UNCONDITIONAL = ("batch_size", "device", "allow_pickle", "url", "concurrency", "retries")
"""Options that may change between an interrupted run and its continuation."""


def score_rows(path: Path, scorer: Scorer, places: range, at_once: int, add: bool = False) -> Iterator[list[Scores]]:
    """Score rows of a training file.

    Args:
        path: the training file.
        scorer: the teacher.
        places: indices of the rows, among those that `usable_rows` yields.
        at_once: number of rows that are scored at a time.
        add: add the scores to the scores in the rows.

    Raises:
        ValueError: if the teacher does not return one finite number for each pair.
    """
    unscored = islice(usable_rows(path, add), places.start, places.stop)
    while rows := list(islice(unscored, at_once)):
        pairs = [(row["query"], passage) for row in rows for passage in (*row["pos"], *row["neg"])]
        scores = np.asarray(scorer(pairs), dtype=np.float64)
        if scores.shape != (len(pairs),):
            raise ValueError(f"the teacher returned scores of shape {scores.shape} for {len(pairs)} pairs")
        for pair, score in zip(pairs, scores, strict=True):
            if not np.isfinite(score):
                raise ValueError(f"the teacher returned the score {score} for {pair!r:.200}")
        if add:
            scores += [score for row in rows for score in (*row["pos_scores"], *(row.get("neg_scores") or ()))]
        rest = iter(scores.tolist())
        yield [
            {"pos_scores": list(islice(rest, len(row["pos"]))), "neg_scores": list(islice(rest, len(row["neg"])))}
            for row in rows
        ]


def join_scores(path: Path, places: range, lines: Iterable[str]) -> Iterator[Row]:
    """Yield rows of a training file with `pos_scores` and `neg_scores`; other fields stay as they are.

    Args:
        path: the training file.
        places: indices of the rows, among those that `usable_rows` yields.
        lines: the scores of each row in JSON.
    """
    for row, line in zip(islice(usable_rows(path), places.start, places.stop), lines, strict=True):
        yield row | json.loads(line)


def usable_rows(path: Path, add: bool = False, left_out: Counter[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a training file as `clean_row` returns them, without those that it leaves out.

    Args:
        path: the training file.
        add: whether the rows must have scores.
        left_out: counts of what is left out, which are added to.

    Raises:
        ValueError: naming file and line of the first bad row.
    """
    for row in good_rows(path, partial(row_fault, kind="scores" if add else "labels", min_negatives=0)):
        cleaned, counts = clean_row(split_by_label(row))
        if left_out is not None:
            left_out.update(counts)
        if cleaned is not None:
            yield cleaned


def drop_false_negatives(rows: Iterable[Row], margin: float) -> Iterator[Row]:
    """Yield the rows without the negatives that score above the row's best positive - `margin`.

    A row that loses all its negatives is left out. The numbers of dropped negatives and rows are logged.

    Raises:
        ValueError: if every row loses all its negatives.
    """
    total = left_out = negatives = dropped = 0
    for row in rows:
        limit = max(row["pos_scores"]) - margin
        kept = [index for index, score in enumerate(row["neg_scores"]) if score <= limit]
        total, negatives, dropped = total + 1, negatives + len(row["neg"]), dropped + len(row["neg"]) - len(kept)
        if row["neg"] and not kept:
            left_out += 1
            continue
        yield keep_passages(row, "neg", kept)
    if left_out == total:
        raise ValueError(f"all {total} rows lose all their negatives with --drop_margin {margin:g}")
    logger.info("%d of %d negatives are dropped, and %d of %d rows left out", dropped, negatives, left_out, total)


def raise_positives(rows: Iterable[Row], margin: float) -> Iterator[Row]:
    """Yield the rows with each positive's score raised to at least the best negative's score + `margin`."""
    for row in rows:
        least = max(row["neg_scores"], default=-math.inf) + margin
        yield {**row, "pos_scores": [max(score, least) for score in row["pos_scores"]]}


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="a training file")
    parser.add_argument("--output", type=Path, required=True, help="the training file to write, with scores")
    parser.add_argument(
        "--backend",
        choices=[*TEACHERS, *ALIASES],
        default="flagembedding",
        help="kind of teacher (default: %(default)s); cross_encoder is a CrossEncoder of sentence-transformers (alias: "
        "sentence_transformers), matryoshka a re-ranker of this package such as smollm2 or the output of fine-tuning, "
        "openai a chat model behind an OpenAI-compatible endpoint",
    )
    add_shard(parser, "rows")
    parser.add_argument("--add", action="store_true", help="add the scores to the scores in the rows")
    parser.add_argument(
        "--drop_margin",
        type=_finite,
        metavar="D",
        help="drop negatives that score above the row's best positive - D, and rows that lose all their negatives",
    )
    parser.add_argument(
        "--raise_positive",
        type=_finite,
        metavar="M",
        help="after --drop_margin, raise the score of every positive to at least the row's best negative + M",
    )
    teacher = parser.add_argument_group("teacher", argument_default=argparse.SUPPRESS)
    teacher.add_argument("--model", help="name or path; all backends except bm25 need it")
    teacher.add_argument(
        "--model_class",
        help="FlagEmbedding's model class, such as encoder-only-base, if FlagEmbedding does not know the model's name",
    )
    teacher.add_argument(
        "--scale",
        type=_finite,
        help="factor of the scores (default: 20 for bi_encoder, whose scores are cosines, otherwise 1)",
    )
    teacher.add_argument("--batch_size", type=_positive, help="pairs per batch, or texts with bi_encoder (default: 64)")
    teacher.add_argument(
        "--max_length",
        type=_positive,
        help="tokens of a pair (default: 512, or a layer-wise model's own limit); with bi_encoder, tokens of a text "
        "(default: the model's own limit)",
    )
    teacher.add_argument("--device", help="such as cpu or cuda:0 (default: the backend's choice)")
    teacher.add_argument("--use_fp16", action="store_true", help="score in float16, for GPUs")
    teacher.add_argument("--use_bf16", action="store_true", help="score in bfloat16; for bi_encoder and cross_encoder")
    teacher.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    teacher.add_argument("--allow_pickle", action="store_true", help=ALLOW_PICKLE)
    student = parser.add_argument_group("matryoshka", argument_default=argparse.SUPPRESS)
    student.add_argument("--cutoff_layers", type=int, help="the exit (default: the deepest)")
    student.add_argument("--compress_layers", type=int, nargs="+", help="layers after which the passage is compressed")
    student.add_argument(
        "--compress_ratio", type=int, help="number of tokens that become one: 1, 2, 4 or 8 (default: 1)"
    )
    student.add_argument("--query_max_length", type=_positive, help="tokens of a query (default: the model's own)")
    endpoint = parser.add_argument_group(
        "openai",
        "The key is the environment's OPENAI_API_KEY.",
        argument_default=argparse.SUPPRESS,
    )
    endpoint.add_argument("--url", help="such as http://127.0.0.1:8000/v1 (default: OPENAI_BASE_URL, or OpenAI)")
    endpoint.add_argument(
        "--answer",
        choices=get_args(Answer),
        help="yes_no scores a pair by the log-probabilities of Yes and No, order a list by its ranks (default: yes_no)",
    )
    endpoint.add_argument("--concurrency", type=_positive, help="requests at a time (default: 8)")
    endpoint.add_argument("--retries", type=_positive, help="repetitions of a request that fails (default: 5)")
    return parser


def _teacher_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the teacher with their defaults. End the process if the backend does not take one."""
    settings = dict(DEFAULTS[options.backend])
    known = set().union(*DEFAULTS.values())
    given = {name: value for name, value in vars(options).items() if name in known}
    for name in given:
        if name not in settings:
            parser.error(f"--backend {options.backend} does not take --{name}; its options: {', '.join(settings)}")
    settings |= given
    if settings.get("use_fp16") and settings.get("use_bf16"):
        parser.error("--use_fp16 and --use_bf16 exclude each other: give one of them")
    if settings.get("model", "") is None:
        parser.error(f"--backend {options.backend} needs --model")
    return settings


def _conditions_of(options: argparse.Namespace, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return all conditions of the scores, without the options that change only rounding or the way to an endpoint."""
    given = {name: value for name, value in teacher.items() if name not in UNCONDITIONAL}
    return {
        "input": _digest_input(options),
        "backend": options.backend,
        "add": options.add,
        "shard": str(options.shard),
        "weights": digest_model(teacher["model"]) if "model" in teacher and options.backend != "openai" else None,
        **given,
    }


def _digest_input(options: argparse.Namespace) -> str:
    return digest_files([options.input], options.input.parent)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: None is the process's own.
    """
    parser = _build_parser()
    options = parser.parse_args(arguments)
    options.backend = ALIASES.get(options.backend, options.backend)
    if options.output.resolve() == options.input.resolve():
        parser.error(f"--output {options.output} is the input: name another file")
    if options.output.is_dir():
        parser.error(f"--output {options.output} is a directory: name a file")
    teacher = _teacher_options(parser, options)
    left_out = Counter[str]()
    places = options.shard.places(sum(1 for _ in usable_rows(options.input, options.add, left_out)))
    if not places:
        reasons = f". Left out are {describe_counts(left_out)}" if left_out else ""
        parser.error(f"--shard {options.shard} of --input {options.input} has no row{reasons}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if left_out:
        logger.warning("%s: left out are %s", options.input, describe_counts(left_out))
    conditions = _conditions_of(options, teacher)
    scored = FileOutput(partial_path(options.output), conditions)
    try:
        _score_rest(scored, options, teacher, places)
        if _digest_input(options) != conditions["input"]:
            raise ValueError(
                f"{options.input} has changed while its rows were scored, so {scored.path} has scores of other "
                f"rows. Restore {options.input} and call the command again, or remove {scored.path}."
            )
        rows: Iterable[Row] = join_scores(options.input, places, scored.lines())
        if options.drop_margin is not None:
            rows = drop_false_negatives(rows, options.drop_margin)
        if options.raise_positive is not None:
            rows = raise_positives(rows, options.raise_positive)
        count = write_rows(options.output, rows)
    except BaseException:
        if not scored.end:  # no row has scores
            scored.remove()
        raise
    scored.remove()
    print(f"Wrote {count} rows to {options.output}.")


def _score_rest(scored: FileOutput, options: argparse.Namespace, teacher: dict[str, Any], places: range) -> None:
    """Append the scores that an earlier run has not written.

    Rows are scored in the same batches as without an interruption, so an incomplete batch is scored again.
    """
    done = sum(1 for _ in scored.lines())
    if done == len(places):
        return
    at_once = ROWS_AT_ONCE_REQUESTED if options.backend == "openai" else ROWS_AT_ONCE
    done -= done % at_once
    scored.keep(done)
    if done:
        logger.info("%s has the scores of %d of %d rows", scored.path, done, len(places))
    if options.backend == "bm25":
        texts = dict.fromkeys(text for row in usable_rows(options.input) for text in (*row["pos"], *row["neg"]))
        teacher = {**teacher, "texts": list(texts)}
    scorer = TEACHERS[options.backend](**teacher)
    with tqdm(initial=done, total=len(places), desc="scoring", unit="row", disable=None) as progress:
        for found in score_rows(options.input, scorer, places[done:], at_once, options.add):
            scored.append(map(json.dumps, found))
            progress.update(len(found))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


if __name__ == "__main__":
    main()
