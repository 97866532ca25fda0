"""One training step: ours against the same step as the research code does it, in time and in memory.

    python -m benchmarks.training --output training.json
    python -m benchmarks.training --seven_b    # on a GPU: ours alone, in the shape of Mistral-7B, with random weights

Both sides have the same weights, LoRA adapters, batches and sub-networks, and the learning method is
`distill_fix_layer_teacher`. The research code's step is rebuilt here on the layers of the installed transformers: a
right-padded batch; the whole attention map from every layer of a pass that compresses (other passes run transformers'
`sdpa`, which was its default too); compression of padded tensors; norm and head over all positions at every exit; and a
full-width teacher pass in every step, detached only after its graph was built. Two things are kinder than the original:
the last real token's attention row is read instead of a pad token's, without which the two would compute different
numbers, and memory is not handed back to the device (`empty_cache`) inside a pass.

Loss and gradient norm of both sides must agree in float32 before anything is timed. Each setting is timed in a process
of its own, in which the sides take turns; the peak memory of each side is taken in a further one. The last line of the
output is a JSON object with every number. `ratio` is ours / baseline, of time over all steps together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.measuring import environment
from benchmarks.training.comparison import compare_all
from benchmarks.training.jobs import Job, seven_b_config, small_config
from benchmarks.training.measurements import measure_alone
from benchmarks.training.processes import in_fresh_process
from benchmarks.training.report import describe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 16; default: %(default)s")
    parser.add_argument("--queries", type=int, default=2, help="in a batch; default: %(default)s")
    parser.add_argument("--group", type=int, default=8, help="passages per query; default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="sub-networks to time; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seven_b", action="store_true", help="ours alone in Mistral-7B's shape; needs a GPU")
    parser.add_argument("--output", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args()
    if args.seven_b and torch.device(args.device).type == "cpu":
        parser.error("--seven_b needs a GPU")

    config = seven_b_config() if args.seven_b else small_config(args.layers, args.hidden)
    dtype = torch.bfloat16 if args.seven_b else torch.float32
    job = Job(config, args.queries, args.group, args.steps, args.device, args.threads, dtype, args.seven_b)
    report = {
        "benchmark": "training",
        **describe(job),
        "environment": environment(job.device) | {"threads": job.threads},
    }
    if args.seven_b:
        report["seven_b"] = in_fresh_process(measure_alone, job)
        for name, value in report["seven_b"].items():
            if name != "ours":
                print(f"{name:22}{value:12.3f}")
    else:
        report |= compare_all(job)
    line = json.dumps(report)
    if args.output:
        args.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
