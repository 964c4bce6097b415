#!/bin/sh
# Group relative policy optimization on verifiable questions, scored by functions. Makes what is missing. Examples:
#   sh scripts/run_grpo.sh
#   sh scripts/run_grpo.sh --reward_functions accuracy,format --beta 0.04
# Arguments given here come last and win; scripts/env.sh lists the variables it reads.
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

choose_parent sft
launch grpo_training.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/grpo \
    --validation_file_dir data/eval/verifiable.jsonl \
    --output_dir "$OUTPUT_ROOT/grpo" \
    --do_train \
    --do_eval \
    --reward_functions accuracy,language \
    --num_generations 8 \
    --max_prompt_length "$(by_scale 256 512)" \
    --max_completion_length "$(by_scale 48 512)" \
    --num_train_epochs "${EPOCHS:-1}" \
    --per_device_train_batch_size "${BATCH_SIZE:-$(by_scale 16 8)}" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --learning_rate "${LEARNING_RATE:-$(by_scale 1e-3 1e-5)}" \
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
