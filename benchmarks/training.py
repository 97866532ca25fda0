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
import contextlib
import copy
import ctypes
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import AbsRerankerModel, RerankerOutput
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralRotaryEmbedding,
    eager_attention_forward,
)

from benchmarks.measuring import environment, matrix_flops_per_second, synchronize
from flagembedding_matryoshka import CostWiseMistralConfig, CostWiseMistralForCausalLM, Setting
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.finetune.modeling import MatryoshkaCrossEncoder
from flagembedding_matryoshka.finetune.sampling import sample_setting
from flagembedding_matryoshka.inference.device import fast_dtype
from flagembedding_matryoshka.models.heads import CostWiseHead

METHOD = TRAIN_METHODS["distill_fix_layer_teacher"]
RATIOS = (1, 2, 4, 8)
LORA_RANK, LORA_ALPHA = 32, 64
QUERY_LENGTH, PASSAGE_LENGTHS, PROMPT_LENGTH = 32, (64, 192), 14
LEARNING_RATE = 2e-4
SEEDS = (14, 12, 0, 31, 3, 28, 8, 32)
"""Of sub-networks: with three compress layers these draws hold every ratio twice, and a layer in half of them."""
TOLERANCE = 1e-4
MIB = 2**20
M_MMAP_THRESHOLD = -3  # of malloc.h

PADDED_ATTENTION = "padded_baseline"


# The baseline


def padded_attention(
    module: nn.Module, *tensors: Tensor | None, return_map: bool, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function in the form of `AttentionInterface`: with its map, or without and faster."""
    attend = eager_attention_forward if return_map else sdpa_attention_forward
    return attend(module, *tensors, **kwargs)


AttentionInterface.register(PADDED_ATTENTION, padded_attention)


class PaddedLayer(MistralDecoderLayer):
    """A Mistral layer that returns its attention map, as all layers of transformers 4 could."""

    def forward(self, hidden_states: Tensor, **attention: Any) -> tuple[Tensor, Tensor | None]:
        """(batch, length, hidden) and, where asked for, (batch, heads, length, length)."""
        attended, attention_map = self.self_attn(self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), attention_map


class PaddedMistral(MistralForCausalLM):
    """The layer-wise, compressing Mistral on a padded batch; its weights are named as ours are."""

    def __init__(self, config: CostWiseMistralConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(PaddedLayer(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = nn.ModuleList(CostWiseHead(config.hidden_size) for _ in config.exit_layers)
        config._attn_implementation = PADDED_ATTENTION

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        query_lengths: Tensor,
        prompt_lengths: Tensor,
        setting: Setting,
        **unused: Any,
    ) -> Tensor:
        """(exits, batch) float32 scores, from the shallowest exit to the deepest."""
        hidden, mask = self.model.embed_tokens(input_ids), attention_mask.bool()
        rows = torch.arange(len(hidden), device=hidden.device)
        attention = self._attention_arguments(hidden, mask)
        scores = []
        for depth, layer in enumerate(self.model.layers, start=1):
            hidden, attention_map = layer(hidden, return_map=setting.compress_ratio > 1, **attention)
            last = mask.sum(1) - 1
            if depth in setting.cutoff_layers:
                scores.append(self.lm_head[len(scores)](self.model.norm(hidden))[rows, last])
            if setting.compresses_after(depth):
                weights = attention_map[rows, :, last].sum(1)
                ratio = setting.compress_ratio
                hidden, mask = compress_padded(hidden, mask, weights, query_lengths, prompt_lengths, ratio)
                attention = self._attention_arguments(hidden, mask)
        return torch.stack(scores)

    def _attention_arguments(self, hidden: Tensor, mask: Tensor) -> dict[str, Any]:
        length = hidden.shape[1]
        seen = mask[:, None, None] & mask.new_ones(length, length).tril()
        bias = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        positions = torch.arange(length, device=hidden.device)[None]
        return {"attention_mask": bias, "position_embeddings": self.model.rotary_emb(hidden, positions)}


def compress_padded(
    hidden: Tensor, mask: Tensor, weights: Tensor, query_lengths: Tensor, prompt_lengths: Tensor, ratio: int
) -> tuple[Tensor, Tensor]:
    """Merge groups of `ratio` neighbouring passage tokens of a right-padded batch.

    Args:
        hidden: (batch, length, hidden).
        mask: (batch, length) bool, True on tokens.
        weights: (batch, length), how much the last token attends to each.
        query_lengths, prompt_lengths: (batch,) tokens before and behind the passage.

    Returns:
        (batch, shorter length, hidden) and its mask.
    """
    batch, length, width = hidden.shape
    query, prompt = query_lengths[:, None], prompt_lengths[:, None]
    passage = mask.sum(1, keepdim=True) - query - prompt
    kept = (passage + ratio - 1) // ratio
    groups, new_length = int(kept.max()), int((query + kept + prompt).max())

    def positions(count: int) -> Tensor:
        return torch.arange(count, device=hidden.device)[None]

    in_passage = (positions(length) >= query) & (positions(length) < query + passage)
    aligned = positions(groups * ratio) < passage
    tokens = hidden.new_zeros(batch, groups * ratio, width)
    tokens[aligned] = hidden[in_passage]
    shares = weights.new_zeros(batch, groups * ratio)
    shares[aligned] = weights[in_passage]
    shares = shares.view(batch, groups, ratio)
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    merged = (tokens.view(batch, groups, ratio, width) * shares[..., None]).sum(2)

    new_mask = positions(new_length) < query + kept + prompt
    new_passage = (positions(new_length) >= query) & (positions(new_length) < query + kept)
    compressed = hidden.new_zeros(batch, new_length, width)
    compressed[new_mask & ~new_passage] = hidden[mask & ~in_passage]
    compressed[new_passage] = merged[positions(groups) < kept].to(hidden.dtype)
    return compressed, new_mask


class PaddedCrossEncoder(AbsRerankerModel):
    """The research code's learning step; the counterpart of `MatryoshkaCrossEncoder`."""

    def __init__(self, base_model: PeftModel, train_group_size: int, **kwargs: Any) -> None:
        super().__init__(base_model, **kwargs)
        self.train_group_size = train_group_size

    def encode(self, features: dict[str, Tensor], setting: Setting) -> Tensor:
        """(exits, queries, group) scores."""
        scores = self.model(**features, setting=setting)
        return scores.view(len(scores), -1, self.train_group_size)

    def forward(self, pair: dict[str, Tensor], teacher_scores: list[float], setting: Setting) -> RerankerOutput:
        """The loss of `distill_fix_layer_teacher`."""
        student = self.encode(pair, setting)
        full_width = self.encode(pair, replace(setting, compress_layers=(), compress_ratio=1))
        data_shares = torch.tensor(teacher_scores, device=student.device).view_as(student[0]).softmax(-1)
        loss = torch.zeros((), device=student.device)
        teacher_shares = None
        for index, (scores, deeper_scores) in enumerate(zip(student.flip(0), full_width.flip(0), strict=True)):
            log_shares = scores.log_softmax(-1)
            loss = loss - log_shares[:, 0].mean() - (data_shares * log_shares).sum(-1).mean()
            if teacher_shares is not None:
                loss = loss - (teacher_shares * log_shares).sum(-1).mean()
            if index % 8 == 0:
                teacher_shares = deeper_scores.detach().softmax(-1)
        return RerankerOutput(loss=loss, scores=student)


# What is measured


@dataclass(frozen=True)
class Job:
    """What a child process measures.

    Attributes:
        config: the shape of the model; layers are compressed after every `start_layer` of them.
        queries, group: pairs in a batch.
        steps: training steps, each under a sub-network of its own.
    """

    config: CostWiseMistralConfig
    queries: int
    group: int
    steps: int
    device: str
    threads: int
    dtype: torch.dtype
    checkpointing: bool

    @property
    def compress_layers(self) -> list[int]:
        return list(range(self.config.start_layer, self.config.num_hidden_layers, self.config.start_layer))

    @property
    def settings(self) -> list[Setting]:
        """One per step, the same for every job of a shape."""
        seeds = itertools.islice(itertools.cycle(SEEDS), self.steps)
        return [sample_setting(self.config, self.compress_layers, RATIOS, seed, step=0) for seed in seeds]


def small_config(layers: int, hidden: int) -> CostWiseMistralConfig:
    """Mistral's proportions."""
    return CostWiseMistralConfig(
        layer_wise=True,
        start_layer=max(1, layers // 4),
        vocab_size=1000,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        pad_token_id=0,
    )


def seven_b_config() -> CostWiseMistralConfig:
    """Mistral-7B-v0.1's shape and the recipe's exits."""
    return CostWiseMistralConfig(
        layer_wise=True,
        start_layer=4,
        vocab_size=32000,
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        pad_token_id=0,
    )


def make_batch(job: Job) -> dict[str, Any]:
    """Random tokens and teacher scores, as the trainer hands them to the model."""
    generator = torch.Generator().manual_seed(0)
    pairs = job.queries * job.group
    shortest, longest = PASSAGE_LENGTHS
    lengths = QUERY_LENGTH + torch.randint(shortest, longest + 1, (pairs,), generator=generator) + PROMPT_LENGTH
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    pair = {
        "input_ids": torch.randint(1, job.config.vocab_size, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "query_lengths": torch.full((pairs,), QUERY_LENGTH),
        "prompt_lengths": torch.full((pairs,), PROMPT_LENGTH),
    }
    return {
        "pair": {name: value.to(job.device) for name, value in pair.items()},
        "teacher_scores": torch.randn(pairs, generator=generator).tolist(),
    }


def adapted_model(model_class: type[MistralForCausalLM], job: Job) -> PeftModel:
    """A model with adapters as the runner adds them; its weights depend on their names alone, not on its class.

    The adapters have no dropout, under which two passes could not be compared.
    """
    with torch.device("meta"):
        model = model_class(copy.deepcopy(job.config)).to(job.dtype)
    model.to_empty(device=job.device)
    model.model.rotary_emb = MistralRotaryEmbedding(job.config).to(job.device)
    adapters = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_head"],
    )
    adapted = get_peft_model(model, adapters)
    generator = torch.Generator(job.device).manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1)  # norms
            else:
                parameter.normal_(std=0.5 * parameter.shape[1] ** -0.5, generator=generator)
    return adapted


def any_tokenizer() -> PreTrainedTokenizerFast:
    """What FlagEmbedding's class asks for; batches hold ids already."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"Yes": 0}, unk_token="Yes")))


def build_ours(job: Job) -> MatryoshkaCrossEncoder:
    return MatryoshkaCrossEncoder(
        adapted_model(CostWiseMistralForCausalLM, job),
        method=METHOD,
        tokenizer=any_tokenizer(),
        train_batch_size=job.queries,
        train_group_size=job.group,
    )


def build_baseline(job: Job) -> PaddedCrossEncoder:
    return PaddedCrossEncoder(
        adapted_model(PaddedMistral, job),
        tokenizer=any_tokenizer(),
        train_batch_size=job.queries,
        train_group_size=job.group,
    )


SIDES: dict[str, Callable[[Job], AbsRerankerModel]] = {"ours": build_ours, "baseline": build_baseline}


class Learner:
    """One side, ready to take steps."""

    def __init__(self, job: Job, side: str) -> None:
        self.job = job
        self.batch = make_batch(job)
        self.model = SIDES[side](job).train()
        if job.checkpointing:
            self.model.gradient_checkpointing_enable()
            self.model.enable_input_require_grads()
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=LEARNING_RATE)

    def learn(self, setting: Setting) -> float:
        """Forward and backward; the loss."""
        self.optimizer.zero_grad()
        mixed = self.job.dtype == torch.bfloat16
        with torch.autocast(torch.device(self.job.device).type, torch.bfloat16, enabled=mixed):
            loss = self.model(**self.batch, setting=setting).loss
        loss.backward()
        return loss.item()

    def gradient_norm(self) -> float:
        return float(nn.utils.get_total_norm([weight.grad for weight in self.weights.values()]))

    def step(self, setting: Setting) -> float:
        """Seconds that a whole training step takes."""
        synchronize(self.job.device)
        start = time.perf_counter()
        self.learn(setting)
        self.optimizer.step()
        synchronize(self.job.device)
        return time.perf_counter() - start


def reset_peak(device: str) -> int:
    """Forget the peak so far; bytes in use now."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # elsewhere than on Linux what is measured is how far the steps raise the peak of the whole process
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: str) -> int:
    """Most bytes in use since `reset_peak`: of tensors on a GPU, of the whole process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hand_back_at_once() -> None:
    """Let glibc return what tensors leave, so that the process's memory is that in use and not what it holds back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 65536)


def disagreement(learners: dict[str, Learner], setting: Setting) -> dict[str, float]:
    """How far loss and gradient norm of the sides are apart, relative to the baseline's."""
    loss = {side: learner.learn(setting) for side, learner in learners.items()}
    norm = {side: learner.gradient_norm() for side, learner in learners.items()}
    return {
        "loss": abs(loss["ours"] - loss["baseline"]) / abs(loss["baseline"]),
        "gradient_norm": abs(norm["ours"] - norm["baseline"]) / norm["baseline"],
    }


def measure_time(job: Job) -> dict[str, Any]:
    """Seconds per step of both sides, which take turns, after a pass that warms up and compares them.

    Raises:
        RuntimeError: if they compute different numbers in float32.
    """
    learners = {side: Learner(job, side) for side in SIDES}
    one_per_ratio = {setting.compress_ratio: setting for setting in job.settings}
    apart = [disagreement(learners, setting) for setting in one_per_ratio.values()]
    worst = {name: max(each[name] for each in apart) for name in apart[0]}
    if job.dtype == torch.float32 and not max(worst.values()) <= TOLERANCE:
        raise RuntimeError(f"the two sides compute different numbers, relative differences are {worst}")
    for learner in learners.values():
        learner.optimizer.step()

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for index, setting in enumerate(job.settings):
        for side in sorted(SIDES, reverse=index % 2 == 0):
            seconds[side].append(learners[side].step(setting))
    return {"differences": worst, **{side: summary(values) for side, values in seconds.items()}}


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "total_s": sum(seconds),
        "steps_s": seconds,
    }


def measure_memory(job: Job, side: str) -> dict[str, float]:
    """What the steps of one side need above what lay in memory before them."""
    hand_back_at_once()
    learner = Learner(job, side)
    before = reset_peak(job.device)
    for setting in job.settings:
        learner.step(setting)
    return {"before_mib": before / MIB, "peak_above_mib": (peak_bytes(job.device) - before) / MIB}


def measure_alone(job: Job) -> dict[str, Any]:
    """Ours by itself: tokens per second, memory, and how much of the device's matrix speed the steps reach.

    Arithmetic is counted as it is done, with what gradient checkpointing does twice.
    """
    learner = Learner(job, "ours")
    before = reset_peak(job.device)
    with FlopCounterMode(display=False) as counter:
        for setting in job.settings:
            learner.learn(setting)
    learner.optimizer.step()
    seconds = [learner.step(setting) for setting in job.settings]
    peak = peak_bytes(job.device)
    tokens = int(learner.batch["pair"]["attention_mask"].sum())
    speed = counter.get_total_flops() / sum(seconds)
    del learner
    matrix_speed = matrix_flops_per_second(job.device, job.dtype)
    return {
        "ours": summary(seconds),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens * job.steps / sum(seconds),
        "tflops_per_s": speed / 1e12,
        "matrix_tflops_per_s": matrix_speed / 1e12,
        "share_of_matrix_peak": speed / matrix_speed,
        "before_mib": before / MIB,
        "peak_mib": peak / MIB,
    }


# Running it


def in_fresh_process(measure: Callable[..., dict[str, Any]], job: Job, *args: Any) -> dict[str, Any]:
    """`measure(job, *args)` in a process that has imported what it needs and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flagembedding_matryoshka.finetune.modeling", "peft"])
    with ProcessPoolExecutor(1, context, set_up_process, (job.threads,)) as pool:
        return pool.submit(measure, job, *args).result()


def set_up_process(threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, on names that the trainer uses as well


def compare(job: Job) -> dict[str, Any]:
    """Time and memory of both sides in one setting, and ours as a share of the baseline's."""
    result = in_fresh_process(measure_time, job)
    for side in SIDES:
        result[side] |= in_fresh_process(measure_memory, job, side)
    ours, baseline = result["ours"], result["baseline"]
    return {
        "dtype": str(job.dtype).removeprefix("torch."),
        "gradient_checkpointing": job.checkpointing,
        **result,
        "time_ratio": ours["total_s"] / baseline["total_s"],
        "memory_ratio": ours["peak_above_mib"] / baseline["peak_above_mib"],
    }


def compare_all(job: Job) -> dict[str, Any]:
    """Every setting, and a row of the table for each."""
    print(f"{'':24}{'seconds per step: median (min–max)':^44}{'':9}{'MiB above the weights':^24}")
    print(
        f"{'dtype, checkpointing':24}{'ours':>22}{'baseline':>22}{'ratio':>9}{'ours':>10}{'baseline':>12}{'ratio':>8}"
    )
    settings, skipped = [], []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and fast_dtype(job.device) != dtype:
            reason = f"this {job.device} has no instructions for bfloat16"
            skipped.append({"dtype": "bfloat16", "reason": reason})
            print(f"bfloat16 is skipped: {reason}.", flush=True)
            continue
        for checkpointing in (False, True):
            result = compare(replace(job, dtype=dtype, checkpointing=checkpointing))
            settings.append(result)
            print(table_row(result), flush=True)
    return {"settings": settings, "skipped": skipped}


def table_row(result: dict[str, Any]) -> str:
    ours, baseline = result["ours"], result["baseline"]
    times = [f"{side['median_s']:.3f} ({side['min_s']:.3f}–{side['max_s']:.3f})" for side in (ours, baseline)]
    setting = f"{result['dtype']}, {'on' if result['gradient_checkpointing'] else 'off'}"
    return (
        f"{setting:24}{times[0]:>22}{times[1]:>22}{result['time_ratio']:>9.2f}"
        f"{ours['peak_above_mib']:>10.0f}{baseline['peak_above_mib']:>12.0f}{result['memory_ratio']:>8.2f}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
