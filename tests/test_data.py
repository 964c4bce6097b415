"""The account of the rows of files, what is held out, and the cache of tokenised data."""

import json
import logging
import os
import random
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import conversations, spooled, write_jsonl

from stagekit.arguments import DataArguments
from stagekit.data import (
    accept_conversation,
    accept_preference,
    accept_text,
    cache_key,
    cached,
    draw,
    hold_out,
    load_splits,
)
from stagekit.ledger import NOT_DRAWN, UNREADABLE, Ledger, Rejected
from stagekit.prompts import Prompt, accept_prompt
from stagekit.reading import load_rows
from stagekit.records import Conversation, Message, Preference, Question, Ranking, RowError, Text, Unused
from stagekit.rows import Row, Rows, Spool
from stagekit.seen_prompts import load_seen_prompts, prompt_hash


def write(path, content):
    """Write a file, and the folders above it, from text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def arguments(path, **options):
    return DataArguments(train_file_dir=str(path), **options)


def texts(rows):
    return [row.record.text for row in rows]


# -- rows and the ledger ---------------------------------------------------------------------------------------------


def test_bad_rows_stop_the_run_with_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n{"txet": 1}\n[1]\n{')
    with pytest.raises(ValueError) as error:
        load_rows([path], accept_text, arguments(path))
    lines = str(error.value).split("\n")
    assert lines[0].startswith(f"{path}:2: no known format has the fields ['txet']; expected one of: ")
    assert lines[1] == f"{path}:3: expected an object with named fields, got list"
    assert lines[2].startswith(f"{path}:4: broken JSON at column 2 (")
    assert lines[3:] == ["(mend the data, or go on without such rows: --on_bad_row skip)"]


def test_a_single_bad_row_is_told_in_a_single_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n[1]\n')
    with pytest.raises(ValueError) as error:
        load_rows([path], accept_text, arguments(path))
    remedy = "(mend the data, or go on without such rows: --on_bad_row skip)"
    assert str(error.value) == f"{path}:2: expected an object with named fields, got list {remedy}"


def test_only_ten_bad_rows_are_named_and_the_others_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n' + "[1]\n" * 1234)
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
    assert (ledger.read, dict(ledger.dropped)) == (6, {"unreadable": 2, "empty dialogue": 1})
    assert dict(ledger.repaired) == {"turn after the last answer dropped": 1}
    rejected.save(tmp_path / "rejected.jsonl")
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
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
    kept, more = Rejected(skip=True), Rejected(skip=True)
    kept.add(*rejected[0].values())
    for row in rejected[1:]:
        more.add(*row.values())
    kept.take(more)
    kept.check()
    kept.save(tmp_path / "rejected_rows.jsonl")
    assert kept.count == 3
    lines = (tmp_path / "rejected_rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rejected


def test_a_file_of_bad_rows_only_is_an_error_even_when_they_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", '[1]\n{"text": ""}\n')
    with pytest.raises(ValueError, match="a.jsonl: none of the 2 rows can be used .unreadable: 1, empty text: 1."):
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
            rows.settle(ledger)
            assert len(rows) == ledger.used and ledger.used + sum(ledger.dropped.values()) == ledger.read
            total += ledger.read
        assert total == written
        dropped = splits.train_ledger.dropped
        assert splits.rejected.count == dropped["unreadable"] + dropped["empty text"] == bad
        assert splits.rejected.num_stopping == dropped["unreadable"]


def test_a_ledger_that_does_not_add_up_is_a_programming_error():
    with pytest.raises(AssertionError, match="the ledger does not add up"):
        Ledger(read=3, used=1, dropped=Counter({"unreadable": 1})).close()


def test_the_ledger_survives_json_and_is_printed_as_a_table():
    ledger = Ledger(read=1234, used=1233, samples=1300, files=["a", "b", "c", "d", "e"])
    ledger.drop("unreadable")
    ledger.drop(NOT_DRAWN, 0)
    with pytest.raises(AssertionError, match="none of ledger.REASONS"):
        ledger.drop("a new reason", 0)
    ledger.tokens.update(used=50_000, trained=20_000)
    ledger.pairs.update({"from rankings": 6})
    stored = json.loads(json.dumps(ledger.to_dict()))
    assert stored["dropped"] == {"unreadable": 1}
    assert Ledger.from_dict(stored) == ledger
    lines = ledger.lines("training")
    assert lines[0] == "training data: a, b, c and 2 more"
    assert [line.split()[-1] for line in lines[1:4]] == ["1,234", "1,233", "1"]
    assert any(line.split() == ["pairs", "from", "rankings", "6"] for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1, "the columns are not aligned"


# -- splits ----------------------------------------------------------------------------------------------------------


def numbered(count, same=1):
    """Rows of text; `same` rows in a row share their text."""
    return spooled([Row(Text(f"document {number // same}"), f"f:{number}") for number in range(count)])


def test_a_seeded_share_is_held_out_in_file_order():
    rows = numbered(200)
    train, held_out = hold_out(rows, 0.05, seed=1)
    assert (len(train), len(held_out)) == (190, 10)
    assert sorted([*train, *held_out], key=list(rows).index) == list(rows)
    for part in (held_out, train):
        assert list(part) == sorted(part, key=list(rows).index)
    assert [list(part) for part in hold_out(rows, 0.05, seed=1)] == [list(train), list(held_out)]
    assert list(hold_out(rows, 0.05, seed=2)[1]) != list(held_out)


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
    turned = spooled(rows[::-1])
    assert set(texts(hold_out(rows, 0.1, seed=1)[1])) == set(texts(hold_out(turned, 0.1, seed=1)[1]))


def test_draw_takes_at_most_the_limit_keeps_the_order_and_counts_the_others():
    rows = numbered(100)
    drawn = texts(draw(rows, 30, seed=1))
    assert len(set(drawn)) == 30 and drawn == sorted(drawn, key=texts(rows).index)
    assert drawn == texts(draw(rows, 30, seed=1)) != texts(draw(rows, 30, seed=2))
    rows = numbered(100)
    ledger = draw(rows, 30, seed=1).settle(Ledger(read=100))
    assert (ledger.used, dict(ledger.dropped)) == (30, {"not drawn (--max_…_samples)": 70})
    rows = numbered(100)
    for limit in (None, 100, 101):
        assert draw(rows, limit, 1).settle(Ledger(read=100)).used == 100


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


# -- mixtures and duplicates -----------------------------------------------------------------------------------------


def mixture(tmp_path, sizes, **options):
    """Splits of a mixture of files that hold so many rows, of which none is held out."""
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}: {i}"} for i in range(s)]) for n, s in sizes.items()]
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": "held"}])
    names = ",".join(map(str, paths))
    return load_splits(arguments(names, validation_file_dir=str(held_out), **options), accept_text, seed=1)


def origins(rows):
    return Counter(text.split(":")[0] for text in texts(rows))


@pytest.mark.parametrize(
    ("sizes", "weights", "epoch", "expected"),
    [
        ({"a": 100, "b": 10}, "0.9,0.1", "first_exhausted", {"a": 90, "b": 10}),
        ({"a": 100, "b": 10}, "9,1", "all_exhausted", {"a": 100, "b": 11}),
        ({"a": 30, "b": 10}, "1,1", "first_exhausted", {"a": 10, "b": 10}),
        ({"a": 30, "b": 10}, "1,1", "all_exhausted", {"a": 30, "b": 30}),
        ({"a": 7, "b": 7, "c": 7}, "2,1,1", "first_exhausted", {"a": 7, "b": 4, "c": 4}),
    ],
)
def test_an_epoch_of_a_mixture_has_the_shares_asked_for(tmp_path, sizes, weights, epoch, expected):
    splits = mixture(tmp_path, sizes, mixing_weights=weights, mixing_epoch=epoch)
    assert origins(splits.train) == expected
    repeats = Counter(texts(splits.train))
    for name, size in sizes.items():  # every row of a part stands in it as often as any other, or once more
        counts = {repeats[f"{name}: {number}"] for number in range(size)}
        assert max(counts) - min(counts) <= 1 and max(counts) == -(-expected[name] // size)
    found = {Path(name).stem: (share["rows"], share["taken"]) for name, share in splits.train_ledger.shares.items()}
    assert found == {name: (size, expected[name]) for name, size in sizes.items()}
    assert sum(share["share"] for share in splits.train_ledger.shares.values()) == pytest.approx(1)
    ledger = splits.train.settle(splits.train_ledger)
    used = sum(min(size, expected[name]) for name, size in sizes.items())
    left = sum(sizes.values()) - used
    assert ledger.used == used
    assert dict(ledger.dropped) == ({"not drawn (--mixing_weights)": left} if left else {})
    assert any("of the mixture from" in line for line in ledger.lines("training"))


def test_a_limit_cuts_every_part_of_a_mixture_alike(tmp_path):
    splits = mixture(tmp_path, {"a": 100, "b": 100}, mixing_weights="0.75,0.25", max_train_samples=40)
    assert origins(splits.train) == {"a": 30, "b": 10}


@pytest.mark.parametrize("weights", ["0.5", "0.5,0.5,0.5", "1,0", "1,-1", "1,nan", "1,inf", "a,b", ""])
def test_weights_that_fit_no_mixture_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match="--mixing_weights .*: give one positive number for each of the 2 parts"):
        mixture(tmp_path, {"a": 5, "b": 5}, mixing_weights=weights)


def test_a_row_that_repeats_an_earlier_one_is_left_out_on_request(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}, {"text": " one\n"}, {"text": "One"}, {"text": "one"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": "held"}, {"text": "held"}])
    for kind, kept in (("none", ["one", "two", " one\n", "One", "one"]), ("exact", ["one", "two", "One"])):
        splits = load_splits(arguments(path, validation_file_dir=str(held_out), dedup=kind), accept_text, seed=1)
        assert texts(splits.train) == kept
        assert len(splits.validation) == (2 if kind == "none" else 1)
        ledger = splits.train.settle(splits.train_ledger)
        assert (ledger.read, ledger.used) == (5, len(kept))
    assert dict(ledger.dropped) == {"exact duplicate (--dedup)": 2}


def test_duplicates_left_out_are_no_part_of_what_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{number // 2}"} for number in range(40)])
    splits = load_splits(arguments(path, dedup="exact", validation_split_percentage=25), accept_text, seed=1)
    assert (len(splits.train), len(splits.validation)) == (15, 5)
    train, held_out = (
        rows.settle(ledger)
        for rows, ledger in ((splits.train, splits.train_ledger), (splits.validation, splits.validation_ledger))
    )
    assert (train.read, train.used, dict(train.dropped)) == (35, 15, {"exact duplicate (--dedup)": 20})
    assert (held_out.read, held_out.used, dict(held_out.dropped)) == (5, 5, {})


def test_a_row_of_a_file_counts_as_used_if_anything_made_of_it_is():
    """Two rows of a file became three records: 0 -> a, 0 and 1 -> b, 1 -> c."""
    spool = Spool()
    for text, sources in (("a", [0]), ("b", [0, 1]), ("c", [1])):
        spool.append(Row(Text(text), "f").packed(), 1, 0, sources, 1)
    spool.flush()
    rows = Rows(spool, np.arange(3))
    assert rows.num_sources() == 2
    rows.drop([0], NOT_DRAWN)
    assert rows.settle(Ledger(read=2)).used == 2
    rows.drop([1], UNREADABLE)
    ledger = rows.settle(Ledger(read=2))
    assert (ledger.used, dict(ledger.dropped)) == (1, {NOT_DRAWN: 1})


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
    hashes = np.unique(rows.column("prompts"))
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
    assert accept_text(asked("Q", "R")) == Text("Q\n\nA\n\nR\n\nA")
    assert accept_text(Question(question, "2", "1+1\n#### 2")) == Text("Q\n\n1+1\n#### 2")
    assert accept_text(Question(question, "", "")) == Text("Q")
    with pytest.raises(RowError, match="fine-tuning needs a conversation"):
        accept_conversation(Text("x"))
    for record in (pair, ranking):
        assert accept_text(record) == Text("Q\n\ngood")
    with pytest.raises(Unused, match="fine-tuning needs an answer"):
        accept_conversation(Question(question, "", ""))
    for accept in (accept_text, accept_conversation, accept_preference, accept_prompt):
        with pytest.raises(RowError, match="message"):
            accept(Message("m", None, "user", "Q"))
    for record in (Text("x"), asked("Q"), Question(question, "2", "2")):
        kind = type(record).__name__.lower()
        with pytest.raises(RowError, match=f"compares answers .*'chosen' and 'rejected'.* and this is a {kind}$"):
            accept_preference(record)


def test_a_dialogue_without_an_answer_to_learn_is_left_out_and_still_a_prompt():
    question, left = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "train": False}
    marked = Conversation([question, left])
    for accept in (accept_text, accept_conversation):
        with pytest.raises(Unused) as left_out:
            accept(marked)
        assert left_out.value.reason == "marked as not to be learnt"
    assert accept_prompt(marked) == Prompt([question], "")
    partly = Conversation([question, left, question, {"role": "assistant", "content": "B"}])
    assert accept_conversation(partly) is partly
    assert accept_text(partly) == Text("Q\n\nQ\n\nB")
    assert accept_prompt(partly) == Prompt(partly.messages[:-1], "B")


def test_of_a_ranking_the_first_of_the_best_answers_is_learnt_in_finetuning():
    question, answers = [{"role": "user", "content": "Q"}], [[{"role": "assistant", "content": t}] for t in "abc"]
    assert accept_conversation(Ranking(question, answers, [1, 0, 0])) == Conversation([*question, *answers[1]])


# -- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def single_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def build_by(name):
    return lambda directory: (directory / "by").write_text(name)


def test_the_cache_key_follows_content_and_settings(tmp_path):
    path = write(tmp_path / "a.jsonl", "one")
    key = cache_key([path], {"max_length": 8, "b": 1})
    assert key == cache_key([path], {"b": 1, "max_length": 8})
    assert key != cache_key([path], {"max_length": 9, "b": 1})
    write(path, "two")
    assert key != cache_key([path], {"max_length": 8, "b": 1})


def test_tokenised_data_is_built_once_and_read_back_equal(tmp_path, single_process):
    built = []

    def build(directory):
        built.append(1)
        build_by("this run")(directory)

    first, second = (cached("key", str(tmp_path), build) for _ in range(2))
    assert len(built) == 1 and first == second == tmp_path / "key"
    assert (first / "by").read_text() == "this run"
    cached("other", str(tmp_path), build)
    assert len(built) == 2
    assert sorted(os.listdir(tmp_path)) == ["key", "other"], "a temporary directory is left"


def test_a_build_that_fails_leaves_nothing_that_could_be_taken_for_data(tmp_path, single_process):
    def fail(directory):
        build_by("half")(directory)
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        cached("key", str(tmp_path / "cache"), fail)
    assert not os.listdir(tmp_path)
    assert (cached("key", str(tmp_path / "cache"), build_by("whole")) / "by").read_text() == "whole"


def test_of_two_runs_that_build_at_once_the_slower_takes_what_the_faster_wrote(tmp_path, single_process):
    cached("key", str(tmp_path / "faster"), build_by("faster"))

    def build(directory):  # while this one is at work, the other finishes
        shutil.copytree(tmp_path / "faster/key", tmp_path / "slower/key")
        build_by("slower")(directory)

    assert (cached("key", str(tmp_path / "slower"), build) / "by").read_text() == "faster"
    assert os.listdir(tmp_path / "slower") == ["key"]


def test_other_ranks_wait_for_the_first_and_never_build(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    cached("key", str(tmp_path / "first"), build_by("first"))
    monkeypatch.setenv("LOCAL_RANK", "1")

    def never(directory):
        raise AssertionError("rank 1 built")

    (tmp_path / "shared").mkdir()
    timer = threading.Timer(0.5, lambda: (tmp_path / "first/key").rename(tmp_path / "shared/key"))
    timer.start()
    found = cached("key", str(tmp_path / "shared"), never)
    timer.join()
    assert (found / "by").read_text() == "first"
