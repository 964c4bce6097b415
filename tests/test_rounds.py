"""scripts/run_rounds.sh: what follows what, with a recorder in Python's place; one round for real; the table."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, stage_of, write_jsonl
from test_generation import outputs  # noqa: F401 (a fixture)
from test_reward_modeling import pairs, train
from test_scripts import READ, write_program

from stagekit.checkpoint import base_fingerprint, stage_fingerprint
from tools.rounds_table import main as rounds_table

OWN = ("METHOD", "REWARD_FUNCTIONS", "PROMPTS", "NUM_GENERATIONS", "MAX_SAMPLES", "SAMPLING")
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
    rejection_sampling.py) mkdir -p "$out"; echo {{}} >"$out/summary.json"
        for name in sft preferences; do printf "$KEPT" >"$out/$name.jsonl"; done ;;
    *_training.py | *_finetuning.py | *_modeling.py) mkdir -p "$out"
        echo '{{"base_model": {{"name_or_path": "a/b"}}}}' >"$out/stage.json" ;;
esac
"""


def record(tmp_path, script, recorder, own, **fixed):
    """Run a script with a recorder in Python's place.

    Args:
        recorder: what that does, a shell script with {python} and {calls}.
        own: names of variables the script reads beside those of scripts/env.sh.
        **fixed: variables it is always given.

    Returns:
        .run(*arguments, code=0, **variables) gives its calls as {flag: value}; .outputs is where they go.
    """
    calls, outputs = tmp_path / "calls", tmp_path / "outputs"  # noqa: F811
    program = write_program(tmp_path / "bin" / "python", recorder.format(python=sys.executable, calls=calls))
    write_program(tmp_path / "bin" / "nvidia-smi", "exit 9\n")

    def run(*arguments, code=0, **variables):
        calls.write_text("")
        environment = {name: value for name, value in os.environ.items() if name not in (*READ, *own)}
        environment |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(program)}
        environment |= {"OUTPUT_ROOT": str(outputs), "FAIL": "no such script", **fixed, **variables}
        command = ["sh", ROOT / script, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == code, result.stderr
        found.stdout, found.printed = result.stdout.splitlines(), result.stdout + result.stderr
        return [call(line) for line in calls.read_text().splitlines()]

    found = SimpleNamespace(run=run, outputs=outputs)
    return found


@pytest.fixture
def rounds(tmp_path):
    """See record; .directory is where the rounds are."""
    found = record(tmp_path, "scripts/run_rounds.sh", RECORDER, OWN, KEPT="{}\\n")
    found.directory = found.outputs / "rounds"
    for name in ("sft", "rm"):
        (found.outputs / name).mkdir(parents=True)
        (found.outputs / name / "stage.json").write_text('{"base_model": {"name_or_path": "a/b"}}')
    return found


def call(line):
    """{"script": …, flag: value}; the last of equal flags wins."""
    words = line.split()
    flags = {"script": words[0] if words[0] != "-m" else words[1]}
    for place, word in enumerate(words):
        if word.startswith("--"):
            after = words[place + 1 : place + 2]
            flags[word[2:]] = after[0] if after and not after[0].startswith("--") else True
    return flags


SCRIPTS = ["rejection_sampling.py", "dpo_training.py", "reward_modeling.py"]


# -- what follows what -----------------------------------------------------------------------------------------------


def test_two_rounds_are_chained_and_the_reward_model_learns_from_functions(rounds):
    calls = rounds.run("2", REWARD_FUNCTIONS="accuracy,format")
    assert [each["script"] for each in calls] == [*SCRIPTS, *SCRIPTS, "tools.rounds_table"]
    start, previous = f"{rounds.outputs}/sft", f"{rounds.outputs}/sft"
    learnt = "data/reward"
    for number, (sampling, policy, reward) in enumerate((calls[:3], calls[3:6]), 1):
        place = f"{rounds.directory}/{number}"
        assert sampling["model_name_or_path"] == policy["model_name_or_path"] == previous
        assert sampling["output_dir"] == f"{place}/samples" and sampling["seed"] == str(number)
        assert sampling["reward_functions"] == "accuracy,format" and "reward_model_path" not in sampling
        assert sampling["data_file"] == "data/grpo"
        assert policy["train_file_dir"] == f"{place}/samples/preferences.jsonl"
        assert policy["output_dir"] == f"{place}/policy"
        assert not {"overwrite_output_dir", "resume_from_checkpoint"} & (set(policy) | set(reward))
        learnt += f",{place}/samples/preferences.jsonl"
        assert reward["model_name_or_path"] == start and reward["train_file_dir"] == learnt
        assert reward["output_dir"] == f"{place}/rm" and reward["use_margin"] == "False"
        previous = policy["output_dir"]


def test_a_reward_model_does_not_learn_from_its_own_choices(rounds):
    calls = rounds.run("2")
    assert [each["script"] for each in calls] == [*SCRIPTS[:2], *SCRIPTS[:2], "tools.rounds_table"]
    assert {each["reward_model_path"] for each in calls[::2][:2]} == {f"{rounds.outputs}/rm"}
    assert {each["data_file"] for each in calls[::2][:2]} == {"data/finetune"}
    assert "reward_functions" not in calls[0]
    samples = f"{rounds.directory}/1/samples"
    (line,) = [line for line in rounds.printed.splitlines() if line.startswith("round 1: ")]
    assert "must not learn from its own choices" in line
    assert f"cp {samples}/preferences.jsonl {samples}/labelled.jsonl" in line and "same command again" in line


def test_what_a_person_labelled_refreshes_it_and_scores_the_next_round(rounds):
    rounds.run("1")
    labelled = rounds.directory / "1" / "samples" / "labelled.jsonl"
    labelled.write_text("{}\n")
    calls = rounds.run("2")
    assert [each["script"] for each in calls] == ["reward_modeling.py", *SCRIPTS[:2], "tools.rounds_table"]
    assert calls[0]["train_file_dir"] == f"data/reward,{labelled}"
    assert calls[1]["reward_model_path"] == f"{rounds.directory}/1/rm"
    (rounds.directory / "2" / "samples" / "labelled.jsonl").write_text("{}\n")
    (rounds.directory / "2" / "policy" / "stage.json").unlink()
    policy, reward, _ = rounds.run("2")  # trained after the labelling, the policy learns from it as well
    assert policy["train_file_dir"].endswith("2/samples/labelled.jsonl")
    assert reward["train_file_dir"] == f"data/reward,{labelled},{rounds.directory}/2/samples/labelled.jsonl"


def test_labels_of_a_person_come_before_those_of_functions(rounds):
    rounds.run("1", FAIL="dpo_training.py", REWARD_FUNCTIONS="accuracy", code=7)
    labelled = rounds.directory / "1" / "samples" / "labelled.jsonl"
    labelled.write_text("{}\n")
    policy, reward, _ = rounds.run("1", REWARD_FUNCTIONS="accuracy")
    assert policy["train_file_dir"] == str(labelled) and reward["train_file_dir"] == f"data/reward,{labelled}"


def test_what_is_finished_is_not_done_again(rounds):
    rounds.run("2", REWARD_FUNCTIONS="accuracy")
    assert [each["script"] for each in rounds.run("2", REWARD_FUNCTIONS="accuracy")] == ["tools.rounds_table"]
    more = rounds.run("3", REWARD_FUNCTIONS="accuracy")
    assert [each["script"] for each in more] == [*SCRIPTS, "tools.rounds_table"]
    assert more[0]["model_name_or_path"] == f"{rounds.directory}/2/policy"


@pytest.mark.parametrize("failing", SCRIPTS)
def test_a_step_that_fails_ends_the_rounds_and_is_the_first_one_next_time(rounds, failing):
    calls = rounds.run("2", FAIL=failing, REWARD_FUNCTIONS="accuracy", code=7)
    assert calls[-1]["script"] == failing and len(calls) == 1 + SCRIPTS.index(failing)
    calls = rounds.run("1", REWARD_FUNCTIONS="accuracy")
    assert [each["script"] for each in calls] == [*SCRIPTS[SCRIPTS.index(failing) :], "tools.rounds_table"]


def test_an_interrupted_training_goes_on_from_its_checkpoint(rounds):
    rounds.run("1", REWARD_FUNCTIONS="accuracy")
    for name in ("policy", "rm"):
        (rounds.directory / "1" / name / "stage.json").unlink()
    checkpoint = rounds.directory / "1" / "policy" / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "complete.json").write_text("{}")
    policy, reward, _ = rounds.run("1", REWARD_FUNCTIONS="accuracy")
    assert policy["resume_from_checkpoint"] == "True" and "overwrite_output_dir" not in policy
    assert reward["overwrite_output_dir"] == "True" and "resume_from_checkpoint" not in reward


def test_sft_learns_from_the_best_answers(rounds):
    calls = rounds.run("1", METHOD="sft", REWARD_FUNCTIONS="accuracy")
    assert [each["script"] for each in calls[:2]] == ["rejection_sampling.py", "supervised_finetuning.py"]
    assert calls[1]["train_file_dir"] == f"{rounds.directory}/1/samples/sft.jsonl"


def test_variables_and_arguments_arrive(rounds):
    variables = {"NUM_GENERATIONS": "3", "MAX_SAMPLES": "5", "PROMPTS": "my,prompts", "EPOCHS": "4"}
    variables["SAMPLING"] = "--temperature 0.7 --min_score 1"
    calls = rounds.run("1", "--max_steps", "2", REWARD_FUNCTIONS="accuracy", **variables)
    sampling, policy, reward, _ = calls
    assert (sampling["num_generations"], sampling["max_samples"], sampling["data_file"]) == ("3", "5", "my,prompts")
    assert (sampling["temperature"], sampling["min_score"]) == ("0.7", "1") and "max_steps" not in sampling
    for each in (policy, reward):
        assert each["max_steps"] == "2" and each["num_train_epochs"] == "4"


def test_sampling_flags_are_ones_the_program_knows(rounds):
    import rejection_sampling

    for variables in ({}, {"REWARD_FUNCTIONS": "accuracy"}):
        rounds.run("1", DRY_RUN="1", **variables)
        words = rounds.stdout
        first = words.index("rejection_sampling.py") + 1
        args = rejection_sampling.parse_args(words[first : words.index("dpo_training.py") - 1])
        assert args.output_dir == f"{rounds.directory}/1/samples"


def test_without_a_reward_model_functions_can_score_and_nothing_is_refreshed(rounds):
    (rounds.outputs / "rm" / "stage.json").unlink()
    calls = rounds.run("1", code=2)
    assert calls == [] and "sh scripts/run_rm.sh makes one; or REWARD_FUNCTIONS=accuracy scores" in rounds.printed
    calls = rounds.run("1", REWARD_FUNCTIONS="accuracy")
    assert [each["script"] for each in calls] == [*SCRIPTS[:2], "tools.rounds_table"]
    assert "there is no reward model in" in rounds.printed


def test_functions_that_make_no_pairs_leave_the_reward_model_as_it_is(rounds):
    calls = rounds.run("1", METHOD="sft", REWARD_FUNCTIONS="accuracy", FAIL="supervised", code=7)
    (rounds.directory / "1" / "samples" / "preferences.jsonl").write_text("")
    calls = rounds.run("1", METHOD="sft", REWARD_FUNCTIONS="accuracy")
    assert [each["script"] for each in calls] == ["supervised_finetuning.py", "tools.rounds_table"]
    assert "there are no pairs, so the reward model stays as it is" in rounds.printed


def test_a_round_that_kept_nothing_stops_and_says_how_to_go_on(rounds):
    calls = rounds.run("2", KEPT="", code=2)
    assert [each["script"] for each in calls] == ["rejection_sampling.py"]
    assert f"nothing was kept in {rounds.directory}/1/samples/preferences.jsonl; rm" in rounds.printed


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "the first argument says how many rounds"),
        (("many",), {}, "the first argument says how many rounds"),
        (("0",), {}, "the first argument says how many rounds"),
        (("--max_steps", "2"), {}, "the first argument says how many rounds"),
        (("1",), {"METHOD": "ppo"}, "METHOD must be dpo or sft, got 'ppo'"),
    ],
)
def test_a_wrong_start_is_refused_in_one_line(rounds, arguments, variables, message):
    assert rounds.run(*arguments, code=2, **variables) == []
    assert f"error: {message}" in rounds.printed.splitlines()[-1]


def test_a_dry_run_shows_every_command_and_does_nothing(rounds):
    assert rounds.run("2", DRY_RUN="1", REWARD_FUNCTIONS="accuracy") == []
    words = [word for word in rounds.stdout if word.endswith(".py") or word == "tools.rounds_table"]
    assert words == [*SCRIPTS, *SCRIPTS, "tools.rounds_table"]
    assert "own choices" not in rounds.printed
    assert not rounds.directory.exists()


# -- for real --------------------------------------------------------------------------------------------------------


def test_a_round_for_real_and_a_second_start_that_finds_nothing_to_do(outputs, tmp_path):  # noqa: F811
    """sample -> DPO -> reward model, with the wrappers, on the tiny model; labels come from functions."""
    root = tmp_path / "outputs"
    write_jsonl(tmp_path / "train" / "a.jsonl", pairs(40))
    write_jsonl(tmp_path / "held_out.jsonl", pairs(41, prefix="held out"))
    for name in ("base", "sft"):
        shutil.copytree(outputs / name, root / name)
    train(tmp_path, root / "base", root / "rm", "--max_steps", "8")
    asked = [
        {"question": f"{words}?", "answer": "多休息，多喝温水。"}
        for words in ("fever", "cold", "发烧", "body", "rest")
    ]
    write_jsonl(tmp_path / "asked" / "a.jsonl", asked)
    environment = {name: value for name, value in os.environ.items() if name not in (*READ, *OWN)}
    environment |= {"PYTHON": sys.executable, "OUTPUT_ROOT": str(root), "BASE_MODEL": str(root / "base")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"REWARD_FUNCTIONS": "accuracy", "PROMPTS": str(tmp_path / "asked"), "NUM_GENERATIONS": "4"}
    environment |= {"SAMPLING": "--temperature 1.6 --max_new_tokens 12"}
    few = ("--max_steps", "2", "--max_train_samples", "24", "--max_eval_samples", "8", "--report_to", "none")

    def start():
        command = ["sh", str(ROOT / "scripts/run_rounds.sh"), "1", *few]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    printed = start().stdout
    place = root / "rounds" / "1"
    summary = json.loads((place / "samples" / "summary.json").read_text())
    policy, reward = stage_of(place / "policy"), stage_of(place / "rm")
    assert summary["pairs"] == policy["data"]["train"]["read"] > 0
    assert policy["parent"]["fingerprint"] == stage_fingerprint(stage_of(root / "sft"))
    assert (
        policy["base_model"]["fingerprint"]
        == reward["base_model"]["fingerprint"]
        == base_fingerprint(str(root / "base"))
    )
    assert reward["parent"]["fingerprint"] == policy["parent"]["fingerprint"]
    assert str(place / "samples" / "preferences.jsonl") in reward["data"]["train"]["files"]
    assert all(check["passed"] is not False for stage in (policy, reward) for check in stage["checks"].values())
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert start().stdout == printed[printed.index("| round") :] and printed.count("| round") == 1
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before
    assert (root / "rounds" / "table.md").read_text("utf-8") == printed[printed.index("| round") :]
    cells = [cell.strip() for cell in printed.splitlines()[-1].split("|")[1:-1]]
    metrics = [policy["metrics"][when]["rewards/accuracies"] for when in ("before", "after")]
    assert cells == [
        *("1", "accuracy", "5", f"{summary['mean_score']['all']:+.3f}", f"{summary['mean_score']['best']:+.3f}"),
        *(f"{summary['cut'] / 20:.0%}", str(summary["pairs"]), "dpo", str(policy["data"]["train"]["used"])),
        f"reward accuracy {metrics[0]:.3f} → {metrics[1]:.3f}",
        *(
            str(reward["data"]["train"]["used"]),
            f"- → {reward['metrics']['after']['accuracy']:.3f}",
        ),  # measured on other pairs
    ]


# -- the table -------------------------------------------------------------------------------------------------------


def write(path, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields), encoding="utf-8")


def measured(stage, used, **values):
    """A stage.json with before and after of each metric."""
    metrics = {
        when: {name: both[place] for name, both in values.items()} for place, when in enumerate(("before", "after"))
    }
    return {"stage": stage, "metrics": metrics, "data": {"train": {"used": used}}}


def samples(mean, model=None, functions=None):
    reward = {"model": model and {"name_or_path": model}, "functions": functions}
    return {"prompts": 1200, "answers": 4800, "cut": 1200, "pairs": 7, "mean_score": mean, "reward": reward}


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_the_table_follows_the_reward_model_from_round_to_round(tmp_path, capsys):
    root = tmp_path / "outputs"
    write(root / "rm/stage.json", **measured("rm", 384, accuracy=(0.5, 0.7)))
    write(root / "rounds/1/samples/summary.json", **samples({"all": 0.1, "best": 0.5}, f"{root}/rm"))
    write(
        root / "rounds/1/policy/stage.json",
        **measured("dpo", 6, **{"rewards/accuracies": (0.5, 0.625), "loss": (1, 2)}),
    )
    write(root / "rounds/2/samples/summary.json", **samples({"all": -1, "best": None}, "elsewhere/rm"))
    write(root / "rounds/2/policy/stage.json", **measured("sft", 1006, loss=(2.5, 2.25)))
    write(root / "rounds/2/rm/stage.json", **measured("rm", 391, accuracy=(0.48, 0.72)))
    write(root / "rounds/10/samples/summary.json", **samples({"all": 3, "best": 4}, f"{root}/rounds/2/rm", "format"))
    write(root / "rounds/10/rm/stage.json", **measured("rm", 400, accuracy=(0.48, 0.75)))
    (root / "rounds/old").mkdir()
    rounds_table([str(root / "rounds")])
    text = (root / "rounds/table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    _, rule, *rows = cells(text)
    assert set("".join(rule)) == {"-"} and len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    counts = ["1,200", "25%", "7"]
    assert rows == [
        ["1", "rm", counts[0], "+0.100", "+0.500", *counts[1:], "dpo", "6"]
        + ["reward accuracy 0.500 → 0.625", "-", "-"],
        ["2", "elsewhere/rm", counts[0], "-1.000", "-", *counts[1:], "sft", "1,006"]
        + ["loss 2.500 → 2.250", "391", "0.700 → 0.720"],
        ["10", "rounds/2/rm + format", counts[0], "+3.000", "+4.000", *counts[1:], "-", "-"]
        + ["-", "400", "0.720 → 0.750"],
    ]
    assert "no common scale" in text


def test_an_accuracy_on_other_pairs_is_not_set_beside_the_new_one(tmp_path, capsys):
    for place, used in (("rm", 64), ("rounds/1/rm", 64), ("rounds/2/rm", 20)):
        stage = measured("rm", 9, accuracy=(0.5, 0.75))
        stage["data"]["validation"] = {"files": ["a"], "used": used}
        write(tmp_path / place / "stage.json", **stage)
    rounds_table([str(tmp_path / "rounds")])
    rows = cells(capsys.readouterr().out)
    assert [row[-1] for row in rows[2:]] == ["0.750 → 0.750", "- → 0.750"]


def test_scores_of_one_scorer_are_compared_without_a_warning(tmp_path, capsys):
    for number in (1, 2):
        write(tmp_path / f"{number}/samples/summary.json", **samples({"all": 0.1, "best": 0.5}, functions="accuracy"))
    rounds_table([str(tmp_path)])
    assert "no common scale" not in capsys.readouterr().out


def test_a_directory_without_rounds_and_a_damaged_file_are_told_in_one_line(tmp_path):
    def refused():
        result = subprocess.run(
            [sys.executable, "-m", "tools.rounds_table", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        return result.stderr

    assert refused().startswith(f"rounds_table: error: {tmp_path}: no rounds (1, 2, …) in there; ")
    (tmp_path / "1" / "samples").mkdir(parents=True)
    (tmp_path / "1" / "samples" / "summary.json").write_text("{")
    assert refused().startswith(f"rounds_table: error: {tmp_path}/1/samples/summary.json: damaged (")
