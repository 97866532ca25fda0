"""A cut model in each runtime: speed, memory, difference and quality.

    python -m benchmarks.runtimes --data ../shared/data/cranfield --output benchmarks/results/runtimes.json \
        --page docs/export.md

BM25's candidates of a sample of queries are scored at each depth, by this package and by the runtimes that an exit is
exported for. Each measurement has a process of its own. --page writes the table between its two comments.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import environment
from flagembedding_matryoshka import SMOLLM2, MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.export.formats import Format
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, sample_queries
from flagembedding_matryoshka.evaluation.runs import QUALITY, mean, per_query
from flagembedding_matryoshka.text.collections import read_collection

Pairs = Sequence[tuple[str, str]]
Scorer = Callable[[Pairs], list[float]]
BATCH = 16
"""Pairs of a padded batch, in runtimes that have no batching of their own."""
INPUTS = ("input_ids", "attention_mask")
BEGIN, END = "<!-- benchmarks.runtimes -->", "<!-- end of benchmarks.runtimes -->"
VERSIONS = ("onnxruntime", "openvino", "nncf")


def with_ours(directory: str, dtype: str) -> Scorer:
    reranker = MatryoshkaReranker(directory, dtype=dtype, devices="cpu")

    def score(pairs: Pairs) -> list[float]:
        found: Any = reranker.compute_score(list(pairs), show_progress_bar=False)
        return list(found)

    return score


def with_transformers(directory: str, dtype: str) -> Scorer:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype).eval()

    @torch.inference_mode()
    def run(batch: dict[str, Any]) -> Any:
        return model(**{name: torch.from_numpy(values) for name, values in batch.items()}).logits.float().numpy()

    return padded(directory, run)


def with_onnxruntime(directory: str, dtype: str) -> Scorer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(Path(directory, "onnx", "model.onnx"), options)
    return padded(directory, lambda batch: session.run(["logits"], batch)[0])


def with_openvino(directory: str, dtype: str) -> Scorer:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.compile_model(str(Path(directory, "openvino", "openvino_model.xml")), "CPU", hints)
    return padded(directory, lambda batch: model(batch)["logits"])


RUNTIMES: dict[str, tuple[Callable[[str, str], Scorer], str, Format, str | None]] = {
    "this package, float32": (with_ours, "float32", "layerwise", None),
    "this package, bfloat16": (with_ours, "bfloat16", "layerwise", None),
    "transformers, float32": (with_transformers, "float32", "transformers", None),
    "onnxruntime, float32": (with_onnxruntime, "float32", "onnx", None),
    "OpenVINO, f32": (with_openvino, "f32", "openvino", "f32"),
    "OpenVINO, bf16": (with_openvino, "bf16", "openvino", "bf16"),
    "OpenVINO, int8": (with_openvino, "int8", "openvino", "int8"),
}
"""Of each: how it is loaded, its dtype, and the format and precision of its files. The first is compared with."""


def padded(directory: str, run: Callable[[dict[str, Any]], Any]) -> Scorer:
    """Score pairs in padded batches, the longest texts first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def score(pairs: Pairs) -> list[float]:
        order = sorted(range(len(pairs)), key=lambda index: -len("".join(pairs[index])))
        scores = [0.0] * len(pairs)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            messages = [
                [{"role": "query", "content": query}, {"role": "document", "content": document}]
                for query, document in (pairs[row] for row in rows)
            ]
            batch: Any = tokenizer.apply_chat_template(messages, padding=True, return_tensors="np", return_dict=True)
            for row, score in zip(rows, run({name: batch[name] for name in INPUTS})[:, 0], strict=True):
                scores[row] = float(score)
        return scores

    return score


def measure(runtime: str, directory: str, threads: int, pairs: Pairs) -> dict[str, Any]:
    """Load a model and score pairs, in a new process.

    Returns:
        `scores`; `pairs_per_second`; `megabytes`, the highest memory of the process less that before it loaded the
        model.
    """
    torch.set_num_threads(threads)
    load, dtype, _, _ = RUNTIMES[runtime]
    before = memory("VmRSS")
    score = load(directory, dtype)
    score(pairs[:BATCH])
    start = time.perf_counter()
    scores = score(pairs)
    seconds = time.perf_counter() - start
    grown = memory("VmHWM") - before
    return {"scores": scores, "pairs_per_second": len(pairs) / seconds, "megabytes": grown / 1e6}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, now, or VmHWM, at most so far. Those of getrusage count the parent's, too."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def measure_all(
    reranker: MatryoshkaReranker, layers: Sequence[int], runtimes: Sequence[str], candidates: Candidates
) -> list[dict[str, Any]]:
    """Measure each runtime at each depth. The first runtime's scores are those that others are compared with."""
    keys = [(query, passage) for query, passages in candidates.passages.items() for passage in passages]
    texts = {query: candidates.texts(query) for query in candidates.passages}
    pairs = [(candidates.collection.queries[query], text) for query in candidates.passages for text in texts[query]]
    rows = []
    for layer in layers:
        expected = torch.zeros(0)
        for runtime in runtimes:
            _, _, format, precision = RUNTIMES[runtime]
            with tempfile.TemporaryDirectory() as folder:
                reranker.export(folder, layer, format=format, precision=precision)
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    found = process.submit(measure, runtime, folder, torch.get_num_threads(), pairs).result()
            scores = torch.tensor(found.pop("scores"), dtype=torch.float64)
            expected = scores if runtime == runtimes[0] else expected
            run: dict[str, dict[str, float]] = {query: {} for query in candidates.passages}
            for (query, passage), score in zip(keys, scores.tolist(), strict=True):
                run[query][passage] = score
            row = {"runtime": runtime, "layers": layer, **found}
            row["largest_difference"] = float((scores - expected).abs().max())
            row[QUALITY] = mean(per_query(candidates, run, 10)[QUALITY])
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    about = report["machine"]
    lines = [
        f"{report['candidates']} of {report['queries']} queries of {report['data']}, {report['pairs']} pairs, "
        f"documents cut to {report['characters']} characters; {', '.join(about['devices'])} with {about['threads']} "
        f"threads, load {about['load_average']:.1f} at the start; "
        + ", ".join(f"{name} {about[name]}" for name in ("torch", "transformers", *VERSIONS))
        + ".",
        "",
        "| layers | runtime | pairs/s | memory, MB | largest difference | nDCG@10 |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = (
            row["layers"],
            row["runtime"],
            f"{row['pairs_per_second']:.1f}",
            f"{row['megabytes']:.0f}",
            f"{row['largest_difference']:.2g}",
            f"{row[QUALITY]:.3f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_page(path: Path, text: str) -> None:
    """Replace what stands between `BEGIN` and `END` of a page.

    Raises:
        ValueError: if the page does not have both comments, once.
    """
    page = path.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} must have {BEGIN} and {END}, each once, around the table.")
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{behind}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="default: %(default)s")
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 12, 18], help="default: %(default)s")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), metavar="NAME")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a collection in BEIR's layout")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=30, help="number of queries, drawn; default: %(default)s")
    parser.add_argument("--candidates", type=int, default=20, help="of each query; default: %(default)s")
    parser.add_argument("--characters", type=int, default=600, help="of a document; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page with the two comments around its table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    collection = sample_queries(read_collection(options.data, options.split), options.queries, 0)
    candidates = from_bm25(collection, options.candidates)
    for passage, text in collection.passages.items():
        collection.passages[passage] = text[: options.characters]
    about = environment("cpu") | {name: version(name) for name in VERSIONS}
    reranker = MatryoshkaReranker(options.model, dtype="float32", devices="cpu")
    rows = measure_all(reranker, options.layers, options.runtimes, candidates)
    report = {
        "machine": about,
        "data": options.data.name,
        "candidates": candidates.source,
        "queries": len(candidates.passages),
        "pairs": len(candidates),
        "characters": options.characters,
        "rows": rows,
    }
    print(table(report))
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.page is not None:
        write_page(options.page, table(report))


if __name__ == "__main__":
    main()
