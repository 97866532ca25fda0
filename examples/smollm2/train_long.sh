#!/usr/bin/env bash
# usage: train_long.sh DIR STAGE1 OUT [STEPS [DECAY]]   go on training what train.sh wrote, on long passages too
# The rows of DIR/train_long are articles, whose passages have 130 to 300 words; 600 of each other kind join them.
# It can be stopped and called again like train.sh.
set -euo pipefail
dir=$1 stage1=$2 out=$3 steps=${4:-700} decay=${5:-250}
for rows in "$dir"/train/*.jsonl; do
    tail -n 600 "$rows" > "$dir/train_long/$(basename "$rows")"
done
base=$(python -c 'from flagembedding_matryoshka.gguf import smollm2_base; print(smollm2_base())')
exec torchrun --standalone --nproc_per_node 1 -m flagembedding_matryoshka.finetune --use_cpu True --bf16 \
    --model_name_or_path "$base" --from_peft "$stage1" --train_data "$dir/train_long" --output_dir "$out" \
    --cache_path "$out.cache" --exits 6 9 12 15 18 --exit_weights 0.4 0.6 0.8 0.8 1 --compress_layers 3 6 9 \
    --compress_ratios 1 1 2 4 --train_method distill_final_layer_teacher --knowledge_distillation True \
    --random_negatives 0.4 --lora_rank 16 --lora_alpha 32 --per_device_train_batch_size 4 --train_group_size 8 \
    --query_max_len 96 --passage_max_len 320 --learning_rate 4e-4 --warmup_steps 30 \
    --lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs "{\"num_decay_steps\": $decay}" \
    --max_steps "$steps" --ddp_find_unused_parameters False --logging_steps 10 --save_strategy steps --save_steps 50 \
    --save_total_limit 3 --report_to none --seed 2 --resume_from_checkpoint
