"""Fine-tune tiny re-rankers with FlagEmbedding's own runners and score pairs with its own classes.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install FlagEmbedding==1.3.5 transformers==4.44.2 peft==0.12.0 "accelerate<1.2" \
        protobuf sentencepiece
    ENV/bin/python tests/flagembedding_finetunes/recipe.py --output_dir DIR

The environment is separate because FlagEmbedding's MiniCPM code runs on transformers 4.44 only. The recipe uses nothing
of this package. It takes about 40 seconds on one CPU core. README.md lists the files it writes.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import FlagEmbedding
import sentencepiece
import torch
from FlagEmbedding import FlagLLMReranker, LayerWiseFlagLLMReranker
from FlagEmbedding.inference.reranker.decoder_only.models.configuration_minicpm_reranker import LayerWiseMiniCPMConfig
from FlagEmbedding.inference.reranker.decoder_only.models.modeling_minicpm_reranker import LayerWiseMiniCPMForCausalLM
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer, MistralConfig, MistralForCausalLM

PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
WORDS = [
    "wing",
    "lift",
    "air",
    "flow",
    "heat",
    "flux",
    "shock",
    "wave",
    "layer",
    "plate",
    "body",
    "drag",
    "jet",
    "nose",
]
SENTENCES = [
    "The {0} of a {1} is measured in a {2}.",
    "A {1} with {0} behind the {2}!",
    "What {0} does the {1} have, {2} or none?",
]
START_LAYER, LAYERS = 2, 4
LENGTHS = {"query_max_length": 24, "max_length": 96}
REMOTE_CODE = ("configuration_minicpm_reranker.py", "modeling_minicpm_reranker.py")
KEPT = ("config.json", "adapter_config.json", "special_tokens_map.json")
KEPT += ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")

RUNS = {
    # The arguments of FlagEmbedding's examples: LoRA on attention, the heads trained whole.
    "layerwise": ("layerwise", "layerwise_base", ["q_proj", "k_proj", "v_proj", "o_proj"], ["linear_head"]),
    # LoRA on the heads as well.
    "layerwise_lora_heads": ("layerwise", "layerwise_base", ["q_proj", "v_proj", "linear_head"], []),
    # A raw language model; the modules are the runner's default.
    "plain": ("base", "plain_base", [], []),
}
"""Each run's runner, base, target modules and modules to save."""


def sentence(draw: random.Random, word: str) -> str:
    return draw.choice(SENTENCES).format(word, *draw.sample(WORDS, 2))


def training_rows(count: int) -> list[dict]:
    """Rows of a query, one passage about the query's word and three passages about other words."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        word, *others = draw.sample(WORDS, 4)
        rows.append(
            {
                "query": f"what about the {word}",
                "pos": [sentence(draw, word)],
                "neg": [sentence(draw, other) for other in others],
            }
        )
    return rows


def scored_pairs() -> list[tuple[str, str]]:
    """Twelve pairs: ordinary ones, an empty query, an empty passage, other scripts, and texts that are cut."""
    draw = random.Random(1)
    pairs = [(f"what about the {draw.choice(WORDS)}", sentence(draw, draw.choice(WORDS))) for _ in range(7)]
    long = " ".join(sentence(draw, word) for word in WORDS)
    return [
        *pairs,
        ("", "a wing"),
        ("what lifts", ""),
        ("größe der 翼", "Größe:\n\n 12 №"),
        ("wing", long),
        (long, long),
    ]


def write_tokenizer(directory: Path, texts: list[str]) -> LlamaTokenizer:
    """A SentencePiece vocabulary with byte fallback, as MiniCPM's and Mistral's, in which "Yes" is one token."""
    file = directory / "tokenizer.model"
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*texts * 3, *["Yes"] * 500]), model_writer=model, vocab_size=352, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity", num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    tokenizer = LlamaTokenizer(str(file), legacy=True, pad_token="<unk>")
    assert len(tokenizer("Yes", add_special_tokens=False)["input_ids"]) == 1
    return tokenizer


def write_bases(directory: Path, tokenizer: LlamaTokenizer) -> None:
    """The two random checkpoints that are fine-tuned, in float16 on disk: FlagEmbedding reads them into float32."""
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    layerwise = LayerWiseMiniCPMConfig(
        **common, num_key_value_heads=2, scale_emb=4, scale_depth=1.4, dim_model_base=4, start_layer=START_LAYER,
        head_multi=True, head_type="simple",
    )  # fmt: skip
    layerwise.auto_map = {
        "AutoConfig": "configuration_minicpm_reranker.LayerWiseMiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm_reranker.LayerWiseMiniCPMForCausalLM",
    }
    plain = MistralConfig(**common, num_key_value_heads=1, sliding_window=None)
    models = {"layerwise_base": LayerWiseMiniCPMForCausalLM(layerwise), "plain_base": MistralForCausalLM(plain)}
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms, which start as ones
                    parameter += 0.3 * torch.randn_like(parameter)
        model.half().save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    remote_code = Path(FlagEmbedding.__file__).parent / "finetune/reranker/decoder_only/layerwise"
    for name in REMOTE_CODE:
        shutil.copy(remote_code / name, directory / "layerwise_base" / name)


def fine_tune(directory: Path, name: str) -> None:
    """Run FlagEmbedding's runner in `directory`, so that an adapter notes its base by a relative path."""
    runner, base, target_modules, modules_to_save = RUNS[name]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", "29611",
        "-m", f"FlagEmbedding.finetune.reranker.decoder_only.{runner}", "--model_name_or_path", base,
        "--output_dir", name, "--train_data", "train.jsonl", "--cache_path", "cache", "--trust_remote_code", "True",
        "--use_lora", "True", "--lora_rank", "4", "--lora_alpha", "8", "--lora_dropout", "0",
        "--save_merged_lora_model", "True", "--learning_rate", "2e-2", "--max_steps", "12", "--weight_decay", "0.01",
        "--per_device_train_batch_size", "4", "--train_group_size", "4", "--query_max_len", "24",
        "--query_instruction_for_rerank", "A: ", "--passage_instruction_for_rerank", "B: ",
        "--passage_max_len", "160", "--logging_steps", "4", "--save_steps", "1000", "--warmup_ratio", "0.1",
        "--model_type", "from_finetuned_model" if runner == "layerwise" else "decoder", "--use_cpu", "True",
        "--ddp_backend", "gloo", "--report_to", "none",
    ]  # fmt: skip
    command += ["--start_layer", str(START_LAYER)] if runner == "layerwise" else []
    command += ["--target_modules", *target_modules] if target_modules else []
    command += ["--modules_to_save", *modules_to_save] if modules_to_save else []
    # The adapter_config.json lists its modules in the order of a set.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_MODULES_CACHE": str(directory / "modules")}
    subprocess.run(command, cwd=directory, check=True, env=os.environ | environment)


def scores(name: str, base: str, peft_path: str | None = None) -> list[list[float]]:
    """`compute_score` of FlagEmbedding in float32, (exits, pairs); of a plain model the only exit is the last layer."""
    is_layerwise = RUNS[name][0] == "layerwise"
    kind = LayerWiseFlagLLMReranker if is_layerwise else FlagLLMReranker
    options = {"cutoff_layers": list(range(START_LAYER, LAYERS + 1))} if is_layerwise else {}
    reranker = kind(base, peft_path=peft_path, devices="cpu", batch_size=1, **LENGTHS)
    reranker.use_fp16 = False
    assert next(reranker.model.parameters()).dtype == torch.float32
    found = reranker.compute_score(scored_pairs(), **options)
    return found if is_layerwise else [found]


def collect(source: Path, target: Path) -> None:
    """Copy a directory's configuration, tokenizer and weights. Leave out code, training arguments and merged models."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.name in KEPT:
            shutil.copy(file, target / file.name)
        elif file.suffix == ".safetensors":
            save_file(load_file(file), target / file.name, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="a new directory")
    output = parser.parse_args().output_dir.absolute()
    work = output / "work"
    work.mkdir(parents=True)
    rows = training_rows(64)
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [text for row in rows for text in ("A: " + row["query"], *row["pos"], "B: " + row["neg"][0], PROMPT)]
    write_bases(work, write_tokenizer(work, texts))
    os.chdir(work)
    found = {"pairs": scored_pairs(), "prompt": PROMPT, **LENGTHS, "exits": list(range(START_LAYER, LAYERS + 1))}
    found["scores"] = {}
    for name, (_, base, _, _) in RUNS.items():
        fine_tune(work, name)
        found["scores"][name] = {
            "base": scores(name, base),
            "adapter": scores(name, base, peft_path=name),
            "merged": scores(name, f"{name}/merged_model"),
        }
    for name in ("layerwise_base", "plain_base", *RUNS):
        collect(work / name, output / name)
    for name in ("layerwise", "plain"):
        collect(work / name / "merged_model", output / f"{name}_merged")
    (output / "scores.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
