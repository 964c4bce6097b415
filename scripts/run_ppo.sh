#!/bin/sh
# Proximal policy optimization against the reward model of run_rm.sh. Makes what is missing: environment, model. Examples:
#   sh scripts/run_ppo.sh
#   NPROC=2 sh scripts/run_ppo.sh --target_kl 3 --max_steps 100
# Arguments given here come last and win; scripts/env.sh lists the variables it reads.
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

choose_parent sft
launch ppo_training.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir data/finetune \
    --validation_file_dir data/eval/questions.jsonl \
    --output_dir "$OUTPUT_ROOT/ppo" \
    --do_train \
    --do_eval \
    --reward_model_path "$OUTPUT_ROOT/rm" \
    --max_prompt_length "$(by_scale 256 512)" \
    --max_completion_length "$(by_scale 48 256)" \
    --num_mini_batches 2 \
    --target_kl "$(by_scale 20 10)" \
    --num_train_epochs "${EPOCHS:-1}" \
    --per_device_train_batch_size "${BATCH_SIZE:-$(by_scale 8 4)}" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --learning_rate "${LEARNING_RATE:-$(by_scale 3e-4 1e-5)}" \
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
