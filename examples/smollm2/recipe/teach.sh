#!/usr/bin/env bash
# usage: teach.sh DIR     add teacher scores to the rows of mine.sh: DIR/taught
# The teacher is 20 × cosine of the bi-encoder + WEIGHT × BM25. weigh.py measures weights on the dev queries of each kind.
# Negatives with a score more than 2 above the positive's are probably relevant and are dropped.
set -euo pipefail
dir=$1
declare -A weight=([titles]=0.8 [phrases]=0.9 [abstracts]=0.9 [notes]=0.5 [sentences]=0.9 [wikipedia]=1)
mkdir -p "$dir/taught"
for mined in "$dir"/rows/*.mined.jsonl; do
    kind=$(basename "$mined" .mined.jsonl)
    scored=$dir/rows/$kind.scored.jsonl taught=$dir/taught/$kind.jsonl length=160
    [ "$kind" != articles ] || length=256
    [ -f "$scored" ] || python -m flagembedding_matryoshka.finetune.teacher_scores --input "$mined" --output "$scored" \
        --backend bi_encoder --model "${BI_ENCODER:-$(python "$(dirname "$0")/bi_encoder.py")}" --scale 20 --max_length $length --use_bf16
    [ -f "$taught" ] || python -m flagembedding_matryoshka.finetune.teacher_scores --input "$scored" --output "$taught" \
        --backend bm25 --scale "${weight[$kind]:-0.6}" --add --drop_margin=-2 --raise_positive 1
done
