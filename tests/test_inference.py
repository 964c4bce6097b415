"""inference.py as a user runs it: flags, chat through a pipe and a terminal, files of questions, interruptions."""

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, build_model, run_script, write_jsonl
from test_generation import COLD, FEVER, TAUGHT, endless, outputs, said  # noqa: F401 (two are fixtures)

import inference
from stagekit import generation, prediction
from stagekit.journal import Journal

REST = TAUGHT[0][-1]["content"]


def predict(tmp_path, *flags, name="out.jsonl"):
    """Run the batch mode in this process and return its rows."""
    output = tmp_path / name
    inference.main(inference.parse_args([*map(str, flags), "--output_file", str(output)]))
    return read(output)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refuses(*flags, capsys):
    """The error that parse_args ends with."""
    with pytest.raises(SystemExit) as ended:
        inference.parse_args(list(flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


# -- flags -----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(ROOT / "inference.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "--lora_model" in result.stdout
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "peft", "numpy", "stagekit.generation"}


def test_the_flags_are_the_ones_promised():
    promised = (
        "base_model lora_model tokenizer_path template_name interactive data_file output_file resize_emb only_cpu "
        "gpus system_prompt max_new_tokens temperature top_p repetition_penalty batch_size load_in_4bit load_in_8bit "
        "debug"
    )
    args = inference.parse_args(["--base_model", "b", "--interactive"])
    assert set(vars(args)) == set(promised.split())


@pytest.mark.parametrize("value, expected", [([], True), (["True"], True), (["false"], False), (["False"], False)])
def test_switches_work_bare_and_with_a_value(value, expected):
    args = inference.parse_args(["--base_model", "b", "--interactive", "--only_cpu", *value])
    assert args.only_cpu is expected


def test_an_unknown_flag_names_the_nearest(capsys):
    assert "unknown flag --lora_modle; did you mean --lora_model?" in refuses("--lora_modle", "x", capsys=capsys)


def test_abbreviations_are_refused(capsys):
    assert "unknown flag --temp" in refuses("--base_model", "b", "--interactive", "--temp", "1", capsys=capsys)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--interactive"], "--base_model or --lora_model is missing"),
        (["--base_model", "b"], "one of --interactive (chat) and --data_file"),
        (["--base_model", "b", "--interactive", "--data_file", "f"], "one of --interactive"),
        (["--base_model", "b", "--interactive", "--only_cpu", "--gpus", "0"], "--only_cpu and --gpus exclude"),
        (["--base_model", "b", "--interactive", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--base_model", "b", "--interactive", "--temperature", "-1"], "--temperature -1.0"),
        (["--base_model", "b", "--interactive", "--temperature", "1e-40"], "--temperature 1e-40 must be 0"),
        (["--base_model", "b", "--interactive", "--output_file", "o"], "--output_file belongs to --data_file"),
        (["--base_model", "b", "--interactive", "--batch_size", "4"], "--batch_size belongs to --data_file"),
        (["--base_model", "b", "--interactive", "--top_p", "0"], "--top_p 0.0"),
        (["--base_model", "b", "--interactive", "--max_new_tokens", "0"], "--max_new_tokens 0 must be above 0"),
        (["--base_model", "b", "--interactive", "--only_cpu", "maybe"], "'maybe' is neither True nor False"),
    ],
)
def test_values_that_cannot_work_are_refused_in_one_line(flags, expected, capsys):
    message = refuses(*flags, capsys=capsys)
    assert expected in message and message.count("\n") == 1


@pytest.mark.parametrize("task", ["--interactive", "--data_file"])
@pytest.mark.parametrize("flags, visible", [(["--gpus", "0,1"], "0,1"), (["--only_cpu"], ""), ([], "unset")])
def test_the_gpus_are_chosen_before_torch_is_imported(flags, visible, task, tmp_path):
    seen = "import os, sys\nprint(os.environ.get('CUDA_VISIBLE_DEVICES', 'unset'))\nsys.exit(7)\n"
    (tmp_path / "torch.py").write_text(seen)
    (tmp_path / "q.txt").write_text("a question\n")
    flags = ["--base_model", "b", task, *([tmp_path / "q.txt"] if task == "--data_file" else []), *flags]
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, ROOT / "inference.py", *flags]
    result = subprocess.run(command, env={**environment, "PYTHONPATH": tmp_path}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (7, visible + "\n")


def test_gpus_that_are_not_there_are_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--gpus 0,1: 1 of these GPUs"):
        inference.main(inference.parse_args(["--base_model", "b", "--interactive", "--gpus", "0,1"]))


def test_errors_are_one_line_and_debug_shows_the_traceback(tmp_path):
    flags = ["--base_model", "b", "--data_file", tmp_path / "nothing.txt"]
    result = run_script("inference.py", *flags, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"inference.py: error: {tmp_path}/nothing.txt: no such file")
    for more, env in ((["--debug"], {}), ([], {"STAGEKIT_DEBUG": "1"})):
        result = run_script("inference.py", *flags, *more, check=False, env=env)
        assert result.returncode == 2 and "Traceback" in result.stderr


def test_a_wrong_template_name_is_refused_before_anything_is_loaded(tmp_path):
    args = inference.parse_args(["--base_model", "/no/model", "--interactive", "--template_name", "vicunna"])
    with pytest.raises(ValueError, match="did you mean 'vicuna'"):
        inference.main(args)


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_piped_chat_writes_the_answers_and_nothing_else_to_stdout(outputs, tmp_path):  # noqa: F811
    lines = f"{COLD['content']}\n\n{FEVER['content']}\nclear\n{COLD['content']}\nexit\nWhat is a fever?\n"
    command = [sys.executable, ROOT / "inference.py", "--lora_model", outputs / "sft", "--interactive"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--temperature", "0"], input=lines.encode(), capture_output=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr.decode()
    # The second answer was taught only behind the first exchange, so the conversation was remembered.
    assert result.stdout.decode().splitlines() == [REST, "Ask a doctor! 看医生。", REST]
    notices = result.stderr.decode()
    assert f"base {outputs / 'base'}, template chatml" in notices and "no medical advice" in notices
    assert "forgotten" in notices


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, command, environment):
        self.child, self.descriptor = pty.fork()
        if self.child == 0:
            os.execve(command[0], command, environment)
        self.seen = b""

    def type(self, keys):
        os.write(self.descriptor, keys)

    def wait_for(self, text, timeout_seconds=120, press=None):
        """Read until the text appears behind what was waited for before; press a key every second meanwhile."""
        end = time.monotonic() + timeout_seconds
        while text.encode() not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen.decode(errors='replace')!r}"
            if press:
                self.type(press)
            if select.select([self.descriptor], [], [], 1)[0]:
                self.seen += os.read(self.descriptor, 4096)
        before, _, self.seen = self.seen.partition(text.encode())
        return before.decode(errors="replace")

    def close(self):
        """Wait for the end of the program and return its exit code; kill it after half a minute."""
        end = time.monotonic() + 30
        while (status := os.waitpid(self.child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(self.child, signal.SIGKILL)
            with contextlib.suppress(OSError):  # Linux raises when the other end is closed
                if select.select([self.descriptor], [], [], 0.1)[0]:
                    os.read(self.descriptor, 4096)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status[1])


def test_ctrl_c_stops_the_answer_and_at_the_prompt_says_how_to_leave(endless):  # noqa: F811
    flags = ["--base_model", str(endless), "--interactive", "--temperature", "0", "--max_new_tokens", "1900"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    terminal = Terminal([sys.executable, str(ROOT / "inference.py"), *flags], environment)
    try:
        terminal.wait_for("User: ")
        for question in (b"What is a fever?\n", b"a\n"):
            terminal.type(question)
            terminal.wait_for("Assistant: ")
            time.sleep(0.3)
            terminal.type(b"\x03")
            terminal.wait_for("(stopped)")
            terminal.wait_for("User: ")
            # Pressed again in case: readline misses a signal between writing the prompt and waiting for keys.
            terminal.wait_for("(`exit` or Ctrl-D leaves)", press=b"\x03")
            terminal.wait_for("User: ")
        terminal.type(b"\x04")
    except BaseException:
        os.kill(terminal.child, signal.SIGKILL)
        raise
    finally:
        code = terminal.close()
    assert code == 0


class Scripted:
    """Feed `converse` with lines, and answer each prompt with given pieces; record what the model was asked."""

    def __init__(self, monkeypatch, loaded, lines, answers):
        self.prompts, lines, answers = [], iter(lines), iter(answers)

        def fake_input(prompt=""):
            line = next(lines, None)
            if line is None:
                raise EOFError
            if isinstance(line, BaseException):
                raise line
            return line

        def fake_stream(loaded, input_ids, settings, cache=None):
            self.prompts.append(loaded.chat.tokenizer.decode(input_ids))
            text = ""
            for piece in next(answers):
                if isinstance(piece, BaseException):
                    raise piece
                text += piece
                yield generation.Answer(text, None, 1)
            yield generation.Answer(text, "stop", 2)

        class Channel:
            def reconfigure(self, **options):
                pass

            def isatty(self):
                return False

        monkeypatch.setattr("builtins.input", fake_input)
        monkeypatch.setattr(generation, "stream", fake_stream)
        monkeypatch.setattr(sys, "stdin", Channel())
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
        self.loaded = loaded

    def run(self, system_prompt=None, **settings):
        settings = {"temperature": 0.0, "max_new_tokens": 16, **settings}
        inference.talk(self.loaded, generation.choose_settings(self.loaded, **settings), system_prompt)


@pytest.fixture(scope="module")
def sft(outputs):  # noqa: F811
    source = generation.find_source(None, str(outputs / "sft"))
    return generation.load_for_generation(source, generation.load_chat(source))


def test_an_interrupted_answer_stays_in_the_history_as_far_as_it_came(sft, monkeypatch, capsys):
    chat = Scripted(monkeypatch, sft, ["one", "two"], [["Drink ", "water", KeyboardInterrupt()], ["yes"]])
    chat.run()
    assert "<|im_start|>assistant\nDrink water<|im_end|>" in chat.prompts[1]
    captured = capsys.readouterr()
    assert captured.out == "Drink water\nyes\n" and "(stopped)" in captured.err


def test_memory_that_runs_out_is_told_and_the_conversation_goes_on(sft, monkeypatch, capsys):
    error = generation.OutOfMemory("memory runs out; shorten the prompts")
    chat = Scripted(monkeypatch, sft, ["one", "two", "three"], [["yes"], [error], ["yes"]])
    chat.run()
    assert chat.prompts[2] == chat.prompts[1].replace("two", "three") and "one" in chat.prompts[2]
    captured = capsys.readouterr()
    assert captured.out == "yes\n\nyes\n" and "(memory runs out; shorten the prompts)\n" in captured.err


def test_a_question_interrupted_before_its_answer_is_not_kept(sft, monkeypatch):
    chat = Scripted(monkeypatch, sft, ["one", KeyboardInterrupt(), "two"], [[KeyboardInterrupt()], ["yes"]])
    chat.run()
    assert chat.prompts[1] == chat.prompts[0].replace("one", "two")


def test_the_system_prompt_stays_after_clear(sft, monkeypatch):
    chat = Scripted(monkeypatch, sft, ["one", "CLEAR", "two"], [["yes"], ["yes"]])
    chat.run(system_prompt="Be brief.")
    assert chat.prompts[1] == chat.prompts[0].replace("one", "two")
    assert "Be brief." in chat.prompts[0]


def test_a_full_context_forgets_the_oldest_exchanges_and_says_so_once(sft, monkeypatch, capsys):
    questions = [f"question {number} " + "fever " * 20 for number in range(8)]
    chat = Scripted(monkeypatch, sft, questions, [["yes"]] * 8)
    chat.run(system_prompt="Be brief.", max_new_tokens=2048 - 150)
    assert "question 0" in chat.prompts[1] and "question 0" not in chat.prompts[-1]
    assert "question 6" in chat.prompts[-1] and "question 7" in chat.prompts[-1]
    assert all("Be brief." in prompt for prompt in chat.prompts)
    assert capsys.readouterr().err.count("oldest exchanges are forgotten") == 1


def test_a_question_longer_than_the_context_is_refused_and_forgotten(sft, monkeypatch, capsys):
    chat = Scripted(monkeypatch, sft, ["fever " * 500, "one"], [["yes"]])
    chat.run(max_new_tokens=2000)
    assert len(chat.prompts) == 1 and "fever" not in chat.prompts[0]
    assert "room for 48 tokens" in capsys.readouterr().err


# -- questions from files --------------------------------------------------------------------------------------------


def test_bad_records_are_named_by_file_and_line_before_a_model_is_loaded(tmp_path):
    rows = [{"question": "a"}, {"text": "running text"}, {"question": ["a"]}, {"messages": [said("user", "")]}]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    with path.open("a") as stream:
        stream.write('{"question": \n')
    with pytest.raises(ValueError) as raised:
        predict(tmp_path, "--base_model", "/no/model", "--data_file", path)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (2, 3, 4, 5)]
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        predict(tmp_path, "--base_model", "/no/model", "--data_file", tmp_path / "nothing.jsonl")


def test_answers_stand_in_the_order_of_the_questions_with_their_references(outputs, tmp_path, caplog):  # noqa: F811
    path = write_jsonl(
        tmp_path / "q.jsonl", [{"messages": TAUGHT[i]} for i in (0, 2, 1)] + [{"messages": TAUGHT[2][:3]}]
    )
    rows = predict(tmp_path, "--lora_model", outputs / "sft", "--data_file", path, "--batch_size", 3)
    order = [TAUGHT[0], TAUGHT[2], TAUGHT[1], TAUGHT[2]]
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["prediction"] for row in rows] == [messages[-1]["content"] for messages in order]
    assert [row["messages"] for row in rows] == [messages[:-1] for messages in order]
    assert [row["input"] for row in rows] == [messages[-2]["content"] for messages in order]
    assert [row.get("reference") for row in rows] == [m[-1]["content"] for m in order[:3]] + [None]
    assert "reference" not in rows[3]
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert list(rows[0]) == ["index", "input", "messages", "prediction", "reference", "finish_reason", "new_tokens"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.jsonl", "q.jsonl"]


def test_the_batch_size_changes_no_answer(endless, tmp_path):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "fever " * number + "发烧"} for number in range(1, 7)])
    flags = ["--base_model", endless, "--data_file", path, "--max_new_tokens", 24]
    one = predict(tmp_path, *flags, "--batch_size", 1)
    assert predict(tmp_path, *flags, "--batch_size", 4) == one
    assert {row["finish_reason"] for row in one} == {"length"} and {row["new_tokens"] for row in one} == {24}


def test_the_longest_questions_are_asked_first(endless, tmp_path, monkeypatch):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "fever " * number} for number in (1, 30, 4, 20, 2)])
    real, lengths = generation.generate_batch, []

    def counted(loaded, prompts, settings):
        lengths.extend(map(len, prompts))
        return real(loaded, prompts, settings)

    monkeypatch.setattr(generation, "generate_batch", counted)
    flags = ["--base_model", endless, "--data_file", path, "--max_new_tokens", 2, "--batch_size", 2]
    rows = predict(tmp_path, *flags)
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 5
    assert [len(row["input"].split()) for row in rows] == [1, 30, 4, 20, 2]


def test_a_prompt_that_does_not_fit_is_not_asked_and_a_long_history_is_shortened(outputs, tmp_path, caplog):  # noqa: F811
    long = [said("user", "fever " * 300), said("assistant", "yes"), *TAUGHT[0][:1]]
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "fever " * 300}, {"messages": long}])
    caplog.set_level("INFO", logger="stagekit.prediction")
    flags = ["--lora_model", outputs / "sft", "--data_file", path, "--max_new_tokens", 1948]
    first, second = predict(tmp_path, *flags)
    assert (first["prediction"], first["finish_reason"], first["new_tokens"]) == ("", "prompt_too_long", 0)
    assert (second["prediction"], second["messages"]) == (REST, long)
    assert "1 not asked" in caplog.text and "1 asked without their oldest exchanges" in caplog.text


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_a_killed_run_continues_where_it_stood(endless, tmp_path):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": f"fever {number}"} for number in range(6)])
    output = tmp_path / "deep" / "out.jsonl"
    partial = output.with_name("out.jsonl.partial")
    flags = ["--base_model", endless, "--data_file", path, "--max_new_tokens", 300, "--batch_size", 1]
    command = [sys.executable, ROOT / "inference.py", *flags, "--output_file", output]
    process = subprocess.Popen(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while time.monotonic() < end and (not partial.is_file() or partial.read_bytes().count(b"\n") < 3):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert partial.is_file() and not output.exists()
    lines = partial.read_bytes().splitlines(keepends=True)
    done = json.loads(lines[1])
    done["prediction"] = "KEPT"  # so that it shows whether this question is asked again
    partial.write_bytes(lines[0] + json.dumps(done).encode() + b"\n" + lines[2][:40])  # and the last line is torn
    rows = predict(output.parent, *flags)
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["index"] for row in rows if row["prediction"] == "KEPT"] == [done["index"]]
    assert not partial.exists()
    again = predict(tmp_path, *flags, name="whole.jsonl")
    assert [row for row in rows if row["prediction"] != "KEPT"] == [r for r in again if r["index"] != done["index"]]


def test_a_torn_line_is_cut_off_before_the_journal_goes_on(tmp_path):
    header, rows = {"model": "m"}, [{"index": 0}, {"index": 1}]
    journal = Journal(tmp_path / "p", header)
    journal.add(rows[0])
    whole = (tmp_path / "p").read_bytes()
    for torn in (b'{"index": 1, "predic', b"\x00\x00\x00\n", b'{"index": 1}'):
        (tmp_path / "p").write_bytes(whole + torn)
        journal = Journal(tmp_path / "p", header)
        assert journal.rows == {0: rows[0]}
        journal.add(rows[1])
        assert read(tmp_path / "p") == [header, *rows]
    (tmp_path / "p").write_bytes(whole[:5])
    assert Journal(tmp_path / "p", header).rows == {} and read(tmp_path / "p") == [header]


def test_a_journal_without_rows_is_begun_anew_whatever_run_it_was_of(tmp_path):
    Journal(tmp_path / "p", {"model": "a longer name"}).close()
    journal = Journal(tmp_path / "p", {"model": "m"})
    journal.add({"index": 0})
    assert read(tmp_path / "p") == [{"model": "m"}, {"index": 0}]
    with pytest.raises(ValueError, match="holds answers of a run with other model"):
        Journal(tmp_path / "p", {"model": "a longer name"})


def test_settings_that_fail_before_the_first_answer_do_not_stand_in_the_way_of_others(endless, tmp_path):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "fever"}])
    flags = ["--base_model", endless, "--data_file", path]
    with pytest.raises(ValueError, match="--max_new_tokens 9999 leaves no room"):
        predict(tmp_path, *flags, "--max_new_tokens", 9999)
    assert [row["new_tokens"] for row in predict(tmp_path, *flags, "--max_new_tokens", 2)] == [2]


def test_what_is_answered_stands_in_the_partial_at_once(endless, tmp_path, monkeypatch):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": f"fever {number}"} for number in range(4)])
    flags = ["--base_model", endless, "--data_file", path, "--max_new_tokens", 8, "--batch_size", 2]
    whole = predict(tmp_path, *flags, name="whole.jsonl")
    real, calls = generation.generate_batch, []

    def interrupted(loaded, prompts, settings):
        if calls:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return real(loaded, prompts, settings)

    monkeypatch.setattr(generation, "generate_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path, *flags)
    assert len(read(tmp_path / "out.jsonl.partial")) == 3
    calls.clear()
    assert predict(tmp_path, *flags) == whole
    assert calls == [2]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--max_new_tokens", "9"], "max_new_tokens"),
        (["--system_prompt", "s"], "system_prompt"),
        (["retrained"], "model"),
    ],
)
def test_a_partial_of_other_settings_is_refused(flags, named, outputs, tmp_path, monkeypatch):  # noqa: F811
    base = shutil.copytree(outputs / "base", tmp_path / "base")
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "a"}])
    common = ["--base_model", base, "--data_file", path]

    def interrupted(loaded, settings, prompts, journal, args):
        journal.add({"index": 0})

    monkeypatch.setattr(prediction, "predict", interrupted)
    with pytest.raises(FileNotFoundError):
        predict(tmp_path, *common, "--max_new_tokens", "8")
    if flags == ["retrained"]:
        build_model(base, seed=1)
        flags = ["--max_new_tokens", "8"]
    with pytest.raises(ValueError, match=rf"out\.jsonl\.partial holds .*{named}.* delete the file"):
        predict(tmp_path, *common, *flags)


def test_an_output_file_that_is_a_directory_is_refused(outputs, tmp_path):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "a"}])
    with pytest.raises(ValueError, match="is a directory"):
        predict(tmp_path, "--base_model", outputs / "base", "--data_file", path, name="")
