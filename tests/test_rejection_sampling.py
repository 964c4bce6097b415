"""rejection_sampling.py as a user runs it: what it writes against a recount, memory, interruptions, refusals."""

import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_jsonl
from test_generation import FEVER, TAUGHT, outputs, said  # noqa: F401 (one is a fixture)
from test_reward_modeling import pairs, train

import rejection_sampling
from stagekit import checkpoint, generation, rewards, scoring
from stagekit.arguments import DataArguments
from stagekit.data import accept_conversation, accept_preference
from stagekit.formats import to_canonical
from stagekit.reading import load_rows
from stagekit.records import Conversation, Preference, RowError

torch.set_num_threads(1)
REST = TAUGHT[0][-1]["content"]
FILES = ("sft.jsonl", "preferences.jsonl", "answers.jsonl", "summary.json")
TOOL = {"name": "bmi", "description": "d", "parameters": {"type": "object", "properties": {}}}
PROMPTS = [
    {"question": "感冒了怎么办？", "answer": REST},
    {"question": "What is a fever?", "answer": "A raised body temperature."},
    {"messages": [said("system", "Be brief."), FEVER, said("assistant", "A raised body temperature.")]},
    {"messages": [FEVER, said("assistant", "Heat."), said("user", "怎么办？"), said("assistant", REST)]},
    {"prompt": "发烧怎么办", "chosen": REST, "rejected": "sk"},
    {
        "conversations": [
            {"from": "human", "value": "bmi?"},
            {"from": "function_call", "value": json.dumps({"name": "bmi", "arguments": {"kg": 70}})},
            {"from": "observation", "value": "22"},
            {"from": "gpt", "value": "It is 22."},
        ],
        "tools": json.dumps([TOOL]),
    },
    {"question": "cold?", "answers": [REST, "fever"]},
]


@pytest.fixture(scope="module")
def chain(outputs, tmp_path_factory):  # noqa: F811
    """A policy (`sft`), reward models on its base, a trained and an untrained one, and a file of prompts."""
    root = tmp_path_factory.mktemp("rejection")
    write_jsonl(root / "train" / "a.jsonl", pairs(40))
    write_jsonl(root / "held_out.jsonl", pairs(41, prefix="held out"))
    train(root, outputs / "base", root / "rm", "--max_steps", "8")
    train(root, outputs / "base", root / "untrained", "--learning_rate", "1e-12")
    write_jsonl(root / "prompts.jsonl", PROMPTS)
    return SimpleNamespace(root=root, base=outputs / "base", sft=outputs / "sft", rm=root / "rm")


def flags_for(chain, output_dir, *flags):
    """Hot enough that answers differ; some end, some are cut off. Given flags come last and win."""
    common = (
        *("--model_name_or_path", chain.sft, "--data_file", chain.root / "prompts.jsonl", "--output_dir", output_dir),
        *("--num_generations", 6, "--temperature", 1.4, "--max_new_tokens", 14, "--batch_size", 8),
    )
    return [str(flag) for flag in (*common, *flags)]


def sampled(chain, output_dir, *flags):
    """Run the program in this process with the reward model and a function; return what it wrote."""
    rewarded = ("--reward_model_path", chain.rm, "--reward_functions", "accuracy", "--reward_weights", "2")
    return run(chain, output_dir, *rewarded, *flags)


def run(chain, output_dir, *flags):
    rejection_sampling.main(rejection_sampling.parse_args(flags_for(chain, output_dir, *flags)))
    return written(output_dir)


def written(output_dir):
    """{file name without suffix: rows}, the summary as one object."""
    found = {name.partition(".")[0]: (output_dir / name).read_text(encoding="utf-8") for name in FILES}
    rows = {
        name: [json.loads(line) for line in text.splitlines()] for name, text in found.items() if name != "summary"
    }
    return SimpleNamespace(**rows, summary=json.loads(found["summary"]))


def contents(output_dir):
    return {name: (output_dir / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def done(chain):
    """The files of one whole run, and their directory."""
    found = sampled(chain, chain.root / "done")
    found.directory = chain.root / "done"
    return found


def error_of(chain, output_dir, *flags):
    """The line with which the program refuses."""
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        run(chain, output_dir, *flags)
    return str(refused.value)


# -- the command line ------------------------------------------------------------------------------------------------


def test_help_is_grouped_and_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(ROOT / "rejection_sampling.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "transformers", "peft", "numpy", "stagekit.generation"}
    headings = re.findall(r"^(\w[\w ]+?)(?: \(.*\))?:$", result.stdout, flags=re.M)
    assert headings == ["options", "policy", "rewards", "data", "sampling", "what is kept"]
    assert "Another batch size" in result.stdout


NEEDED = ("--model_name_or_path", "m", "--data_file", "d", "--output_dir", "o", "--reward_functions", "format")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (NEEDED[2:], "--model_name_or_path is missing"),
        ((*NEEDED[:2], *NEEDED[4:]), "--data_file is missing, such as data/finetune"),
        ((*NEEDED[:4], *NEEDED[6:]), "--output_dir is missing"),
        (NEEDED[:6], "--reward_model_path or --reward_functions is missing"),
        ((*NEEDED[:6], "--reward_model_path", "r", "--reward_weights", "1"), "--reward_weights are those of"),
        ((*NEEDED, "--base_model", "b"), "--model_name_or_path and --base_model exclude each other"),
        ((*NEEDED, "--temperature", "0"), "--temperature 0.0 must be above 0: greedy answers are all the same"),
        ((*NEEDED, "--min_margin", "0"), "--min_margin 0.0 must be above 0"),
        ((*NEEDED, "--num_generations", "0"), "--num_generations 0 must be above 0"),
        ((*NEEDED, "--top_p", "2"), "--top_p 2.0 must be above 0 and at most 1"),
        ((*NEEDED, "--load_in_4bit", "--load_in_8bit"), "--load_in_4bit and --load_in_8bit exclude each other"),
        ((*NEEDED, "--num_generation", "4"), "unknown flag --num_generation; did you mean --num_generations?"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        rejection_sampling.parse_args(list(flags))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith(f"rejection_sampling.py: error: {message}")
    assert printed.count("\n") == 1


def test_an_error_of_the_program_is_one_line_and_exit_code_2(chain, tmp_path, monkeypatch, capsys):
    flags = flags_for(chain, tmp_path / "o", "--reward_functions", "format", "--data_file", tmp_path / "none")
    monkeypatch.setattr("sys.argv", ["rejection_sampling.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "rejection_sampling.py"), run_name="__main__")
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.startswith(
        f"rejection_sampling.py: error: {tmp_path / 'none'}: no such file"
    )
    assert not (tmp_path / "o").exists()


# -- what is written, recounted --------------------------------------------------------------------------------------


def test_every_prompt_has_all_its_answers_in_the_order_of_the_file(done):
    assert [row["origin"].rpartition(":")[2] for row in done.answers] == [str(line) for line in range(1, 8)]
    assert all(len(row["samples"]) == 6 for row in done.answers)
    assert len({answer["text"] for row in done.answers for answer in row["samples"]}) > 15
    stopped = [answer["stopped"] for row in done.answers for answer in row["samples"]]
    assert any(stopped) and not all(stopped)
    for row in done.answers:
        for answer in row["samples"]:
            assert answer["num_tokens"] == 14 if not answer["stopped"] else answer["num_tokens"] <= 14


def test_the_score_is_the_weighted_sum_of_the_rewards_minus_the_penalty_of_a_cut(done):
    for row in done.answers:
        for answer in row["samples"]:
            wanted = answer["rewards"]["reward_model"] + 2 * (answer["rewards"]["accuracy"] or 0)
            assert answer["score"] == pytest.approx(wanted - (0 if answer["stopped"] else 1), abs=3e-6)


def test_best_and_worst_are_those_of_a_recount(done):
    """By sorting, where the program takes max() and min(); the margin is the difference of the two scores."""
    kept, compared = [], []
    for row in done.answers:
        places = sorted(range(6), key=lambda place: (-row["samples"][place]["score"], place))
        texts = [answer["text"] for answer in row["samples"]]
        able = [
            place for place in places if row["samples"][place]["stopped"] and texts[place] and "�" not in texts[place]
        ]
        assert row["best"] == (able[0] if able else None)
        if able:
            lowest = min(answer["score"] for answer in row["samples"] if answer["text"])
            worst = next(place for place in range(6) if texts[place] and row["samples"][place]["score"] == lowest)
            best = row["samples"][able[0]]
            kept.append((row["prompt"], best["text"], best["score"]))
            difference = best["score"] - lowest
            assert row["worst"] == (worst if difference >= 0.01 else None)
            if difference >= 0.01:
                compared.append((row["prompt"], best["text"], texts[worst], pytest.approx(difference, abs=1e-9)))
    found = [(row["messages"][:-1], row["messages"][-1]["content"], row["score"]) for row in done.sft]
    assert found == kept and len(kept) >= 4
    assert {row["messages"][-1]["role"] for row in done.sft} == {"assistant"}
    found = [
        (row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"], row["margin"])
        for row in done.preferences
    ]
    assert found == compared and len(compared) >= 4


def test_the_summary_is_that_of_a_recount(done):
    groups = [row["samples"] for row in done.answers]
    answers = [answer for group in groups for answer in group]
    summary, scores = done.summary, [answer["score"] for answer in answers]
    assert (summary["prompts"], summary["answers"]) == (7, 42)
    assert (summary["kept"], summary["pairs"]) == (len(done.sft), len(done.preferences))
    assert summary["cut"] == len([answer for answer in answers if not answer["stopped"]])
    assert summary["empty"] == len([answer for answer in answers if answer["text"] == ""])
    assert summary["repeated"] == 42 - sum(len({answer["text"] for answer in group}) for group in groups)
    unread = len([answer for answer in answers if answer["rewards"]["accuracy"] is None])
    assert summary["unread"] == {"reward_model": 0, "accuracy": unread}
    able = [row["samples"] for row in done.answers if row["best"] is not None]
    best = [row["samples"][row["best"]]["score"] for row in done.answers if row["best"] is not None]
    expected = [sum(answer["score"] for answer in group) / 6 for group in able]
    assert summary["mean_score"] == {
        "all": pytest.approx(sum(scores) / 42, abs=2e-6),
        "random": pytest.approx(sum(expected) / len(able), abs=2e-6),
        "best": pytest.approx(sum(best) / len(best), abs=2e-6),
        "kept": pytest.approx(sum(best) / len(best), abs=2e-6),
    }
    assert summary["mean_score"]["best"] > summary["mean_score"]["random"] + 0.1
    flat = [group for group in groups if len({answer["score"] for answer in group}) == 1]
    assert summary["share_without_spread"] == pytest.approx(len(flat) / 7, abs=1e-6)
    assert summary["data"]["read"] == summary["data"]["used"] == 7


def test_the_summary_names_policy_rewards_and_settings(chain, done):
    base = checkpoint.base_fingerprint(str(chain.base))
    for found, directory in ((done.summary["policy"], chain.sft), (done.summary["reward"]["model"], chain.rm)):
        stage = checkpoint.stage_fingerprint(checkpoint.read_stage(directory))
        assert found["fingerprints"] == [base, stage] and found["name_or_path"] == str(directory)
    assert done.summary["reward"]["functions"] == "accuracy" and done.summary["reward"]["weights"] == "2"
    settings = done.summary["settings"]
    assert (settings["num_generations"], settings["temperature"], settings["seed"]) == (6, 1.4, 42)
    assert settings["missing_eos_penalty"] == 1.0 and settings["min_score"] is None


def test_a_score_is_the_reward_models_at_the_end_of_turn_also_of_an_answer_that_was_cut(chain, done):
    """Read with transformers and PEFT alone, behind text written out by hand."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(chain.base, num_labels=1)
    model = PeftModel.from_pretrained(model, chain.rm).eval().get_base_model()
    tokenizer, kinds = AutoTokenizer.from_pretrained(chain.base), set()
    for row in done.answers:
        if row.get("tools") or row["prompt"][0]["role"] == "system":
            continue
        text = "".join(f"<|im_start|>{item['role']}\n{item['content']}<|im_end|>\n" for item in row["prompt"])
        for answer in row["samples"]:
            ids = tokenizer.encode(f"{text}<|im_start|>assistant\n{answer['text']}<|im_end|>")
            with torch.no_grad():
                wanted = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
            assert answer["rewards"]["reward_model"] == pytest.approx(wanted, abs=1e-4)
            kinds.add(answer["stopped"])
    assert kinds == {True, False}


def test_a_function_is_shown_the_last_question_and_the_reference(chain, tmp_path, done):
    judge = rewards.REWARDS["accuracy"]
    for row in done.answers:
        asked = [message["content"] for message in row["prompt"] if message["role"] == "user"][-1]
        for answer in row["samples"]:
            judged = judge(answer["text"], row.get("reference", ""), asked)
            assert answer["rewards"]["accuracy"] == (round(judged.score, 6) if judged.parsed else None)
    assert [row["reference"] for row in done.answers][:3] == [REST, "A raised body temperature."] + [
        "A raised body temperature."
    ]


# -- what the stages make of the files -------------------------------------------------------------------------------


def data_args(**more):
    return DataArguments(train_file_dir="unused", **more)


def test_fine_tuning_reads_the_best_answers_as_they_stand(done):
    rows, ledger, _ = load_rows([done.directory / "sft.jsonl"], accept_conversation, data_args())
    assert ledger.read == len(rows) == len(done.sft) and not ledger.repaired
    for row, wanted in zip(rows, done.sft, strict=True):
        assert isinstance(row.record, Conversation) and row.record.messages == wanted["messages"]
        assert row.record.tools == wanted.get("tools")
    assert [row.record.tools for row in rows if row.record.tools] in ([], [[{"type": "function", "function": TOOL}]])


def test_reward_modelling_and_dpo_read_the_pairs_as_they_stand(done):
    rows, ledger, _ = load_rows([done.directory / "preferences.jsonl"], accept_preference, data_args())
    assert ledger.read == len(rows) == len(done.preferences) and not ledger.repaired
    for row, wanted in zip(rows, done.preferences, strict=True):
        assert isinstance(row.record, Preference) and row.record.prompt == wanted["prompt"]
        assert (row.record.chosen, row.record.rejected) == (wanted["chosen"], wanted["rejected"])
        assert (row.record.margin, row.record.tools) == (wanted["margin"], wanted.get("tools"))


def test_prompts_of_every_kind_are_carried_whole(done):
    prompts = [row["prompt"] for row in done.answers]
    assert prompts[0] == [said("user", "感冒了怎么办？")]
    assert prompts[2] == [said("system", "Be brief."), FEVER]
    assert prompts[3] == [FEVER, said("assistant", "Heat."), said("user", "怎么办？")]
    assert prompts[4] == [said("user", "发烧怎么办")] and prompts[6] == [said("user", "cold?")]
    assert [message["role"] for message in prompts[5]] == ["user", "assistant", "tool"]
    assert prompts[5][1]["tool_calls"][0]["function"] == {"name": "bmi", "arguments": {"kg": 70}}
    assert done.answers[5]["tools"] == [{"type": "function", "function": TOOL}]


def test_tools_travel_with_their_prompt_into_both_files(chain, tmp_path, monkeypatch):
    def longer_and_longer(loaded, prompts, settings):
        return [generation.Answer("多休息。" * (place + 1), "stop", 1) for place in range(len(prompts))]

    monkeypatch.setattr(generation, "generate_batch", longer_and_longer)
    (tmp_path / "mine.py").write_text("def long(prompts, completions, answers):\n    return map(len, completions)\n")
    run(chain, tmp_path / "o", "--reward_functions", f"{tmp_path}/mine.py:long", "--batch_size", 6)
    for name, accept in (("sft.jsonl", accept_conversation), ("preferences.jsonl", accept_preference)):
        rows, _, _ = load_rows([tmp_path / "o" / name], accept, data_args())
        tools = [row.record.tools for row in rows]
        assert tools == [[{"type": "function", "function": TOOL}] if number == 5 else None for number in range(7)]
    (margin,) = {row["margin"] for row in written(tmp_path / "o").preferences}
    assert margin == 20.0  # six answers of four characters to twenty-four


def test_a_stage_that_is_given_the_directory_does_not_train_on_everything_twice(done):
    with pytest.raises(RowError, match="no known format"):
        to_canonical(done.answers[0])
    assert not (done.directory / "answers.journal").name.endswith((".jsonl", ".json", ".txt"))


def test_the_pairs_train_a_reward_model(chain, done, tmp_path):
    """The next stage runs on the file as it is, tools and margins included."""
    write_jsonl(tmp_path / "held_out.jsonl", pairs(4))
    shutil.copytree(done.directory, tmp_path / "train", ignore=shutil.ignore_patterns("sft*", "answers*", "summary*"))
    stage = train(tmp_path, chain.sft, tmp_path / "rm", "--max_leaked_percentage", "100", "--max_length", "512")
    assert stage["data"]["train"]["used"] == len(done.preferences)


# -- which answers are chosen ----------------------------------------------------------------------------------------


def group(*answers):
    """Answers as (text, score) or (text, score, "cut")."""
    return [{"text": text, "score": score, "stopped": not cut} for text, score, *cut in answers]


@pytest.mark.parametrize(
    ("answers", "options", "best", "worst"),
    [
        ([("a", 1.0), ("b", 3.0), ("c", 2.0)], {}, 1, 0),
        ([("a", 1.0), ("b", 3.0), ("c", 3.0), ("d", 1.0)], {}, 1, 0),  # ties: the first
        ([("a", 1.0), ("a", 1.0)], {}, 0, None),  # one answer twice makes no pair
        ([("a", 1.0), ("b", 1.0)], {}, 0, None),  # nor do equal scores
        ([("a", 1.0), ("b", 1.1)], {"min_margin": 0.1}, 1, 0),  # at the margin, whatever 1.1 - 1.0 is in binary
        ([("a", 1.0), ("b", 1.0999)], {"min_margin": 0.1}, 1, None),
        ([("a", 5.0, "cut"), ("b", 1.0), ("c", 0.0)], {}, 1, 2),  # what was cut off is not the best
        ([("a", 5.0, "cut"), ("b", 1.0), ("c", 0.0)], {"keep_cut": True}, 0, 2),
        ([("a", -5.0, "cut"), ("b", 1.0)], {}, 1, 0),  # and may be the worst
        ([("a", 5.0, "cut"), ("b", 1.0)], {}, 1, None),  # the only other one is better
        ([("a", 5.0, "cut"), ("b", 4.0, "cut")], {}, None, None),
        ([("", 9.0), ("a", 1.0), ("b", 0.0)], {}, 1, 2),  # saying nothing is no answer to learn from
        ([("", -9.0), ("a", 1.0), ("b", 0.0)], {}, 1, 2),
        ([("", 1.0)], {}, None, None),
        ([("\ufffd", 9.0), ("a", 1.0)], {}, 1, None),  # half a character is nothing to learn
        ([("\ufffd", -9.0), ("a", 1.0)], {}, 1, 0),
        ([("a", None), ("b", 1.0), ("c", 0.0)], {}, 1, 2),  # without a score
        ([("a", None)], {}, None, None),
        ([("a", 0.9), ("b", 0.0)], {"min_score": 1.0}, None, None),
        ([("a", 1.0), ("b", 0.0)], {"min_score": 1.0}, 0, 1),
        ([("a", -2.0), ("b", -3.0)], {"min_score": -2.5}, 0, 1),
    ],
)
def test_the_best_and_the_worst_by_hand(answers, options, best, worst):
    chosen = rejection_sampling.choose(
        group(*answers), **{"keep_cut": False, "min_score": None, "min_margin": 0.01, **options}
    )
    assert (chosen["best"], chosen["worst"]) == (best, worst)


def test_a_candidate_below_the_limit_is_counted_and_not_kept():
    groups = [group(("a", 1.0), ("b", 0.0)), group(("a", 0.4), ("b", 0.0)), group(("a", 9.0, "cut"), ("b", None))]
    for answers in groups:
        for answer in answers:
            answer["rewards"] = {"accuracy": answer["score"]}
    choices = [rejection_sampling.choose(answers, False, 0.5, 0.01) for answers in groups]
    found = rejection_sampling.count(groups, choices)
    assert (found["kept"], found["pairs"], found["cut"], found["unread"]) == (1, 1, 1, {"accuracy": 1})
    assert found["mean_score"] == {"all": 2.08, "random": 0.35, "best": 0.7, "kept": 1.0}
    assert found["share_without_spread"] == pytest.approx(1 / 3, abs=1e-6)  # the third has one score only


def test_min_score_keeps_right_answers_only(chain, tmp_path, capsys):
    found = run(chain, tmp_path / "o", "--reward_functions", "accuracy", "--min_score", 1, "--temperature", 1)
    assert {row["score"] for row in found.sft} == {1.0} and 0 < len(found.sft) < 7
    assert all(row["margin"] > 0 and len(row["chosen"]) == 1 for row in found.preferences)
    references = {json.dumps(row["prompt"]): row["reference"] for row in found.answers}
    for row in found.sft:
        assert row["messages"][-1]["content"] == references[json.dumps(row["messages"][:-1])]


# -- the same command, the same files --------------------------------------------------------------------------------


def forbidden(*args, **kwargs):
    raise AssertionError("this must not happen")


def test_the_same_seed_gives_the_same_files_and_another_one_others(chain, done, tmp_path):
    sampled(chain, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(done.directory)
    other = sampled(chain, tmp_path / "other", "--seed", 7)
    assert other.answers != done.answers
    assert [row["prompt"] for row in other.answers] == [row["prompt"] for row in done.answers]


def test_equal_prompts_get_answers_of_their_own(chain, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [PROMPTS[1]] * 3)
    found = run(chain, tmp_path / "o", "--reward_functions", "format", "--data_file", path, "--batch_size", 6)
    texts = [tuple(answer["text"] for answer in row["samples"]) for row in found.answers]
    assert len(set(texts)) == 3


def test_every_answer_goes_to_its_own_prompt_and_the_longest_are_asked_first(chain, tmp_path, monkeypatch):
    lengths = []

    def echo(loaded, prompts, settings):
        lengths.extend(map(len, prompts))
        return [generation.Answer(loaded.chat.tokenizer.decode(ids), "stop", 1) for ids in prompts]

    monkeypatch.setattr(generation, "generate_batch", echo)
    found = run(chain, tmp_path / "o", "--reward_functions", "format")
    for row in found.answers:
        asked = [message["content"] for message in row["prompt"] if message["role"] == "user"]
        for answer in row["samples"]:
            users = [text.partition("<|im_end|>")[0] for text in answer["text"].split("user\n")[1:]]
            assert [text for text in users if "tool_response" not in text] == asked
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 4


def test_other_rewards_and_limits_need_no_new_answers(chain, done, tmp_path, monkeypatch):
    shutil.copytree(done.directory, tmp_path / "o")
    monkeypatch.setattr(generation, "load_for_generation", forbidden)
    found = run(chain, tmp_path / "o", "--reward_functions", "length", "--min_margin", 5)
    for old, new in zip(done.answers, found.answers, strict=True):
        assert [answer["text"] for answer in old["samples"]] == [answer["text"] for answer in new["samples"]]
        assert set(new["samples"][0]["rewards"]) == {"length"}
    assert found.summary["pairs"] == 0 and found.preferences == []
    sampled(chain, tmp_path / "o")
    assert contents(tmp_path / "o") == contents(done.directory)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--temperature", "1.3"), "temperature"),
        (("--num_generations", "5"), "num_generations"),
        (("--batch_size", "4"), "batch_size"),
        (("--max_samples", "3"), "data_file"),
        (("--system_prompt", "Be kind."), "data_file"),
        (("--model_name_or_path", "{base}"), "model"),
    ],
)
def test_a_journal_of_other_settings_is_refused_and_nothing_is_lost(chain, done, tmp_path, flags, named):
    shutil.copytree(done.directory, tmp_path / "o")
    before = {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    flags = [flag.format(base=chain.base) for flag in flags]
    line = error_of(chain, tmp_path / "o", "--reward_functions", "format", *flags)
    assert line.startswith(f"{tmp_path / 'o'}/answers.journal holds answers of a run with other {named}; ")
    assert line.endswith("or choose another --output_dir") and "\n" not in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "o").iterdir()} == before


def test_the_summary_is_there_only_when_the_other_files_are_of_the_same_run(chain, done, tmp_path, monkeypatch):
    from stagekit import journal

    shutil.copytree(done.directory, tmp_path / "o")
    write = journal.write_lines

    def failing(path, rows):
        if path.name == "answers.jsonl":
            raise OSError("no space left")
        write(path, rows)

    monkeypatch.setattr(journal, "write_lines", failing)
    with pytest.raises(OSError, match="no space"):
        run(chain, tmp_path / "o", "--reward_functions", "length")
    assert not (tmp_path / "o" / "summary.json").exists()


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_run_that_stops_within_a_batch_goes_on_as_if_it_had_not(chain, done, tmp_path, monkeypatch, after):
    """Batches of 8 hold parts of two or three prompts' 6 answers; what is finished is not drawn again."""
    from stagekit import journal

    add, batches = journal.Journal.add, []

    def stop(self, row):
        add(self, row)
        if len(self.rows) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        sampled(chain, tmp_path / "o")
    monkeypatch.setattr(journal.Journal, "add", add)
    assert len((tmp_path / "o" / "answers.journal").read_text("utf-8").splitlines()) == 1 + after
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["answers.journal"]
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *args: batches.append(len(args[1])) or real(*args))
    sampled(chain, tmp_path / "o")
    assert contents(tmp_path / "o") == contents(done.directory)
    assert sum(batches) == 42 - 8 * (6 * after // 8)  # whole batches of finished prompts alone are skipped


def test_a_killed_run_goes_on_where_it_stood(chain, tmp_path):
    """kill -9 of a real process, and the same command again: the files of a run that nobody disturbed, bit for bit."""
    path = write_jsonl(
        tmp_path / "q.jsonl", [{"question": f"fever {number}?", "answer": REST} for number in range(24)]
    )
    flags = ("--data_file", path, "--num_generations", 3, "--max_new_tokens", 60, "--batch_size", 4)
    flags = (*flags, "--temperature", 1.8, "--reward_functions", "accuracy,repetition")
    command = [sys.executable, ROOT / "rejection_sampling.py", *flags_for(chain, tmp_path / "o", *flags)]
    journal = tmp_path / "o" / "answers.journal"
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and (not journal.is_file() or journal.read_bytes().count(b"\n") < 5):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = journal.read_bytes().count(b"\n") - 1
    assert 4 <= finished < 24 and [path.name for path in (tmp_path / "o").iterdir()] == ["answers.journal"]
    run(chain, tmp_path / "o", *flags)
    run(chain, tmp_path / "whole", *flags)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


# -- memory ----------------------------------------------------------------------------------------------------------

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_the_batch_shrinks_to_the_memory_and_loses_nobody(chain, tmp_path, monkeypatch, caplog, error):
    real, sizes = generation.generate_batch, []

    def small(loaded, prompts, settings):
        if len(prompts) > 3 or (len(prompts) > 1 and len(sizes) > 8):
            raise error
        sizes.append(len(prompts))
        return real(loaded, prompts, settings)

    monkeypatch.setattr(generation, "generate_batch", small)
    caplog.set_level("INFO", logger="stagekit")
    found = run(chain, tmp_path / "o", "--reward_functions", "accuracy")
    assert all(len(row["samples"]) == 6 for row in found.answers) and len(found.answers) == 7
    assert set(sizes) == {2, 1} and sum(sizes) == 42
    lines = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert lines == [f"memory ran out with {n} at a time; goes on with --batch_size {n // 2}" for n in (8, 4, 2)]


def test_a_run_that_shrank_and_was_interrupted_goes_on_without_loss(chain, tmp_path, monkeypatch):
    real, calls = generation.generate_batch, []

    def failing(loaded, prompts, settings):
        calls.append(len(prompts))
        if len(prompts) > 4:
            raise CUDA
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(loaded, prompts, settings)

    monkeypatch.setattr(generation, "generate_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        sampled(chain, tmp_path / "o")
    before = (tmp_path / "o" / "answers.journal").read_bytes()
    monkeypatch.setattr(generation, "generate_batch", real)
    found = sampled(chain, tmp_path / "o")
    assert (tmp_path / "o" / "answers.journal").read_bytes().startswith(before) and before.count(b"\n") > 1
    assert len(found.answers) == 7 and all(len(row["samples"]) == 6 for row in found.answers)


def test_one_answer_that_does_not_fit_ends_the_run_in_a_line_that_says_what_to_do(chain, tmp_path, monkeypatch):
    def never(*args):
        raise CUDA

    monkeypatch.setattr(generation, "generate_batch", never)
    line = error_of(chain, tmp_path / "o", "--reward_functions", "format")
    assert line.startswith("memory runs out with --batch_size 1; shorten --max_new_tokens") and "\n" not in line


def test_other_errors_are_not_taken_for_a_lack_of_memory(chain, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(generation, "generate_batch", broken)
    with pytest.raises(RuntimeError, match="expected scalar"):
        run(chain, tmp_path / "o", "--reward_functions", "format")


def test_scoring_shrinks_to_the_memory_too(chain, done, tmp_path, monkeypatch):
    shutil.copytree(done.directory, tmp_path / "o")
    real, sizes = scoring.score_answers, []

    def small(reward, items, max_length, batch_size):
        if batch_size > 2:
            raise CPU
        sizes.append(batch_size)
        return real(reward, items, max_length, batch_size)

    monkeypatch.setattr(scoring, "score_answers", small)
    found = sampled(chain, tmp_path / "o")
    assert sizes == [1] * 7  # seven groups at a time are three, are one
    for old, new in zip(done.answers, found.answers, strict=True):
        assert [answer["score"] for answer in new["samples"]] == pytest.approx(
            [answer["score"] for answer in old["samples"]], abs=1e-4
        )


def test_batches_cover_every_place_once_whatever_fails(monkeypatch):
    monkeypatch.setattr(generation, "clear_device_cache", lambda **how: None)  # it takes a while
    chance = random.Random(0)
    for count in (0, 1, 5, 64):
        for _ in range(20):

            def work(batch):
                if len(batch) > 1 and chance.random() < 0.4:
                    raise CUDA
                return list(batch)

            places = [place for batch, found in generation.run_in_batches(count, 9, work) for place in found]
            assert places == list(range(count))


def test_inference_shrinks_its_batches_as_well(chain, tmp_path, monkeypatch):
    import inference

    def small(loaded, prompts, settings):
        if len(prompts) > 2:
            raise CUDA
        return [generation.Answer(f"{len(ids)} tokens", "stop", 1) for ids in prompts]

    monkeypatch.setattr(generation, "generate_batch", small)
    flags = ("--lora_model", chain.sft, "--data_file", chain.root / "prompts.jsonl", "--batch_size", 5)
    flags = (*flags, "--output_file", tmp_path / "out.jsonl")
    inference.main(inference.parse_args(list(map(str, flags))))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [row["index"] for row in rows] == list(range(7))


def test_the_policy_has_left_the_memory_when_the_reward_model_comes(chain, tmp_path, monkeypatch):
    load_policy, load_reward, policies, alive = generation.load_for_generation, scoring.load_reward_model, [], []

    def watched(*args, **kwargs):
        loaded = load_policy(*args, **kwargs)
        policies.append(weakref.ref(loaded.model))
        return loaded

    def load(*args):
        alive.append(policies[0]() is not None)
        return load_reward(*args)

    monkeypatch.setattr(generation, "load_for_generation", watched)
    monkeypatch.setattr(scoring, "load_reward_model", load)
    sampled(chain, tmp_path / "o", "--num_generations", 2)
    assert alive == [False]


# -- what goes in ----------------------------------------------------------------------------------------------------


def test_max_samples_draws_with_the_seed(chain, tmp_path):
    flags = ("--reward_functions", "format", "--max_samples", 3, "--num_generations", 1)
    drawn = [
        [row["origin"] for row in run(chain, tmp_path / str(seed), *flags, "--seed", seed).answers]
        for seed in (1, 2, 3)
    ]
    assert all(len(set(origins)) == 3 and origins == sorted(origins) for origins in drawn)
    assert len({tuple(origins) for origins in drawn}) > 1
    wanted = sorted(random.Random(1).sample(range(7), 3))
    assert [int(origin.rpartition(":")[2]) - 1 for origin in drawn[0]] == wanted


def test_the_system_prompt_is_for_prompts_without_one(chain, tmp_path):
    found = run(
        chain, tmp_path / "o", "--reward_functions", "format", "--system_prompt", "Be kind.", "--num_generations", 1
    )
    systems = [row["prompt"][0] for row in found.answers]
    assert systems == [said("system", "Be brief." if number == 2 else "Be kind.") for number in range(7)]


def test_a_long_history_is_shown_in_part_and_kept_whole(chain, tmp_path, monkeypatch, capsys):
    long = [said("user", "fever " * 60), said("assistant", "yes"), *TAUGHT[0][:1]]
    rows = [{"messages": [*long, TAUGHT[0][1]]}, PROMPTS[0], {"question": "fever " * 60, "answer": "yes"}]
    path, asked = write_jsonl(tmp_path / "q.jsonl", rows), []
    real = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *args: asked.extend(args[1]) or real(*args))
    found = sampled(chain, tmp_path / "o", "--data_file", path, "--max_prompt_length", 40, "--num_generations", 2)
    assert len(asked) == 4 and all(ids == asked[0] for ids in asked)  # without the first exchange it is the second
    assert [row["prompt"] for row in found.answers] == [long, long[2:]]
    assert [row["messages"][:-1] for row in found.sft] == [long, long[2:]]
    assert all(row["prompt"] in (long, long[2:]) for row in found.preferences)
    assert found.summary["data"]["dropped"] == {"prompt longer than --max_prompt_length": 1}
    first, second = ([answer["rewards"]["reward_model"] for answer in row["samples"]] for row in found.answers)
    texts = [[answer["text"] for answer in row["samples"]] for row in found.answers]
    scores = dict(zip(texts[0], first, strict=True))
    assert set(texts[0]) & set(texts[1])  # and the reward model, too, sees what the policy saw
    for text, value in zip(texts[1], second, strict=True):
        assert text not in scores or value == pytest.approx(scores[text], abs=1e-5)
    printed = capsys.readouterr().out
    assert re.search(r"left out: prompt longer than --max_prompt_length +1\n", printed)


def test_bad_rows_stop_or_are_left_out_and_kept(chain, tmp_path):
    rows = [PROMPTS[0], {"text": "Running text about fever."}, PROMPTS[1]]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    flags = ("--reward_functions", "format", "--data_file", path, "--num_generations", 1)
    line = error_of(chain, tmp_path / "o", *flags)
    assert line.startswith(f"{path}:2: this stage needs prompts") and "running text" in line
    assert "--on_bad_row skip" in line and not (tmp_path / "o").exists()
    found = run(chain, tmp_path / "o", *flags, "--on_bad_row", "skip")
    assert len(found.answers) == 2 and found.summary["data"]["dropped"] == {"unreadable": 1}
    assert json.loads((tmp_path / "o" / "rejected_rows.jsonl").read_text("utf-8"))["row"] == rows[1]


def test_what_cannot_be_done_is_refused_before_anything_is_sampled(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate_batch", forbidden)
    both = ("--reward_model_path", chain.rm)
    for flags, wanted in (
        ((*both, "--model_name_or_path", chain.rm), f"{chain.rm} is a reward model: it scores answers and cannot"),
        (
            ("--reward_model_path", chain.sft),
            f"--reward_model_path {chain.sft} is no reward model (it writes answers)",
        ),
        (("--reward_model_path", tmp_path / "no"), f"--reward_model_path {tmp_path / 'no'}: no such directory; "),
        (("--reward_model_path", chain.root / "untrained"), f"{chain.root / 'untrained'} shows a held-out accuracy"),
        (("--reward_functions", "acuracy"), "--reward_functions 'acuracy' is unknown; did you mean accuracy?"),
        ((*both, "--max_prompt_length", 5), f"{chain.root}/prompts.jsonl:1: no prompt fits --max_prompt_length 5"),
        ((*both, "--data_file", tmp_path / "no"), f"{tmp_path / 'no'}: no such file"),
        ((*both, "--model_name_or_path", tmp_path / "no"), f"{tmp_path / 'no'}: no such model directory"),
        ((*both, "--data_format", "csv"), "--data_format 'csv' is unknown"),
        ((*both, "--template_name", "chatlm"), "'chatlm'"),
        ((*both, "--max_new_tokens", 2000), "a prompt of "),
    ):
        line = error_of(chain, tmp_path / "o", *flags)
        assert wanted in line and "\n" not in line, line
    (tmp_path / "file").write_text("")
    assert "is no directory" in error_of(chain, tmp_path / "file", *both)


def test_an_untrained_reward_model_can_be_insisted_on(chain, tmp_path):
    flags = ("--reward_model_path", chain.root / "untrained", "--allow_untrained_reward_model", "--num_generations", 2)
    assert len(run(chain, tmp_path / "o", *flags).answers) == 7


def test_base_and_adapter_can_be_named_apart(chain, done, tmp_path):
    flags = flags_for(chain, tmp_path / "o", "--reward_model_path", chain.rm, "--reward_functions", "accuracy")[2:]
    flags += ["--reward_weights", "2", "--base_model", str(chain.base), "--lora_model", str(chain.sft)]
    rejection_sampling.main(rejection_sampling.parse_args(flags))
    assert contents(tmp_path / "o") == contents(done.directory)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_a_users_function_scores_and_its_file_is_noted(chain, tmp_path, caplog, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def short(prompts, completions, answers):\n    return [-len(text) for text in completions]\n")
    found = run(chain, tmp_path / "o", "--reward_functions", f"{path}:short", "--missing_eos_penalty", 0)
    for row in found.answers:
        assert [answer["score"] for answer in row["samples"]] == [-len(answer["text"]) for answer in row["samples"]]
    assert found.summary["reward"]["files"] == {str(path): checkpoint.file_sha256(path)}
    assert found.summary["reward"]["model"] is None
    table = dict(re.findall(r"^ *(\w[\w ]+?)  +([\d.+-]+)$", capsys.readouterr().out, flags=re.M))
    summary = found.summary
    assert [table[name] for name in ("prompts", "answers", "cut off", "best answers kept", "pairs")] == [
        str(summary[name]) for name in ("prompts", "answers", "cut", "kept", "pairs")
    ]
    means = [table[f"mean score of {which} answer"] for which in ("a random", "the best")]
    assert means == [f"{summary['mean_score'][name]:+.3f}" for name in ("random", "best")]


def test_what_makes_a_run_useless_is_said(chain, tmp_path, caplog):
    caplog.set_level("INFO", logger="rejection_sampling")
    flags = ("--max_new_tokens", 1, "--reward_functions", "format,length", "--missing_eos_penalty", 0)
    found = run(chain, tmp_path / "o", *flags)
    assert found.sft == [] and found.summary["mean_score"]["best"] is None
    for line in (
        f"the answers to {100 * found.summary['share_without_spread']:.0f} % of the prompts all score the same",
        f"{found.summary['cut']} of 42 answers were cut off; raise --max_new_tokens",
        "format could not read 42 of 42 answers",
        "no answer was kept",
    ):
        assert line in caplog.text
    assert "length could not" not in caplog.text


def test_a_good_run_is_not_scolded(chain, done, tmp_path, caplog):
    shutil.copytree(done.directory, tmp_path / "o")
    sampled(chain, tmp_path / "o")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{done.summary['cut']} of 42 answers were cut off; raise --max_new_tokens"
    ] * (done.summary["cut"] > 21)


def test_a_score_that_is_no_number_is_an_error(chain, done, tmp_path, monkeypatch):
    shutil.copytree(done.directory, tmp_path / "o")
    monkeypatch.setattr(scoring, "score_answers", lambda reward, items, *more: iter([((0, 0), float("nan"))]))
    line = error_of(chain, tmp_path / "o", "--reward_model_path", chain.rm)
    assert line == f"--reward_model_path {chain.rm} gave the score nan"
