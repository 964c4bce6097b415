"""Files as users have them, the account of their rows, what is held out, and the cache of tokenised data."""

import gzip
import json
import logging
import os
import random
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
from conftest import conversations, write_jsonl

from stagekit.arguments import DataArguments
from stagekit.data import (
    Ledger,
    Row,
    accept_conversation,
    accept_preference,
    accept_text,
    cache_key,
    cached,
    draw,
    find_files,
    hold_out,
    ledger_dict,
    ledger_from_dict,
    load_rows,
    load_seen_prompts,
    load_splits,
    prompt_hash,
    prompt_hashes,
    read_records,
    write_rejected,
)
from stagekit.formats import Conversation, Preference, Question, Ranking, RowError, Text

TWO = [{"text": "first"}, {"text": "second"}]


def write(path, content):
    """Write a file, and the folders above it, from text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, **options):
    return list(read_records(path, **options))


def arguments(path, **options):
    return DataArguments(train_file_dir=str(path), **options)


def texts(rows):
    return [row.record.text for row in rows]


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"text": "first"}\n{"text": "second"}\n', [1, 2]),
        ('\n{"text": "first"}\r\n\r\n{"text": "second"}', [2, 4]),
        ('[{"text": "first"}, {"text": "second"}]', [1, 1]),
        ('[\n  {\n    "text": "first"\n  },\n  {\n    "text": "second"\n  }\n]\n', [2, 5]),
        ('\n\n[{"text": "first"},\n\n{"text": "second"}]', [3, 5]),
        ('{"a": {"text": "first"}, "b": {"text": "second"}}', [1, 1]),
        ('{\n "a": {"text": "first"},\n "b": {"text": "second"}\n}\n', [1, 1]),
    ],
    ids=["lines", "lines with gaps", "array on a line", "indented array", "late array", "dict by id", "indented dict"],
)
def test_json_is_recognised_by_its_content(tmp_path, name, content, lines):
    assert read(write(tmp_path / name, content)) == list(zip(TWO, lines, strict=True))


def test_one_indented_record_is_one_record(tmp_path):
    path = write(tmp_path / "a.json", '{\n  "text": "first",\n  "url": "u"\n}\n')
    assert read(path) == [({"text": "first", "url": "u"}, 1)]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("blank_line", [("one\ntwo", 2), ("three", 5)]),
        ("line", [("one", 2), ("two", 3), ("three", 5)]),
        ("file", [("one\r\ntwo\r\n \r\nthree", 1)]),
    ],
)
def test_the_documents_of_a_txt_file_end_where_the_user_says(tmp_path, separator, expected):
    path = write(tmp_path / "a.txt", "\r\none\r\ntwo\r\n \r\nthree\r\n")
    assert read(path, txt_documents=separator) == expected


def test_a_gzipped_file_is_read_whatever_its_name(tmp_path):
    packed = gzip.compress(b'{"text": "first"}\n{"text": "second"}\n')
    assert read(write(tmp_path / "a.jsonl.gz", packed)) == [(TWO[0], 1), (TWO[1], 2)]
    assert read(write(tmp_path / "a.jsonl", packed)) == [(TWO[0], 1), (TWO[1], 2)]
    assert read(write(tmp_path / "a.txt.gz", gzip.compress(b"one\n\ntwo"))) == [("one", 1), ("two", 3)]


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "first"}')) == [(TWO[0], 1)]
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == [("one", 1)]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "second"}\n')
    assert read(path) == [({"text": text}, 1), (TWO[1], 2)]
    assert read(write(tmp_path / "a.txt", "one\u2028two"), txt_documents="line") == [("one\u2028two", 1)]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "a.jsonl: the file is empty; remove it or fill it"),
        (" \n\n", "a.jsonl: the file is empty; remove it or fill it"),
        (b"\xef\xbb\xbf\n", "a.jsonl: the file is empty; remove it or fill it"),
        (gzip.compress(b""), "a.jsonl: the file is empty; remove it or fill it"),
        (POINTER, "a.jsonl: this is a Git-LFS pointer, not the data; run `git lfs pull` where it came from"),
        (
            '{"text": "x"}\n{"text": "发烧"}'.encode("gb18030"),
            "a.jsonl:2: not UTF-8 (byte 0xb7); it reads as GBK: iconv -f GB18030 -t UTF-8 a.jsonl > new.jsonl",
        ),
        (b"\xef\xbb\xbf" + b'{"text":\n"\xb7\xa2"}', "a.jsonl:2: not UTF-8 (byte 0xb7); it reads as GBK"),
        (b'{"text": "\xff\xff"}', "a.jsonl:1: not UTF-8 (byte 0xff)"),
        (gzip.compress(b"x" * 99)[:-9], "a.jsonl: damaged gzip file ("),
        (gzip.compress(b"x" * 99)[:10] + b"\xff" * 20, "a.jsonl: damaged gzip file ("),
    ],
    ids=[
        "empty",
        "blank",
        "only a mark",
        "empty gzip",
        "pointer",
        "GBK",
        "GBK after a mark",
        "neither",
        "cut",
        "torn",
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_would_help(tmp_path, content, reason):
    with pytest.raises(ValueError) as error:
        read(write(tmp_path / "a.jsonl", content))
    assert str(error.value).startswith(f"{tmp_path}/{reason}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "first"}\n{"text": \n{"text": "second"}\n', [TWO[0], (2, "broken JSON at column 10 ("), TWO[1]]),
        ('{"text": \n{"text": "first"}\n', [(1, "broken JSON at column 10 ("), TWO[0]]),
        ('[{"text": "first"},\n{"text" 1}, {"text": "x"}]', [TWO[0], (2, "broken JSON at column 9 (")]),
        ('[{"text": "first"},\n{"text": "second"}', [*TWO, (2, "the array does not end; the file is cut off")]),
        ('[{"text": "first"}]\n[{"text": "second"}]', [TWO[0], (2, "something follows the end of the array")]),
    ],
    ids=["line", "first line", "item of an array", "array cut off", "two arrays"],
)
def test_broken_json_is_one_bad_row_with_its_line(tmp_path, content, expected):
    found = read(write(tmp_path / "a.json", content))
    assert len(found) == len(expected)
    for (record, line), wanted in zip(found, expected, strict=True):
        if isinstance(wanted, dict):
            assert record == wanted
        else:
            assert isinstance(record, RowError) and (line, str(record)[: len(wanted[1])]) == wanted


def test_a_directory_is_searched_recursively_in_sorted_order_without_what_is_hidden(tmp_path):
    for name in ("b.jsonl", "a/z.json", "a/y.txt.gz", ".hidden.jsonl", ".cache/x.jsonl", "notes.md", "a/c.csv"):
        write(tmp_path / name, "x")
    assert find_files(str(tmp_path)) == [tmp_path / "a/y.txt.gz", tmp_path / "a/z.json", tmp_path / "b.jsonl"]


def test_files_and_directories_are_listed_with_commas_and_each_file_once(tmp_path):
    one, two = write(tmp_path / "d/one.txt", "x"), write(tmp_path / "two.data", "x")
    assert find_files(f"{two}, {one},{tmp_path / 'd'},") == [two, one]


def test_a_hidden_directory_named_by_the_user_is_read(tmp_path):
    path = write(tmp_path / ".cache/a.txt", "x")
    assert find_files(str(tmp_path / ".cache")) == [path]


def test_a_directory_without_data_and_a_missing_path_are_errors(tmp_path):
    write(tmp_path / "d/readme.md", "x")
    with pytest.raises(FileNotFoundError, match="d: no data in this directory; expected files ending in .jsonl, .js"):
        find_files(str(tmp_path / "d"))
    with pytest.raises(FileNotFoundError, match="missing: no such file or directory"):
        find_files(f"{tmp_path / 'd'}/../missing")


# -- rows and the ledger ---------------------------------------------------------------------------------------------


def test_bad_rows_stop_the_run_with_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n{"txet": 1}\n{"text": ""}\n{')
    with pytest.raises(ValueError) as error:
        load_rows([path], accept_text, arguments(path))
    lines = str(error.value).split("\n")
    assert lines[0].startswith(f"{path}:2: no known format has the fields ['txet']; expected one of: ")
    assert lines[1] == f"{path}:3: field 'text' is empty"
    assert lines[2].startswith(f"{path}:4: broken JSON at column 2 (")
    assert lines[3:] == ["(mend the data, or go on without such rows: --on_bad_row skip)"]


def test_a_single_bad_row_is_told_in_a_single_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n{"text": ""}\n')
    with pytest.raises(ValueError) as error:
        load_rows([path], accept_text, arguments(path))
    remedy = "(mend the data, or go on without such rows: --on_bad_row skip)"
    assert str(error.value) == f"{path}:2: field 'text' is empty {remedy}"


def test_only_ten_bad_rows_are_named_and_the_others_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n' + '{"text": ""}\n' * 1234)
    with pytest.raises(ValueError) as error:
        load_rows([path], accept_text, arguments(path))
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{path}:{number}" for number in range(2, 12)]
    assert lines[10] == "… and 1,224 more"


def test_bad_rows_are_left_out_on_request_and_the_ledger_adds_up(tmp_path):
    good = conversations(3)
    good[1]["conversations"].append({"from": "human", "value": "thanks"})
    lines = [json.dumps(row, ensure_ascii=False) for row in good]
    lines[1:1] = ["{", '{"text": "x"}', '{"conversations": []}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    rows, ledger, rejected = load_rows([path], accept_conversation, arguments(path, on_bad_row="skip"))
    assert [row.origin for row in rows] == [f"{path}:{number}" for number in (1, 5, 6)]
    assert (ledger.read, dict(ledger.dropped)) == (6, {"unreadable": 3})
    assert dict(ledger.repaired) == {"turn after the last answer dropped": 1}
    assert [item["origin"] for item in rejected] == [f"{path}:{number}" for number in (2, 3, 4)]
    assert [item["row"] for item in rejected] == [None, {"text": "x"}, {"conversations": []}]
    assert (
        rejected[1]["reason"] == "fine-tuning needs a conversation, and this is running text (pretraining.py takes it)"
    )


def test_rows_left_out_are_written_beside_the_result(tmp_path):
    rejected = [
        {"origin": "a.jsonl:2", "reason": "空", "row": {"text": "半\n行"}},
        {"origin": "b", "reason": "", "row": None},
        {"origin": "c", "reason": "half a character", "row": {"text": "\ud83d"}},
    ]
    write_rejected(rejected, tmp_path)
    lines = (tmp_path / "rejected_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rejected


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": ""}\n')
    with pytest.raises(ValueError, match="a.jsonl: none of the 2 rows could be read"):
        load_rows([path], accept_text, arguments(path, on_bad_row="skip"))


def test_an_unknown_data_format_is_refused_before_a_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="--data_format 'csv' is unknown"):
        load_rows([tmp_path / "missing"], accept_text, arguments(tmp_path, data_format="csv"))


def test_every_row_is_used_or_dropped_whatever_the_files_hold(tmp_path):
    """Seeded: random files of good, bad and broken rows, with every limit; rows in == rows accounted for."""
    dice = random.Random(11)
    for trial in range(60):
        folder, written, bad = tmp_path / str(trial), 0, 0
        for number in range(dice.randrange(1, 4)):
            lines = ['{"text": "always one good row"}', '{"text": "and another"}']
            for _ in range(dice.randrange(30)):
                kind = dice.randrange(4)
                lines.append(["{", '{"text": " "}', '{"text": "same"}', f'{{"text": "t{dice.random()}"}}'][kind])
                bad += kind < 2
            written += len(lines)
            write(folder / f"{number}.jsonl", "\n".join(dice.sample(lines, len(lines))))
        limits = {name: dice.choice([None, 1, 5, 1000]) for name in ("max_train_samples", "max_eval_samples")}
        share = dice.choice([0.5, 5, 40])
        data_args = arguments(folder, on_bad_row="skip", validation_split_percentage=share, **limits)
        splits = load_splits(data_args, accept_text, seed=trial)
        total = 0
        for rows, ledger in ((splits.train, splits.train_ledger), (splits.validation, splits.validation_ledger)):
            ledger.used = len(rows)
            ledger.close()
            assert rows and ledger.used + sum(ledger.dropped.values()) == ledger.read
            total += ledger.read
        assert total == written
        assert len(splits.rejected) == splits.train_ledger.dropped["unreadable"] == bad


def test_a_ledger_that_does_not_add_up_is_a_programming_error():
    with pytest.raises(AssertionError, match="the ledger does not add up"):
        Ledger(read=3, used=1, dropped=Counter({"unreadable": 1})).close()


def test_the_ledger_survives_json_and_is_printed_as_a_table():
    ledger = Ledger(read=1234, used=1233, samples=1300, files=["a", "b", "c", "d", "e"])
    ledger.drop("unreadable")
    ledger.drop("nothing", 0)
    ledger.tokens.update(used=50_000, trained=20_000)
    ledger.pairs.update({"from rankings": 6})
    stored = json.loads(json.dumps(ledger_dict(ledger)))
    assert stored["dropped"] == {"unreadable": 1}
    assert ledger_from_dict(stored) == ledger
    lines = ledger.lines("training")
    assert lines[0] == "training data: a, b, c and 2 more"
    assert [line.split()[-1] for line in lines[1:4]] == ["1,234", "1,233", "1"]
    assert any(line.split() == ["pairs", "from", "rankings", "6"] for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1, "the columns are not aligned"


# -- splits ----------------------------------------------------------------------------------------------------------


def numbered(count, same=1):
    """Rows of text; `same` rows in a row share their text."""
    return [Row(Text(f"document {number // same}"), f"f:{number}") for number in range(count)]


def test_a_seeded_share_is_held_out_in_file_order():
    rows = numbered(200)
    train, held_out = hold_out(rows, 0.05, seed=1)
    assert (len(train), len(held_out)) == (190, 10)
    assert sorted(train + held_out, key=rows.index) == rows
    assert held_out == sorted(held_out, key=rows.index) and train == sorted(train, key=rows.index)
    assert hold_out(rows, 0.05, seed=1) == (train, held_out)
    assert hold_out(rows, 0.05, seed=2)[1] != held_out


def test_equal_prompts_stay_on_one_side():
    train, held_out = hold_out(numbered(200, same=4), 0.1, seed=1)
    assert len(held_out) == 20
    assert not set(texts(train)) & set(texts(held_out))


def test_at_least_one_row_is_held_out_and_one_prompt_is_left():
    assert [len(part) for part in hold_out(numbered(3), 0.001, seed=1)] == [2, 1]
    assert [len(part) for part in hold_out(numbered(4, same=2), 0.999, seed=1)] == [2, 2]
    with pytest.raises(ValueError, match="f:0: with one prompt only, nothing can be held out"):
        hold_out(numbered(3, same=3), 0.5, seed=1)


def test_the_split_does_not_depend_on_where_the_rows_stand():
    rows = numbered(100)
    assert set(texts(hold_out(rows, 0.1, seed=1)[1])) == set(texts(hold_out(rows[::-1], 0.1, seed=1)[1]))


def test_draw_takes_at_most_the_limit_keeps_the_order_and_counts_the_others():
    rows, ledger = numbered(100), Ledger(read=100)
    drawn = draw(rows, 30, seed=1, ledger=ledger)
    assert len(set(texts(drawn))) == 30 and drawn == sorted(drawn, key=rows.index)
    assert dict(ledger.dropped) == {"not drawn (--max_…_samples)": 70}
    assert drawn == draw(rows, 30, seed=1, ledger=Ledger()) != draw(rows, 30, seed=2, ledger=Ledger())
    untouched = Ledger()
    assert draw(rows, None, 1, untouched) == draw(rows, 100, 1, untouched) == draw(rows, 101, 1, untouched) == rows
    assert not untouched.dropped


def test_held_out_data_of_its_own_is_used_whole(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{number}"} for number in range(20)])
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": f"v{number}"} for number in range(5)])
    splits = load_splits(arguments(train, validation_file_dir=str(held_out)), accept_text, seed=1)
    assert texts(splits.train) == [f"t{number}" for number in range(20)]
    assert texts(splits.validation) == [f"v{number}" for number in range(5)]
    assert (splits.train_ledger.read, splits.validation_ledger.read) == (20, 5)


@pytest.mark.parametrize("way", ["the same path", "another spelling", "the folder above"])
def test_a_file_given_for_both_is_split_instead_of_measured_on_training_rows(tmp_path, caplog, way):
    path = write_jsonl(tmp_path / "d/train.jsonl", [{"text": f"t{number}"} for number in range(40)])
    other = {"the same path": path, "another spelling": tmp_path / "d/../d/train.jsonl", "the folder above": tmp_path}[
        way
    ]
    with caplog.at_level(logging.WARNING, "stagekit.data"):
        splits = load_splits(
            arguments(path, validation_file_dir=str(other), validation_split_percentage=10), accept_text, seed=1
        )
    assert (len(splits.train), len(splits.validation)) == (36, 4)
    assert not set(texts(splits.train)) & set(texts(splits.validation))
    assert "share 1 file(s)" in caplog.text and "10% of the training rows are held out instead" in caplog.text


# -- leakage ---------------------------------------------------------------------------------------------------------


def asked(*questions):
    """A conversation with these questions."""
    turns = ((("user", question), ("assistant", "A")) for question in questions)
    return Conversation([{"role": role, "content": text} for pair in turns for role, text in pair])


SAME = prompt_hash(asked("What is a fever, and when is it high?"))


@pytest.mark.parametrize(
    "question",
    [
        "what is a FEVER and when is it high",
        "  What is a fever,\n and when is it high ？！",
        "Ｗｈａｔ　ｉｓ　ａ　ｆｅｖｅｒ，ａｎｄ　ｗｈｅｎ　ｉｓ　ｉｔ　ｈｉｇｈ？",
        "What is a fever — and when is it “high”?",
    ],
)
def test_the_hash_of_a_prompt_is_blind_to_case_width_space_and_punctuation(question):
    assert prompt_hash(asked(question)) == SAME


def test_the_hash_sees_every_letter_and_digit():
    assert prompt_hash(asked("What is a fewer, and when is it high?")) != SAME
    assert prompt_hash(asked("体温37度是发烧吗？我有点担心")) != prompt_hash(asked("体温38度是发烧吗？我有点担心"))
    assert 0 <= SAME < 2**64


def test_the_same_question_is_recognised_in_every_kind_of_record():
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "What is a fever, and when is it high?"}]
    answer = [{"role": "assistant", "content": "A"}]
    for record in (
        Conversation([*prompt, *answer]),
        Preference(prompt, answer, answer),
        Ranking(prompt, [answer, [{"role": "assistant", "content": "B"}]], [1, 0]),
        Question(prompt, "A", "A"),
        Text("What is a fever, and when is it high?"),
        asked("What is a fever, and when is it high?", "And then?"),
    ):
        assert prompt_hash(record) == SAME


def test_a_greeting_alone_does_not_identify_a_conversation():
    assert prompt_hash(asked("你好", "发烧怎么办？")) != prompt_hash(asked("你好", "咳嗽怎么办？"))
    assert prompt_hash(asked("你好", "发烧怎么办？")) == prompt_hash(asked("你好！", "发烧怎么办"))


def test_seen_prompts_are_sorted_unique_and_read_back(tmp_path):
    rows = numbered(6, same=2)
    hashes = prompt_hashes(rows)
    assert hashes.dtype == np.uint64 and hashes.tolist() == sorted({prompt_hash(row.record) for row in rows})
    assert len(hashes) == 3
    np.save(tmp_path / "seen_prompts.npy", hashes)
    assert load_seen_prompts(tmp_path).tolist() == hashes.tolist()
    assert load_seen_prompts(tmp_path / "base").tolist() == load_seen_prompts(None).tolist() == []


# -- kinds -----------------------------------------------------------------------------------------------------------


def test_each_stage_takes_its_kinds_and_refuses_the_others():
    question = [{"role": "user", "content": "Q"}]
    good, bad = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
    solution = [{"role": "assistant", "content": "1+1\n#### 2"}]
    assert accept_text(Text("x")) == Text("x")
    assert accept_conversation(asked("Q")) == asked("Q")
    assert accept_conversation(Question(question, "2", "1+1\n#### 2")) == Conversation([*question, *solution])
    pair, ranking = Preference(question, good, bad, [{}]), Ranking(question, [bad, good, good], [1, 0, 0], [{}])
    for record in (pair, ranking):
        assert accept_conversation(record) == Conversation([*question, *good], [{}])
        assert accept_preference(record) is record
    with pytest.raises(RowError, match="pretraining needs running text .* and this is a conversation"):
        accept_text(asked("Q"))
    with pytest.raises(RowError, match="fine-tuning needs a conversation"):
        accept_conversation(Text("x"))
    for record in (pair, ranking):
        with pytest.raises(RowError, match=f"pretraining needs running text .* {type(record).__name__.lower()}$"):
            accept_text(record)
    for record in (Text("x"), asked("Q"), Question(question, "2", "2")):
        kind = type(record).__name__.lower()
        with pytest.raises(RowError, match=f"compares answers .*'chosen' and 'rejected'.* and this is a {kind}$"):
            accept_preference(record)


def test_of_a_ranking_the_first_of_the_best_answers_is_learnt_in_finetuning():
    question, answers = [{"role": "user", "content": "Q"}], [[{"role": "assistant", "content": t}] for t in "abc"]
    assert accept_conversation(Ranking(question, answers, [1, 0, 0])) == Conversation([*question, *answers[1]])


# -- cache -----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "train": {"input_ids": [[1, 2], [3]], "lengths": [[2], [1]]},
    "validation": {"input_ids": [[4]], "lengths": [[1]]},
}
META = {"text": "发烧\u2028", "half": "\ud83d", "count": 3}


@pytest.fixture
def single_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def plain(splits):
    return {name: split.to_dict() for name, split in splits.items()}


def test_the_cache_key_follows_content_and_settings(tmp_path):
    path = write(tmp_path / "a.jsonl", "one")
    key = cache_key([path], {"max_length": 8, "b": 1})
    assert key == cache_key([path], {"b": 1, "max_length": 8})
    assert key != cache_key([path], {"max_length": 9, "b": 1})
    write(path, "two")
    assert key != cache_key([path], {"max_length": 8, "b": 1})


def test_tokenised_data_is_built_once_and_read_back_equal(tmp_path, single_process):
    built = []

    def build():
        built.append(1)
        return COLUMNS, META

    first, second = (cached("key", str(tmp_path), build) for _ in range(2))
    assert len(built) == 1
    for splits, meta in (first, second):
        assert plain(splits) == COLUMNS
        assert meta == META
    cached("other", str(tmp_path), build)
    assert len(built) == 2
    assert sorted(os.listdir(tmp_path)) == ["key", "other"], "a temporary directory is left"


def test_a_build_that_fails_leaves_nothing_that_could_be_taken_for_data(tmp_path, single_process):
    def fail():
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        cached("key", str(tmp_path), fail)
    assert cached("key", str(tmp_path), lambda: (COLUMNS, META))[1] == META


def test_of_two_runs_that_build_at_once_the_slower_takes_what_the_faster_wrote(tmp_path, single_process):
    cached("key", str(tmp_path / "faster"), lambda: (COLUMNS, {**META, "by": "faster"}))

    def build():  # while this one is at work, the other finishes
        shutil.copytree(tmp_path / "faster/key", tmp_path / "slower/key")
        return COLUMNS, {**META, "by": "slower"}

    splits, meta = cached("key", str(tmp_path / "slower"), build)
    assert plain(splits) == COLUMNS and meta["by"] == "faster"
    assert os.listdir(tmp_path / "slower") == ["key"]


def test_other_ranks_wait_for_the_first_and_never_build(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    cached("key", str(tmp_path / "first"), lambda: (COLUMNS, META))
    monkeypatch.setenv("LOCAL_RANK", "1")

    def never():
        raise AssertionError("rank 1 built")

    (tmp_path / "shared").mkdir()
    timer = threading.Timer(0.5, lambda: (tmp_path / "first/key").rename(tmp_path / "shared/key"))
    timer.start()
    splits, meta = cached("key", str(tmp_path / "shared"), never)
    timer.join()
    assert plain(splits) == COLUMNS and meta == META
