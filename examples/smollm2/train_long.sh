#!/usr/bin/env bash
# usage: train_long.sh DIR FROM OUT [STEPS [DECAY [SEED]]]   go on training the adapters in FROM, on long passages too
# FROM is what train.sh, write.py or train_long.sh itself wrote; its exits stay. The rows are DIR/train_long, articles whose
# passages have 130 to 300 words, and a part of each other kind, most of what has most to teach. It can be stopped and
# called again like train.sh; each time that it goes on from another FROM needs another SEED.
set -euo pipefail
dir=$1 from=$2 out=$3 steps=${4:-720} decay=${5:-250} seed=${6:-2}
while read -r kind count; do
    [ ! -f "$dir/train/$kind.jsonl" ] || tail -n "$count" "$dir/train/$kind.jsonl" > "$dir/train_long/$kind.jsonl"
done <<< $'code 2280\ndocstrings 2000\nsentences 1200\nsections 800\npackages 300\nglosses 300'
base=$(python -c 'from flagembedding_matryoshka.checkpoints.gguf import smollm2_base; print(smollm2_base())')
exits=$(python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["exits"])' "$from/config.json")
weights=([6]=0.4 [9]=0.5 [12]=0.8 [15]=0.8 [18]=1)
exec torchrun --standalone --nproc_per_node 1 -m flagembedding_matryoshka.finetune --use_cpu True --bf16 \
    --model_name_or_path "$base" --from_peft "$from" --train_data "$dir/train_long" --output_dir "$out" \
    --cache_path "$out.cache" --exits $exits \
    --exit_weights $(for layer in $exits; do echo "${weights[layer]}"; done) --compress_layers 3 6 9 --compress_ratios 1 1 2 4 \
    --train_method distill_final_layer_teacher --knowledge_distillation True --random_negatives 0.4 \
    --lora_rank 16 --lora_alpha 32 --per_device_train_batch_size 4 --train_group_size 8 --query_max_len 96 \
    --passage_max_len 320 --learning_rate 4e-4 --warmup_steps 30 --lr_scheduler_type warmup_stable_decay \
    --lr_scheduler_kwargs "{\"num_decay_steps\": $decay}" --max_steps "$steps" --ddp_find_unused_parameters False \
    --logging_steps 10 --save_strategy steps --save_steps 50 --save_total_limit 3 --report_to none --seed "$seed" \
    --resume_from_checkpoint
