#!/bin/sh
# The whole way: PT, SFT, RM, PPO and, from SFT, DPO, ORPO, GRPO. Each is measured on the same held-out data, and
# outputs/report.html says what each of them brought. Examples:
#   sh scripts/run_pipeline.sh
#   STAGES="sft dpo" BASE_MODEL=Qwen/Qwen3-0.6B-Base sh scripts/run_pipeline.sh
# The same command goes on at the first step that is not finished. Arguments go to every training. Read beside what
# scripts/env.sh lists, all optional:
#   STAGES     which of them (pt sft rm ppo dpo orpo grpo)
#   EVAL_DATA  files or directories to measure on (data/eval)
#   EVALUATE   0 measures nothing
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

# measure DIRECTORY MODEL_FLAGS: answer, score and judge the held-out data, unless that is done.
measure() {
    [ "${EVALUATE:-1}" != 0 ] && [ ! -f "$1/results.json" ] || return 0
    say "pipeline: measuring for $1"
    results=$1
    shift
    run "$PYTHON" eval_benchmark.py \
        "$@" \
        --data_file "${EVAL_DATA:-data/eval}" \
        --output_dir "$results" \
        --max_new_tokens "$(by_scale 96 512)" \
        --batch_size "$(by_scale 32 8)"
}

# reward_model: print the flag that has answers scored, if there is a reward model.
reward_model() {
    [ ! -f "$OUTPUT_ROOT/rm/stage.json" ] && [ "${DRY_RUN:-}" != 1 ] || echo --reward_model "$OUTPUT_ROOT/rm"
}

: "${STAGES:=pt sft rm ppo dpo orpo grpo}"
for stage in $STAGES; do
    case $stage in
        pt | sft | rm | ppo | dpo | orpo | grpo) ;;
        *) stop "STAGES names '$stage'; known: pt sft rm ppo dpo orpo grpo" ;;
    esac
done
case " $STAGES " in
    *" ppo "*"rm "*) stop "STAGES: ppo needs the reward model of rm, so rm comes before it" ;;
esac
choose_base
base=$MODEL
for stage in $STAGES; do
    directory=$OUTPUT_ROOT/$stage
    [ ! -f "$directory/stage.json" ] || continue
    say "pipeline: $stage"
    # what shows the way on the starter, in minutes
    case $SCALE-$stage in
        starter-sft) limit="--num_train_epochs 6" ;;
        starter-ppo | starter-grpo) limit="--max_steps 40" ;;
        *) limit= ;;
    esac
    sh "scripts/run_$stage.sh" $(go_on "$directory") $limit "$@"
done
for stage in $STAGES; do
    directory=$OUTPUT_ROOT/$stage
    case $stage in
        rm) measure "$directory/eval" --lora_model "$directory" ;;
        *) measure "$directory/eval" --lora_model "$directory" $(reward_model) ;;
    esac
done
case $base in
    "$OUTPUT_ROOT"/*) measure "$base/eval" --base_model "$base" $(reward_model) ;;
    *) measure "$OUTPUT_ROOT/base/eval" --base_model "$base" $(reward_model) ;;
esac
run "$PYTHON" -m tools.report "$OUTPUT_ROOT"
