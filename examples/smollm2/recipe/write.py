"""Put a fine-tuned re-ranker into the package, as adapters in bfloat16 on a base that is known by name.

    python examples/smollm2/recipe/write.py --checkpoint OUT --exits 6 9 12 --plan matryoshka_plan.json

The last step of the recipe. Exits that are not wanted go, with their heads and with the layers above the deepest that
stays. Nothing is written unless the result scores as the checkpoint does and is small enough to be shipped.
"""

import argparse
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagembedding_matryoshka import SMOLLM2, CostWiseMistralConfig, MatryoshkaReranker
from flagembedding_matryoshka.checkpoints.export import write_sentence_transformers_files
from flagembedding_matryoshka.checkpoints.gguf import SMOLLM2_BASE_NAME
from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint
from flagembedding_matryoshka.files import write_text
from flagembedding_matryoshka.inference.plan import PLAN_NAME, load_plan

WEIGHTS = "adapter_model.safetensors"
MAX_BYTES = 25_000_000
TOLERANCE = 0.05
"""Of the scores' standard deviation: rounding adapters to bfloat16 changes scores by less, another base by more."""

QUERIES = ["how is a list sorted", "What lifts a wing?", "capital of France"]
PASSAGES = [
    "Sort the items of the list in place; the arguments can be used to customise the order.",
    "Air flows faster over the upper side of a wing, where the pressure is lower.",
    "Paris has been the capital of France since the tenth century.",
    "The lexer splits its input into tokens.",
]
WIDTHS = [{"compress_ratio": 1}, {"compress_layers": [2], "compress_ratio": 2}]


def write(checkpoint: Path, output: Path, exits: Sequence[int] | None = None, plan: Path | None = None) -> None:
    """Write `checkpoint`, a directory that fine-tuning wrote, to the directory `output`.

    Args:
        exits: those to keep; None is all.
        plan: what an evaluation of these exits measured; without it `output` has no plan afterwards.

    Raises:
        ValueError: if the checkpoint lacks an exit or is not adapters on a raw base, the plan is another model's, or
            the result is too large or scores otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part"
        config = write_part(checkpoint, part, exits)
        if plan is not None:
            write_plan(plan, part / PLAN_NAME)
            load_plan(str(part), config)
        size = sum(file.stat().st_size for file in part.iterdir())
        if size > MAX_BYTES:
            raise ValueError(f"{checkpoint} takes {size} bytes in bfloat16, but {MAX_BYTES} is what may be shipped.")
        check_scores(checkpoint, part, config.exit_layers)
        output.mkdir(parents=True, exist_ok=True)
        (output / PLAN_NAME).unlink(missing_ok=True)
        shutil.copytree(part, output, dirs_exist_ok=True)
    print(f"Wrote the exits {config.exit_layers}, {size / 1e6:.1f} MB, to {output}.")


def write_plan(plan: Path, output: Path) -> None:
    """Write a plan whose calibrations are used in every dtype, because rounding changes scores little."""
    stored = json.loads(plan.read_text(encoding="utf-8"))
    stored["scored_with"].pop("dtype", None)
    write_text(output, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def write_part(checkpoint: Path, part: Path, exits: Sequence[int] | None) -> CostWiseMistralConfig:
    """Write adapters and configurations for some exits, and return the model's configuration."""
    found = inspect_checkpoint(str(checkpoint))
    if found.adapters != [str(checkpoint)]:
        raise ValueError(f"{checkpoint} must be adapters on a raw base, but it is made of {found.adapters}.")
    config = found.config
    have = config.exit_layers
    wanted = have if exits is None else sorted(set(exits))
    if missing := [layer for layer in wanted if layer not in have]:
        raise ValueError(f"exits {missing} are not those of {checkpoint}, which has {have}.")
    config.exits, config.num_hidden_layers = wanted, wanted[-1]
    config.save_pretrained(part)
    adapters = PeftConfig.from_pretrained(checkpoint)
    adapters.base_model_name_or_path = SMOLLM2_BASE_NAME
    adapters.target_modules = sorted(adapters.target_modules)  # a set, whose order would differ from time to time
    adapters.save_pretrained(part)
    weights = select(load_file(checkpoint / WEIGHTS), have, wanted)
    save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
    (part / WEIGHTS).chmod(0o644)  # safetensors lets nobody but the owner read what it writes
    write_sentence_transformers_files(part)
    return config


def select(weights: Mapping[str, Tensor], have: Sequence[int], wanted: Sequence[int]) -> dict[str, Tensor]:
    """What the exits `wanted` need of the adapters of a model with the exits `have`, in bfloat16, heads renumbered."""
    selected = {}
    for name, value in weights.items():
        layer, head = (re.search(rf"\.{part}\.(\d+)\.", name) for part in ("layers", "lm_head"))
        if layer is not None and int(layer[1]) >= wanted[-1]:
            continue
        if head is not None:
            exit_layer = have[int(head[1])]
            if exit_layer not in wanted:
                continue
            name = name.replace(head[0], f".lm_head.{wanted.index(exit_layer)}.")
        selected[name] = value.to(torch.bfloat16).contiguous()
    return selected


def check_scores(checkpoint: Path, part: Path, exits: Sequence[int]) -> None:
    """Raise ValueError unless both give every pair nearly the same score at every exit."""
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    before, after = (MatryoshkaReranker(str(path), dtype="float32", devices="cpu") for path in (checkpoint, part))
    for layer in exits:
        for width in WIDTHS:
            expected, actual = (model.compute_score(pairs, cutoff_layers=layer, **width) for model in (before, after))
            spread = statistics.pstdev(expected)
            difference = max(abs(a - b) for a, b in zip(expected, actual, strict=True))
            if difference > TOLERANCE * spread:
                raise ValueError(
                    f"at exit {layer}, {width}, scores change by up to {difference:.3g}, and only "
                    f"{TOLERANCE} of their standard deviation, {spread:.3g}, is rounding. Was {checkpoint} trained on "
                    f"what {SMOLLM2_BASE_NAME!r} brings?"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what fine-tuning wrote")
    parser.add_argument("--exits", type=int, nargs="+", help="those to keep (default: all)")
    parser.add_argument("--plan", type=Path, help="the plan that the evaluation of these exits wrote")
    parser.add_argument("--output", type=Path, default=Path(SMOLLM2), help="default: the package's own folder")
    options = parser.parse_args()
    write(options.checkpoint, options.output, options.exits, options.plan)


if __name__ == "__main__":
    main()
