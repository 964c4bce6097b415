"""The data doctor: its ledger is the stage's own, its counts are worked out by hand, no row can stop it."""

import importlib
import json
import runpy
import statistics
import subprocess
import sys
import unicodedata
import warnings

import numpy as np
import pytest
from conftest import ROOT, build_tokenizer, write_jsonl
from PIL import Image

from stagekit import commandline, data, examination, fitting
from stagekit.arguments import DataArguments
from stagekit.encoding import encode_samples, write_dataset
from stagekit.pair_metrics import wilson_interval
from stagekit.pairs import encode_pairs, encode_preference
from stagekit.prompts import encode_prompts, fit_prompt
from stagekit.reading import load_rows
from stagekit.records import Conversation
from stagekit.texts import language_of
from stagekit.tokenization import document_control, encode_conversation, encode_document, prepare_chat, preview
from tools import check_data

QUESTION, ANSWER = "发烧了怎么办？", "多休息，多喝温水，持续高热要及时就医。"


def chat_row(*texts, **more):
    """A conversation of texts said in turns, the user first."""
    names = ("human", "gpt")
    return {"conversations": [{"from": names[n % 2], "value": text} for n, text in enumerate(texts)], **more}


def instruction(question, answer):
    return {"instruction": question, "input": "", "output": answer}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tokenizer and nothing else: the doctor needs no weights."""
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def chat():
    return prepare_chat(build_tokenizer(), None)


@pytest.fixture
def doctor(tmp_path, capsys):
    """Write rows and examine them; returns what --json holds, with "printed" and "code" beside it."""

    def run(stage, rows, *flags, model=None):
        path = rows if isinstance(rows, str) else str(write_jsonl(tmp_path / "data" / "rows.jsonl", rows))
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        given = [path, "--stage", stage, "--json", report, "--num_workers", 1, "--preview", 0, *flags]
        given += ["--model_name_or_path", model] if model else []
        code = 0
        try:
            commandline.run(check_data.main, check_data.parse_args(list(map(str, given))), "check_data", "")
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        return {**found, "printed": printed.out, "errors": printed.err, "code": code}

    return run


def refusal(capsys, *flags):
    """The line with which parsing ends."""
    with pytest.raises(SystemExit) as end:
        check_data.parse_args(["data", "--stage", "sft", *flags])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# -- the stage's own account -----------------------------------------------------------------------------------------

TALKS = [
    chat_row(QUESTION, ANSWER),
    chat_row(QUESTION * 9, ANSWER),
    chat_row(QUESTION, ANSWER * 9),
    chat_row(QUESTION * 9, ANSWER, QUESTION, ANSWER * 9, QUESTION, ANSWER),
    chat_row(QUESTION, ANSWER, QUESTION, ANSWER, QUESTION, ANSWER),
    chat_row("问" * 300, ANSWER),
]
PAIRS = [
    pair(QUESTION, ANSWER, "不用管。"),
    pair(QUESTION * 20, ANSWER, "不用管。"),
    pair(QUESTION, ANSWER * 9, "不用管。"),
    pair(QUESTION, ANSWER, ANSWER),
    {"question": QUESTION, "answers": [ANSWER, "多喝水。", "不用管。"]},
]
TEXTS = [{"text": ANSWER * count} for count in (1, 5, 20)]
ROWS = {"pt": TEXTS, "sft": TALKS, "rm": PAIRS, "dpo": PAIRS, "orpo": PAIRS, "ppo": TALKS, "grpo": TALKS}


def account(stage, path, chat, limit):
    """The ledger that the stage itself writes."""
    arguments = DataArguments(train_file_dir=str(path))
    rows, ledger, rejected = load_rows([path], fitting.ACCEPT[stage], arguments)
    control = document_control(chat.tokenizer)
    encode = {
        "pt": lambda record: (encode_document(control, chat.tokenizer, record.text, limit), 0),
        "sft": lambda record: encode_conversation(chat, record, limit),
    }.get(stage, lambda record: encode_preference(chat, record, limit, stage == "rm"))

    def encode_chunk(part):
        if stage in ("pt", "sft"):
            return encode_samples(part, encode, limit, packing=False)
        return encode_prompts(part, chat, limit) if stage in ("ppo", "grpo") else encode_pairs(part, encode)

    write_dataset(rows, ledger, encode_chunk, path.with_suffix(".arrow"), rejected)
    return ledger


@pytest.mark.parametrize("limit", [48, 100, 2048])
@pytest.mark.parametrize("stage", fitting.ACCEPT)
def test_the_ledger_is_the_one_that_the_stage_writes(doctor, tmp_path, model, chat, stage, limit):
    found = doctor(stage, ROWS[stage], "--max_length", limit, model=model)
    theirs = account(stage, tmp_path / "data" / "rows.jsonl", chat, limit).to_dict()
    ours = found["ledger"]
    for key in ("read", "used", "truncated", "samples", "dropped", "repaired", "turns", "files"):
        assert ours[key] == theirs[key], key
    assert ours["tokens"]["used"] == theirs["tokens"]["used"]
    assert ours["tokens"]["trained"] == theirs["tokens"].get("trained", 0)
    assert ours["read"] == ours["used"] + sum(ours["dropped"].values())


def test_the_limits_table_is_what_encoding_at_each_limit_gives(doctor, tmp_path, model, chat):
    found = doctor("sft", TALKS, "--max_length", "100,48,2048", model=model)
    assert [item["max_length"] for item in found["limits"]] == [100, 48, 2048] and found["max_length"] == 100
    rows, _, _ = load_rows([tmp_path / "data" / "rows.jsonl"], data.accept_conversation, DataArguments("d"))
    for item in found["limits"]:
        made = [encode_conversation(chat, row.record, item["max_length"]) for row in rows]
        assert item["samples"] == sum(len(samples) for samples, _ in made)
        assert item["rows_truncated"] == sum(any(sample.truncated for sample in samples) for samples, _ in made)
        assert item["rows_split"] == sum(len(samples) > 1 for samples, _ in made)
        assert item["rows_dropped"] == sum(not samples for samples, _ in made) == sum(item["dropped"].values())
        assert item["answers_lost"] == sum(lost for _, lost in made)
        learnt = [label for samples, _ in made for sample in samples for label in sample.labels if label != -100]
        assert found["limits"][2]["learnt_tokens_lost"] == 0
        whole = sum(
            label != -100 for row in rows for label in encode_conversation(chat, row.record, 9999)[0][0].labels
        )
        assert item["learnt_tokens_lost"] == whole - len(learnt)
        assert item["learnt_tokens_lost_percentage"] == pytest.approx(100 * (1 - len(learnt) / whole), abs=1e-3)
    assert (
        found["limits"][1]["rows_truncated"]
        and found["limits"][1]["rows_split"]
        and found["limits"][1]["rows_dropped"]
    )


def test_prompts_that_lose_their_beginning_are_counted(doctor, model, chat):
    long = chat_row(QUESTION * 5, ANSWER, QUESTION, ANSWER)
    found = doctor("ppo", [long, chat_row(QUESTION, ANSWER)], "--max_length", "64,1024", model=model)
    assert [item["rows_shortened"] for item in found["limits"]] == [1, 0]
    assert found["lengths"]["max"] == len(
        fit_prompt(
            chat,
            fitting.ACCEPT["ppo"](
                Conversation(
                    [
                        {"role": "user", "content": QUESTION * 5},
                        {"role": "assistant", "content": ANSWER},
                        {"role": "user", "content": QUESTION},
                        {"role": "assistant", "content": ANSWER},
                    ]
                )
            ),
            9999,
        )[0]
    )
    found = doctor(
        "dpo", [pair(QUESTION * 20, ANSWER, "不。"), pair(QUESTION, ANSWER, "不。")], "--max_length", 100, model=model
    )
    assert found["limits"][0]["rows_shortened"] == 1


def test_the_default_limits_are_those_of_the_stages():
    def default(module, name, flag):
        cls = getattr(importlib.import_module(module), name)
        return cls.__dataclass_fields__[flag].default

    arguments = "stagekit.arguments"
    expected = {
        "pt": default("pretraining", "PretrainingArguments", "block_size"),
        "sft": default("supervised_finetuning", "SFTArguments", "max_length"),
        **dict.fromkeys(("rm", "dpo", "orpo"), default(arguments, "PairArguments", "max_length")),
        **dict.fromkeys(("ppo", "grpo"), default(arguments, "RolloutArguments", "max_prompt_length")),
    }
    assert fitting.DEFAULT_LIMITS == expected and set(check_data.STAGES) == set(expected) == set(fitting.ACCEPT)


# -- rows that cannot be read ----------------------------------------------------------------------------------------


def test_rows_that_cannot_be_read_are_counted_by_reason_and_written(doctor, tmp_path):
    broken = [
        chat_row(QUESTION),
        chat_row(""),
        *({"conversations": [{"from": f"x{n}", "value": "a"}]} for n in range(12)),
    ]
    rejected = tmp_path / "out" / "rejected_rows.jsonl"
    found = doctor("sft", [chat_row(QUESTION, ANSWER), *broken, {"x": 1}], "--rejected_file", rejected)
    assert found["code"] == 0 and found["ledger"]["read"] == 16 and found["ledger"]["used"] == 1
    assert found["ledger"]["dropped"] == {"unreadable": 13, "no question followed by an answer": 2}
    assert found["rejected"]["rows"] == 13
    assert max(found["rejected"]["reasons"].values()) == 12  # numbers aside, twelve rows have one reason
    written = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "data" / "rows.jsonl"
    assert [item["origin"] for item in written] == [f"{path}:{line}" for line in range(2, 17)]
    assert written[0]["row"] == broken[0] and written[-1]["row"] == {"x": 1}
    assert found["rejected"]["first"] == [{key: item[key] for key in ("origin", "reason")} for item in written[2:12]]
    assert f"{path}:4: " in found["printed"] and "rows that cannot be read (13)" in found["printed"]


def test_where_no_row_can_be_read_the_reasons_are_told_all_the_same(doctor, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"a": \n{"b": "\\ud83d"}\n', encoding="utf-8")
    found = doctor("sft", str(path), "--rejected_file", tmp_path / "rejected.jsonl")
    assert found["code"] == 0 and found["ledger"]["dropped"] == {"unreadable": 2}
    assert "broken JSON" in found["printed"] and found["lengths"] == {"rows": 0, "bins": []}
    written = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(written[1])["row"] == {"b": "\ud83d"}


def test_a_row_that_the_chat_template_refuses_is_one_that_cannot_be_read(doctor, tmp_path):
    tokenizer = build_tokenizer()
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = strict + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "strict")
    rows = [chat_row(QUESTION, ANSWER), chat_row("a", ANSWER, system="be kind"), chat_row("b", ANSWER)]
    found = doctor("sft", rows, "--rejected_file", tmp_path / "r.jsonl", model=tmp_path / "strict")
    assert found["ledger"]["read"] == 3 and found["ledger"]["used"] == 2 and found["lengths"]["rows"] == 2
    assert found["ledger"]["dropped"] == {"refused by the chat template": 1}
    assert [item["origin"] for item in found["rejected"]["first"]] == [f"{tmp_path}/data/rows.jsonl:2"]
    assert "no system here" in found["rejected"]["first"][0]["reason"]
    assert json.loads((tmp_path / "r.jsonl").read_text())["row"]["messages"][0]["content"] == "be kind"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "empty"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_file_that_cannot_be_read_at_all_ends_it_with_one_line(doctor, tmp_path, content, message):
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_bytes(content)
    found = doctor("sft", str(path))
    assert found["code"] == 2 and message in found["errors"] and found["printed"] == ""
    assert len(found["errors"].strip().splitlines()) == 1


# -- sections --------------------------------------------------------------------------------------------------------


def test_lengths_are_counted_between_the_usual_limits():
    bins = examination.histogram(np.array([1, 15, 16, 23, 24, 31, 100, 128]))
    filled = [(item["from"], item["to"], item["rows"]) for item in bins if item["rows"]]
    assert filled == [(1, 15, 2), (16, 23, 2), (24, 31, 2), (96, 127, 1), (128, 191, 1)]
    assert [item["to"] + 1 for item in bins[:-1]] == [item["from"] for item in bins[1:]]
    assert examination.histogram(np.array([700])) == [{"from": 512, "to": 767, "rows": 1}]
    assert {1024, 1536, 2048} <= {item["from"] for item in examination.histogram(np.arange(900, 3000))}


def test_without_a_tokenizer_lengths_are_in_characters(doctor):
    rows = [instruction("甲" * n, "乙" * n) for n in range(1, 101)]  # 2, 4, … 200 characters
    found = doctor("sft", rows)
    lengths = found["lengths"]
    assert found["unit"] == "characters" and found["limits"] == [] and found["model"] is None
    assert {key: lengths[key] for key in ("rows", "min", "max", "mean")} == {
        "rows": 100,
        "min": 2,
        "max": 200,
        "mean": 101,
    }
    assert (lengths["p50"], lengths["p90"], lengths["p99"]) == (102, 182, 200)
    assert "no --model_name_or_path" in found["printed"]


def test_duplicates_are_told_with_the_row_they_repeat(doctor, tmp_path):
    text = " ".join(f"word{n}" for n in range(60))
    rows = [
        instruction("first question", text),
        instruction("second question", "another answer"),
        instruction("first question", text),
        instruction("first question", text + " more"),
        instruction("First question!", "a third answer"),
        instruction("second  question", "another answer"),
    ]
    found, path = doctor("sft", rows)["duplicates"], tmp_path / "data" / "rows.jsonl"
    assert found["exact"] == {"rows": 2, "first": [[f"{path}:3", f"{path}:1"], [f"{path}:6", f"{path}:2"]]}
    assert found["near"] == {"rows": 1, "first": [[f"{path}:4", f"{path}:1"]]}
    assert found["same_prompt"] == {"rows": 1, "first": [[f"{path}:5", f"{path}:1"]]}
    assert doctor("sft", rows, "--near_threshold", "0.999")["duplicates"]["near"]["rows"] == 0


def test_overlap_names_the_rows_on_both_sides(doctor, tmp_path):
    words = " ".join(f"word{n}" for n in range(13))
    against = write_jsonl(
        tmp_path / "eval" / "e.jsonl",
        [
            {"question": "What is a fever?", "answer": "x"},
            {"question": "unseen", "answer": "y"},
            {"question": "q", "answer": words},
            {"no": 1},
        ],
    )
    rows = [instruction("what is a fever", "a"), instruction("b", f"Say {words}!"), instruction("c", "d")]
    report = doctor("sft", rows, "--against", against)
    found, path = report["overlap"], tmp_path / "data" / "rows.jsonl"
    assert (found["against_rows"], found["against_unreadable"], found["against_rows_seen"]) == (3, 1, 2)
    assert found["against_rows_seen_percentage"] == pytest.approx(200 / 3, abs=1e-3)
    assert found["same_prompt"] == {"rows": 1, "first": [[f"{path}:1", f"{against}:1"]]}
    assert found["shared_run"] == {"rows": 1, "against_rows": 1, "most": [[f"{path}:2", f"{against}:3", 1.0, words]]}
    assert doctor("sft", rows)["overlap"] is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ANSWER, "zh"),
        ("Rest and drink water.", "en"),
        ("Boire de l'eau, à la température", "en"),
        ("患者做了CT和MRI，结果正常，没有发现异常", "zh"),
        ("请翻译：the cat sat on the mat", "mixed"),
        ("水を飲んでください", "other"),
        ("Пейте воду", "other"),
        ("12.5 37 !?", "other"),
    ],
)
def test_a_language_is_told_by_its_script(text, language):
    assert language_of([text]) == language


def test_languages_and_answers_in_another_one_are_counted(doctor, tmp_path):
    rows = [
        instruction(QUESTION, ANSWER),
        instruction("What is a fever?", "A raised body temperature, nothing else."),
        instruction(QUESTION, "Rest and drink plenty of water."),
        instruction("What is a fever?", "体温升高。多喝水多休息。"),
        instruction("哪个字母？", "B"),  # a letter is no language
    ]
    found = doctor("sft", rows)["languages"]
    path = tmp_path / "data" / "rows.jsonl"
    assert found["switched"] == {"rows": 2, "first": [f"{path}:3", f"{path}:4"]}
    assert (found["zh"], found["en"], found["mixed"], found["other"]) == (2, 1, 2, 0)


def test_roles_and_turns_are_counted(doctor):
    call = '{"name": "f", "arguments": {"x": 1}}'
    tool = '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]'
    called = [("human", "q"), ("function_call", call), ("observation", "1"), ("gpt", "a")]
    rows = [
        chat_row(QUESTION, ANSWER, system="be kind"),
        chat_row(QUESTION, ANSWER, "谢谢", "不客气"),
        {"conversations": [{"from": name, "value": value} for name, value in called], "tools": tool},
    ]
    assert doctor("sft", rows)["conversations"] == {
        "roles": {"assistant": 5, "system": 1, "tool": 1, "user": 4},
        "rows_by_turns": {"1": 2, "2": 1},
        "rows_with_tools": 1,
        "rows_with_system": 1,
        "rows_without_reference": 0,
    }


def test_pairs_are_weighed_by_row_and_identical_ones_are_told(doctor, tmp_path):
    """Characters: +3, -1, 0 (a tie); a ranking of 4, 3, 1: +1, +3, +2, of mean 2, always longer; one of the same."""
    rows = [
        pair("a", "12345", "12"),
        pair("b", "1", "21"),
        pair("c", "12", "34"),
        {"question": "d", "answers": ["1234", "123", "1"]},
        pair("e", "same", "same"),
    ]
    found = doctor("rm", rows)["pairs"]
    assert found["pairs"] == 7
    assert found["identical"] == {"pairs": 1, "first": [f"{tmp_path}/data/rows.jsonl:5"]}
    low, high = wilson_interval(2.5, 4)
    assert found["chosen_is_longer"] == pytest.approx({"share": 2.5 / 4, "low": low, "high": high})
    half = 1.959964 * statistics.stdev([3, -1, 0, 2]) / 2
    assert found["difference"] == pytest.approx({"mean": 1, "low": 1 - half, "high": 1 + half}, abs=1e-6)
    assert doctor("sft", rows)["pairs"] is None


def test_with_a_tokenizer_answers_are_measured_in_tokens(doctor, model):
    found = doctor("dpo", [pair("a", "多喝温水。", "water"), pair("b", "yes", "no")], model=model)
    tokens = [len(build_tokenizer()(text)["input_ids"]) for text in ("多喝温水。", "water", "yes", "no")]
    mean = (tokens[0] - tokens[1] + tokens[2] - tokens[3]) / 2
    assert found["pairs"]["difference"]["mean"] == pytest.approx(mean) and found["unit"] == "tokens"


def test_both_answers_of_a_pair_are_looked_at(doctor):
    found = doctor("rm", [pair("q", "better", "13800001234"), pair("q", "better", "another one")])
    assert found["duplicates"]["exact"]["rows"] == 0 and found["duplicates"]["same_prompt"]["rows"] == 1
    assert found["personal_data"]["count"] == 1 and found["conversations"]["roles"] == {"assistant": 4, "user": 2}
    found = doctor("rm", [{"question": "q", "answers": ["a", "b", "13800001234"]}])
    assert found["personal_data"]["count"] == 1 and found["conversations"]["roles"] == {"assistant": 3, "user": 1}


@pytest.mark.parametrize(("longer", "told"), [(40, True), (28, False), (20, False), (12, False), (0, True)])
def test_a_better_answer_that_length_tells_is_a_finding(doctor, longer, told):
    rows = [pair(f"q{n}", *(("long answer", "short") if n < longer else ("short", "long answer"))) for n in range(40)]
    findings = doctor("rm", rows)["findings"]
    assert any("length tells the better answer" in text for text in findings) is told


@pytest.mark.parametrize(("separator", "told"), [("\n", True), ("\n\n", False)])
def test_a_whole_book_as_one_document_is_a_finding(doctor, tmp_path, separator, told):
    (tmp_path / "book.txt").write_text(separator.join(["发热的病人要多喝水。" * 100] * 110), encoding="utf-8")
    found = doctor("pt", str(tmp_path / "book.txt"))
    assert any("--txt_documents line" in text for text in found["findings"]) is told
    assert found["lengths"]["rows"] == (1 if told else 110)


def test_rows_are_read_as_the_flags_of_the_stages_say(doctor, tmp_path):
    rows = [{"问题": "头痛怎么办？", "好": "多休息。", "坏": "不管它。"}]
    found = doctor("rm", rows, "--columns", "prompt=问题,chosen=好,rejected=坏")
    assert found["ledger"]["used"] == 1 and found["pairs"]["pairs"] == 1
    write_jsonl(tmp_path / "repository" / "train.jsonl", [instruction(QUESTION, ANSWER)])
    write_jsonl(tmp_path / "repository" / "test.jsonl", [instruction(QUESTION, ANSWER)] * 3)
    for split, count in (("train", 1), ("test", 3)):
        flags = ("--dataset_name", tmp_path / "repository", "--dataset_split", split)
        args = check_data.parse_args(["--stage", "sft", "--json", str(tmp_path / "hub.json"), *map(str, flags)])
        check_data.main(args)
        assert json.loads((tmp_path / "hub.json").read_text())["ledger"]["read"] == count


def test_no_data_at_all_is_said():
    with pytest.raises(SystemExit) as end:
        check_data.parse_args(["--stage", "sft"])
    assert end.value.code == 2


def test_personal_data_is_told_masked_and_once_a_row(doctor, tmp_path):
    rows = [
        instruction("电话13800001234，再说一遍13800001234", ANSWER),
        instruction(QUESTION, ANSWER),
        pair("写信到jane@clinic.cn", "13900005678", "不"),
    ]
    report = doctor("sft", rows)
    found, path = report["personal_data"], tmp_path / "data" / "rows.jsonl"
    assert found["found"] == [
        {"origin": f"{path}:1", "kind": "mobile number", "masked": "138******34"},
        {"origin": f"{path}:3", "kind": "e-mail address", "masked": "j***@c***.cn"},
        {"origin": f"{path}:3", "kind": "mobile number", "masked": "139******78"},
    ]
    assert found["count"] == 3 and found["rows"] == 2 and found["kinds"] == {"mobile number": 2, "e-mail address": 1}
    printed = " ".join(report["printed"].split())
    assert f"{path}:1: mobile number 138******34" in printed and "13800001234" not in printed


def test_grpo_rows_without_an_answer_are_a_finding():
    record = fitting.ACCEPT["grpo"](
        Conversation([{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}])
    )
    facts = examination.facts_of(record, None, [], len, None)
    assert not facts.reference and facts.roles == {"user": 1}


# -- limits and verdict ----------------------------------------------------------------------------------------------


def test_nothing_to_mend_is_said_in_the_last_line(doctor, model):
    found = doctor("sft", [chat_row(f"{QUESTION}{n}", f"{ANSWER}{n}") for n in range(3)], model=model)
    assert found["code"] == 0 and found["findings"] == []
    assert found["printed"].splitlines()[-1] == "nothing to mend"


@pytest.mark.parametrize(
    ("flag", "passed", "kept", "value"),
    [
        ("max_dropped_percentage", 24.9, 25, 25.0),  # one of four rows cannot be read
        ("max_truncated_percentage", 24.9, 25, 25.0),
        ("max_duplicate_percentage", 24.9, 25, 25.0),
        ("max_overlap_percentage", 49.9, 50, 50.0),
        ("max_personal_data", 0, 1, 1),
    ],
)
def test_a_limit_that_is_passed_ends_with_1(doctor, tmp_path, model, flag, passed, kept, value):
    rows = [chat_row(QUESTION, f"13800001234 {ANSWER * 9}"), chat_row("b", "c"), chat_row("b", "c"), {"x": 1}]
    against = write_jsonl(tmp_path / "e.jsonl", [{"question": "b", "answer": "c"}, {"question": "d", "answer": "e"}])
    given = ["--max_length", 64, "--against", against]
    found = doctor("sft", rows, *given, f"--{flag}", passed, model=model)
    assert found["code"] == 1 and found["limits_passed"] == [{"flag": flag, "limit": passed, "found": value}]
    assert f"limit passed: --{flag} {passed}" in found["printed"]
    found = doctor("sft", rows, *given, f"--{flag}", kept, model=model)
    assert found["code"] == 0 and found["limits_passed"] == []


# -- how it is shown -------------------------------------------------------------------------------------------------


def test_samples_show_what_is_learnt(doctor, model, chat, monkeypatch):
    rows = [chat_row(f"{QUESTION}{n}", ANSWER) for n in range(5)]
    record = Conversation([{"role": "user", "content": f"{QUESTION}2"}, {"role": "assistant", "content": ANSWER}])
    sample = encode_conversation(chat, record, 1024)[0][0]
    printed = doctor("sft", rows, "--preview", 3, model=model)["printed"]
    assert preview(chat.tokenizer, sample, color=False).strip() in printed
    assert [f"{QUESTION}{n}" in printed for n in range(5)] == [True, False, True, False, True]
    assert "\033" not in printed
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert f"\033[32m{ANSWER}" in doctor("sft", rows, "--preview", 1, model=model)["printed"]


@pytest.mark.parametrize("stage", fitting.ACCEPT)
def test_every_stage_shows_samples(doctor, model, stage):
    printed = doctor(stage, ROWS[stage], "--preview", 1, model=model)["printed"]
    names = {"pt": ["text"], "sft": ["conversation"], "ppo": ["prompt"], "grpo": ["prompt"]}
    for name in names.get(stage, ["chosen", "rejected"]):
        assert f"--- {name} of " in printed
    assert ("⟦" in printed.partition("⟦ and ⟧")[2]) is (stage not in ("ppo", "grpo"))


def test_of_a_long_sample_the_beginning_and_the_end_are_shown(doctor, model):
    text = "甲" * 300 + "乙" * 300 + "丙" * 300
    printed = doctor("pt", [{"text": text}], "--preview", 1, "--max_length", 9999, model=model)["printed"]
    assert "tokens …]" in printed and "甲" in printed and "丙" in printed and "乙" not in printed


def columns(line):
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in line)


@pytest.mark.parametrize("stage", fitting.ACCEPT)
def test_it_fits_a_terminal_of_a_hundred_columns(doctor, tmp_path, model, stage):
    against = write_jsonl(tmp_path / "eval" / "e.jsonl", [{"question": QUESTION, "answer": ANSWER * 2}])
    rows = [*ROWS[stage], {"很长的字段名称" * 30: 1}, *ROWS[stage][:2]]
    found = doctor(stage, rows, "--against", against, "--max_length", "48,100", model=model)
    assert [line for line in found["printed"].splitlines() if columns(line) > 100 and "很长" not in line] == []
    assert "█" in found["printed"] and "\t" not in found["printed"]


def test_a_line_is_cut_at_its_columns():
    assert check_data.clip("abc", 3) == "abc" and check_data.clip("abcd", 3) == "ab…"
    assert check_data.clip("中文字", 6) == "中文字" and check_data.clip("中文字", 5) == "中文…"
    assert columns(check_data.clip("中文字中文字", 8)) <= 8 and check_data.clip("", 5) == ""


def test_lengths_are_drawn(doctor, tmp_path, model):
    picture = tmp_path / "pictures" / "lengths.png"
    found = doctor("sft", TALKS, "--plot", picture, model=model)
    with Image.open(picture) as image:
        assert image.size == (1080, 480) and len(image.convert("RGB").getcolors(1 << 20)) > 3
    assert f"saved: {picture}, " in found["printed"]


def test_every_key_of_the_report_is_explained(doctor, tmp_path, model):
    against = write_jsonl(tmp_path / "e.jsonl", [{"question": QUESTION, "answer": ANSWER * 2}])
    found = doctor("dpo", [*PAIRS, {"x": "13800001234"}], "--against", against, "--max_personal_data", 0, model=model)
    words = set(check_data.__doc__.replace(",", " ").replace(":", " ").replace("[", " ").replace("{", " ").split())
    words = {word.strip("()[]{};.") for word in words}
    data_keys = {
        "dropped",
        "repaired",
        "reasons",
        "roles",
        "rows_by_turns",
        "kinds",
        "tokens",
        "turns",
        "pairs",
        "ledger",
    }

    def explained(value, path):
        if isinstance(value, dict):
            for key, item in value.items():
                assert key in words, f"{path}.{key}"
                if key not in data_keys or key == "pairs":
                    explained(item, f"{path}.{key}")
        elif isinstance(value, list) and value:
            explained(value[0], f"{path}[0]")

    explained({key: value for key, value in found.items() if key not in ("printed", "errors", "code")}, "")
    assert found["format"] == 1


# -- how it works ----------------------------------------------------------------------------------------------------


def test_more_processes_find_the_same(doctor, tmp_path, model):
    rows = [*TALKS * 3, chat_row("电话13800001234", ANSWER), {"x": 1}]
    against = write_jsonl(tmp_path / "e.jsonl", [{"question": QUESTION, "answer": ANSWER * 2}])
    one = doctor("sft", rows, "--against", against, model=model)
    two = doctor("sft", rows, "--against", against, "--num_workers", 2, model=model)
    assert {**one, "errors": ""} == {**two, "errors": ""}
    assert "examining: 100%" in one["errors"] and "examining: 100%" in two["errors"]


# -- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length", "512;1024", "--model_name_or_path", "m"], "--max_length 512;1024: expected numbers"),
        (["--max_length", "8", "--model_name_or_path", "m"], "--max_length 8 must be at least 16"),
        (["--max_length", "512"], "--max_length needs --model_name_or_path"),
        (["--max_truncated_percentage", "1"], "--max_truncated_percentage needs --model_name_or_path"),
        (["--max_overlap_percentage", "1"], "--max_overlap_percentage needs --against"),
        (["--near_threshold", "0"], "--near_threshold 0.0 must be above 0"),
        (["--max_personal_data", "-1"], "--max_personal_data -1 must be 0 or more"),
        (["--num_workers", "0"], "--num_workers 0 must be at least 1"),
        (["--max_lenght", "512"], "unknown flag --max_lenght; did you mean --max_length?"),
    ],
)
def test_a_wrong_flag_is_told_in_a_line(capsys, flags, message):
    assert message in refusal(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "/nowhere"], "/nowhere"),
        (["--data_format", "nonsense"], "nonsense"),
        (["--against", "/nowhere"], "/nowhere"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(doctor, flags, message):
    found = doctor("sft", TALKS, *flags)
    assert found["code"] == 2 and message in found["errors"] and len(found["errors"].strip().splitlines()) == 1


def test_a_tokenizer_without_a_template_needs_its_name_but_for_pretraining(doctor, tmp_path):
    build_tokenizer(chat=False).save_pretrained(tmp_path / "plain")
    found = doctor("sft", TALKS, model=tmp_path / "plain")
    assert found["code"] == 2 and "--template_name" in found["errors"]
    assert doctor("pt", TEXTS, model=tmp_path / "plain")["code"] == 0
    assert doctor("sft", TALKS, "--template_name", "chatml", model=tmp_path / "plain")["template"] == "chatml"


def test_reading_the_command_line_loads_nothing_heavy():
    program = (
        "import sys; from tools.check_data import parse_args; parse_args(['d', '--stage', 'sft']); "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_runs_as_a_module(tmp_path, capsys, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"x": 1}])
    given = [str(path), "--stage", "sft", "--max_dropped_percentage", "0"]
    monkeypatch.setattr("sys.argv", ["check_data.py", *given])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it is imported above
        runpy.run_module("tools.check_data", run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 thing to look at: rows that cannot be read (1)"
