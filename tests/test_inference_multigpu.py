"""inference_multigpu_demo.py in several processes and in one: shares, order, interruptions, and whose GPU is whose."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_script, write_jsonl
from test_generation import endless  # noqa: F401 (a fixture)

import inference
import inference_multigpu_demo as multigpu
from stagekit import generation
from stagekit.journal import read_lines
from stagekit.prediction import Prompt

SCRIPT = "inference_multigpu_demo.py"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """One process, whatever started the tests; main() hides the GPUs, and that is undone afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def questions(tmp_path):
    """Nine questions of nine lengths, the shortest first but one."""
    lengths = (3, 1, 4, 9, 5, 2, 6, 8, 7)
    return write_jsonl(tmp_path / "q.jsonl", [{"question": "fever " * length, "answer": "rest"} for length in lengths])


def flags_for(model, questions, output, *more):
    return list(map(str, ["--base_model", model, "--data_file", questions, "--output_file", output, *more]))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(flags):
    """The demo in this process."""
    multigpu.main(multigpu.parse_args([*flags, "--only_cpu"]))


def reference(flags, tmp_path):
    """The bytes inference.py writes for the same questions."""
    output = tmp_path / "single.jsonl"
    inference.main(inference.parse_args([*flags, "--output_file", str(output), "--only_cpu"]))
    return output.read_bytes()


# -- answers ---------------------------------------------------------------------------------------------------------


def test_two_processes_killed_in_the_middle_and_resumed_by_one_write_what_inference_py_writes(
    endless,  # noqa: F811
    questions,
    tmp_path,
):
    output = tmp_path / "deep" / "out.jsonl"
    flags = flags_for(endless, questions, output, "--max_new_tokens", 200, "--batch_size", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *flags], env=environment, start_new_session=True)
    journals = [output.with_name(f"out.jsonl.partial.{rank}") for rank in range(2)]
    end = time.monotonic() + 240
    while not all(journal.is_file() and journal.read_bytes().count(b"\n") >= 3 for journal in journals):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()

    done = [read_whole(journal)[1:] for journal in journals]
    assert not {row["index"] for row in done[0]} & {row["index"] for row in done[1]}
    # In the order of their lengths the questions are 3 7 8 6 4 2 0 5 1: every other one is a process's share.
    assert [row["index"] for row in done[0]] == [3, 8, 4, 0, 1][: len(done[0])]
    assert [row["index"] for row in done[1]] == [7, 6, 2, 5][: len(done[1])]
    kept = done[1][0]["index"]
    lines = journals[1].read_bytes().splitlines(keepends=True)
    changed = json.dumps({**done[1][0], "prediction": "KEPT"}).encode() + b"\n"
    journals[1].write_bytes(b"".join([lines[0], changed, *lines[2:]])[:-20])  # marked, and torn at its end

    run(flags)
    expected = [json.loads(line) for line in reference(flags, tmp_path).splitlines()]
    assert len(expected) == 9 and {row["new_tokens"] for row in expected} == {200}
    assert read(output) == [{**row, "prediction": "KEPT"} if row["index"] == kept else row for row in expected]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl"]


def read_whole(journal):
    """The lines of a journal, but for one that the kill has torn."""
    lines = journal.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def test_one_process_interrupted_and_resumed_by_two_writes_the_bytes_of_inference_py(
    endless,  # noqa: F811
    questions,
    tmp_path,
    monkeypatch,
):
    output = tmp_path / "out.jsonl"
    flags = flags_for(endless, questions, output, "--max_new_tokens", 16, "--batch_size", 2)
    real, calls = generation.generate_batch, []

    def interrupted(loaded, prompts, settings):
        if calls:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return real(loaded, prompts, settings)

    with monkeypatch.context() as patched:
        patched.setattr(generation, "generate_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(flags)
    (partial,) = tmp_path.glob("out.jsonl.partial*")
    assert partial.name == "out.jsonl.partial.0" and len(read(partial)) == 3
    result = run_script(SCRIPT, *flags, processes=2)
    assert output.read_bytes() == reference(flags, tmp_path)
    assert result.stderr.count("out.jsonl: 9 answers") == 1
    assert result.stderr.count("9 cut off after --max_new_tokens 16") == 1
    assert not list(tmp_path.glob("out.jsonl.partial*"))


def test_process_0_waits_for_the_answers_of_the_others(endless, questions, tmp_path, monkeypatch):  # noqa: F811
    output = tmp_path / "out.jsonl"
    flags = flags_for(endless, questions, output, "--max_new_tokens", 4)
    whole = reference(flags, tmp_path)

    def other_process(seconds):
        """Answer what process 0 has not, as process 1 would."""
        own = read(output.with_name("out.jsonl.partial.0"))
        done = {row["index"] for row in own[1:]}
        rows = [row for row in map(json.loads, whole.splitlines()) if row["index"] not in done]
        assert len(rows) == 4
        write_jsonl(output.with_name("out.jsonl.partial.1"), [own[0], *rows])

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(multigpu, "meet", lambda: None)
    monkeypatch.setattr(multigpu.time, "sleep", other_process)
    run(flags)
    assert output.read_bytes() == whole


def test_the_journal_of_an_interrupted_inference_py_is_continued(endless, questions, tmp_path, monkeypatch):  # noqa: F811
    output = tmp_path / "out.jsonl"
    flags = flags_for(endless, questions, output, "--max_new_tokens", 4, "--batch_size", 9)
    whole = reference(flags, tmp_path)
    header = {"written": "by inference.py"}
    monkeypatch.setattr("stagekit.prediction.describe_run", lambda *args: header)
    rows = [header, *map(json.loads, whole.splitlines())]
    write_jsonl(tmp_path / "out.jsonl.partial", rows[:-1])
    asked = []
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *args: asked.append(len(args[1])) or real(*args))
    run(flags)
    assert asked == [1] and output.read_bytes() == whole
    assert not list(tmp_path.glob("out.jsonl.partial*"))


def test_what_is_answered_already_is_written_without_loading_a_model(endless, questions, tmp_path, monkeypatch):  # noqa: F811
    output = tmp_path / "out.jsonl"
    flags = flags_for(endless, questions, output, "--max_new_tokens", 4)
    with monkeypatch.context() as patched:
        patched.setattr(multigpu.Gathered, "write", lambda self: None)  # as if killed before the last step
        run(flags)
    assert not output.exists()
    monkeypatch.setattr(generation, "load_for_generation", None)
    run(flags)
    assert [row["index"] for row in read(output)] == list(range(9))


def test_a_journal_of_other_settings_is_refused_whosever_it_is(endless, questions, tmp_path):  # noqa: F811
    output = tmp_path / "out.jsonl"
    write_jsonl(tmp_path / "out.jsonl.partial.3", [{"max_new_tokens": 7}, {"index": 0}])
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial\.3 holds .*max_new_tokens.* delete the file"):
        run(flags_for(endless, questions, output, "--max_new_tokens", 4))


def test_a_run_that_failed_before_its_first_answer_does_not_stand_in_the_way(endless, questions, tmp_path):  # noqa: F811
    output = tmp_path / "out.jsonl"
    flags = flags_for(endless, questions, output)
    write_jsonl(tmp_path / "out.jsonl.partial.3", [{"max_new_tokens": 7}])
    with pytest.raises(ValueError, match="--max_new_tokens 9999 leaves no room"):
        run([*flags, "--max_new_tokens", "9999"])
    run([*flags, "--max_new_tokens", "4"])
    assert [row["new_tokens"] for row in read(output)] == [4] * 9
    assert not list(tmp_path.glob("out.jsonl.partial*"))


def test_questions_that_do_not_fit_are_rows_too(endless, tmp_path, monkeypatch):  # noqa: F811
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "fever " * 300}, {"question": "fever"}])
    flags = flags_for(endless, path, tmp_path / "out.jsonl", "--max_new_tokens", 4)
    monkeypatch.setattr(generation, "prompt_limit", lambda *args: 100)
    run(flags)
    rows = read(tmp_path / "out.jsonl")
    assert [row["finish_reason"] for row in rows] == ["prompt_too_long", "length"]


# -- shares ----------------------------------------------------------------------------------------------------------


def prompt(length):
    return Prompt([{"role": "user", "content": "x" * length}], None, None, "")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_are_even_in_number_and_length_and_complete(processes):
    prompts = [prompt(length) for length in (50, 10, 40, 90, 10, 20, 60, 80, 70, 30, 30)]
    answered = {3, 7}
    shares = multigpu.deal_out(prompts, answered, processes)
    assert len(shares) == processes
    assert sorted(index for share in shares for index in share) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    sizes = [len(share) for share in shares]
    lengths = [sum(len(prompts[index].messages[0]["content"]) for index in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert max(lengths) - min(lengths) <= 80  # the longest question left


def test_more_processes_than_questions_leave_some_without_work():
    assert multigpu.deal_out([prompt(1)], set(), 3) == [[0], [], []]


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_what_stands_behind_a_torn_line_is_not_read(tmp_path):
    journal = tmp_path / "out.jsonl.partial.0"
    journal.write_bytes(b'{"model": "m"}\n{"index": 0}\n{"ind\n{"index": 2}\n')
    lines, end = read_lines(journal)
    assert lines == [{"model": "m"}, {"index": 0}] and end == len(b'{"model": "m"}\n{"index": 0}\n')
    assert read_lines(journal, end) == ([], end)


def test_a_header_that_its_process_writes_anew_is_read_again(tmp_path):
    journal = write_jsonl(tmp_path / "out.jsonl.partial.1", [{"model": "of a run that failed"}])
    gathered = multigpu.Gathered(str(tmp_path / "out.jsonl"), {"model": "m"})
    gathered.read()
    write_jsonl(journal, [{"model": "m"}, {"index": 5}])
    gathered.read()
    assert gathered.rows == {5: {"index": 5}}


def test_process_0_reads_along_and_ends_when_torchrun_is_gone(tmp_path, monkeypatch):
    header = {"model": "m"}
    journal = write_jsonl(tmp_path / "out.jsonl.partial.1", [header, {"index": 1}])
    gathered = multigpu.Gathered(str(tmp_path / "out.jsonl"), header)
    polls = []

    def others_work(seconds):
        polls.append(seconds)
        with journal.open("ab") as file:
            file.write(b'{"ind' if len(polls) == 1 else b'ex": 0}\n')  # first half a line, then the other half

    monkeypatch.setattr(multigpu.time, "sleep", others_work)
    gathered.wait_for(2)
    assert gathered.rows == {0: {"index": 0}, 1: {"index": 1}} and len(polls) == 2
    monkeypatch.setattr(multigpu.os, "getppid", lambda: 1)
    with pytest.raises(ValueError, match="torchrun is gone; the same command goes on"):
        gathered.wait_for(3)


# -- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "gpus", "count", "rank", "seen"),
    [
        (None, None, 2, 1, "1"),
        ("4,6", None, 2, 0, "4"),
        ("4,6", None, 2, 1, "6"),
        ("GPU-a,GPU-b", None, 2, 1, "GPU-b"),
        ("0,1,2,3", "2,3", 2, 1, "3"),
        (None, None, 0, 1, None),
    ],
)
def test_each_process_sees_the_gpu_of_its_number(visible, gpus, count, rank, seen, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    multigpu.choose_own_gpu(False, gpus)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def test_more_processes_than_gpus_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 processes on this machine, but 2 GPUs; --nproc_per_node 2, or --only_cpu"):
        multigpu.choose_own_gpu(False, None)


# -- flags -----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(ROOT / SCRIPT), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "torchrun --nproc_per_node 2" in result.stdout
    assert not imported & {"torch", "transformers", "numpy"}


def test_the_flags_are_those_of_inference_py_without_the_chat():
    flags = ["--base_model", "b", "--data_file", "f"]
    ours, theirs = vars(multigpu.parse_args(flags)), vars(inference.parse_args(flags))
    assert ours == {name: value for name, value in theirs.items() if name != "interactive"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--base_model", "b"], "--data_file is missing"),
        (["--data_file", "f"], "--base_model or --lora_model is missing"),
        (["--base_model", "b", "--data_file", "f", "--temperature", "-1"], "--temperature -1.0 must be 0"),
        (["--base_model", "b", "--data_file", "f", "--interactive"], "unknown flag --interactive"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(flags, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        multigpu.parse_args(flags)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and expected in message and message.count("\n") == 1
