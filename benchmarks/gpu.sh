#!/usr/bin/env bash
# From the repository's root:  benchmarks/gpu.sh [DIRECTORY FOR RESULTS] [OPTIONS OF benchmarks.gpu]
# On a machine with a card it runs the tests that need one, which check scores against float32, and then all
# measurements (python -m benchmarks.gpu --help). With --dry_run it lists these tests and measures tiny shapes on a CPU.
set -euo pipefail
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
only=()
if [[ " $* " == *" --dry_run "* ]]; then only=(--collect-only); fi
"$python" -m pytest -q -m gpu "${only[@]}" tests
"$python" -m benchmarks.gpu --output "$results" "${@:2}"
