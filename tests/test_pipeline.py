"""scripts/run_pipeline.sh: what follows what, with a recorder in Python's place."""

import hashlib
import json

import pytest
from test_rounds import record

OWN = ("STAGES", "EVAL_DATA", "EVALUATE")
SCRIPTS = {
    **{"pt": "pretraining.py", "sft": "supervised_finetuning.py", "rm": "reward_modeling.py"},
    **{name: f"{name}_training.py" for name in ("ppo", "dpo", "orpo", "grpo")},
}
# Stands for Python: notes its arguments, and leaves behind what tells that the step is finished.
RECORDER = """
case $1 in -c) exec "{python}" "$@" ;; esac
echo "$*" >>"{calls}"
case "$*" in *"$FAIL"*) exit 7 ;; *"$NOT_FOR"*) exit 3 ;; esac
script=$1
while [ $# -gt 0 ]; do
    [ "$1" != --output_dir ] || out=$2
    [ "$1" != --data_file ] || data=$2
    shift
done
case $script in
    eval_benchmark.py) mkdir -p "$out"
        echo '{{"settings": {{"data_file": "'"$data"'"}}, "tasks": {{}}}}' >"$out/results.json" ;;
    *.py) mkdir -p "$out"; echo '{{"base_model": {{"name_or_path": "a/b"}}}}' >"$out/stage.json" ;;
esac
"""


@pytest.fixture
def pipeline(tmp_path):
    """See record."""
    return record(tmp_path, "scripts/run_pipeline.sh", RECORDER, OWN, BASE_MODEL="a/b", NOT_FOR="no such model")


def names(calls):
    return [each["script"] for each in calls]


def test_every_stage_is_trained_then_measured_then_reported(pipeline):
    calls = pipeline.run()
    assert names(calls) == [*SCRIPTS.values(), *["eval_benchmark.py"] * 8, "tools.report"]
    trained = {name: each for name, each in zip(SCRIPTS, calls, strict=False)}
    assert trained["pt"]["model_name_or_path"] == "a/b"
    assert trained["sft"]["model_name_or_path"] == f"{pipeline.outputs}/pt"
    for name in ("rm", "ppo", "dpo", "orpo", "grpo"):
        assert trained[name]["model_name_or_path"] == f"{pipeline.outputs}/sft", name
    assert trained["ppo"]["reward_model_path"] == f"{pipeline.outputs}/rm"


def test_each_is_measured_on_the_same_data_and_scored_by_the_reward_model(pipeline):
    measured = [each for each in pipeline.run() if each["script"] == "eval_benchmark.py"]
    assert {each["data_file"] for each in measured} == {"data/eval"}
    # whether it is an adapter or, after --use_peft False, a whole model
    assert [each["base_model"] for each in measured] == [*(f"{pipeline.outputs}/{name}" for name in SCRIPTS), "a/b"]
    assert [each["output_dir"] for each in measured] == [
        f"{pipeline.outputs}/{name}/eval" for name in (*SCRIPTS, "base")
    ]
    scored = [each.get("reward_model") for each in measured]
    assert scored == [f"{pipeline.outputs}/rm" if name != "rm" else None for name in (*SCRIPTS, "base")]


def test_what_is_finished_is_not_done_again(pipeline):
    pipeline.run()
    assert names(pipeline.run()) == ["tools.report"]
    (pipeline.outputs / "dpo" / "stage.json").unlink()
    (pipeline.outputs / "dpo" / "eval" / "results.json").unlink()
    again = pipeline.run()
    assert names(again) == ["dpo_training.py", "eval_benchmark.py", "tools.report"]
    assert again[0]["overwrite_output_dir"] == "True"


def test_other_data_are_measured_anew(pipeline, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("{}")
    own = {"STAGES": "sft dpo", "EVAL_DATA": str(data)}
    pipeline.run(STAGES="sft dpo")
    assert names(pipeline.run(**own)) == [*["eval_benchmark.py"] * 3, "tools.report"]
    assert names(pipeline.run(**own)) == ["tools.report"]
    results = {"settings": {"data_file": str(data)}}
    results["tasks"] = {"q": {"data_file": str(data), "sha256": hashlib.sha256(b"{}").hexdigest()}}
    (pipeline.outputs / "dpo/eval/results.json").write_text(json.dumps(results))
    assert names(pipeline.run(**own)) == ["tools.report"]
    data.write_text('{"more": 1}')
    found = pipeline.run(**own)
    assert names(found) == ["eval_benchmark.py", "tools.report"]
    assert found[0]["base_model"] == f"{pipeline.outputs}/dpo"


def test_what_the_data_hold_nothing_for_is_not_measured_and_the_rest_goes_on(pipeline):
    calls = pipeline.run(NOT_FOR="/rm --data_file", STAGES="sft rm dpo")
    assert names(calls)[3:] == [*["eval_benchmark.py"] * 4, "tools.report"]
    line = f"pipeline: EVAL_DATA holds nothing for this kind of model; {pipeline.outputs}/rm/eval stays as it is"
    assert line in pipeline.printed.splitlines()
    assert not (pipeline.outputs / "rm/eval").exists() and (pipeline.outputs / "dpo/eval/results.json").exists()


def test_directories_may_have_a_blank_in_their_name(pipeline, tmp_path):
    root = tmp_path / "my outputs"
    pipeline.run(DRY_RUN="1", OUTPUT_ROOT=str(root))
    for flag, name in (("--base_model", "ppo"), ("--reward_model", "rm"), ("--output_dir", "ppo/eval")):
        assert f"\n{flag}\n{root}/{name}\n" in pipeline.printed


@pytest.mark.parametrize("failing", ["reward_modeling.py", "eval_benchmark.py", "tools.report"])
def test_a_step_that_fails_ends_it_and_is_the_first_one_next_time(pipeline, failing):
    whole = [*SCRIPTS.values(), *["eval_benchmark.py"] * 8, "tools.report"]
    calls = pipeline.run(FAIL=failing, code=7)
    assert names(calls) == whole[: len(calls)] and names(calls)[-1] == failing
    assert names(pipeline.run())[0] == failing


def test_an_interrupted_training_goes_on_from_its_checkpoint(pipeline):
    pipeline.run(STAGES="sft", EVALUATE="0")
    (pipeline.outputs / "sft" / "stage.json").unlink()
    (pipeline.outputs / "sft" / "checkpoint-5").mkdir()
    (pipeline.outputs / "sft" / "checkpoint-5" / "complete.json").write_text("{}")
    assert pipeline.run(STAGES="sft", EVALUATE="0")[0]["resume_from_checkpoint"] == "True"


def test_some_stages_can_be_chosen_and_nothing_measured(pipeline):
    calls = pipeline.run("--max_steps", "3", STAGES="sft dpo", EVALUATE="0")
    assert names(calls) == ["supervised_finetuning.py", "dpo_training.py", "tools.report"]
    assert calls[0]["max_steps"] == calls[1]["max_steps"] == "3"
    assert calls[0]["model_name_or_path"] == "a/b"


def test_without_a_reward_model_answers_are_not_scored(pipeline):
    calls = pipeline.run(STAGES="sft", EVAL_DATA="my/questions.jsonl")
    assert names(calls) == ["supervised_finetuning.py", *["eval_benchmark.py"] * 2, "tools.report"]
    assert all("reward_model" not in each and each["data_file"] == "my/questions.jsonl" for each in calls[1:3])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("sft dbo", "STAGES names 'dbo'; known: pt sft rm ppo dpo orpo grpo"),
        ("ppo rm", "STAGES: ppo needs the reward model of rm, so rm comes before it"),
    ],
)
def test_a_wrong_list_of_stages_is_refused_in_one_line(pipeline, stages, message):
    assert pipeline.run(STAGES=stages, code=2) == []
    assert message in pipeline.printed


def test_a_dry_run_shows_every_command_and_does_nothing(pipeline):
    assert pipeline.run(DRY_RUN="1") == []
    for script in (*SCRIPTS.values(), "eval_benchmark.py", "tools.report"):
        assert f"\n{script}\n" in pipeline.printed
    assert not pipeline.outputs.exists()
