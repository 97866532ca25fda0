"""Measure a model on one split of every kind of text, and draw quality against cost.

    python examples/smollm2/recipe/measure.py DIR --split test --output OUT

BM25's first passages for each query of DIR/KIND are re-ranked at several depths and widths, plain and fused with BM25
at the weight in the model's plan. `python -m flagembedding_matryoshka.evaluation` measures each kind and writes its
report to OUT/KIND. Complete results are not measured again.

OUT/table.md has nDCG@10 of each kind, with p-values of a paired randomisation test against BM25, after Holm over the
kinds. OUT/quality_cost.svg has 95 % confidence intervals of a bootstrap over the queries of each kind.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from bi_encoder import path as bi_encoder_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flagembedding_matryoshka import SMOLLM2
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.evaluation.__main__ import main as evaluate
from flagembedding_matryoshka.evaluation.candidates import from_bm25
from flagembedding_matryoshka.evaluation.report.tables import markdown_table
from flagembedding_matryoshka.evaluation.results import slug
from flagembedding_matryoshka.evaluation.runs import QUALITY, in_order, per_query
from flagembedding_matryoshka.evaluation.significance import holm, paired_p_value
from flagembedding_matryoshka.files import replacing, write_text
from flagembedding_matryoshka.inference.plan import load_plan
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection

GROUPS = {
    "abstracts of all sciences": ("titles", "abstracts", "phrases", "notes"),
    "medical answers": ("medical",),
    "code and its documentation": ("code", "docstrings"),
}
"""Kinds of each panel of the figure. All kinds of a panel have the same weight in its mean."""
RESAMPLES = 2000
BM25, BI_ENCODER = "BM25", "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Kind:
    """nDCG@10 on one kind of text.

    Attributes:
        plain, fused: nDCG@10 of each query by setting, without and with fusion.
        bm25: nDCG@10 of each query in the order of BM25.
        bi_encoder: mean nDCG@10 in the order of the bi-encoder.
        cost: fraction of the full network's operations by setting.
    """

    plain: Mapping[Setting, Sequence[float]]
    fused: Mapping[Setting, Sequence[float]]
    bm25: Sequence[float]
    bi_encoder: float
    cost: Mapping[Setting, float]


def measure(data: Path, output: Path, model: str, weight: float, split: str, top_k: int) -> Kind:
    """Evaluate a model on a collection, and read the results.

    Args:
        data: the collection.
        output: folder of the report.
        model: name or path of the model.
        weight: weight of BM25 in fused scores.
        split: split of the collection.
        top_k: candidates of a query.
    """
    evaluate(
        [
            *("--model", model, "--data", str(data), "--split", split, "--output", str(output)),
            *("--top_k", str(top_k), "--max_length", "384", "--timed_pairs", "64"),
            *("--compress_layers", "3", "--compress_ratios", "1", "2", "--fusion", str(weight)),
            *("--bi_encoder", BI_ENCODER, bi_encoder_path()),
        ]
    )
    report = json.loads((output / "results.json").read_text(encoding="utf-8"))
    plain = read_results(output / "settings", report["settings"])
    # At weight 0 the evaluation stores no fused results, since no order changes.
    fused = read_results(output / "fused" / "settings", report["settings"]) if weight else plain
    full = plain[max(plain, key=lambda setting: (setting.depth, -setting.compress_ratio))]
    candidates = from_bm25(read_collection(data, split), top_k)
    return Kind(
        {setting: item["per_query"][QUALITY] for setting, item in plain.items()},
        {setting: item["per_query"][QUALITY] for setting, item in fused.items()},
        per_query(candidates, in_order(candidates.passages), 10)[QUALITY],
        next(item[QUALITY] for item in report["baselines"] if item["name"] == BI_ENCODER),
        {setting: item["flops_per_pair"] / full["flops_per_pair"] for setting, item in plain.items()},
    )


def read_results(directory: Path, settings: Sequence[Mapping]) -> dict[Setting, dict]:
    """Read the stored results of an evaluation, by setting.

    Args:
        directory: folder of the stored results, which may also have those of an earlier evaluation.
        settings: the settings in the evaluation's results.json.
    """
    names = [field.name for field in fields(Setting)]
    return {
        (setting := Setting(**{name: item[name] for name in names})): json.loads(
            (directory / f"{slug(setting)}.json").read_text(encoding="utf-8")
        )
        for item in settings
    }


def tabulate(kinds: Mapping[str, Kind]) -> str:
    """Tabulate nDCG@10 of each kind, and the mean over kinds, as Markdown."""
    settings = sorted(next(iter(kinds.values())).plain, key=lambda setting: (setting.compress_ratio, setting.depth))
    deepest = max((setting for setting in settings if setting.compress_ratio == 1), key=lambda item: item.depth)
    names = [
        f"{setting.depth}" + (f", ratio {setting.compress_ratio}" if setting.compress_ratio > 1 else "")
        for setting in settings
    ]
    rows = [
        [
            "kind",
            "queries",
            BM25,
            BI_ENCODER,
            *names,
            f"p, {names[settings.index(deepest)]}",
            *(f"fused {name}" for name in names),
            "p, fused",
        ]
    ]
    p_values = [
        holm([paired_p_value(getattr(kind, side)[deepest], kind.bm25) for kind in kinds.values()])
        for side in ("plain", "fused")
    ]
    means = []
    for (name, kind), p_plain, p_fused in zip(kinds.items(), *p_values, strict=True):
        values = [
            [float(np.mean(kind.bm25)), kind.bi_encoder],
            [float(np.mean(kind.plain[setting])) for setting in settings],
            [float(np.mean(kind.fused[setting])) for setting in settings],
        ]
        means.append([*values[0], *values[1], *values[2]])
        first, plain, fused = ([f"{value:.3f}" for value in part] for part in values)
        rows.append([name, str(len(kind.bm25)), *first, *plain, f"{p_plain:.3f}", *fused, f"{p_fused:.3f}"])
    mean = [f"{value:.3f}" for value in np.mean(means, axis=0)]
    split = 2 + len(settings)
    rows.append(["mean", "", *mean[:split], "", *mean[split:], ""])
    return markdown_table(rows)


def interval(parts: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return the mean over kinds of their means, and its 95 % confidence interval by a bootstrap.

    Queries are drawn within each kind. The percentiles of the draws are the interval's ends (Efron and Tibshirani, An
    introduction to the bootstrap, 1993, chapter 13).

    Args:
        parts: for each kind a value for each query.

    Returns:
        mean, low and high end.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(part) for part in parts]
    drawn = np.mean(
        [array[rng.integers(len(array), size=(RESAMPLES, len(array)))].mean(axis=1) for array in arrays], axis=0
    )
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.mean([array.mean() for array in arrays])), float(low), float(high)


def draw(panels: Mapping[str, Sequence[Kind]], path: Path) -> None:
    """Draw a panel for each group of kinds: quality against the fraction of operations."""
    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (name, kinds) in zip(axes, panels.items(), strict=True):
        draw_panel(panel, kinds)
        panel.set_title(f"{name}, {sum(len(kind.bm25) for kind in kinds)} queries", fontsize=10)
        panel.set_xlabel("share of the full network's operations")
    axes[0].set_ylabel(QUALITY)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    with replacing(path) as partial:
        figure.savefig(partial, format="svg")


def draw_panel(panel: Axes, kinds: Sequence[Kind]) -> None:
    """Draw a line of exits for each ratio, plain and fused, and the levels of BM25 and the bi-encoder."""
    panel.axhline(float(np.mean([np.mean(kind.bm25) for kind in kinds])), color="grey", ls="--", label=BM25)
    panel.axhline(float(np.mean([kind.bi_encoder for kind in kinds])), color="grey", ls=":", label=BI_ENCODER)
    for side, fill in (("plain", None), ("fused", "white")):
        for ratio, color in ((1, "tab:blue"), (2, "tab:orange")):
            settings = sorted(
                (setting for setting in kinds[0].plain if setting.compress_ratio == ratio), key=lambda item: item.depth
            )
            costs = [float(np.mean([kind.cost[setting] for kind in kinds])) for setting in settings]
            found = [interval([getattr(kind, side)[setting] for kind in kinds]) for setting in settings]
            means = [mean for mean, _, _ in found]
            errors = [[mean - low for mean, low, _ in found], [high - mean for mean, _, high in found]]
            label = ("full width" if ratio == 1 else f"ratio {ratio}") + (
                ", fused with BM25" if side == "fused" else ""
            )
            panel.errorbar(
                *(costs, means, errors), label=label, color=color, marker="o", mfc=fill, ms=5, lw=1.4, capsize=2,
                ls="-" if side == "plain" else "--",
            )  # fmt: skip
            for setting, cost, mean in zip(settings, costs, means, strict=True):
                if side == "plain":
                    panel.annotate(str(setting.depth), (cost, mean), (0, -12), textcoords="offset points", fontsize=7)
    panel.set_xlim(left=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where collect.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=SMOLLM2, help="default: the shipped one")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="default: %(default)s")
    parser.add_argument("--top_k", type=int, default=50, help="candidates of a query (default: %(default)s)")
    parser.add_argument("--fusion", type=float, help="weight of BM25 (default: that in the model's plan)")
    options = parser.parse_args()
    weight = options.fusion
    if weight is None:
        weight = load_plan(options.model, inspect_checkpoint(options.model).config).fusion_weight()
    kinds = {
        name: measure(
            options.directory / name, options.output / name, options.model, weight, options.split, options.top_k
        )
        for group in GROUPS.values()
        for name in group
    }
    text = tabulate(kinds)
    print(text)
    write_text(options.output / "table.md", text)
    draw(
        {group: [kinds[name] for name in names] for group, names in GROUPS.items()}, options.output / "quality_cost.svg"
    )


if __name__ == "__main__":
    main()
