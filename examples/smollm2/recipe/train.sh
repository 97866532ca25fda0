#!/usr/bin/env bash
# usage: train.sh DATA FROM OUT STEPS [DECAY [SEED [PASSAGE_TOKENS [OPTION...]]]]
# Train the adapters in FROM further on the rows in DATA, DIR/short or DIR/long of mix.py. FROM is the output of widen.py,
# write.py or train.sh; its exits stay. FROM is "-" for new adapters on the base.
# STEPS must be more than 150: four states are averaged, and a checkpoint is written every 50 steps.
# The run can be stopped at any time: called again it continues from the newest checkpoint. To end it earlier, call it
# again with STEPS = the steps so far + DECAY: the learning rate falls in the last DECAY steps.
# OPTIONs are passed to the trainer, after those below: --store_layers 3 6 9 trains for stored passages.
# --bf16 needs a processor that computes bfloat16 fast; without it a run takes several times as long.
set -euo pipefail
data=$1 from=$2 out=$3 steps=$4 decay=${5:-400} seed=${6:-1} tokens=${7:-128}
base=$(python -c 'from flagembedding_matryoshka.checkpoints.gguf import smollm2_base; print(smollm2_base())')
[ "$from" = - ] && adapters=(--lora_rank 32 --lora_alpha 64 --learning_rate 7e-4) || adapters=(--from_peft "$from" --learning_rate 2e-4)
exec torchrun --standalone --nproc_per_node 1 -m flagembedding_matryoshka.finetune --use_cpu True --bf16 \
    --model_name_or_path "$base" "${adapters[@]}" --train_data "$data" --output_dir "$out" --cache_path "$out.cache" \
    --exits 6 9 12 15 18 --exit_weights 0.4 0.6 0.8 0.8 1 --compress_layers 3 6 9 --compress_ratios 1 1 2 4 \
    --train_method distill_final_layer_teacher --knowledge_distillation True --random_negatives 0.15 \
    --per_device_train_batch_size 4 --train_group_size 8 --query_max_len 96 \
    --passage_max_len "$tokens" --warmup_steps 40 --lr_scheduler_type warmup_stable_decay \
    --lr_scheduler_kwargs "{\"num_decay_steps\": $decay}" --max_steps "$steps" --ddp_find_unused_parameters False \
    --logging_steps 10 --save_strategy steps --save_steps 50 --save_total_limit 4 --average_last 4 --report_to none \
    --seed "$seed" --resume_from_checkpoint "${@:8}"
