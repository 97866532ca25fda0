"""One training step: ours against others' on the same weights and rows, in time and in memory.

    python -m benchmarks.training --output training.json

Against the **research code**: the same LoRA adapters, batches and sub-networks, and the learning method is
`distill_fix_layer_teacher`. Its step is rebuilt here on the layers of the installed transformers: a right-padded batch;
the whole attention map from every layer of a pass that compresses (other passes run transformers' `sdpa`, which was its
default too); compression of padded tensors; norm and head over all positions at every exit; and a full-width teacher
pass in every step, detached only after its graph was built. Two things are kinder than the original: the last real
token's attention row is read instead of a pad token's, without which the two would compute different numbers, and
memory is not handed back to the device (`empty_cache`) inside a pass.

Against **FlagEmbedding**: model, collator and loss of its layer-wise fine-tuning; `benchmarks.training.flag_embedding`
says what is put right so that they run. It knows no width, so both sides run all exits at full width, and learn from
the label and the data's scores. Under bfloat16 its weights lie in float32, as its runner loads them.

Loss and gradient norm of both sides must agree in float32 before anything is timed. Each setting is timed in a process
of its own, in which the sides take turns; the peak memory of each side is taken in a further one. `ratio` is ours /
baseline, of time over all steps together; the peak is that of one plain product of the layers' biggest shape, in the
same process. On a GPU ours is also measured alone, in the shapes of Mistral-7B and Qwen3-0.6B. The last line of the
output is a JSON object with every number.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measuring import environment
from benchmarks.training.comparison import big_ones, compare_all
from benchmarks.training.jobs import Job
from benchmarks.training.report import describe
from benchmarks.training.shapes import small_config, small_granite_config


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
    parser.add_argument("--output", type=Path, help="file to write the JSON to as well")
    args = parser.parse_args()

    job = Job(small_config(args.layers, args.hidden), args.queries, args.group, args.steps, args.device, args.threads)
    minicpm = replace(job, config=small_granite_config(args.layers, args.hidden), compared="FlagEmbedding")
    report = {
        "benchmark": "training",
        **describe(job),
        "environment": environment(job.device) | {"threads": job.threads},
        **compare_all([job, minicpm]),
    }
    if torch.device(job.device).type == "cuda":
        report["alone"] = big_ones(job)
    line = json.dumps(report)
    if args.output:
        args.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
