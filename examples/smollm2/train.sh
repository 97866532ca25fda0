#!/usr/bin/env bash
# usage: train.sh DIR OUT [STEPS [DECAY]]     train on DIR/train, which teach.sh wrote, into OUT; in the background, say
# It can be stopped at any time: called again it goes on from the newest checkpoint. Whoever wants to stop earlier than
# STEPS lets the learning rate fall first: called again with STEPS = the steps so far + DECAY.
# On a processor that computes bfloat16 fast; without --bf16 it takes several times as long.
set -euo pipefail
dir=$1 out=$2 steps=${3:-3000} decay=${4:-500}
base=$(python -c 'from flagembedding_matryoshka.checkpoints.gguf import smollm2_base; print(smollm2_base())')
exec torchrun --standalone --nproc_per_node 1 -m flagembedding_matryoshka.finetune --use_cpu True --bf16 \
    --model_name_or_path "$base" --train_data "$dir/train" --output_dir "$out" --cache_path "$out.cache" \
    --exits 6 9 12 15 18 --exit_weights 0.4 0.6 0.8 0.8 1 --compress_layers 3 6 9 --compress_ratios 1 1 2 4 \
    --train_method distill_final_layer_teacher --knowledge_distillation True --random_negatives 0.4 \
    --lora_rank 16 --lora_alpha 32 --per_device_train_batch_size 4 --train_group_size 8 --query_max_len 64 \
    --passage_max_len 128 --learning_rate 7e-4 --warmup_steps 60 --lr_scheduler_type warmup_stable_decay \
    --lr_scheduler_kwargs "{\"num_decay_steps\": $decay}" --max_steps "$steps" --ddp_find_unused_parameters False \
    --logging_steps 10 --save_strategy steps --save_steps 50 --save_total_limit 3 --report_to none --seed 1 \
    --resume_from_checkpoint
