"""Held-out questions answered while a model is trained: which are asked, what is measured, what it changes."""

from types import SimpleNamespace

import pytest
from conftest import ROOT, build_tokenizer, log_of, run_script, stage_of, write_jsonl

import eval_metrics
from stagekit.generation import choose_settings, find_source, generate_batch, load_chat, load_for_generation
from stagekit.held_out import choose_questions
from stagekit.records import Conversation, Preference
from stagekit.rewards import is_checkable
from stagekit.rows import Row
from stagekit.tokenization import encode_prompt, prepare_chat

ANSWERS = ("多休息，多喝水。", "Rest and drink water.", "看医生。", "It is a raised temperature.")


def said(role, content):
    return {"role": role, "content": content}


def rows_of(*records):
    return [Row(record, f"file:{number}") for number, record in enumerate(records, 1)]


@pytest.fixture(scope="module")
def chat():
    return prepare_chat(build_tokenizer(), None)


# -- which questions -------------------------------------------------------------------------------------------------


def test_the_last_answer_is_the_reference_and_what_stands_before_it_the_prompt(chat):
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c?"), said("assistant", "d.")]
    pair = Preference([said("user", "e?")], [said("assistant", "better")], [said("assistant", "worse")])
    found = choose_questions(rows_of(Conversation(messages), pair), chat, 200, 0)
    assert {(item["question"], item["reference"]) for item in found} == {("c?", "d."), ("e?", "better")}
    assert {tuple(item["prompt_ids"]) for item in found} == {
        tuple(encode_prompt(chat, messages[:3])),
        tuple(encode_prompt(chat, pair.prompt)),
    }


def test_rows_without_an_answer_or_with_too_long_a_question_are_not_asked(chat):
    called = said("assistant", "") | {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    rows = rows_of(
        Conversation([said("user", "a?"), called]), Conversation([said("user", "a? " * 99), said("assistant", "b")])
    )
    assert choose_questions(rows, chat, 60, 0) == []


def test_the_seed_alone_decides_the_order(chat):
    rows = rows_of(*(Conversation([said("user", f"{n}?"), said("assistant", "b")]) for n in range(20)))
    first, again, other = ([item["question"] for item in choose_questions(rows, chat, 99, s)] for s in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)


@pytest.mark.parametrize(
    ("reference", "prompt", "expected"),
    [
        ("B", "Which bone?\nA. tibia\nB. patella\nC. ulna", True),
        ("12.5 mL/h", "How fast?", True),
        ("是", "对吗？", True),
        ("Maybe", "Is it?", True),
        ("多休息，多喝水。", "感冒怎么办？", False),
        ("A cold is caused by viruses.", "Why?", False),
    ],
)
def test_letters_numbers_and_yes_or_no_can_be_right_or_wrong(reference, prompt, expected):
    assert is_checkable(reference, prompt) is expected


# -- a run that asks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tiny_qwen3, tmp_path_factory):
    """Fine-tuning that learns four answers by heart, is asked the questions again and again, and keeps the best."""
    root = tmp_path_factory.mktemp("asked")
    rows = [
        {"conversations": [{"from": "human", "value": f"held {n}?"}, {"from": "gpt", "value": ANSWERS[n % 4]}]}
        for n in range(4)
    ]
    write_jsonl(root / "train.jsonl", [swap(row) for row in rows])
    write_jsonl(root / "held_out.jsonl", rows)
    flags = ("--do_train", "--do_eval", "--max_length", "128", "--learning_rate", "3e-3", "--logging_steps", "5")
    steps = ("--max_steps", "60", "--eval_strategy", "steps", "--eval_steps", "20", "--save_steps", "20")
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_rouge_l", "--use_peft", "False")
    result = run_script(
        "supervised_finetuning.py",
        *("--model_name_or_path", tiny_qwen3, "--train_file_dir", root / "train.jsonl", "--output_dir", root / "sft"),
        *("--validation_file_dir", root / "held_out.jsonl", "--data_cache_dir", root / "cache"),
        *(*flags, *steps, *best, "--eval_generation_samples", "4", "--eval_max_new_tokens", "40"),
    )
    return SimpleNamespace(output_dir=root / "sft", stderr=result.stderr, rows=rows)


def swap(row):
    """The same answer to a question asked in other words."""
    question, answer = row["conversations"]
    return {"conversations": [{**question, "value": f"Tell me, {question['value']}"}, answer]}


def test_every_evaluation_logs_the_answers_metrics(asked):
    for name in ("eval_bleu4", "eval_rouge_l", "eval_stop_rate", "eval_answer_tokens"):
        assert len(log_of(asked.output_dir, name)) >= 4, name  # before, and after 20, 40 and 60 steps
    series = log_of(asked.output_dir, "eval_rouge_l")
    assert max(series) > series[0] + 5
    assert asked.stderr.count("held 0? → ") + asked.stderr.count("held 1? → ") >= 4
    assert "held-out after training: answers: BLEU-4" in asked.stderr


def test_the_checkpoint_with_the_best_answers_is_delivered(asked):
    series = log_of(asked.output_dir, "eval_rouge_l")
    assert stage_of(asked.output_dir)["metrics"]["after"]["rouge_l"] == pytest.approx(max(series[1:4]))


def test_the_metrics_are_those_of_the_answers_inference_gives(asked):
    source = find_source(str(asked.output_dir), None)
    loaded = load_for_generation(source, load_chat(source), only_cpu=True)
    pairs = [[message["value"] for message in row["conversations"]] for row in asked.rows]
    prompts = [encode_prompt(loaded.chat, [said("user", question)]) for question, _ in pairs]
    answers = generate_batch(loaded, prompts, choose_settings(loaded, temperature=0.0, max_new_tokens=40))
    shares = []
    for answer, (_, reference) in zip(answers, pairs, strict=True):
        given, wanted = eval_metrics.tokenize(answer.text), eval_metrics.tokenize(reference)
        table = [[0] * (len(wanted) + 1) for _ in range(len(given) + 1)]  # the textbook's
        for i, mine in enumerate(given):
            for j, theirs in enumerate(wanted):
                table[i + 1][j + 1] = table[i][j] + 1 if mine == theirs else max(table[i][j + 1], table[i + 1][j])
        shares.append(2 * table[-1][-1] / (len(given) + len(wanted)) if given else 0.0)
    after = stage_of(asked.output_dir)["metrics"]["after"]
    assert after["rouge_l"] == pytest.approx(100 * sum(shares) / 4)
    assert after["stop_rate"] == sum(answer.finish_reason == "stop" for answer in answers) / 4
    assert after["answer_tokens"] == sum(answer.num_tokens for answer in answers) / 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--metric_for_best_model", "eval_rouge_l"), "--metric_for_best_model eval_rouge_l needs --eval_generation"),
        (("--eval_generation_samples", "-1"), "--eval_generation_samples must be 0 to 500, got -1"),
        (("--eval_max_new_tokens", "0"), "--eval_max_new_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(tiny_qwen3, tmp_path, flags, message):
    data = ("--train_file_dir", ROOT / "data" / "finetune", "--output_dir", tmp_path / "sft")
    result = run_script("supervised_finetuning.py", "--model_name_or_path", tiny_qwen3, *data, *flags, check=False)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
