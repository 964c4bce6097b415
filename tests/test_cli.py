"""One flag means one thing in every stage, every flag is read somewhere, and a wrong one is told in a line."""

import ast
import dataclasses
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_script
from transformers import TrainingArguments

from stagekit.arguments import OLD_FLAGS, ModelArguments, StageTrainingArguments, parse_args, translate_old_flags

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["pretraining", "supervised_finetuning"]
NEEDED = ["--model_name_or_path", "m", "--train_file_dir", "d", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Parsing prepares the process for its devices; here without an accelerator, and undone afterwards."""
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: False)
    yield
    os.environ.clear()
    os.environ.update(before)


def own_fields(stage):
    """{flag: (type, default, help, choices)} of the dataclasses this project declares."""
    own = [cls for cls in importlib.import_module(stage).ARGUMENTS if cls is not StageTrainingArguments]
    return {
        field.name: (str(field.type), repr(field.default), field.metadata["help"], field.metadata.get("choices"))
        for cls in own
        for field in dataclasses.fields(cls)
    }


def parse(stage, *flags):
    """{flag: value} over all the dataclasses of a stage."""
    parsed = parse_args(*importlib.import_module(stage).ARGUMENTS, args=list(flags))
    return {name: value for part in parsed for name, value in vars(part).items()}


def refusal(capsys, stage, *flags):
    """The line on stderr with which parsing ends."""
    with pytest.raises(SystemExit) as end:
        parse(stage, *flags)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# -- declarations ----------------------------------------------------------------------------------------------------


def test_a_flag_means_the_same_in_every_stage():
    seen = {}
    for stage in STAGES:
        for name, meaning in own_fields(stage).items():
            assert seen.setdefault(name, meaning) == meaning, f"--{name} differs in {stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_what_transformers_declares_is_not_declared_again(stage):
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not theirs & set(own_fields(stage))
    assert {field.name for field in dataclasses.fields(StageTrainingArguments)} == theirs


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_has_a_help_that_is_a_sentence(stage):
    for name, (_, _, text, _) in own_fields(stage).items():
        assert text[0].isupper() or text.split(":")[0] in ("stop", "tensorboard"), (name, text)
        assert text.endswith("."), (name, text)


def read_attributes():
    """Names read as attributes anywhere in the project; a dataclass that checks its own fields does not count."""
    found = set()

    def own_check(path, node):
        return path.name == "arguments.py" and isinstance(node.value, ast.Name) and node.value.id == "self"

    for path in [*ROOT.glob("*.py"), *ROOT.glob("stagekit/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not own_check(path, node):
                found.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
                found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_is_read(stage):
    assert ModelArguments(model_name_or_path="m", qlora=True).load_in_4bit is True  # all that --qlora does
    assert set(own_fields(stage)) - {"qlora"} <= read_attributes()


# -- parsing ---------------------------------------------------------------------------------------------------------


def test_flags_are_parsed_into_their_types():
    values = parse(
        *("supervised_finetuning", *NEEDED, "--max_length", "77", "--lora_alpha", "3.5", "--packing", "False"),
        *(
            "--use_peft",
            "no",
            "--load_in_8bit",
            "--neft_alpha",
            "5",
            "--learning_rate",
            "2e-3",
            "--warmup_steps",
            "0.05",
        ),
    )
    wanted = {"max_length": 77, "lora_alpha": 3.5, "packing": False, "use_peft": False, "load_in_8bit": True}
    wanted |= {"neft_alpha": 5.0, "learning_rate": 0.002, "warmup_steps": 0.05, "train_file_dir": "d", "use_cpu": True}
    assert {name: values[name] for name in wanted} == wanted
    assert values["model_name_or_path"] == "m" and values["output_dir"] == "o"


def test_the_defaults_differ_from_transformers_only_where_this_toolkit_needs_it():
    values = parse("pretraining", *NEEDED)
    wanted = {
        "report_to": ["tensorboard"],
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "seed": 42,
    }
    assert {name: values[name] for name in wanted} == wanted
    assert parse("pretraining", *NEEDED, "--report_to", "none")["report_to"] == []
    assert parse("pretraining", *NEEDED, "--report_to", "swanlab", "wandb")["report_to"] == ["swanlab", "wandb"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lora_rankk", "8"], "unknown flag --lora_rankk; did you mean --lora_rank?"),
        (["--train_dir=x"], "unknown flag --train_dir; did you mean --train_file_dir?"),
        (["--zzzzzzz", "1"], "unknown flag --zzzzzzz"),
        (["8"], "unexpected argument '8'; flags start with --"),
        (["--lora_ran", "8"], "unknown flag --lora_ran; did you mean --lora_rank?"),
        (["--output", "x"], "unknown flag --output; did you mean --output_dir?"),
        (["--lora_rank", "eight"], "argument --lora_rank/--lora-rank: invalid int value: 'eight'"),
        (["--on_bad_row", "ignore"], "argument --on_bad_row/--on-bad-row: invalid choice: 'ignore' (choose from"),
    ],
    ids=["misspelt", "with =", "like nothing", "no flag", "abbreviated", "also abbreviated", "no number", "no choice"],
)
def test_a_wrong_flag_ends_with_one_line_and_exit_code_2(capsys, monkeypatch, stage, flags, line):
    monkeypatch.setattr("sys.argv", [f"/somewhere/{stage}.py"])
    got = refusal(capsys, stage, *NEEDED, *flags)
    assert got.startswith(f"{stage}.py: error: {line}")
    assert got.endswith(" (--help lists the flags)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "0"], "--lora_rank must be at least 1, got 0"),
        (["--lora_dropout", "1"], r"--lora_dropout must be in \[0, 1\), got 1.0"),
        (["--validation_split_percentage", "0"], "--validation_split_percentage must be between 0 and 100, got 0.0"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1, got 0"),
        (["--load_in_8bit", "--qlora"], "--load_in_4bit and --load_in_8bit exclude each other; give one"),
        (["--peft_path", "x", "--use_peft", "False"], "--peft_path continues an adapter, so it needs --use_peft True"),
        (["--max_length", "15"], "--max_length must be at least 16 tokens, got 15"),
        (["--template_name", "chatlm"], "--template_name 'chatlm' is not a template; did you mean 'chatglm'"),
        (["--model_name_or_path", ""], "--model_name_or_path is missing: name a hub model"),
        (["--train_file_dir", ""], "--train_file_dir is missing: name a file or directory"),
    ],
)
def test_a_value_out_of_range_is_refused_while_parsing(flags, message):
    with pytest.raises(ValueError, match=message):
        parse("supervised_finetuning", *NEEDED, *flags)


def test_half_precision_without_a_gpu_is_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match=r"--fp16 True needs a GPU .* leave it out \(fp32\), or use --bf16 True"):
        parse("pretraining", *NEEDED, "--fp16", "True")
    assert parse("pretraining", *NEEDED, "--fp16", "False")["fp16"] is False


# -- flags of earlier years ------------------------------------------------------------------------------------------


def test_every_old_flag_leads_to_a_flag_of_today():
    names = set().union(*map(own_fields, STAGES)) | {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {today for today, _ in OLD_FLAGS.values() if today} <= names


@pytest.mark.parametrize("form", ["--a b", "--a=b"])
@pytest.mark.parametrize("old", OLD_FLAGS)
def test_an_old_flag_is_translated_with_a_note(old, form):
    today, note = OLD_FLAGS[old]
    given = [f"--{old}", "7"] if form == "--a b" else [f"--{old}=7"]
    argv, notes = translate_old_flags(["--seed", "1", *given, "--do_train"], known={"seed", "do_train"})
    wanted = [] if today is None else [f"--{today}", "7"] if form == "--a b" else [f"--{today}=7"]
    assert argv == ["--seed", "1", *wanted, "--do_train"]
    assert notes == [f"--{old} {note}"]


def test_an_old_flag_without_a_value_and_with_several_is_translated():
    argv, _ = translate_old_flags(["--use_lora", "--lora_target_modules", "q_proj", "v_proj"], known=set())
    assert argv == ["--use_peft", "--target_modules", "q_proj", "v_proj"]


def test_a_flag_the_script_declares_is_never_touched():
    argv = ["--model_max_length", "5", "--device_map=auto", "--max_source_length", "3", "--run_name=--x=y"]
    assert translate_old_flags(argv, {"model_max_length", "device_map", "max_source_length"}) == (argv, [])


@pytest.mark.parametrize(
    ("given", "length", "names"),
    [
        (["--max_source_length", "256", "--max_target_length", "512"], 768, "max_source_length + --max_target_length"),
        (["--max_target_length=512", "--max_source_length=256"], 768, "max_target_length + --max_source_length"),
        (["--max_source_length", "256"], 256, "max_source_length"),
    ],
)
def test_lengths_of_source_and_target_become_one_sum(given, length, names):
    argv, notes = translate_old_flags(given, known=set())
    assert argv == ["--max_length", str(length)]
    assert notes == [f"--{names} is --max_length {length} here: one limit for prompt and answer"]


def test_a_length_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="--max_source_length must be whole numbers, got .'long'"):
        translate_old_flags(["--max_source_length", "long"], known=set())


@pytest.mark.parametrize("given", [["--hf_hub_token", "hf_secret"], ["--hf_hub_token=hf_secret"]])
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(given):
    with pytest.raises(ValueError, match="set the environment variable HF_TOKEN") as error:
        translate_old_flags(given, known=set())
    assert "hf_secret" not in str(error.value)


def test_an_old_command_line_still_runs(capsys):
    values = parse(
        *("supervised_finetuning", *NEEDED, "--evaluation_strategy", "steps", "--warmup_ratio", "0.05"),
        *("--torch_dtype=float32", "--model_max_length", "512", "--device_map", "auto", "--overwrite_output_dir"),
    )
    assert values["eval_strategy"] == "steps" and values["warmup_steps"] == 0.05
    assert values["dtype"] == "float32" and values["max_length"] == 512 and values["overwrite_output_dir"] is True
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[:2] for note in notes] == [
        ["note:", f"--{name}"]
        for name in (
            *("evaluation_strategy", "warmup_ratio", "torch_dtype", "model_max_length", "device_map"),
            "overwrite_output_dir",
        )
    ]


# -- a file of arguments ---------------------------------------------------------------------------------------------


def write_arguments(path, **values):
    path.write_text(json.dumps({"model_name_or_path": "m", "train_file_dir": "d", "output_dir": "o", **values}))
    return str(path)


def test_a_json_file_says_the_same_as_the_flags(tmp_path):
    path = write_arguments(tmp_path / "run.json", max_length=77, learning_rate=0.002, packing=False)
    flags = [*NEEDED, "--max_length", "77", "--learning_rate", "0.002", "--packing", "False"]
    from_file, from_flags = parse("supervised_finetuning", path), parse("supervised_finetuning", *flags)
    differ = {name for name in from_flags if repr(from_file[name]) != repr(from_flags[name])}
    assert differ <= {"distributed_state", "accelerator_config", "logging_dir"}
    assert from_file["use_cpu"] is True and from_file["max_length"] == 77


def test_half_precision_without_a_gpu_is_refused_from_a_json_file_too(tmp_path):
    with pytest.raises(ValueError, match="--fp16 True needs a GPU"):
        parse("pretraining", write_arguments(tmp_path / "run.json", fp16=True))


def test_a_wrong_name_in_a_json_file_ends_like_a_wrong_flag(tmp_path, capsys):
    line = refusal(capsys, "pretraining", write_arguments(tmp_path / "run.json", lora_rankk=8))
    assert "error: unknown flag --lora_rankk; did you mean --lora_rank?" in line
    line = refusal(capsys, "pretraining", write_arguments(tmp_path / "run.json", lora_rank="eight"))
    assert "invalid int value: 'eight'" in line


def test_a_json_file_may_hold_lists_objects_and_nulls(tmp_path):
    given = {"report_to": ["tensorboard", "wandb"], "lr_scheduler_kwargs": {"num_cycles": 2}, "cache_dir": None}
    values = parse("pretraining", write_arguments(tmp_path / "run.json", **given))
    assert {name: values[name] for name in given} == given


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"lora_rank": 8', "run.json: not JSON ("),
        ("[1]", "run.json: expected one object"),
    ],
)
def test_a_wrong_json_file_of_arguments_is_named(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        parse("pretraining", str(path))
    assert str(error.value).startswith(f"{tmp_path}/{message}")


ASKED = ["answers to held-out questions"]

# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "groups"),
    [
        ("pretraining", ["model", "data", "adapter", "pretraining", "run", "training"]),
        ("supervised_finetuning", ["model", "data", "prompt", "adapter", "fine-tuning", *ASKED, "run", "training"]),
    ],
)
def test_help_groups_the_flags_and_loads_no_model(tmp_path, stage, groups):
    result = run_script(f"{stage}.py", "--model_name_or_path", tmp_path / "missing", "--help")
    usage, document = f"usage: {stage}.py --flag VALUE", importlib.import_module(stage).__doc__.strip()
    assert result.stdout.startswith(f"{usage} ... (or one FILE.json with the same names)\n\n{document}\n\n")
    lines = result.stdout.partition(document)[2].splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert [heading.split(" (")[0].rstrip(":") for heading in headings] == ["options", *groups]
    for name in own_fields(stage):
        assert sum(line.startswith(f"  --{name} ") or line.startswith(f"  --{name},") for line in lines) == 1, name
