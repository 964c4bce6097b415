#!/bin/sh
# The whole way: PT, SFT, RM, PPO and, from SFT, DPO, ORPO, GRPO. Each is measured on the same held-out data, and
# outputs/report.html says what each of them brought. Examples:
#   sh scripts/run_pipeline.sh
#   STAGES="sft dpo" BASE_MODEL=Qwen/Qwen3-0.6B-Base sh scripts/run_pipeline.sh
# The same command goes on at the first step that is not finished. Arguments go to every training. Read beside what
# scripts/env.sh lists, all optional:
#   STAGES     which of them (pt sft rm ppo dpo orpo grpo)
#   EVAL_DATA  files or directories to measure on (data/eval); others, or changed ones, are measured anew
#   EVALUATE   0 measures nothing
set -eu
cd "$(dirname "$0")/.."
. scripts/env.sh

# is_measured RESULTS: whether that file holds what was found on the held-out data, as these are now.
is_measured() {
    [ -f "$1" ] && "$PYTHON" -c '
import hashlib, json, sys

try:
    with open(sys.argv[1], encoding="utf-8") as stream:
        results = json.load(stream)
    for task in results["tasks"].values():
        with open(task["data_file"], "rb") as stream:
            if hashlib.sha256(stream.read()).hexdigest() != task["sha256"]:
                sys.exit(1)
    sys.exit(results["settings"]["data_file"] != sys.argv[2])
except (OSError, ValueError, KeyError, TypeError, AttributeError):
    sys.exit(1)
' "$1" "${EVAL_DATA:-data/eval}"
}

# measure MODEL DIRECTORY [REWARD_MODEL]: answer, score and judge the held-out data, unless that is done.
measure() {
    [ "${EVALUATE:-1}" != 0 ] && ! is_measured "$2/results.json" || return 0
    say "pipeline: measuring for $2"
    status=0
    run "$PYTHON" eval_benchmark.py \
        --base_model "$1" \
        --data_file "${EVAL_DATA:-data/eval}" \
        --output_dir "$2" \
        --max_new_tokens "$(by_scale 96 512)" \
        --batch_size "$(by_scale 32 8)" \
        ${3:+--reward_model "$3"} || status=$?
    case $status in
        0) ;;
        3) say "pipeline: EVAL_DATA holds nothing for this kind of model; $2 stays as it is" ;;
        *) exit "$status" ;;
    esac
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
reward=$OUTPUT_ROOT/rm
[ -f "$reward/stage.json" ] || [ "${DRY_RUN:-}" = 1 ] || reward=
for stage in $STAGES; do
    directory=$OUTPUT_ROOT/$stage
    case $stage in
        rm) measure "$directory" "$directory/eval" ;;
        *) measure "$directory" "$directory/eval" "$reward" ;;
    esac
done
case $base in
    "$OUTPUT_ROOT"/*) measure "$base" "$base/eval" "$reward" ;;
    *) measure "$base" "$OUTPUT_ROOT/base/eval" "$reward" ;;
esac
run "$PYTHON" -m tools.report "$OUTPUT_ROOT"
