#!/usr/bin/env bash
# usage: mine.sh DIR      make training rows, DIR/rows, from the collections that collect.py wrote to DIR
# Negatives are the first passages of BM25 and of a bi-encoder (BI_ENCODER, default all-MiniLM-L6-v2). Complete files are
# skipped.
set -euo pipefail
dir=$1
mkdir -p "$dir/rows"
for qrels in "$dir"/*/qrels/train.tsv; do
    collection=$(dirname "$(dirname "$qrels")")
    rows=$dir/rows/$(basename "$collection").mined.jsonl length=160
    [ "$(basename "$collection")" != articles ] || length=256
    [ -f "$rows" ] || python -m flagembedding_matryoshka.finetune.hard_negatives --data "$collection" --output "$rows" \
        --miner both --bi_encoder "${BI_ENCODER:-$(python "$(dirname "$0")/bi_encoder.py")}" --max_length $length --use_bf16 \
        --first 1 --last 40 --negatives 12
done
