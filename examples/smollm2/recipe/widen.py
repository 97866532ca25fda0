"""Give adapters a higher rank and a model more exits, without changing a score.

    python examples/smollm2/recipe/widen.py --checkpoint FROM --rank 32 --exits 6 9 12 15 18 --output OUT

New rows of an adapter's A are drawn at random, new columns of its B are zero. A new exit starts with the head of the
next deeper exit. Fine-tuning continues from OUT with `--from_peft OUT`.
"""

import argparse
import re
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagembedding_matryoshka.checkpoints.loading import inspect_checkpoint

WEIGHTS = "adapter_model.safetensors"


def widen(checkpoint: Path, output: Path, rank: int, exits: list[int]) -> None:
    """Write the adapters in `checkpoint` with a higher rank and more exits to the directory `output`.

    Args:
        checkpoint: adapters that fine-tuning or write.py wrote.
        output: directory to write to.
        rank: new rank, such as a multiple of the adapters' rank.
        exits: new exits, with all exits of the adapters and the same deepest one.

    Raises:
        ValueError: if the rank is lower than the adapters' rank or changes their scale, the adapters have whole layers,
            an exit is missing, or a new exit is the deepest.
    """
    config, adapters = inspect_checkpoint(str(checkpoint)).config, PeftConfig.from_pretrained(checkpoint)
    have, exits = config.exit_layers, sorted(set(exits))
    if rank < adapters.r:
        raise ValueError(f"rank {rank} is lower than that of {checkpoint}, {adapters.r}: give a multiple of it.")
    if not set(have) <= set(exits) or exits[-1] != have[-1]:
        raise ValueError(f"exits {exits} must contain the exits of {checkpoint}, {have}, and end with the same exit.")
    if adapters.lora_alpha * rank % adapters.r:
        raise ValueError(
            f"rank {rank} changes the scale of the adapters in {checkpoint}, lora_alpha {adapters.lora_alpha} / rank "
            f"{adapters.r}: lora_alpha would be no integer. Choose a multiple of {adapters.r}."
        )
    if adapters.modules_to_save:
        raise ValueError(f"{checkpoint} holds whole layers, {adapters.modules_to_save}, which have no rank.")
    torch.manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, value in load_file(checkpoint / WEIGHTS).items():
        head = re.search(r"\.lm_head\.(\d+)\.", name)
        value = pad_rank(value.float(), rank, is_first=".lora_A." in name)
        if head is None:
            weights[name] = value
            continue
        own = have[int(head[1])]
        before = max((layer for layer in have if layer < own), default=0)
        for place, layer in enumerate(exits):
            if before < layer <= own:
                weights[name.replace(head[0], f".lm_head.{place}.")] = value.clone()
    config.exits, adapters.lora_alpha, adapters.r = exits, adapters.lora_alpha * rank // adapters.r, rank
    adapters.target_modules = sorted(adapters.target_modules)
    output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(output)
    adapters.save_pretrained(output)
    save_file(weights, output / WEIGHTS, metadata={"format": "pt"})


def pad_rank(value: Tensor, rank: int, is_first: bool) -> Tensor:
    """Add drawn rows to A, (rank, in), or columns of zeros to B, (out, rank).

    Args:
        value: A or B of an adapter.
        rank: new rank.
        is_first: True for A.
    """
    if is_first:
        added = torch.empty(rank - len(value), value.shape[1]).uniform_(-1, 1) * value.shape[1] ** -0.5
        return torch.cat([value, added])
    return torch.cat([value, value.new_zeros(len(value), rank - value.shape[1])], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="adapters that fine-tuning or write.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--exits", type=int, nargs="+", required=True)
    options = parser.parse_args()
    widen(options.checkpoint, options.output, options.rank, options.exits)


if __name__ == "__main__":
    main()
