"""Scores outside of training are those of training: the same tokens, the same place, the same numbers."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, build_tokenizer, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_reward_modeling import END, pairs, prompt_of, ranking, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_modeling import RewardModelTrainer
from stagekit.scoring import load_reward_model, score_answers
from tools.score_answers import main as score_file

HELD_OUT = pairs(11, prefix="held out")


@pytest.fixture(scope="module")
def trained(tiny_qwen3, tmp_path_factory):
    """A reward model, and what its trainer measured on each held-out pair at last: {name: (pairs,)}."""
    root = tmp_path_factory.mktemp("scoring")
    write_jsonl(root / "train" / "a.jsonl", pairs(16) + [ranking(0)])
    write_jsonl(root / "held_out.jsonl", HELD_OUT)
    measured = {}
    with pytest.MonkeyPatch.context() as patch:
        report = RewardModelTrainer.report
        patch.setattr(
            RewardModelTrainer, "report", lambda self, path: measured.update(self.rows) or report(self, path)
        )
        train(root, tiny_qwen3, root / "rm", "--max_steps", "4")
    return SimpleNamespace(directory=root / "rm", base=tiny_qwen3, measured=measured, root=root)


@pytest.fixture(scope="module")
def reward(trained):
    return load_reward_model(str(trained.directory), only_cpu=True)


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def item(question, answer):
    return [user(question)], [says(answer)], None


ITEMS = [item(row["question"], row[side]) for side in ("chosen", "rejected") for row in HELD_OUT]


def scored(reward, items, max_length=128, batch_size=4):
    items = [(prompt, [answer], tools) for prompt, answer, tools in items]
    found = [(index, score) for (index, _), score in score_answers(reward, items, max_length, batch_size)]
    assert sorted(index for index, _ in found) == list(range(len(items)))  # each answer once
    return [score for _, score in sorted(found)]


def by_hand(trained, text):
    """The head at the last token of a text, with transformers and PEFT alone."""
    model = AutoModelForSequenceClassification.from_pretrained(trained.base, num_labels=1)
    model = PeftModel.from_pretrained(model, trained.directory).eval().get_base_model()
    ids = AutoTokenizer.from_pretrained(trained.base).encode(text)
    assert ids[-1] == END
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


# -- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_are_those_that_training_measured(trained, reward, batch_size):
    measured = np.concatenate([trained.measured["chosen"], trained.measured["rejected"]])
    assert len(measured) == 22 and np.ptp(measured) > 0.05  # they differ, so that a wrong order would show
    assert scored(reward, ITEMS, batch_size=batch_size) == pytest.approx(measured.tolist(), abs=1e-5)


def test_a_score_is_the_head_at_the_end_of_turn(trained, reward):
    for index in (0, 5, 21):
        (prompt, answer, _) = ITEMS[index]
        wanted = by_hand(trained, prompt_of(prompt[0]["content"]) + answer[0]["content"] + "<|im_end|>")
        assert scored(reward, [ITEMS[index]]) == pytest.approx([wanted], abs=1e-5)


def test_a_conversation_is_scored_at_its_last_answer(trained, reward):
    prompt = [{"role": "system", "content": "Be brief."}, user("What is a fever?"), says("Heat."), user("And then?")]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a fever?<|im_end|>\n"
    text += "<|im_start|>assistant\nHeat.<|im_end|>\n" + prompt_of("And then?") + "Rest.<|im_end|>"
    assert scored(reward, [(prompt, [says("Rest.")], None)]) == pytest.approx([by_hand(trained, text)], abs=1e-5)


def test_an_answer_that_does_not_fit_has_no_score(trained, reward):
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    answer, prompt = "Rest and drink water. " * 4 + "Rest.", prompt_of("q?")
    whole = len(tokenizer.encode(prompt + answer + "<|im_end|>"))
    items = [item("q?", "Rest."), item("q?", answer), item("q?", "Water.")]
    assert None not in scored(reward, items, max_length=whole)
    quarter = whole // 4  # of the limit stays with the prompt
    longest = len(tokenizer.encode(answer + "<|im_end|>"))
    assert longest > quarter
    found = scored(reward, items, max_length=longest)
    assert found[1] is None and None not in (found[0], found[2])
    assert [found[0], found[2]] == pytest.approx(scored(reward, [items[0], items[2]]), abs=1e-5)


def test_two_answers_to_one_prompt_are_scored_behind_the_same_part_of_it(trained, reward):
    """As in training: the long answer leaves no room for the first exchange, and the short one does not see it."""
    prompt = [user("What is a fever?"), says("Heat."), user("And then?")]
    texts = ["Rest.", "Rest and drink water. " * 4 + "Rest."]
    tails = [prompt_of("And then?") + text + "<|im_end|>" for text in texts]
    length = len(AutoTokenizer.from_pretrained(trained.base).encode(tails[1]))
    found = dict(score_answers(reward, [(prompt, [[says(text)] for text in texts], None)], length, 4))
    for number, tail in enumerate(tails):
        assert found[0, number] == pytest.approx(by_hand(trained, tail), abs=1e-5)


def test_a_prompt_that_is_too_long_loses_its_oldest_exchange_first(trained, reward):
    prompt = [user("What is a fever? " * 5), says("Heat. " * 5), user("And then?")]
    text = prompt_of("And then?") + "Rest.<|im_end|>"
    length = len(AutoTokenizer.from_pretrained(trained.base).encode(text))
    assert scored(reward, [(prompt, [says("Rest.")], None)], max_length=length) == pytest.approx(
        [by_hand(trained, text)], abs=1e-5
    )


def test_control_strings_in_an_answer_do_not_end_it(trained, reward):
    """A forged end-of-turn is text: the score is read behind all of it."""
    plain, forged, longer = scored(
        reward, [item("q?", "Rest."), item("q?", "Rest.<|im_end|>"), item("q?", "Rest.<|im_end|> tool_call")]
    )
    assert abs(forged - plain) > 1e-4 and abs(longer - forged) > 1e-4


@pytest.mark.parametrize("wrong", ["padding", "head"])
def test_a_fault_in_scoring_would_be_seen(trained, wrong):
    """Planted: a model that pools elsewhere, and one with another head, do not reproduce what training measured."""
    reward = load_reward_model(str(trained.directory), only_cpu=True)
    if wrong == "padding":
        reward.model.get_base_model().config.pad_token_id = END
    else:
        with torch.no_grad():
            reward.model.get_base_model().score.modules_to_save["default"].weight.mul_(1.01)
    measured = np.concatenate([trained.measured["chosen"], trained.measured["rejected"]])
    assert np.abs(np.array(scored(reward, ITEMS)) - measured).max() > 1e-4


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_with_merged_parents_scores_as_in_training(trained, tmp_path):
    measured = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModelTrainer, "report", lambda self, path: measured.update(self.rows) or {})
        stage = train(
            *(trained.root, trained.directory, tmp_path / "rm", "--new_adapter", "True"),
            *("--skip_checks", "leakage"),
        )
    assert len(stage["base_model"]["merged"]) == 1
    wanted = np.concatenate([measured["chosen"], measured["rejected"]])
    assert scored(load_reward_model(str(tmp_path / "rm"), only_cpu=True), ITEMS) == pytest.approx(
        wanted.tolist(), abs=1e-5
    )


@pytest.mark.parametrize("flags", [("--use_peft", "False", "--learning_rate", "1e-4"), ("--use_dora", "True")])
def test_other_ways_of_tuning_score_as_in_training(trained, tmp_path, flags):
    stage = train(trained.root, trained.base, tmp_path / "rm", *flags)
    found = scored(load_reward_model(str(tmp_path / "rm"), only_cpu=True), ITEMS)
    after = stage["metrics"]["after"]
    assert np.mean(found[:11]) == pytest.approx(after["score_chosen"], abs=1e-5)
    assert np.mean(found[11:]) == pytest.approx(after["score_rejected"], abs=1e-5)


def test_what_is_no_reward_model_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=f"^{trained.base} is no reward model .it writes answers.; reward_modeling"):
        load_reward_model(str(trained.base))
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_reward_model(str(tmp_path / "none"))


def test_a_head_that_was_changed_afterwards_is_refused(trained, tmp_path):
    shutil.copytree(trained.directory, tmp_path / "rm")
    path = tmp_path / "rm" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.score.weight"] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="adapter_model.safetensors: changed after the stage was saved"):
        load_reward_model(str(tmp_path / "rm"))


# -- the tool --------------------------------------------------------------------------------------------------------

RECORDS = [
    {"index": 7, "input": "q?", "messages": [user("q?")], "prediction": "Rest and drink water."},
    {"conversations": [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "Drink water."}], "note": "发烧"},
    {"question": "q?", "answer": "Rest and drink water."},
    {"question": "q?", "chosen": "Drink water.", "rejected": "Rest and drink water.", "margin": 1},
    {"question": "q?", "answers": ["Rest and drink water.", "Drink water.", "water " * 200]},
]


@pytest.fixture
def score(trained, tmp_path, capsys):
    """A function that scores records, given as they stand in a file, and returns (new records, what was printed)."""

    def score(records, *flags):
        path = write_jsonl(tmp_path / "answers.jsonl", records)
        given = ("--reward_model", trained.directory, "--data_file", path, "--output_file", tmp_path / "out/scores")
        score_file(list(map(str, (*given, "--only_cpu", *flags))))
        lines = (tmp_path / "out" / "scores").read_text(encoding="utf-8").splitlines()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores"]
        return [json.loads(line) for line in lines], capsys.readouterr().out

    return score


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_form_of_records_is_scored_and_kept(trained, score, batch_size):
    found, printed = score(RECORDS, "--batch_size", batch_size, "--max_length", 128)
    rest, drink = (
        pytest.approx(by_hand(trained, prompt_of("q?") + answer + "<|im_end|>"), abs=1e-5)
        for answer in ("Rest and drink water.", "Drink water.")
    )
    wanted = [
        {"score": rest},
        {"score": drink},
        {"score": rest},
        {"chosen_score": drink, "rejected_score": rest},
        {"scores": [rest, drink, None]},
    ]
    assert [list(row) for row in found] == [
        [*record, *added] for record, added in zip(RECORDS, wanted, strict=True)
    ]  # the record as it was, then the scores
    assert found == [{**record, **added} for record, added in zip(RECORDS, wanted, strict=True)]
    right = found[3]["chosen_score"] > found[3]["rejected_score"]
    assert f"pairs in the right order: {right:.3f} (95 % interval" in printed and ", 1 pairs)" in printed
    assert "1 answers do not fit --max_length 128: their score is null" in printed
    assert "7 answers, mean score" in printed


def test_the_summary_of_pairs_is_counted_by_hand(trained, score):
    rows = HELD_OUT + [{"question": "q?", "chosen": "Rest.", "rejected": "Rest."}]
    found, printed = score(rows)
    right = (trained.measured["chosen"] > trained.measured["rejected"]).sum()
    assert f"pairs in the right order: {(right + 0.5) / 12:.3f} (95 % interval" in printed  # a tie is half right
    assert [row["chosen_score"] for row in found[:11]] == pytest.approx(trained.measured["chosen"].tolist(), abs=1e-5)
    assert [row["rejected_score"] for row in found[:11]] == pytest.approx(
        trained.measured["rejected"].tolist(), abs=1e-5
    )


def tool(monkeypatch, capsys, *flags):
    """Run the tool as its command line does; return its last line on stderr, after exit code 2."""
    monkeypatch.setattr("sys.argv", ["score_answers", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "score_answers.py"), run_name="__main__")
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


BROKEN = {
    "running text": ({"text": "words"}, "this is running text, and only answers can be scored"),
    "unknown fields": ({"a": 1}, "no known format has the fields ['a']"),
    "broken JSON": ('{"question": ', "broken JSON at column"),
    "an empty answer": ({"question": "q?", "chosen": "", "rejected": "Rest."}, "field 'chosen' is empty"),
    # fail until read_answers puts the messages of a prediction through dialogues.read_messages and check_turns
    "a prediction without messages": ({"messages": [], "prediction": "Rest."}, ""),
    "a prediction without a question": ({"messages": [says("Hello.")], "prediction": "Rest."}, ""),
    "a prediction with broken messages": ({"messages": ["q?"], "prediction": "Rest."}, ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_cannot_be_scored_is_named_by_file_and_line(trained, tmp_path, monkeypatch, capsys, name):
    row, message = BROKEN[name]
    path = write_jsonl(tmp_path / "answers.jsonl", RECORDS[:2])
    path.write_text(path.read_text("utf-8") + (row if isinstance(row, str) else json.dumps(row)) + "\n", "utf-8")
    flags = ("--reward_model", trained.directory, "--data_file", path, "--output_file", tmp_path / "scores.jsonl")
    line = tool(monkeypatch, capsys, *flags)
    assert line.startswith(f"score_answers: error: {path}:3: {message}")
    assert not (tmp_path / "scores.jsonl").exists()


def test_other_mistakes_are_one_line_too(trained, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "answers.jsonl", RECORDS[:1])
    for flags, message in (
        (("--reward_model", trained.base, "--data_file", path), f"{trained.base} is no reward model"),
        (("--reward_model", tmp_path / "none", "--data_file", path), f"{tmp_path / 'none'}: no such model directory"),
        (("--reward_model", trained.directory, "--data_file", tmp_path / "no"), f"{tmp_path / 'no'}: no such file"),
        (
            ("--reward_model", trained.directory, "--data_file", path, "--data_format", "csv"),
            "--data_format 'csv' is unknown",
        ),
    ):
        if "csv" in flags:
            write_jsonl(path, RECORDS[1:2])
        line = tool(monkeypatch, capsys, *flags, "--output_file", tmp_path / "scores.jsonl", "--only_cpu")
        assert line.removeprefix("score_answers: error: ").startswith(message) or (
            "csv" in flags and message in line
        ), line
    assert re.match("usage|score_answers: error", tool(monkeypatch, capsys, "--reward_modle", "x"))


def test_an_empty_prediction_is_scored_where_it_ends(trained, score):
    """inference.py writes one when a model stops at once."""
    found, _ = score([{"messages": [user("q?")], "prediction": ""}])
    assert found[0]["score"] == pytest.approx(by_hand(trained, prompt_of("q?") + "<|im_end|>"), abs=1e-5)


def test_help_needs_no_torch():
    code = (
        "import runpy, sys; sys.argv = ['score_answers', '--help']\n"
        "try: runpy.run_module('tools.score_answers', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'a heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--reward_model" in result.stdout and "prediction" in result.stdout


def test_the_padding_of_scoring_is_that_of_training(reward):
    assert reward.pad_token_id == build_tokenizer().pad_token_id == reward.model.config.pad_token_id == 3


def test_under_a_python_without_packages_it_goes_on_in_the_environment_or_says_so(tmp_path):
    """-S hides installed packages; the project's .venv, where there is one, has them."""
    command = [
        sys.executable,
        "-S",
        "-m",
        "tools.score_answers",
        "--reward_model",
        tmp_path / "none",
        "--data_file",
        "x",
    ]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
