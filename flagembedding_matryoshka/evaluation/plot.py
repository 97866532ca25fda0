"""Quality against cost as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flagembedding_matryoshka.evaluation.baselines import Baseline
from flagembedding_matryoshka.evaluation.metrics import QUALITY, mean
from flagembedding_matryoshka.evaluation.report import Compared
from flagembedding_matryoshka.files import replacing

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("the plot needs matplotlib: pip install flagembedding_matryoshka[evaluation]") from error

MARKERS = "osD^"


def plot(compared: Sequence[Compared], baselines: Sequence[Baseline], title: str, path: Path) -> None:
    """A line for each width, a point for each exit with its number, a star for each cascade, the Pareto front behind.

    A baseline is a cross where it has a cost, and else a level.

    Args:
        path: the PNG to write.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    places = {item.result.setting: (item.result.flops_per_pair / 1e9, item.result.mean(QUALITY)) for item in compared}
    front = sorted(places[item.result.setting] for item in compared if item.on_front)
    axes.step(*zip(*front, strict=True), where="post", color="gold", lw=5, alpha=0.5, zorder=1, label="Pareto front")
    widths = dict.fromkeys((setting.compress_layers, setting.compress_ratio) for setting in places)
    for number, (after, ratio) in enumerate(widths):
        mine = [setting for setting in places if (setting.compress_layers, setting.compress_ratio) == (after, ratio)]
        exits = [setting for setting in mine if not setting.cascade]
        label = "full width" if ratio == 1 else f"ratio {ratio} after {', '.join(map(str, after))}"
        (line,) = axes.plot(
            *zip(*(places[setting] for setting in exits), strict=True),
            marker=MARKERS[number % len(MARKERS)],
            ms=5,
            lw=1.2,
            label=label,
        )
        cascades = [setting for setting in mine if setting.cascade]
        if cascades:
            stars = zip(*(places[setting] for setting in cascades), strict=True)
            axes.plot(*stars, "*", ms=12, mec="black", mew=0.5, color=line.get_color(), label=f"cascade, {label}")
        for setting in mine:
            stages = "".join(f"{layer}:{share:g}→" for layer, share in setting.cascade)
            axes.annotate(
                f"{stages}{setting.depth}",
                places[setting],
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    for baseline in baselines:
        quality, flops = mean(baseline.per_query[QUALITY]), baseline.flops_per_pair
        if flops is None:
            axes.axhline(quality, color="grey", lw=0.8, ls="--")
            axes.annotate(
                baseline.name, (1, quality), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        else:
            axes.plot(flops / 1e9, quality, "X", color="grey", ms=8, label=baseline.name)
    axes.set(xlabel="GFLOP per pair", ylabel=QUALITY, title=title)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.legend(fontsize=8, loc="best")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
