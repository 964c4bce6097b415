"""What a user gets wrong is told in one line, with exit code 2, before any model is loaded."""

import importlib
import json
import logging
import os
import re

import pytest
from conftest import conversations, run_script, write_jsonl

SFT, PT = "supervised_finetuning", "pretraining"
GREETING = re.compile(r"(sft|pt): base ")  # the only thing a stage says before it has read its data


@pytest.fixture(autouse=True)
def own_process(monkeypatch, tmp_path):
    """Give each test the surroundings of a fresh process and undo what main() does to them."""
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "STAGEKIT_DEBUG"):
        os.environ.pop(name, None)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(environment)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def run(monkeypatch, capsys, tiny_qwen3, tmp_path):
    """A function that runs a stage's main() on flags and returns its lines on stderr."""

    def run(stage, *flags):
        module = importlib.import_module(stage)

        def load_model(*args):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(module, "load_model", load_model)
        given = {"--model_name_or_path": tiny_qwen3, "--output_dir": "out", "--data_cache_dir": "cache"}
        argv = [text for flag, value in given.items() if flag not in flags for text in (flag, str(value))]
        monkeypatch.setattr("sys.argv", [f"/where/it/stands/{stage}.py", *argv, "--do_train", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            module.main()
        output = capsys.readouterr()
        assert end.value.code == 2
        assert output.out == ""
        return output.err.splitlines()

    return run


def error_of(lines, stage):
    """The one line of error; nothing but the greeting may stand before it."""
    assert lines[-1].startswith(f"{stage}.py: error: ")
    assert all(GREETING.match(line) for line in lines[:-1]), lines
    return lines[-1].removeprefix(f"{stage}.py: error: ")


def talk(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def good_and(*lines):
    """Nine good conversations and these lines."""
    good = [json.dumps(row, ensure_ascii=False) for row in conversations(9)]
    return "\n".join([*good, *(line if isinstance(line, str) else json.dumps(line) for line in lines)]) + "\n"


REMEDY = " (mend the data, or go on without such rows: --on_bad_row skip)"
BAD_DATA = {
    "broken line": (
        SFT,
        good_and('{"conversations": ['),
        "d.jsonl:10: broken JSON at column 20 (Expecting value)" + REMEDY,
    ),
    "missing field": (
        *(SFT, good_and({"conversations": [{"from": "human"}]})),
        "d.jsonl:10: message 1 has no text (field 'value' or 'content' is NoneType)" + REMEDY,
    ),
    "unknown fields": (
        SFT,
        good_and({"a": 1, "b": 2}),
        "d.jsonl:10: no known format has the fields ['a', 'b']; expected",
    ),
    "wrong role order": (
        *(SFT, good_and(talk(("human", "Q"), ("system", "S"), ("gpt", "A")))),
        "d.jsonl:10: wrong role order at turn 2: system after user; user and assistant must take turns" + REMEDY,
    ),
    "tool call that is no JSON": (
        *(SFT, good_and(talk(("human", "Q"), ("function_call", "f(x)"), ("gpt", "A")))),
        "d.jsonl:10: message 2: the tool call is not JSON (Expecting value)" + REMEDY,
    ),
    "text instead of conversations": (
        *(SFT, good_and({"text": "words"})),
        "d.jsonl:10: fine-tuning needs a conversation, and this is running text (pretraining.py takes it)" + REMEDY,
    ),
    "empty file": (SFT, "", "d.jsonl: the file is empty; remove it or fill it"),
    "not UTF-8": (
        *(SFT, good_and()),
        "d.jsonl:1: not UTF-8 (byte 0xb7); it reads as GBK: iconv -f GB18030 -t UTF-8 d.jsonl > new.jsonl",
    ),
    "one prompt only": (
        *(PT, '{"text": "one"}\n{"text": "ONE!"}\n'),
        "d.jsonl:1: with one prompt only, nothing can be held out; give --validation_file_dir",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_named_by_file_and_line(run, name):
    stage, content, error = BAD_DATA[name]
    with open("d.jsonl", "w", encoding="gb18030" if name == "not UTF-8" else "utf-8") as stream:
        stream.write(content)
    assert error_of(run(stage, "--train_file_dir", "d.jsonl"), stage).startswith(error)
    assert not os.path.exists("out/stage.json") and not os.path.exists("cache")


def test_several_bad_rows_take_a_line_each_and_one_says_what_to_do(run):
    with open("d.jsonl", "w") as stream:
        stream.write('{"text": "one"}\n[1]\n{"text": 7}\n')
    lines = [line for line in run(PT, "--train_file_dir", "d.jsonl") if not GREETING.match(line)]
    assert lines[0] == "pretraining.py: error: d.jsonl:2: expected an object with named fields, got list"
    assert lines[1].startswith("d.jsonl:3: no known format has the fields ['text']; expected one of: ")
    assert lines[2:] == [REMEDY.strip()]


def make_nothing():
    pass


def make_directory():
    os.makedirs("d/sub")
    with open("d/sub/notes.md", "w") as stream:
        stream.write("x")


def make_model_without_weights():
    os.mkdir("m")
    with open("m/config.json", "w") as stream:
        stream.write("{}")


def make_unfinished_run():
    make_model_without_weights()
    os.mkdir("m/checkpoint-3")


def make_damaged_stage():
    os.mkdir("m")
    with open("m/model.safetensors", "w") as stream:
        stream.write("x")
    with open("m/stage.json", "w") as stream:
        stream.write('{"format": 1')


def make_interrupted_run():
    os.makedirs("out/checkpoint-7")


def make_file():
    with open("file", "w") as stream:
        stream.write("x")


BAD_FLAGS = {
    "directory without data": (
        *(make_directory, ["--train_file_dir", "d"]),
        "d: no data in this directory; expected files ending in .jsonl, .json, .txt",
    ),
    "no such data": (make_nothing, ["--train_file_dir", "none"], "none: no such file or directory (looked from /"),
    "no such held-out data": (make_nothing, ["--validation_file_dir", "none"], "none: no such file or directory"),
    "misspelt flag": (
        *(make_nothing, ["--lerning_rate", "1"]),
        "unknown flag --lerning_rate; did you mean --learning_rate? (--help lists the flags)",
    ),
    "model directory without weights": (
        *(make_model_without_weights, ["--model_name_or_path", "m"]),
        "m: no weights in this directory (expected *.safetensors or adapter_config.json)",
    ),
    "model directory of an unfinished run": (
        *(make_unfinished_run, ["--model_name_or_path", "m"]),
        "m: no weights in this directory (expected *.safetensors or adapter_config.json); it holds checkpoint-3 of an "
        "unfinished run",
    ),
    "damaged stage.json": (make_damaged_stage, ["--model_name_or_path", "m"], "m/stage.json: damaged ("),
    "no such model directory": (make_nothing, ["--model_name_or_path", "./m"], "./m: no such model directory"),
    "no adapter": (
        *(make_model_without_weights, ["--peft_path", "m"]),
        "m: not an adapter directory, adapter_config.json is missing",
    ),
    "unknown template": (
        *(make_nothing, ["--template_name", "chatlm"]),
        "--template_name 'chatlm' is not a template; did you mean 'chatglm'? known: alpaca, ",
    ),
    "unknown check": (
        make_nothing,
        ["--skip_checks", "leaks"],
        "--skip_checks 'leaks' is not a check; known: leakage, ",
    ),
    "unknown data format": (make_nothing, ["--data_format", "csv"], "--data_format 'csv' is unknown; known: auto, "),
    "output is a file": (
        make_file,
        ["--output_dir", "file"],
        "--output_dir file cannot be written (file is no directory",
    ),
    "output below a file": (
        make_file,
        ["--output_dir", "file/out"],
        "--output_dir file/out cannot be written (",
    ),
    "output of an interrupted run": (
        *(make_interrupted_run, []),
        "out holds checkpoint-7 of an interrupted run: continue it with --resume_from_checkpoint True, or start over "
        "with --overwrite_output_dir True",
    ),
    "secret in a flag": (
        make_nothing,
        ["--hf_hub_token", "hf_x"],
        "--hf_hub_token would be logged with the arguments",
    ),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_bad_flag_is_told_in_one_line(run, name):
    prepare, flags, error = BAD_FLAGS[name]
    prepare()
    data = [] if "--train_file_dir" in flags else ["--train_file_dir", write_jsonl("good.jsonl", conversations(9))]
    assert error_of(run(SFT, *data, *flags), SFT).startswith(error)


def test_debug_shows_where_it_happened(run):
    lines = run(SFT, "--train_file_dir", "none", "--debug")
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("supervised_finetuning.py: error: none: no such file or directory")


@pytest.mark.parametrize("stage", [SFT, PT])
def test_a_real_process_says_one_line_and_ends_with_2(tiny_qwen3, tmp_path, stage):
    write_jsonl(tmp_path / "d/one.jsonl", conversations(3) if stage == SFT else [{"text": "one"}, {"text": "two"}])
    (tmp_path / "d/two.jsonl").write_text('{"text": \n')
    flags = ["--model_name_or_path", tiny_qwen3, "--train_file_dir", "d", "--output_dir", "out", "--do_train"]
    result = run_script(f"{stage}.py", *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stdout == "" and "Traceback" not in result.stderr
    line = f"{stage}.py: error: d/two.jsonl:1: broken JSON at column 10 (Expecting value){REMEDY}"
    assert [text for text in result.stderr.splitlines() if text.startswith(f"{stage}.py")] == [line]
    assert result.stderr.splitlines()[-1] == line
