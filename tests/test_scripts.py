"""The wrappers are POSIX sh of one shape, give only flags their stage declares, and find what they need."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci/run"]
STAGES = [path for path in SCRIPTS if "\nlaunch " in path.read_text(encoding="utf-8")]
PT = ROOT / "scripts/run_pt.sh"
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]
# What env.sh reads and must not come from whoever runs the tests.
READ = (
    "ACCUMULATION BASE_MODEL BATCH_SIZE CUDA_VISIBLE_DEVICES DEEPSPEED DRY_RUN EPOCHS LEARNING_RATE LORA_ALPHA "
    "LORA_RANK MASTER_ADDR MASTER_PORT MODULES_TO_SAVE NNODES NODE_RANK NPROC OMP_NUM_THREADS OUTPUT_ROOT PRECISION "
    "PYTHON"
).split()
SHAPE = re.compile(
    r"#!/bin/sh\n(# .*\n)+set -eu\ncd \"\$\(dirname \"\$0\"\)/\.\.\"\n\. scripts/env\.sh\n\n"
    r"choose_(base|parent \w+)\nlaunch \w+\.py \\\n((    --\w+|    \$\{\w+:\+--\w+)( .+)? \\\n)+    \$PRECISION \\\n"
    r"    \$\{DEEPSPEED:\+--deepspeed \"\$DEEPSPEED\"\} \\\n    \"\$@\"\n"
)


# learning rate and epochs on the starter, rows of a step there, learning rate and epochs on a real base
SCALES = {
    "run_pt.sh": (["3e-3", "3"], "2", ["2e-4", "1"], "4"),
    "run_sft.sh": (["4e-3", "8"], "4", ["2e-4", "2"], "4"),
    "run_rm.sh": (["1e-3", "1"], "4", ["1e-4", "1"], "4"),
    "run_dpo.sh": (["5e-4", "1"], "4", ["2e-5", "1"], "4"),
    "run_orpo.sh": (["1e-3", "1"], "4", ["5e-5", "1"], "4"),
    "run_ppo.sh": (["3e-4", "1"], "8", ["1e-5", "1"], "4"),
    "run_grpo.sh": (["1e-3", "1"], "16", ["1e-5", "1"], "8"),
}


def by_name(path):
    return path.name


def write_program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def start(tmp_path):
    """Run a script on a machine without GPU, with outputs below tmp_path; `gpus` are lines of nvidia-smi."""

    def run(script, *args, gpus="", cwd=None, check=True, **env):
        write_program(tmp_path / "bin/nvidia-smi", f'[ -n "{gpus}" ] || exit 9\nprintf "{gpus}"\n')
        inherited = {name: value for name, value in os.environ.items() if name not in READ}
        path = f"{tmp_path / 'bin'}{os.pathsep}{env.pop('PATH', inherited['PATH'])}"
        ours = {"OUTPUT_ROOT": str(tmp_path / "outputs"), "PYTHON": sys.executable, **env}
        result = subprocess.run(
            ["sh", str(script), *args],
            env={**inherited, "PATH": path, **{name: value for name, value in ours.items() if value is not None}},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture
def command(start):
    """The command a wrapper would run: (interpreter and launcher, script, its arguments)."""

    def dry_run(script, *args, **env):
        words = start(script, *args, DRY_RUN="1", **env).stdout.splitlines()
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        return words[:at], words[at], words[at + 1 :]

    return dry_run


@pytest.fixture
def recorder(tmp_path):
    """A program to stand for Python: appends its arguments to .calls, one call a line, and writes .variables."""
    calls, variables = tmp_path / "calls", tmp_path / "variables"
    program = write_program(tmp_path / "recorder/python", f'echo "$*" >>"{calls}"\nenv >"{variables}"\n')
    return SimpleNamespace(
        program=str(program),
        calls=lambda: calls.read_text(encoding="utf-8").splitlines(),
        variables=lambda: dict(line.split("=", 1) for line in variables.read_text().splitlines() if "=" in line),
    )


def value(arguments, flag):
    """What a flag is worth when the last one wins."""
    return arguments[len(arguments) - 1 - arguments[::-1].index(f"--{flag}") + 1]


def write_stage(directory, base):
    directory.mkdir(parents=True)
    (directory / "stage.json").write_text(json.dumps({"base_model": {"name_or_path": base}}), encoding="utf-8")
    return directory


def copy_scripts(directory):
    shutil.copytree(ROOT / "scripts", directory / "scripts")
    shutil.copy(ROOT / "requirements.txt", directory)
    return directory


# -- form --


def test_there_are_wrappers():
    assert set(SCALES) <= {path.name for path in STAGES}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_a_script_is_valid_in_every_shell(script, shell):
    subprocess.run([shell, "-n", script], check=True)


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_a_wrapper_has_the_common_shape(wrapper):
    assert SHAPE.fullmatch(wrapper.read_text(encoding="utf-8"))


def test_wrappers_give_common_flags_in_the_same_order():
    flags = [re.findall(r"^    --(\w+)", path.read_text(encoding="utf-8"), flags=re.M) for path in STAGES]
    common = set.intersection(*map(set, flags))
    assert len(common) >= 20
    for mine in flags:
        assert len(mine) == len(set(mine))
        assert [flag for flag in mine if flag in common] == [flag for flag in flags[0] if flag in common]


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.json")), ids=by_name)
def test_a_deepspeed_configuration_has_no_auto_left_when_the_trainer_has_filled_it_in(path):
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = SimpleNamespace(
        **dict(world_size=2, per_device_train_batch_size=3, gradient_accumulation_steps=5, max_grad_norm=0.5),
        **dict(learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, weight_decay=0.0),
        **dict(fp16=False, fp16_full_eval=False, bf16=True, bf16_full_eval=False, save_on_each_node=False),
        get_warmup_steps=lambda steps: 1,
    )
    config = HfTrainerDeepSpeedConfig(str(path))
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=64)), 10)
    assert "auto" not in json.dumps(config.config)
    assert config.config["train_batch_size"] == 2 * 3 * 5
    assert config.config["bf16"]["enabled"] and not config.config["fp16"]["enabled"]
    assert config.config["zero_optimization"]["stage"] == int(re.match(r"zero(\d)", path.name)[1])
    assert ("offload_optimizer" in config.config["zero_optimization"]) == ("offload" in path.name)


# -- arguments --


@pytest.mark.parametrize("base", ["starter", "Qwen/Qwen3-0.6B-Base"])
@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_a_wrapper_gives_only_flags_its_stage_declares(wrapper, base, command, tmp_path, monkeypatch):
    from stagekit.arguments import parse_args

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # parse_args sets it on a machine without GPU: undo that
    monkeypatch.setenv("PATH", os.environ["PATH"])
    _, script, arguments = command(wrapper, "--seed", "7", BASE_MODEL=base)
    parsed = parse_args(*importlib.import_module(script.removesuffix(".py")).ARGUMENTS, args=arguments)
    every = {name: found for part in parsed for name, found in vars(part).items()}
    assert every["seed"] == 7 and every["do_train"] and every["do_eval"] and every["use_peft"]
    assert every["model_name_or_path"] == (str(tmp_path / "outputs/starter") if base == "starter" else base)
    for folder in (every["train_file_dir"], every["validation_file_dir"]):
        assert folder is None or (ROOT / folder).exists()


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_arguments_come_last_and_unchanged(wrapper, command):
    mine = ["--train_file_dir", "my data/*.txt", "--learning_rate", '$HOME "x"', ""]
    assert command(wrapper, *mine)[2][-5:] == mine


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_a_wrapper_runs_from_any_directory(wrapper, command, tmp_path):
    elsewhere = tmp_path / "some where"
    tree = copy_scripts(elsewhere / "tree with  blanks")
    expected = command(wrapper, cwd=ROOT)
    assert command(wrapper.name, cwd=ROOT / "scripts") == expected
    assert command(wrapper, cwd=tmp_path) == expected
    assert command(tree / "scripts" / wrapper.name, cwd=tmp_path) == expected
    assert command(f"tree with  blanks/scripts/{wrapper.name}", cwd=elsewhere) == expected


# -- launcher and hardware --


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_one_process_needs_no_launcher(wrapper, command):
    assert command(wrapper)[0] == [sys.executable]


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_several_processes_go_through_torchrun(wrapper, command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    assert command(wrapper, NPROC="2")[0] == [*launcher, "2"]
    assert command(wrapper, DEEPSPEED="scripts/zero 2.json")[0] == [*launcher, "1"]
    assert command(wrapper, "--deepspeed", "scripts/zero3.json")[0] == [*launcher, "1"]
    assert value(command(wrapper, DEEPSPEED="scripts/zero 2.json")[2], "deepspeed") == "scripts/zero 2.json"


def test_several_machines_are_told_who_is_who(command):
    launcher, *_ = command(STAGES[0], NNODES="3", NODE_RANK="2", MASTER_ADDR="10.0.0.1", NPROC="4")
    given = " ".join(launcher[3:])
    assert given == "--nproc_per_node 4 --nnodes 3 --node_rank 2 --master_addr 10.0.0.1 --master_port 29500"
    assert command(STAGES[0], NNODES="2", NODE_RANK="0", MASTER_ADDR="a", MASTER_PORT="7")[0][-1] == "7"


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, "NODE_RANK"),
        ({"NNODES": "two"}, "NNODES"),
        ({"NPROC": "all"}, "NPROC"),
        ({"NPROC": "0"}, "NPROC"),
        ({"NPROC": "3", "gpus": r"8.0, GPU-a\n8.0, GPU-b\n"}, "NPROC=3"),
        ({"PYTHON": "no/such/python"}, "no/such/python"),
    ],
)
def test_a_wrong_variable_is_named_and_ends_with_2(start, env, named):
    result = start(PT, DRY_RUN="1", check=False, **env)
    assert result.returncode == 2 and result.stdout == ""
    assert named in result.stderr.splitlines()[-1] and "error: " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("gpus", "visible", "processes", "precision"),
    [
        (r"8.0, GPU-a\n9.0, GPU-b\n", None, 2, ["--bf16", "True"]),
        (r"8.0, GPU-a\n7.5, GPU-b\n", None, 2, ["--fp16", "True"]),
        (r"12.0, GPU-a\n", None, 1, ["--bf16", "True"]),
        (r"10.0\n10.0\n", None, 2, ["--bf16", "True"]),
        (r"8.0, GPU-a\n7.5, GPU-b\n8.6, GPU-c\n", "0,2", 2, ["--bf16", "True"]),
        (r"8.0, GPU-a\n7.5, GPU-b\n8.6, GPU-c\n", "1", 1, ["--fp16", "True"]),
        (r"7.0, GPU-a1\n8.6, GPU-c2\n", "GPU-c", 1, ["--bf16", "True"]),
        (r"8.0, GPU-a\n8.0, GPU-b\n", "1,-1,0", 1, ["--bf16", "True"]),
        (r"8.0, GPU-a\n", "MIG-1234", 1, ["--bf16", "True"]),
        (r"8.0, GPU-a\n", "", 1, ["--use_cpu", "True"]),
        (r"8.0, GPU-a\n", "-1", 1, ["--use_cpu", "True"]),
        (r"8.0, GPU-a\n", "5", 1, ["--use_cpu", "True"]),
        (r"No devices were found\n", None, 1, ["--use_cpu", "True"]),
        ("", None, 1, ["--use_cpu", "True"]),
    ],
)
def test_gpus_decide_processes_and_precision(command, gpus, visible, processes, precision):
    launcher, _, arguments = command(STAGES[0], gpus=gpus, CUDA_VISIBLE_DEVICES=visible, BASE_MODEL="a/b")
    assert (launcher[-1] if "--nproc_per_node" in launcher else "1") == str(processes)
    assert arguments[-2:] == precision
    assert value(arguments, "activation_checkpointing") == str(precision != ["--use_cpu", "True"])


def test_a_lone_process_among_several_gpus_gets_a_launcher(command):
    assert "torch.distributed.run" in command(STAGES[0], gpus=r"8.0, GPU-a\n8.0, GPU-b\n", NPROC="1")[0]


def test_precision_can_be_chosen(command):
    two = r"8.0, GPU-a\n"
    assert command(STAGES[0], gpus=two, PRECISION="--fp16 True")[2][-2:] == ["--fp16", "True"]
    assert "--bf16" not in command(STAGES[0], gpus=two, PRECISION="")[2]


@pytest.mark.parametrize(
    ("gpus", "arguments", "said"),
    [
        ("", (), "1 process, fp32"),
        ("", ("--bf16", "True"), "1 process, bf16"),
        (r"8.0, GPU-a\n8.0, GPU-b\n", (), "2 processes, bf16"),
        (r"8.0, GPU-a\n", ("--bf16", "False"), "1 process, fp32"),
        (r"8.0, GPU-a\n", ("--bf16", "False", "--fp16", "True"), "1 process, fp16"),
    ],
)
def test_one_line_tells_the_hardware(start, gpus, arguments, said):
    lines = start(PT, *arguments, gpus=gpus, DRY_RUN="1", BASE_MODEL="a/b").stderr.splitlines()
    (line,) = [line for line in lines if line.startswith("hardware: ")]
    assert re.search(r"\b\d+ CPU cores?, " + said + "$", line)


def test_processes_share_the_cores(start, recorder, tmp_path):
    write_program(tmp_path / "bin/nproc", 'echo "${OMP_NUM_THREADS:-12}"\n')
    for env, share in (({}, 1), ({"NPROC": "2"}, 2), ({"NPROC": "5"}, 5), ({"NPROC": "40"}, 40)):
        result = start(PT, PYTHON=recorder.program, BASE_MODEL="a/b", **env)
        cores = int(re.search(r"hardware: (\d+) CPU", result.stderr)[1])
        assert 1 <= cores <= 12  # fewer than nproc says where a container has a limit
        assert recorder.variables()["OMP_NUM_THREADS"] == str(max(1, cores // share))
    result = start(PT, PYTHON=recorder.program, BASE_MODEL="a/b", OMP_NUM_THREADS="3")
    assert recorder.variables()["OMP_NUM_THREADS"] == "3" and f"hardware: {cores} CPU" in result.stderr


# -- model --


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_the_default_base_follows_the_hardware_and_one_line_says_so(wrapper, start, tmp_path):
    starter = write_stage(tmp_path / "outputs/starter", ".")
    for gpus, model in (("", str(starter)), (r"8.0, GPU-a\n", "Qwen/Qwen3-0.6B-Base")):
        result = start(wrapper, gpus=gpus, DRY_RUN="1")
        assert value(result.stdout.splitlines(), "model_name_or_path") == model
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("model: ")]
        assert line.startswith(f"model: {model} (") and "BASE_MODEL=" in line


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_base_model_and_output_root_are_honoured(wrapper, command, tmp_path):
    assert value(command(wrapper, BASE_MODEL="/models/my model/")[2], "model_name_or_path") == "/models/my model"
    arguments = command(wrapper, OUTPUT_ROOT="my runs", BASE_MODEL="starter", gpus=r"8.0, GPU-a\n")[2]
    assert value(arguments, "model_name_or_path") == "my runs/starter"
    assert value(arguments, "output_dir").startswith("my runs/")
    assert value(command(wrapper, OUTPUT_ROOT=None)[2], "output_dir").startswith("outputs/")


def test_a_model_given_as_an_argument_is_the_one_that_is_reported_and_none_is_built(start, recorder):
    for given in (("--model_name_or_path", "a/b"), ("--model_name_or_path=a/b",)):
        result = start(PT, *given, PYTHON=recorder.program)
        assert "model: a/b (" in result.stderr and "learning_rate 2e-4" in recorder.calls()[-1]
    assert not any("build_starter_model" in call for call in recorder.calls())


def test_the_starter_is_built_once(start, recorder, tmp_path):
    starter = tmp_path / "outputs/starter"
    start(PT, PYTHON=recorder.program)
    build, train = recorder.calls()
    assert build == f"-m tools.build_starter_model --output_dir {starter}"
    assert train.startswith(f"pretraining.py --model_name_or_path {starter} ")
    assert not Path(f"{starter}.lock").exists()
    write_stage(starter, ".")
    start(PT, PYTHON=recorder.program)
    assert len(recorder.calls()) == 3


def test_a_failed_build_ends_the_start_and_frees_the_lock(start, tmp_path):
    failing = write_program(tmp_path / "recorder/python", 'echo "called $1"\nexit 7\n')
    result = start(PT, PYTHON=str(failing), check=False)
    assert result.returncode == 7 and result.stderr.count("called") == 1 and result.stdout == ""
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_dry_run_builds_nothing(start, recorder, tmp_path):
    result = start(PT, PYTHON=recorder.program, DRY_RUN="1")
    assert "would be built first" in result.stderr
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "calls").exists()


@pytest.mark.parametrize("wrapper", STAGES, ids=by_name)
def test_the_size_of_the_base_sets_the_scale_and_the_user_wins(wrapper, command, tmp_path):
    write_stage(tmp_path / "outputs/starter", ".")
    write_stage(tmp_path / "outputs/mine", "../starter")
    write_stage(tmp_path / "outputs/other", "a/b")
    small, rows, large, few = SCALES[wrapper.name]
    flags = ("learning_rate", "num_train_epochs", "lora_rank", "lora_alpha", "per_device_train_batch_size")
    for base, scale in (
        ("starter", [*small, "32", "64", rows]),
        (f"{tmp_path}/outputs/starter/", [*small, "32", "64", rows]),
        (f"{tmp_path}/outputs/mine", [*small, "32", "64", rows]),
        (f"{tmp_path}/outputs/other", [*large, "16", "32", few]),
        ("a/b", [*large, "16", "32", few]),
    ):
        arguments = command(wrapper, BASE_MODEL=base)[2]
        assert [value(arguments, flag) for flag in flags] == scale
        assert ("--modules_to_save" in arguments) == (scale[2] == "32")
    chosen = {"LEARNING_RATE": "1e-9", "EPOCHS": "9", "LORA_RANK": "1", "LORA_ALPHA": "2", "BATCH_SIZE": "3"}
    arguments = command(wrapper, ACCUMULATION="7", MODULES_TO_SAVE="lm_head", **chosen)[2]
    assert [value(arguments, flag) for flag in flags] == list(chosen.values())
    assert value(arguments, "gradient_accumulation_steps") == "7" and value(arguments, "modules_to_save") == "lm_head"


@pytest.mark.parametrize("wanted", [None, "starter", "{outputs}/starter", "{outputs}/pt", "{outputs}/../link"])
def test_sft_continues_the_pretraining_it_finds(start, tmp_path, wanted):
    outputs = tmp_path / "outputs"
    write_stage(outputs / "starter", ".")
    pretrained = write_stage(outputs / "pt", "../starter")
    (tmp_path / "link").symlink_to(outputs / "starter")
    base = wanted and wanted.format(outputs=outputs)
    result = start(ROOT / "scripts/run_sft.sh", DRY_RUN="1", BASE_MODEL=base)
    arguments = result.stdout.splitlines()
    assert value(arguments, "model_name_or_path") == str(pretrained)
    assert value(arguments, "learning_rate") == "4e-3"
    assert f"model: {pretrained} (continues " in result.stderr


@pytest.mark.parametrize("recorded", ["a/b", "../starter"])
def test_sft_leaves_a_pretraining_on_another_base_aside_and_says_so(start, tmp_path, recorded):
    pretrained = write_stage(tmp_path / "outputs/pt", recorded)
    result = start(ROOT / "scripts/run_sft.sh", DRY_RUN="1", BASE_MODEL="c/d")
    assert value(result.stdout.splitlines(), "model_name_or_path") == "c/d"
    base = recorded.replace("..", str(tmp_path / "outputs"))
    assert f"model: c/d (BASE_MODEL; {pretrained} was trained on {base} and is left aside)" in result.stderr


def test_an_explicit_model_argument_beats_the_parent_stage(start, tmp_path):
    write_stage(tmp_path / "outputs/pt", "a/b")
    result = start(ROOT / "scripts/run_sft.sh", "--model_name_or_path", "a/b", DRY_RUN="1")
    assert value(result.stdout.splitlines(), "model_name_or_path") == "a/b" and "model: a/b (" in result.stderr


def test_pretraining_never_continues_itself(command, tmp_path):
    starter = write_stage(tmp_path / "outputs/starter", ".")
    write_stage(tmp_path / "outputs/pt", "../starter")
    assert value(command(ROOT / "scripts/run_pt.sh")[2], "model_name_or_path") == str(starter)


@pytest.mark.parametrize("text", ["", "{}", '{"base_model": {"name_or_path": null}}'])
def test_a_damaged_stage_file_ends_the_start_with_its_name(start, tmp_path, text):
    (write_stage(tmp_path / "outputs/pt", "a/b") / "stage.json").write_text(text, encoding="utf-8")
    result = start(ROOT / "scripts/run_sft.sh", DRY_RUN="1", check=False)
    assert result.returncode != 0 and result.stdout == ""
    assert "outputs/pt/stage.json: names no base model" in result.stderr and "Traceback" not in result.stderr


# -- tests --


@pytest.mark.parametrize(
    ("script", "given", "passed"),
    [
        (".ci/run", [], "tests"),
        ("scripts/run_tests.sh", [], "tests"),
        ("scripts/run_tests.sh", ["-k", "a b"], "-k a b"),
        ("scripts/run_tests.sh", ["tests/x.py"], "tests/x.py"),
    ],
)
def test_run_tests_passes_its_arguments_to_pytest(start, recorder, script, given, passed, tmp_path):
    write_program(tmp_path / "bin/chromium", "exit 9\n")  # CI installs one where there is none
    start(ROOT / script, *given, PYTHON=recorder.program, cwd="/")
    assert recorder.calls() == [f"-m pytest -n 2 --dist loadfile {passed}"]
    assert recorder.variables()["HF_HUB_OFFLINE"] == "1"


def test_each_test_process_has_one_thread_whatever_the_gpus(start, recorder, tmp_path):
    write_program(tmp_path / "bin/nproc", "echo 8\n")
    for gpus in ("", r"8.0, GPU-a\n8.0, GPU-b\n"):
        start(ROOT / "scripts/run_tests.sh", PYTHON=recorder.program, gpus=gpus)
        assert recorder.variables()["OMP_NUM_THREADS"] == "1"


# -- environment --


def test_nothing_is_reported_to_anybody_and_the_environment_comes_first_on_path(start, recorder):
    start(PT, PYTHON=recorder.program, BASE_MODEL="a/b", HF_ENDPOINT="https://mirror.example")
    variables = recorder.variables()
    assert variables["HF_HUB_DISABLE_TELEMETRY"] == variables["DO_NOT_TRACK"] == "1"
    assert variables["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert variables["HF_ENDPOINT"] == "https://mirror.example"
    assert variables["PATH"].startswith(str(Path(recorder.program).parent) + os.pathsep)


def write_wheel(directory, name, version):
    """Write a wheel with one empty module, so that pip has something to install without a network."""
    info = f"{name}-{version}.dist-info"
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Variables with which pip installs from a folder that holds two versions of one package."""
    wheels = tmp_path_factory.mktemp("wheels")
    write_wheel(wheels, "tinypackage", "1.0")
    write_wheel(wheels, "tinypackage", "2.0")
    return {
        "PYTHON": None,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels.as_uri(),
        "PIP_CONFIG_FILE": os.devnull,
        "BASE_MODEL": "a/b",
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory, offline):
    """A tree that two starts at once met without environment: (tree, what the two wrote)."""
    tree = copy_scripts(tmp_path_factory.mktemp("fresh") / "tree with blanks")
    (tree / "requirements.txt").write_text("# a comment\ntinypackage>=1,<2  # another\n", encoding="utf-8")
    (tree / "pretraining.py").write_text("import sys, tinypackage\nprint(sys.prefix, tinypackage.version)\n")
    env = {name: found for name, found in os.environ.items() if name not in READ}
    env.update({name: found for name, found in offline.items() if found is not None})
    start = ["sh", str(tree / "scripts/run_pt.sh")]
    both = [subprocess.Popen(start, env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    written = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], written
    return tree, written


@pytest.fixture
def tree(installed):
    return installed[0]


def site_packages(tree):
    return next(tree.glob(".venv/lib/python*/site-packages"))


def test_the_first_start_makes_an_environment_and_runs_in_it(installed):
    tree, written = installed
    assert [stdout for stdout, _ in written] == [f"{tree / '.venv'} 1.0\n"] * 2
    assert len(list(tree.glob(".venv/.complete-*"))) == 1


def test_two_starts_at_once_install_once(installed):
    tree, written = installed
    assert sorted(".venv is complete" in stderr for _, stderr in written) == [False, True]
    assert not (tree / ".venv.lock").exists()


def test_a_complete_environment_is_taken_as_it_is(tree, start, offline):
    result = start(tree / "scripts/run_pt.sh", **{**offline, "PIP_FIND_LINKS": "file:///no/such/folder"})
    assert result.stdout == f"{tree / '.venv'} 1.0\n"
    assert [line for line in result.stderr.splitlines() if line.startswith("environment:")] in (
        [],
        ["environment: .venv; the active one lacks tinypackage>=1,<2"],
    )


def test_a_half_finished_installation_is_repaired(tree, start, offline):
    for marker in tree.glob(".venv/.complete-*"):
        marker.unlink()
    (site_packages(tree) / "tinypackage.py").unlink()
    (site_packages(tree) / "tinypackage-1.0.dist-info/INSTALLER").unlink()
    result = start(tree / "scripts/run_pt.sh", **offline)
    assert "repairing" in result.stderr and result.stdout == f"{tree / '.venv'} 1.0\n"
    assert len(list(tree.glob(".venv/.complete-*"))) == 1


def test_an_environment_whose_interpreter_is_gone_is_rebuilt(tree, start, offline):
    for name in ("python", "python3"):
        (tree / ".venv/bin" / name).unlink()
        (tree / ".venv/bin" / name).symlink_to("/no/such/python")
    result = start(tree / "scripts/run_pt.sh", **offline)
    assert "repairing" in result.stderr and result.stdout == f"{tree / '.venv'} 1.0\n"


def test_changed_requirements_and_the_lock_of_a_dead_start_are_met_with_an_installation(tree, start, offline):
    before = (tree / "requirements.txt").read_text(encoding="utf-8")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tree / ".venv.lock").mkdir()
    (tree / ".venv.lock/holder").write_text(f"{dead.pid} {os.uname().nodename}\n")
    (tree / "requirements.txt").write_text("tinypackage==2.0\n", encoding="utf-8")
    try:
        result = start(tree / "scripts/run_pt.sh", **offline)
    finally:
        (tree / "requirements.txt").write_text(before, encoding="utf-8")
    assert result.stdout == f"{tree / '.venv'} 2.0\n" and not (tree / ".venv.lock").exists()
    assert start(tree / "scripts/run_pt.sh", **offline).stdout == f"{tree / '.venv'} 1.0\n"


def test_a_failed_installation_leaves_no_marker_and_no_lock(start, offline, tree):
    before = (tree / "requirements.txt").read_text(encoding="utf-8")
    (tree / "requirements.txt").write_text("tinypackage==3.0\n", encoding="utf-8")
    try:
        result = start(tree / "scripts/run_pt.sh", check=False, **offline)
    finally:
        (tree / "requirements.txt").write_text(before, encoding="utf-8")
    assert result.returncode == 2 and result.stdout == "" and "No matching distribution" in result.stderr
    assert not list(tree.glob(".venv/.complete-*")) and not (tree / ".venv.lock").exists()
    assert start(tree / "scripts/run_pt.sh", **offline).stdout == f"{tree / '.venv'} 1.0\n"


def test_an_active_environment_that_meets_the_requirements_is_used(start, tmp_path):
    tree = copy_scripts(tmp_path / "tree")
    (tree / "requirements.txt").write_text("pytest>=1\nno-such-package>1; python_version < '3'\n", encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = start(tree / "scripts/run_pt.sh", PYTHON=None, DRY_RUN="1", BASE_MODEL="a/b", PATH=path)
    assert Path(result.stdout.splitlines()[0]).parent == Path(sys.executable).parent
    assert "environment" not in result.stderr
    for line in ("pytest<1", "no-such-package"):
        (tree / "requirements.txt").write_text(f"{line}\n", encoding="utf-8")
        result = start(tree / "scripts/run_pt.sh", PYTHON=None, DRY_RUN="1", BASE_MODEL="a/b", PATH=path)
        assert "environment: .venv would be made first" in result.stderr and not (tree / ".venv").exists()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("sys.version_info, sys.version = (3, 8, 2), '3.8.2 (old)'", "Python 3.8.2 is too old"),
        ("sys.modules['ensurepip'] = None", "has no module venv (Debian, Ubuntu: apt install python3-venv)"),
    ],
)
def test_a_machine_without_a_fit_python_is_told_what_it_lacks(start, tmp_path, lie, said):
    tree = copy_scripts(tmp_path / "tree")
    (tree / "requirements.txt").write_text("no-such-package\n", encoding="utf-8")
    liar = tmp_path / "liar.py"
    liar.write_text(f"import sys\n{lie}\ncode = sys.argv[2]\ndel sys.argv[1:3]\nexec(code, {{}})\n", encoding="utf-8")
    for version in ("3", "", "3.10", "3.11", "3.12", "3.13", "3.14"):
        write_program(tmp_path / f"bin/python{version}", f'exec "{sys.executable}" "{liar}" "$@"\n')
    result = start(tree / "scripts/run_pt.sh", PYTHON=None, BASE_MODEL="a/b", check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[-1]
    assert not (tree / ".venv").exists() and not (tree / ".venv.lock").exists()
