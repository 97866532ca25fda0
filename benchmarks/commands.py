"""Measure the commands that read whole collections by the number of passages: time, and peak memory.

    python -m benchmarks.commands --passages 10000 100000 1000000 --output commands.json

The collection has as many passages, of words with Zipf's frequencies, and 1,000 queries of words of a passage. The
training file has a row for every four passages: a positive and three negatives. Every command is a process of its own.
Memory is that of its own pages, without those of files that are mapped. CPU seconds are those of all its threads, which
a busy machine changes less than the time. The evaluation reads a collection, and finds candidates, as `mine` does. The
last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import environment
from benchmarks.mining import PASSAGE_WORDS, QUERY_WORDS, draw_texts

QUERIES, GROUP = 1000, 4
OWN_PAGES = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
INTERVAL = 0.05
"""Seconds between two readings of a process's memory."""
COMMANDS = {
    "mine": "mine --data {here} --split test --output {here}/mined.jsonl --negatives 15",
    "teach": "teach --input {here}/rows.jsonl --output {here}/taught.jsonl --backend bm25",
    "finetune": "finetune --model_name_or_path smollm2 --train_data {here}/rows.jsonl --output_dir {here}/tuned "
    "--cache_path {here}/cache --train_method normal --train_group_size 4 "
    "--per_device_train_batch_size 1 --query_max_len 8 --passage_max_len 16 --max_steps 4 --report_to none",
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON Lines."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(here: Path, passages: int) -> None:
    """Write a collection in BEIR's layout, and a training file of all its passages."""
    draw = np.random.default_rng(0)
    texts = draw_texts(passages, PASSAGE_WORDS, draw)
    queries = [" ".join(text.split()[:QUERY_WORDS]) for text in texts]
    judged = draw.choice(passages, QUERIES, replace=False).tolist()
    write_jsonl(here / "corpus.jsonl", ({"_id": f"p{place}", "text": text} for place, text in enumerate(texts)))
    write_jsonl(here / "queries.jsonl", ({"_id": f"q{place}", "text": queries[place]} for place in judged))
    (here / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{place}\tp{place}\t1" for place in judged)]
    (here / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    groups = range(0, passages, GROUP)
    rows = ({"query": queries[at], "pos": [texts[at]], "neg": texts[at + 1 : at + GROUP]} for at in groups)
    write_jsonl(here / "rows.jsonl", rows)


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(command: str) -> dict[str, float]:
    """Run a command of the package and return its seconds, its CPU seconds and its peak memory in GB.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    with tempfile.TemporaryFile("w+") as said:
        start, before, peak = time.perf_counter(), cpu_seconds(), 0
        arguments = [sys.executable, "-m", "flagembedding_matryoshka", *command.split()]
        with subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT) as process:
            status = Path(f"/proc/{process.pid}/status")
            while process.poll() is None:
                peak = max(peak, sum(map(int, OWN_PAGES.findall(status.read_text()))))
                time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, arguments, said.read())
    return {"s": round(seconds, 1), "CPU s": round(cpu_seconds() - before, 1), "GB": round(peak / 2**20, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", required=True, help="numbers of passages")
    parser.add_argument("--output", type=Path, help="file of the results")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": environment("cpu"), "queries": QUERIES, "rows": []}
    for passages in options.passages:
        row: dict[str, Any] = {"passages": passages}
        with tempfile.TemporaryDirectory() as directory:
            write_data(Path(directory), passages)
            for name, command in COMMANDS.items():
                row[name] = measure(command.format(here=directory))
                print(json.dumps(row), flush=True)
        report["rows"].append(row)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
