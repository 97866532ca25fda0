"""What was run, in JSON, and the rows of the table."""

from __future__ import annotations

from typing import Any

from benchmarks.training.jobs import Job, pair_lengths

HEADER = (
    f"{'':38}{'seconds per step: median (min–max)':^44}{'':8}{'tokens/s':^16}{'of the peak':^16}"
    f"{'MiB above weights':^24}\n"
    f"{'against, dtype, checkpointing':38}{'ours':>22}{'baseline':>22}{'ratio':>8}"
    + f"{'ours':>8}{'baseline':>8}" * 2
    + f"{'ours':>8}{'baseline':>9}{'ratio':>7}"
)


def describe(job: Job) -> dict[str, Any]:
    """What was run."""
    config = job.config
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "exits": config.exit_layers,
        "compress_layers": job.compress_layers,
        "queries": job.queries,
        "group": job.group,
        "lengths": pair_lengths(job),
        "sub_networks": [
            {"compress_layers": setting.compress_layers, "compress_ratio": setting.compress_ratio}
            for setting in job.settings
        ],
    }


def table_row(result: dict[str, Any]) -> str:
    sides = result["ours"], result["baseline"]
    times = [f"{side['median_s']:.3f} ({side['min_s']:.3f}–{side['max_s']:.3f})" for side in sides]
    speeds = [f"{side['tokens_per_s']:.0f}" for side in sides]
    shares = [f"{side['share_of_matrix_peak']:.0%}" for side in sides]
    memory = [f"{side['peak_above_mib']:.0f}" for side in sides]
    setting = f"{result['compared']}, {result['dtype']}, {'on' if result['gradient_checkpointing'] else 'off'}"
    return (
        f"{setting:38}{times[0]:>22}{times[1]:>22}{result['time_ratio']:>8.2f}"
        f"{speeds[0]:>8}{speeds[1]:>8}{shares[0]:>8}{shares[1]:>8}"
        f"{memory[0]:>8}{memory[1]:>9}{result['memory_ratio']:>7.2f}"
    )


def alone_row(name: str, result: dict[str, Any]) -> str:
    return (
        f"{name}: {result['median_s']:.3f} s a step, {result['tokens_per_s']:.0f} tokens/s, "
        f"{result['share_of_matrix_peak']:.0%} of the matrix peak, {result['peak_mib']:.0f} MiB"
    )
