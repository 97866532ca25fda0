"""Check training data: faults, duplicates, likely false negatives, lengths, and leakage into evaluation data.

flagembedding-matryoshka finetune check train.jsonl --eval_data dev.jsonl --model_name_or_path smollm2
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoints.loading import load_tokenizer
from flagembedding_matryoshka.finetune.sources import Columns, parse_columns, place_of, read_source, source_files
from flagembedding_matryoshka.mining.rows import row_fault, split_by_label
from flagembedding_matryoshka.parser import Parser, program

SAMPLED_TEXTS = 10_000
"""Number of queries, and of passages, whose lengths are measured: a random sample."""
QUANTILES = (0.5, 0.95, 1.0)


@dataclass
class Sample:
    """A random sample of texts of any number (reservoir sampling, Vitter, TOMS 1985, algorithm R)."""

    texts: list[str] = field(default_factory=list)
    seen: int = 0
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, text: str) -> None:
        """Add a text with the probability that keeps the sample uniform."""
        self.seen += 1
        if len(self.texts) < SAMPLED_TEXTS:
            self.texts.append(text)
        elif (place := self.draw.randrange(self.seen)) < SAMPLED_TEXTS:
            self.texts[place] = text


@dataclass
class DataReport:
    """Numbers of rows with each finding. Texts are compared without regard to case and white space.

    Attributes:
        rows: rows without a fault.
        faults: rows with a fault.
        first_fault: source, place and fault of the first one.
        repeated_queries: rows whose query an earlier row has.
        repeated_rows: rows whose query and passages an earlier row has.
        repeated_passages: rows with a passage twice.
        contradictions: rows with a passage that is positive and negative.
        query_as_passage: rows whose query is one of the passages.
        empty_texts: rows with an empty query or passage.
        negatives, scored_negatives: negatives in all rows, and in rows with teacher scores.
        false_negatives: negatives that the teacher scores above every positive of the row.
        leaked_queries: rows whose query is in the evaluation data.
        leaked_positives: positives that are positives in the evaluation data.
        queries, passages: samples of texts.
    """

    rows: int = 0
    faults: int = 0
    first_fault: str = ""
    repeated_queries: int = 0
    repeated_rows: int = 0
    repeated_passages: int = 0
    contradictions: int = 0
    query_as_passage: int = 0
    empty_texts: int = 0
    negatives: int = 0
    scored_negatives: int = 0
    false_negatives: int = 0
    leaked_queries: int = 0
    leaked_positives: int = 0
    queries: Sample = field(default_factory=Sample)
    passages: Sample = field(default_factory=Sample)


def check_rows(
    sources: Iterable[str], columns: Columns, eval_queries: set[bytes], eval_positives: set[bytes]
) -> DataReport:
    """Check the rows of files and data sets. Memory grows by a few bytes a row.

    Args:
        sources: items of `source_files`.
        columns: columns that are read under another name.
        eval_queries, eval_positives: digests of the evaluation data's texts, see `digest_texts`.
    """
    report = DataReport()
    queries: set[bytes] = set()
    rows: set[bytes] = set()
    for source in sources:
        for place, row, fault in _rows(source, columns):
            if row is None:
                report.faults += 1
                report.first_fault = report.first_fault or f"{source}, {place}: {fault}"
                continue
            _check_row(row, report, queries, rows)
            report.leaked_queries += _digest(row["query"]) in eval_queries
            report.leaked_positives += sum(_digest(text) in eval_positives for text in row.get("pos", ()))
    return report


def digest_texts(sources: Iterable[str], columns: Columns) -> tuple[set[bytes], set[bytes]]:
    """Return digests of all queries and of all positives.

    Raises:
        ValueError: if a row has a fault; names source and place.
    """
    queries: set[bytes] = set()
    positives: set[bytes] = set()
    for source in sources:
        for place, row, fault in _rows(source, columns):
            if row is None:
                raise ValueError(f"{source}, {place}: {fault}")
            queries.add(_digest(row["query"]))
            positives.update(map(_digest, row.get("pos", ())))
    return queries, positives


def _rows(source: str, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
    """Yield place, row and fault of each row; rows with labels have `pos` and `neg`."""

    def check(row: dict[str, Any]) -> str | None:
        is_list = "passages" in row and "labels" not in row
        return row_fault(row, "passages" if is_list else "labels", min_negatives=0)

    for number, row, fault in read_source(source, columns, check):
        yield place_of(source, number), None if row is None else split_by_label(row), fault


def _check_row(row: dict[str, Any], report: DataReport, queries: set[bytes], rows: set[bytes]) -> None:
    query = _digest(row["query"])
    lists = {name: [_digest(text) for text in row.get(name, ())] for name in ("pos", "neg", "passages")}
    passages = [digest for digests in lists.values() for digest in digests]
    whole = blake2b(b"".join([query, *passages]), digest_size=8).digest()
    report.rows += 1
    report.repeated_queries += query in queries
    report.repeated_rows += whole in rows
    queries.add(query)
    rows.add(whole)
    report.contradictions += not set(lists["pos"]).isdisjoint(lists["neg"])
    report.repeated_passages += any(len(set(digests)) < len(digests) for digests in lists.values())
    report.query_as_passage += query in passages
    report.empty_texts += _digest("") in (query, *passages)
    report.negatives += len(lists["neg"])
    if row.get("pos_scores") and row.get("neg_scores"):
        report.scored_negatives += len(row["neg_scores"])
        report.false_negatives += sum(score > max(row["pos_scores"]) for score in row["neg_scores"])
    report.queries.add(row["query"])
    for name in lists:
        for text in row.get(name, ()):
            report.passages.add(text)


def _digest(text: str) -> bytes:
    return blake2b(" ".join(text.split()).casefold().encode(errors="replace"), digest_size=8).digest()


def describe_lengths(texts: Sequence[str], limit: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return quantiles of the lengths in tokens, or without a tokenizer in characters, and what is truncated."""
    if tokenizer is None:
        lengths = [len(text) for text in texts]
    else:
        lengths = list(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"]))
    median, most, longest = (int(value) for value in np.quantile(lengths, QUANTILES))
    words = f"median {median}, 95 % up to {most}, longest {longest}"
    if tokenizer is None:
        return f"{words} characters"
    truncated = sum(length > limit for length in lengths) / len(lengths)
    return f"{words} tokens; {100 * truncated:.1f} % are above {limit} and truncated"


def describe_report(report: DataReport) -> list[tuple[str, str]]:
    """Return a name and a value for each finding, apart from lengths."""

    def of_rows(count: int) -> str:
        return f"{count} of {report.rows} rows"

    false = f"{report.false_negatives} of {report.scored_negatives} negatives with a teacher score"
    return [
        ("rows", f"{report.rows}, and {report.faults} with a fault"),
        *([("first fault", report.first_fault)] if report.faults else []),
        ("same query and passages as an earlier row", of_rows(report.repeated_rows)),
        ("same query as an earlier row", of_rows(report.repeated_queries)),
        ("a passage twice", of_rows(report.repeated_passages)),
        ("a passage both positive and negative", of_rows(report.contradictions)),
        ("the query as a passage", of_rows(report.query_as_passage)),
        ("an empty query or passage", of_rows(report.empty_texts)),
        ("negatives above every positive by the teacher", false),
    ]


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog=f"{program('flagembedding_matryoshka.finetune')} check", description=__doc__)
    parser.add_argument("train_data", nargs="+", help="files, directories or data sets, as in finetune --train_data")
    parser.add_argument("--eval_data", nargs="+", default=[], help="data whose queries must not be in train_data")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=THEIRS", help="as in finetune")
    parser.add_argument("--model_name_or_path", help="model whose tokenizer counts lengths (default: characters)")
    parser.add_argument("--query_max_len", type=int, default=32, help="tokens of a query (default: %(default)s)")
    parser.add_argument("--passage_max_len", type=int, default=192, help="tokens of a passage (default: %(default)s)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Print a report on training data.

    Raises:
        ValueError: if no row is without a fault, or a row of the evaluation data has one.
    """
    options = build_parser().parse_args(arguments)
    columns = parse_columns(options.columns)
    tokenizer = None if options.model_name_or_path is None else load_tokenizer(options.model_name_or_path)
    eval_texts = digest_texts(source_files(options.eval_data), columns)
    report = check_rows(source_files(options.train_data), columns, *eval_texts)
    if not report.rows:
        raise ValueError(f"no row is without a fault. {report.first_fault}")
    findings = describe_report(report)
    if options.eval_data:
        findings += [
            ("a query of the evaluation data", f"{report.leaked_queries} of {report.rows} rows"),
            ("positives that are positives of the evaluation data", str(report.leaked_positives)),
        ]
    findings += [
        ("queries", describe_lengths(report.queries.texts, options.query_max_len, tokenizer)),
        ("passages", describe_lengths(report.passages.texts, options.passage_max_len, tokenizer)),
    ]
    for name, value in findings:
        print(f"{name}: {value}")
