#!/bin/sh
# Rounds of sampling, choosing, training: the policy answers prompts, the best and the worst answers are kept, and it
# learns from them; the reward model learns from what functions or a person say about them; then again. Examples:
#   sh scripts/run_rounds.sh 2
#   METHOD=sft REWARD_FUNCTIONS=accuracy,format SAMPLING="--min_score 1" sh scripts/run_rounds.sh 3
# It starts from outputs/sft and outputs/rm; round 1 is outputs/rounds/1 (samples, policy, rm), chained to the round
# before. The same command goes on at the first step that is not finished. Arguments after the number go to every
# training. Read beside what scripts/env.sh lists, all optional:
#   METHOD            dpo (on pairs, the default) or sft (on the best answers)
#   REWARD_FUNCTIONS  functions that score the answers instead of the reward model
#   PROMPTS           what is asked (data/finetune; with REWARD_FUNCTIONS data/grpo)
#   NUM_GENERATIONS, MAX_SAMPLES
#                     answers to a prompt; prompts of a round, drawn anew in each
#   SAMPLING          more flags for rejection_sampling.py
set -eu
cd "$(dirname "$0")/.."
rounds=${1:-}
[ $# -eq 0 ] || shift
. scripts/env.sh

# Sample and choose; $samples has summary.json when that is finished.
sample() {
    [ ! -f "$samples/summary.json" ] || return 0
    scorer=$reward
    [ -z "${REWARD_FUNCTIONS:-}" ] || scorer=
    run "$PYTHON" rejection_sampling.py \
        --model_name_or_path "$policy" \
        --data_file "${PROMPTS:-$prompts}" \
        --output_dir "$samples" \
        ${scorer:+--reward_model_path "$scorer"} \
        ${REWARD_FUNCTIONS:+--reward_functions "$REWARD_FUNCTIONS"} \
        --num_generations "${NUM_GENERATIONS:-$(by_scale 4 8)}" \
        --max_samples "${MAX_SAMPLES:-$(by_scale 64 512)}" \
        --max_prompt_length "$(by_scale 256 512)" \
        --max_new_tokens "$(by_scale 48 256)" \
        --batch_size "$(by_scale 16 8)" \
        --seed "$round" \
        ${SAMPLING:-}
}

# Train the policy on the pairs, those of a person if there are any, or on the best answers.
train() {
    [ ! -f "$directory/policy/stage.json" ] || return 0
    chosen=$samples/sft.jsonl
    if [ "$METHOD" = dpo ]; then
        chosen=$samples/preferences.jsonl
        [ ! -s "$samples/labelled.jsonl" ] || chosen=$samples/labelled.jsonl
    fi
    [ "${DRY_RUN:-}" = 1 ] || [ -s "$chosen" ] ||
        stop "round $round: nothing was kept in $chosen; rm $samples/summary.json, and choose anew with other SAMPLING"
    sh "scripts/run_$METHOD.sh" \
        --model_name_or_path "$policy" \
        --train_file_dir "$chosen" \
        --output_dir "$directory/policy" \
        $(go_on "$directory/policy") \
        "$@"
}

# Train the reward model anew, from where it started, on its own data and all the pairs that others have labelled.
refresh() {
    labelled=$samples/labelled.jsonl
    [ -s "$labelled" ] || [ -z "${REWARD_FUNCTIONS:-}" ] || labelled=$samples/preferences.jsonl
    if [ ! -f "$OUTPUT_ROOT/rm/stage.json" ]; then
        say "round $round: there is no reward model in $OUTPUT_ROOT/rm to refresh"
    elif [ -s "$labelled" ] || [ "${DRY_RUN:-}${REWARD_FUNCTIONS:+ functions}" = "1 functions" ]; then
        pairs=$pairs,$labelled
        [ -f "$directory/rm/stage.json" ] || sh scripts/run_rm.sh \
            --model_name_or_path "$MODEL" \
            --train_file_dir "$pairs" \
            --output_dir "$directory/rm" \
            --use_margin False \
            $(go_on "$directory/rm") \
            "$@"
        reward=$directory/rm
    elif [ -n "${REWARD_FUNCTIONS:-}" ]; then
        say "round $round: there are no pairs, so the reward model stays as it is"
    else
        say "round $round: the reward model stays as it is, since it must not learn from its own choices; to refresh" \
            "it, cp $samples/preferences.jsonl $samples/labelled.jsonl, swap chosen and rejected where they are" \
            "wrong, and give the same command again"
    fi
}

case $rounds in
    '' | 0* | *[!0-9]*) stop "the first argument says how many rounds: sh scripts/run_rounds.sh 2" ;;
esac
: "${METHOD:=dpo}"
case $METHOD in
    dpo | sft) ;;
    *) stop "METHOD must be dpo or sft, got '$METHOD'" ;;
esac
reward=$OUTPUT_ROOT/rm
prompts=data/finetune
if [ -n "${REWARD_FUNCTIONS:-}" ]; then
    prompts=data/grpo
elif [ ! -f "$reward/stage.json" ]; then
    stop "there is no reward model in $reward: sh scripts/run_rm.sh makes one; or REWARD_FUNCTIONS=accuracy scores"
fi
choose_parent sft
policy=$MODEL
pairs=data/reward
round=1
while [ "$round" -le "$rounds" ]; do
    directory=$OUTPUT_ROOT/rounds/$round
    samples=$directory/samples
    say "round $round of $rounds: $directory"
    sample
    train "$@"
    refresh "$@"
    policy=$directory/policy
    round=$((round + 1))
done
run "$PYTHON" -m tools.rounds_table "$OUTPUT_ROOT/rounds"
