#!/bin/sh
# Continued pretraining on the texts in data/pretrain. Makes what is missing: environment, model. Examples:
#   sh scripts/run_pt.sh
#   BASE_MODEL=Qwen/Qwen3-4B-Base sh scripts/run_pt.sh --train_file_dir /path/to/texts
# Arguments given here come last and win; scripts/env.sh lists the variables it reads.
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

choose_base
launch pretraining.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/pretrain \
    --output_dir "$OUTPUT_ROOT/pt" \
    --do_train \
    --do_eval \
    --block_size "$(by_scale 512 1024)" \
    --num_train_epochs "${EPOCHS:-$(by_scale 3 1)}" \
    --per_device_train_batch_size "${BATCH_SIZE:-$(by_scale 2 4)}" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --learning_rate "${LEARNING_RATE:-$(by_scale 3e-3 2e-4)}" \
    --warmup_steps 0.05 \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --eval_strategy steps \
    --eval_steps 100 \
    --save_strategy steps \
    --save_steps 100 \
    --save_total_limit 2 \
    --use_peft True \
    --target_modules all \
    --lora_rank "$LORA_RANK" \
    --lora_alpha "$LORA_ALPHA" \
    --lora_dropout "$(by_scale 0.1 0.05)" \
    ${MODULES_TO_SAVE:+--modules_to_save "$MODULES_TO_SAVE"} \
    --activation_checkpointing "$ACTIVATION_CHECKPOINTING" \
    $PRECISION \
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
    "$@"
