#!/usr/bin/env bash
# usage: mine.sh DIR      the collections of DIR, as collect.py wrote them, to training rows in DIR/rows
# Negatives are what BM25 and a bi-encoder (BI_ENCODER, all-MiniLM-L6-v2 if not set) rank first; a row file that is
# complete is not made again.
set -euo pipefail
dir=$1
mkdir -p "$dir/rows"
for qrels in "$dir"/*/qrels/train.tsv; do
    collection=$(dirname "$(dirname "$qrels")")
    rows=$dir/rows/$(basename "$collection").mined.jsonl length=128
    [ "$(basename "$collection")" != articles ] || length=256
    [ -f "$rows" ] || python -m flagembedding_matryoshka.finetune.hard_negatives --data "$collection" --output "$rows" \
        --miner both --bi_encoder "${BI_ENCODER:-$(python "$(dirname "$0")/bi_encoder.py")}" --max_length $length --use_bf16 \
        --first 1 --last 40 --negatives 10
done
