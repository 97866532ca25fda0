"""What was measured, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(report: dict[str, Any]) -> None:
    low, median, high = report["tokens_per_pair"]
    print(
        f"\n{report['shape']}, {report['dtype']}, {report['pairs']} pairs of {low} to {high} tokens (median {median}), "
        f"matrix product {report['matrix_tflops_per_s']:.3f} TFLOP/s, first score after "
        f"{report['seconds_to_first_score']:.1f} s, tokenizing is {report['tokenizing_share']:.3f} of full depth's time"
    )
    print(f"{'setting':26}{'pairs/s':>9}{'(range)':>18}{'speedup':>9}{'of peak':>9}{'FLOPs':>8}{'time':>8}")
    for row in report["settings"]:
        low, high = row["pairs_per_s_range"]
        line = f"{row['setting']:26}{row['pairs_per_s']:9.1f}{f'({low:.1f}–{high:.1f})':>18}{row['speedup']:9.2f}"
        if "flops_share" in row:
            line += f"{row['share_of_matrix_peak']:9.2f}{row['flops_share']:8.2f}{row['time_share']:8.2f}"
        print(line, flush=True)


def plot(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """How many times as fast as a plain cross-encoder each setting is, for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row["setting"] for row in reports[0]["settings"] if not row["setting"].startswith("plain")]
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    height = 0.8 / len(reports)
    for number, report in enumerate(reports):
        speedups = {row["setting"]: row["speedup"] for row in report["settings"]}
        places = [place + number * height for place in range(len(names))]
        bars = axes.barh(places, [speedups[name] for name in names], height, label=report["shape"])
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.axvline(1, color="black", lw=0.8, ls=":")
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as a plain cross-encoder of the same shape (padded, SDPA, full depth)")
    axes.legend(title="layers × hidden", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
