"""What was run, in JSON, and the rows of the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.training.jobs import Job, make_batch

HEADER = (
    f"{'':24}{'seconds per step: median (min–max)':^44}{'':9}{'MiB above the weights':^24}\n"
    f"{'dtype, checkpointing':24}{'ours':>22}{'baseline':>22}{'ratio':>9}{'ours':>10}{'baseline':>12}{'ratio':>8}"
)


def describe(job: Job) -> dict[str, Any]:
    """What was run."""
    config = job.config
    lengths = make_batch(replace(job, device="cpu"))["pair"]["attention_mask"].sum(1)
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "exits": config.exit_layers,
        "compress_layers": job.compress_layers,
        "queries": job.queries,
        "group": job.group,
        "lengths": lengths.tolist(),
        "settings": [
            {"compress_layers": setting.compress_layers, "compress_ratio": setting.compress_ratio}
            for setting in job.settings
        ],
    }


def table_row(result: dict[str, Any]) -> str:
    ours, baseline = result["ours"], result["baseline"]
    times = [f"{side['median_s']:.3f} ({side['min_s']:.3f}–{side['max_s']:.3f})" for side in (ours, baseline)]
    setting = f"{result['dtype']}, {'on' if result['gradient_checkpointing'] else 'off'}"
    return (
        f"{setting:24}{times[0]:>22}{times[1]:>22}{result['time_ratio']:>9.2f}"
        f"{ours['peak_above_mib']:>10.0f}{baseline['peak_above_mib']:>12.0f}{result['memory_ratio']:>8.2f}"
    )
