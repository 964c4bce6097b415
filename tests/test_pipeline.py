"""scripts/run_pipeline.sh: what follows what, with a recorder in Python's place."""

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
case "$*" in *"$FAIL"*) exit 7 ;; esac
script=$1
while [ $# -gt 0 ]; do
    [ "$1" != --output_dir ] || out=$2
    shift
done
case $script in
    eval_benchmark.py) mkdir -p "$out"; echo {{}} >"$out/results.json" ;;
    *.py) mkdir -p "$out"; echo '{{"base_model": {{"name_or_path": "a/b"}}}}' >"$out/stage.json" ;;
esac
"""


@pytest.fixture
def pipeline(tmp_path):
    """See record."""
    return record(tmp_path, "scripts/run_pipeline.sh", RECORDER, OWN, BASE_MODEL="a/b")


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
    assert [each.get("lora_model") for each in measured] == [*(f"{pipeline.outputs}/{name}" for name in SCRIPTS), None]
    assert [each["output_dir"] for each in measured] == [
        f"{pipeline.outputs}/{name}/eval" for name in (*SCRIPTS, "base")
    ]
    assert measured[-1]["base_model"] == "a/b"
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
