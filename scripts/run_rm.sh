#!/bin/sh
# Reward model from the pairs in data/reward. Makes what is missing: environment, model. Examples:
#   sh scripts/run_rm.sh
#   NPROC=2 sh scripts/run_rm.sh --center_rewards_coefficient 0.01
# Arguments given here come last and win; scripts/env.sh lists the variables it reads.
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

choose_parent sft
launch reward_modeling.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/reward \
    --validation_file_dir data/eval/preferences.jsonl \
    --output_dir "$OUTPUT_ROOT/rm" \
    --do_train \
    --do_eval \
    --max_length "$(by_scale 512 1024)" \
    --num_train_epochs "${EPOCHS:-1}" \
    --per_device_train_batch_size "${BATCH_SIZE:-4}" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --learning_rate "${LEARNING_RATE:-$(by_scale 1e-3 1e-4)}" \
    --warmup_steps 0.05 \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --eval_strategy steps \
    --eval_steps 50 \
    --save_strategy steps \
    --save_steps 50 \
    --save_total_limit 2 \
    --use_peft True \
    --target_modules all \
    --lora_rank "$LORA_RANK" \
    --lora_alpha "$LORA_ALPHA" \
    --lora_dropout 0.05 \
    ${MODULES_TO_SAVE:+--modules_to_save "$MODULES_TO_SAVE"} \
    --activation_checkpointing "$ACTIVATION_CHECKPOINTING" \
    $PRECISION \
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} \
    "$@"
