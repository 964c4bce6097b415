"""Each adapter on records as their data sets publish them; the expected records are written out by hand."""

import copy
import json
import math
import random
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagekit.data import accept_conversation, accept_preference, accept_text
from stagekit.formats import ADAPTERS, adapter_named, parse_columns, rename, to_canonical
from stagekit.prompts import accept_prompt
from stagekit.records import (
    REPAIRS,
    Choice,
    Conversation,
    Message,
    Preference,
    Question,
    Ranking,
    RowError,
    Rubric,
    Text,
    Tree,
)


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def call(*calls):
    """An assistant message that calls (name, arguments) and says nothing."""
    functions = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions}


def said(*turns):
    """ShareGPT turns from (speaker, text) pairs."""
    return [{"from": speaker, "value": text} for speaker, text in turns]


def ranked(prompt, *answers):
    """A ranking from (answer, rank) pairs."""
    return Ranking(prompt, [[assistant(text)] for text, _ in answers], [rank for _, rank in answers])


BARE_TOOL = {"name": "shop_hours", "description": "Opening hours", "parameters": {"type": "object", "properties": {}}}
OPENAI_TOOL = {"type": "function", "function": BARE_TOOL}

READINGS = {
    "T text": ({"text": "A fever is a raised temperature."}, Text("A fever is a raised temperature.")),
    "T text among other fields": ({"text": "words", "url": "u", "timestamp": 1}, Text("words")),
    "T wikipedia-cn": ({"completion": "发烧是体温升高。", "source": "wiki"}, Text("发烧是体温升高。")),
    "T content": ({"title": "Fever", "content": "words"}, Text("words")),
    "T only column, whatever its name": ({"paragraph": "words"}, Text("words")),
    "T plain line": ("a line of a .txt file", Text("a line of a .txt file")),
    "T keeps its white space": ({"text": " a\n\n b \n"}, Text(" a\n\n b \n")),
    "C ShareGPT": (
        {"id": "qZ81kd_0", "conversations": said(("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"))},
        Conversation([user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]),
    ),
    "C system turn": (
        {"conversations": said(("system", "S"), ("human", "Q"), ("gpt", "A"))},
        Conversation([system("S"), user("Q"), assistant("A")]),
    ),
    "C empty system turn is none": (
        {"conversations": said(("system", " "), ("human", "Q"), ("gpt", "A"))},
        Conversation([user("Q"), assistant("A")]),
    ),
    "C LLaMA-Factory system field": (
        {"conversations": said(("human", "Q"), ("gpt", "A")), "system": "S", "tools": ""},
        Conversation([system("S"), user("Q"), assistant("A")]),
    ),
    "C system turn goes before system field": (
        {"conversations": said(("system", "turn"), ("human", "Q"), ("gpt", "A")), "system_prompt": "field"},
        Conversation([system("turn"), user("Q"), assistant("A")]),
    ),
    "C OpenAI messages": (
        {"messages": [system("S"), user("Q"), assistant("A")]},
        Conversation([system("S"), user("Q"), assistant("A")]),
    ),
    "C OpenAI content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]},
                {"role": "assistant", "content": [{"type": "text", "value": "A"}]},
            ]
        },
        Conversation([user("two parts"), assistant("A")]),
    ),
    "C OpenAI tool_calls": (
        {
            "messages": [
                user("When is it open?"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "a", "arguments": '{"shop": "北门"}'}},
                        {"id": "c2", "type": "function", "function": {"name": "b", "arguments": {}}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": '{"open": "8:00"}'},
                {"role": "tool", "tool_call_id": "c2", "content": ""},
                assistant("From eight."),
            ],
            "tools": [OPENAI_TOOL],
        },
        Conversation(
            [
                user("When is it open?"),
                call(("a", {"shop": "北门"}), ("b", {})),
                tool('{"open": "8:00"}'),
                tool(""),
                assistant("From eight."),
            ],
            [OPENAI_TOOL],
        ),
    ),
    "C function_call and observation as JSON strings": (
        {
            "conversations": said(
                ("human", "营业时间？"),
                ("function_call", '{"name": "shop_hours", "arguments": {"shop": "北门药店"}}'),
                ("observation", '{"open": "8:00", "close": "21:00"}'),
                ("gpt", "早八点到晚九点。"),
            ),
            "tools": json.dumps([BARE_TOOL]),
        },
        Conversation(
            [
                user("营业时间？"),
                call(("shop_hours", {"shop": "北门药店"})),
                tool('{"open": "8:00", "close": "21:00"}'),
                assistant("早八点到晚九点。"),
            ],
            [OPENAI_TOOL],
        ),
    ),
    "C several calls in one function_call": (
        {
            "conversations": said(
                ("human", "Q"),
                ("function_call", '[{"name": "a", "arguments": "{\\"x\\": 1}"}, {"name": "b"}]'),
                ("observation", "1"),
                ("observation", "2"),
                ("gpt", "A"),
            )
        },
        Conversation([user("Q"), call(("a", {"x": 1}), ("b", {})), tool("1"), tool("2"), assistant("A")]),
    ),
    "C {human, assistant} pairs": (
        {"conversation": [{"human": "Q1", "assistant": "A1"}, {"human": "Q2", "assistant": "A2"}], "category": "x"},
        Conversation([user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]),
    ),
    "C other names of the speakers": (
        {"items": said(("患者", "Q1"), ("医生", "A1"), ("User", "Q2"), ("MOSS", "A2"))},
        Conversation([user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]),
    ),
    "I Alpaca": (
        {"instruction": "Name three vegetables.", "input": "", "output": "Carrot, beet, turnip."},
        Conversation([user("Name three vegetables."), assistant("Carrot, beet, turnip.")]),
    ),
    "I Alpaca with input, history and system": (
        {
            "instruction": "And as a question?",
            "input": "The shop closes at nine.",
            "output": "Does it?",
            "history": [["Q1", "A1"], ["Q2", "A2"]],
            "system": "S",
        },
        Conversation(
            [
                system("S"),
                user("Q1"),
                assistant("A1"),
                user("Q2"),
                assistant("A2"),
                user("And as a question?\nThe shop closes at nine."),
                assistant("Does it?"),
            ]
        ),
    ),
    "P plain": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        Preference([user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "P response_chosen with history and system": (
        {
            "system": "S",
            "history": [["Q1", "A1"]],
            "question": "Q2",
            "response_chosen": "good",
            "response_rejected": "bad",
        },
        Preference([system("S"), user("Q1"), assistant("A1"), user("Q2")], [assistant("good")], [assistant("bad")]),
    ),
    "P Alpaca ranking": (
        {"instruction": "Do", "input": "this", "chosen": "good", "rejected": "bad"},
        Preference([user("Do\nthis")], [assistant("good")], [assistant("bad")]),
    ),
    "P hh transcript with an open answer": (
        {
            "prompt": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q2\nline two\n\nAssistant:",
            "response": " good",
            "chosen": " good",
            "rejected": " bad",
        },
        Preference([user("Q1"), assistant("A1"), user("Q2\nline two")], [assistant("good")], [assistant("bad")]),
    ),
    "P hh transcript whose answers bring the header": (
        {"prompt": "\n\nHuman: Q\n\n", "chosen": "Assistant: good", "rejected": "Assistant: bad"},
        Preference([user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "P prompter transcript": (
        {"lang": "en", "prompt": "prompter: Q1\nassistant: A1\nprompter: Q2", "chosen": "good", "rejected": "bad"},
        Preference([user("Q1"), assistant("A1"), user("Q2")], [assistant("good")], [assistant("bad")]),
    ),
    "P TRL messages": (
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        Preference([system("S"), user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "S ShareGPT ranking with message objects": (
        {
            "conversations": said(("human", "Q1"), ("gpt", "A1"), ("human", "Q2")),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        Preference([user("Q1"), assistant("A1"), user("Q2")], [assistant("good")], [assistant("bad")]),
    ),
    "S ShareGPT ranking with strings, system and tools": (
        {
            "conversations": said(("human", "Q")),
            "system": "S",
            "chosen": "good",
            "rejected": "bad",
            "tools": json.dumps([BARE_TOOL]),
        },
        Preference([system("S"), user("Q")], [assistant("good")], [assistant("bad")], [OPENAI_TOOL]),
    ),
    "S answer to a tool's result": (
        {
            "conversations": said(("human", "Q"), ("function_call", '{"name": "a"}'), ("observation", "1")),
            "chosen": "good",
            "rejected": "bad",
        },
        Preference([user("Q"), call(("a", {})), tool("1")], [assistant("good")], [assistant("bad")]),
    ),
    "S TRL implicit prompt": (
        {
            "chosen": [user("Q1"), assistant("A1"), user("Q2"), assistant("good")],
            "rejected": [user("Q1"), assistant("A1"), user("Q2"), assistant("bad")],
        },
        Preference([user("Q1"), assistant("A1"), user("Q2")], [assistant("good")], [assistant("bad")]),
    ),
    "S LLaMA-Factory v1 whole dialogues": (
        {"chosen_messages": [user("Q"), assistant("good")], "rejected_messages": [user("Q"), assistant("bad")]},
        Preference([user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "P with a margin": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 1.5},
        Preference([user("Q")], [assistant("good")], [assistant("bad")], None, 1.5),
    ),
    "P with a margin of nothing": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": None},
        Preference([user("Q")], [assistant("good")], [assistant("bad")], None, None),
    ),
    "P with a margin of zero": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 0},
        Preference([user("Q")], [assistant("good")], [assistant("bad")], None, 0.0),
    ),
    "S with a margin": (
        {"conversations": said(("human", "Q")), "chosen": "good", "rejected": "bad", "margin": 3},
        Preference([user("Q")], [assistant("good")], [assistant("bad")], None, 3.0),
    ),
    "S whole dialogues with a margin": (
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")], "margin": -0.5},
        Preference([user("Q")], [assistant("good")], [assistant("bad")], None, -0.5),
    ),
    "K strings, best first": (
        {"question": "Q", "answers": ["best", "fair", "bad"]},
        ranked([user("Q")], ("best", 0), ("fair", 1), ("bad", 2)),
    ),
    "K objects, best first": (
        {"prompt": "Q", "responses": [{"answer": "best", "by": "a"}, {"text": "bad", "by": "b"}]},
        ranked([user("Q")], ("best", 0), ("bad", 1)),
    ),
    "K objects with ranks": (
        {
            "question": "Q",
            "answers": [{"answer": "bad", "rank": 7}, {"text": "best", "rank": 1}, {"response": "fair", "rank": 2.5}],
        },
        ranked([user("Q")], ("bad", 2), ("best", 0), ("fair", 1)),
    ),
    "K objects with scores": (
        {
            "instruction": "Do",
            "input": "this",
            "completions": [
                {"text": "fair", "score": 0.5},
                {"text": "bad", "score": -1},
                {"text": "best", "score": 9},
            ],
        },
        ranked([user("Do\nthis")], ("fair", 1), ("bad", 2), ("best", 0)),
    ),
    "K ranks beside the answers, two of them equal": (
        {"question": "Q", "answers": ["bad", "best", "fair", "also best"], "ranks": [4, 1, 3, 1]},
        ranked([user("Q")], ("bad", 2), ("best", 0), ("fair", 1), ("also best", 0)),
    ),
    "K scores beside the answers, two of them equal": (
        {"query": "Q", "candidates": ["bad", "best", "as bad"], "scores": [1, 4.5, 1.0]},
        ranked([user("Q")], ("bad", 1), ("best", 0), ("as bad", 1)),
    ),
    "K messages with scores": (
        {
            "messages": [system("S"), user("Q1"), assistant("A1"), user("Q2")],
            "responses": [{**assistant("bad"), "score": 1}, {"from": "gpt", "value": "best", "score": 2}],
        },
        ranked([system("S"), user("Q1"), assistant("A1"), user("Q2")], ("bad", 1), ("best", 0)),
    ),
    "K ShareGPT with system and tools, answers of several messages": (
        {
            "conversations": said(("human", "Q")),
            "system": "S",
            "tools": json.dumps([BARE_TOOL]),
            "answers": [
                said(("function_call", '{"name": "shop_hours"}'), ("observation", "8:00"), ("gpt", "From eight.")),
                "No idea.",
            ],
        },
        Ranking(
            [system("S"), user("Q")],
            [[call(("shop_hours", {})), tool("8:00"), assistant("From eight.")], [assistant("No idea.")]],
            [0, 1],
            [OPENAI_TOOL],
        ),
    ),
    "K history and system": (
        {"system": "S", "history": [["Q1", "A1"]], "question": "Q2", "answers": ["best", "bad"]},
        ranked([system("S"), user("Q1"), assistant("A1"), user("Q2")], ("best", 0), ("bad", 1)),
    ),
    "K hh transcript": (
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "answers": [" best", "Assistant: bad"]},
        ranked([user("Q")], ("best", 0), ("bad", 1)),
    ),
    "V free text": (
        {"question": "Q", "answer": "rest", "topic": "x"},
        Question([user("Q")], "rest", "rest"),
    ),
    "V gsm8k": (
        {"question": "How many?", "answer": "600 + 634 = <<600+634=1234>>1234\n#### 1,234"},
        Question([user("How many?")], "1234", "600 + 634 = <<600+634=1234>>1234\n#### 1,234"),
    ),
    "V system": ({"question": "Q", "answer": "A", "system": "S"}, Question([system("S"), user("Q")], "A", "A")),
    "V standard answer of BELLE's evaluation": (
        {"question": "Q", "class": "math", "std_answer": "A", "type": "open"},
        Question([user("Q")], "A", "A"),
    ),
    "V heading in a free answer": (
        {"question": "Q", "answer": "#### Care\nRest.\n#### Food\nSoup."},
        Question([user("Q")], "#### Care\nRest.\n#### Food\nSoup.", "#### Care\nRest.\n#### Food\nSoup."),
    ),
    "V mark in the middle of a line": (
        {"question": "Q", "answer": "see #### 5"},
        Question([user("Q")], "see #### 5", "see #### 5"),
    ),
    "V comma that parts no thousands": (
        {"question": "Q", "answer": "So\n#### Paris, 1,200, 3"},
        Question([user("Q")], "Paris, 1200, 3", "So\n#### Paris, 1,200, 3"),
    ),
    "V TRL bare prompt": ({"prompt": "Q", "difficulty": 3, "source": "s"}, Question([user("Q")], "", "")),
    "V TRL bare prompt of messages": (
        {"prompt": [system("S"), user("Q")], "ground_truth": "5"},
        Question([system("S"), user("Q")], "5", "5"),
    ),
    "V only a question": ({"question": "Q"}, Question([user("Q")], "", "")),
    "I TRL prompt and completion": ({"prompt": "Q", "completion": "A"}, Conversation([user("Q"), assistant("A")])),
    "I TRL messages": (
        {"prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
        Conversation([system("S"), user("Q"), assistant("A")]),
    ),
    "I TRL good completion": (
        {"prompt": "Q", "completion": "A", "label": True},
        Conversation([user("Q"), assistant("A")]),
    ),
    "I TRL bad completion": (
        {"prompt": "Q", "completion": "A", "label": False},
        Conversation([user("Q"), {**assistant("A"), "train": False}]),
    ),
    "I TRL right steps": (
        {"prompt": "Q", "completions": ["one", "two"], "labels": [True, True]},
        Conversation([user("Q"), assistant("one\ntwo")]),
    ),
    "I TRL steps with a wrong one": (
        {"prompt": "Q", "completions": ["one", "two"], "labels": [True, False]},
        Conversation([user("Q"), {**assistant("one\ntwo"), "train": False}]),
    ),
    "I ms-swift": (
        {"system": "S", "query": "Q2", "response": "A2", "history": [["Q1", "A1"]]},
        Conversation([system("S"), user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]),
    ),
    "I a task about a dialogue": (
        {"instruction": "Summarise:\nHuman: hi\nAssistant: hello", "input": "", "output": "They greet."},
        Conversation([user("Summarise:\nHuman: hi\nAssistant: hello"), assistant("They greet.")]),
    ),
    "I a task with a dialogue as its input": (
        {"instruction": "Summarise.", "input": "User: hi\nAssistant: hello", "output": "They greet."},
        Conversation([user("Summarise.\nUser: hi\nAssistant: hello"), assistant("They greet.")]),
    ),
    "E a dialogue as the input of no instruction": (
        {"instruction": "", "input": "User: hi", "output": "hello"},
        Conversation([user("hi"), assistant("hello")]),
    ),
    "C KTO good": (
        {"messages": [user("Q"), assistant("A")], "label": True},
        Conversation([user("Q"), assistant("A")]),
    ),
    "C KTO bad, from a table": (
        {"messages": [user("Q"), assistant("A")], "kto_tag": "False"},
        Conversation([user("Q"), {**assistant("A"), "train": False}]),
    ),
    "C LLaMA-Factory v1 with weights": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "value": "Q"}], "loss_weight": 0.0},
                {"role": "assistant", "content": [{"type": "text", "value": "A"}], "loss_weight": 1.0},
            ]
        },
        Conversation([user("Q"), assistant("A")]),
    ),
    "C thoughts beside an answer": (
        {"messages": [user("Q"), {**assistant("A"), "reasoning_content": "Hm.\n"}]},
        Conversation([user("Q"), assistant("<think>\nHm.\n</think>\n\nA")]),
    ),
    "C an empty system turn leaves the field its place": (
        {"conversations": said(("system", ""), ("human", "Q"), ("gpt", "A")), "system": "S"},
        Conversation([system("S"), user("Q"), assistant("A")]),
    ),
    "C HTML that nobody copied from a page": (
        {"messages": [user("Make a list."), assistant("<ul><li>a</li></ul>")]},
        Conversation([user("Make a list."), assistant("<ul><li>a</li></ul>")]),
    ),
    "L Chinese-Vicuna lists": (
        {"input": ["Q1", "Q2"], "output": ["A1", "A2"]},
        Conversation([user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]),
    ),
    "P ms-swift": (
        {"query": "Q", "response": "good", "rejected_response": "bad"},
        Preference([user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "S ms-swift with a rejected response": (
        {"messages": [system("S"), user("Q"), assistant("good")], "rejected_response": "bad"},
        Preference([system("S"), user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "S ms-swift with rejected messages": (
        {
            "messages": [user("Q"), assistant("good")],
            "rejected_messages": [user("Q"), assistant("bad")],
            "system": "S",
        },
        Preference([system("S"), user("Q")], [assistant("good")], [assistant("bad")]),
    ),
    "T beside numbers only": ({"id": 7, "passage": "words", "score": None}, Text("words")),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_published_record_becomes_the_canonical_one_without_repairs(name):
    record, expected = READINGS[name]
    before = json.dumps(record)
    canonical, repairs = to_canonical(record)
    assert canonical == expected
    assert not repairs.counts
    assert json.dumps(record) == before, "the record itself was changed"


@pytest.mark.parametrize("name", READINGS)
def test_the_letter_names_the_adapter_that_recognises_it(name):
    record, expected = READINGS[name]
    adapter = next(adapter for adapter in ADAPTERS if adapter.code == name[0])
    assert to_canonical(record, adapter.name)[0] == expected
    record = {"text": record} if isinstance(record, str) else record
    assert next(adapter.code for adapter in ADAPTERS if adapter.matches(record)) == name[0]


REPAIRED = {
    "leading answer": (
        said(("gpt", "second half"), ("human", "Q"), ("gpt", "A")),
        [user("Q"), assistant("A")],
        {"answer before the first question dropped": 1},
    ),
    "leading answers after a system turn": (
        said(("system", "S"), ("gpt", "x"), ("gpt", "y"), ("human", "Q"), ("gpt", "A")),
        [system("S"), user("Q"), assistant("A")],
        {"answer before the first question dropped": 2},
    ),
    "trailing question": (
        said(("human", "Q"), ("gpt", "A"), ("human", "thanks")),
        [user("Q"), assistant("A")],
        {"turn after the last answer dropped": 1},
    ),
    "trailing question without an answer in it": (
        said(("human", "Q"), ("gpt", "A"), ("human", "Q2"), ("gpt", " ")),
        [user("Q"), assistant("A")],
        {"turn after the last answer dropped": 2},
    ),
    "two questions in a row": (
        said(("human", "Q"), ("human", "more"), ("gpt", "A")),
        [user("Q\n\nmore"), assistant("A")],
        {"neighbouring messages of one speaker merged": 1},
    ),
    "three answers in a row": (
        said(("human", "Q"), ("gpt", "A"), ("gpt", "B"), ("gpt", "C")),
        [user("Q"), assistant("A\n\nB\n\nC")],
        {"neighbouring messages of one speaker merged": 2},
    ),
    "the same question twice": (
        said(("human", "Q"), ("human", "Q"), ("gpt", "A")),
        [user("Q"), assistant("A")],
        {"neighbouring messages of one speaker merged": 1},
    ),
    "empty answer in the middle": (
        said(("human", "Q"), ("gpt", " \n"), ("human", "R"), ("gpt", "A")),
        [user("Q\n\nR"), assistant("A")],
        {"empty message dropped": 1, "neighbouring messages of one speaker merged": 1},
    ),
    "null and not-a-number in the middle": (
        said(("human", "Q"), ("gpt", "A"), ("human", None), ("human", math.nan), ("human", "R"), ("gpt", "B")),
        [user("Q"), assistant("A"), user("R"), assistant("B")],
        {"empty message dropped": 2},
    ),
    "numbers": (
        said(("human", 3), ("gpt", 4.0), ("human", 0.5), ("gpt", -7)),
        [user("3"), assistant("4"), user("0.5"), assistant("-7")],
        {"number read as text": 4},
    ),
    "text before a tool call": (
        said(
            ("human", "Q"),
            ("gpt", "Let me see."),
            ("function_call", '{"name": "a"}'),
            ("observation", "1"),
            ("gpt", "A"),
        ),
        [user("Q"), {**call(("a", {})), "content": "Let me see."}, tool("1"), assistant("A")],
        {"neighbouring messages of one speaker merged": 1},
    ),
    "tool calls in a row": (
        said(
            *(("human", "Q"), ("function_call", '{"name": "a"}'), ("function_call", '{"name": "b"}')),
            *(("observation", "1"), ("observation", "2"), ("gpt", "A")),
        ),
        [user("Q"), call(("a", {}), ("b", {})), tool("1"), tool("2"), assistant("A")],
        {"neighbouring messages of one speaker merged": 1},
    ),
    "merged with one that is not to be learnt": (
        [user("Q"), assistant("A"), {**assistant("B"), "weight": 0}],
        [user("Q"), {**assistant("A\n\nB"), "train": False}],
        {"neighbouring messages of one speaker merged": 1},
    ),
    "weights": (
        [
            *(user("Q"), {**assistant("A"), "loss_weight": 0.0}, user("R"), {**assistant("B"), "weight": 2}),
            *(
                user("S"),
                {**assistant("C"), "train": False},
                user("T"),
                {**assistant("D"), "train": True, "weight": 1},
            ),
            *(user("U"), {**assistant("E"), "loss_weight": None, "train_detail": [{"begin_offset": 0}]}),
        ],
        [
            *(user("Q"), {**assistant("A"), "train": False}, user("R"), assistant("B")),
            *(user("S"), {**assistant("C"), "train": False}, user("T"), assistant("D"), user("U"), assistant("E")),
        ],
        {"loss weight taken as 1": 1, "training marks within an answer ignored": 1},
    ),
    "both ends": (
        said(("gpt", "x"), ("human", "Q"), ("gpt", "A"), ("human", "Q2")),
        [user("Q"), assistant("A")],
        {"answer before the first question dropped": 1, "turn after the last answer dropped": 1},
    ),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_hangs_over_at_either_end_is_dropped_and_counted(name):
    turns, messages, counts = REPAIRED[name]
    canonical, repairs = to_canonical({"conversations": turns})
    assert canonical == Conversation(messages)
    assert dict(repairs.counts) == counts


def talk(*turns, **more):
    return {"conversations": said(*turns), **more}


REFUSED = {
    "unknown role": (talk(("human", "Q"), ("alien", "A")), "message 2 has the role 'alien'; known: answer, assistant"),
    "no role": ({"messages": [{"content": "Q"}]}, "message 1 has the role None"),
    "system in the middle": (
        talk(("human", "Q"), ("system", "S"), ("gpt", "A")),
        "wrong role order at turn 2: system after user; user and assistant must take turns",
    ),
    "two system turns": (talk(("system", "S"), ("system", "S"), ("human", "Q"), ("gpt", "A")), "turn 1: system first"),
    "answer to a call without its result": (
        talk(("human", "Q"), ("function_call", '{"name": "a"}'), ("gpt", "A")),
        "turn 3: assistant after assistant",
    ),
    "weight that is no number": (
        {"messages": [user("Q"), {**assistant("A"), "weight": "much"}]},
        "message 2: 'weight' must be a number or true or false, got 'much'",
    ),
    "tool result without a call": (
        talk(("human", "Q"), ("gpt", "A"), ("observation", "1"), ("gpt", "A")),
        "turn 3: a tool result without a tool call before it",
    ),
    "tool result after the question": (talk(("human", "Q"), ("observation", "1"), ("gpt", "A")), "tool after user"),
    "missing value": ({"conversations": [{"from": "human"}]}, "message 1 has no text"),
    "value that is no string": (
        {"conversations": [{"from": "human", "value": {"text": "Q"}}]},
        "message 1 has no text (field 'value' or 'content' is dict)",
    ),
    "missing half of a pair": (
        {"conversation": [{"human": "Q", "assistant": None}]},
        "no question followed by an answer is left",
    ),
    "message that is true": ({"messages": [user(True), assistant("A")]}, "'content' is bool"),
    "content part without text": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "message 1 has a part that is not text",
    ),
    "messages that are no list": ({"conversations": "Q"}, "the list of messages is missing or empty"),
    "no messages": ({"conversations": []}, "the list of messages is missing or empty"),
    "message that is no object": ({"conversations": ["Q", "A"]}, "message 1 must be an object such as {'from'"),
    "answers only": (talk(("gpt", "A")), "no question followed by an answer is left"),
    "questions only": (talk(("human", "Q")), "no question followed by an answer is left"),
    "tool call that is no JSON": (
        talk(("human", "Q"), ("function_call", '{"name": "a", '), ("observation", "1"), ("gpt", "A")),
        "message 2: the tool call is not JSON (",
    ),
    "arguments that are no JSON": (
        talk(("human", "Q"), ("function_call", '{"name": "a", "arguments": "{x}"}'), ("gpt", "A")),
        "message 2: the arguments of the tool call are not JSON (",
    ),
    "tool call without a name": (
        talk(("human", "Q"), ("function_call", '{"arguments": {}}'), ("gpt", "A")),
        "message 2: a tool call needs 'name' and 'arguments'",
    ),
    "tools that are no JSON": (talk(("human", "Q"), ("gpt", "A"), tools="[{"), "field 'tools' is not JSON ("),
    "tools that are no list": (talk(("human", "Q"), ("gpt", "A"), tools={"name": "a"}), "'tools' must be a list"),
    "empty text": ({"text": " \n"}, "field 'text' is empty"),
    "no output": ({"instruction": "I", "output": ""}, "field 'output' is empty"),
    "output that is no string": ({"instruction": "I", "output": ["A"]}, "field 'output' is missing or not a string"),
    "history that is no list of pairs": (
        {"instruction": "I", "output": "A", "history": [["Q", "A", "Q"]]},
        "field 'history' must be a list of [question, answer] pairs",
    ),
    "history that is no list": ({"instruction": "I", "output": "A", "history": 1}, "field 'history' must be a list"),
    "history with a hole": (
        {"instruction": "I", "output": "A", "history": [["Q", None]]},
        "field 'history' must be a list of [question, answer] pairs",
    ),
    "no rejected answer": ({"prompt": "Q", "chosen": "good", "rejected": " "}, "field 'rejected' is empty"),
    "rejected that is no answer": (
        {"prompt": "Q", "chosen": "good", "rejected": 3},
        "field 'rejected' is int; expected a string or a message",
    ),
    "prompt that ends with an answer": (
        {"conversations": said(("human", "Q"), ("gpt", "A")), "chosen": "good", "rejected": "bad"},
        "the prompt of a preference must end with a user message",
    ),
    "chosen that is a question": (
        {"conversations": said(("human", "Q")), "chosen": {"from": "human", "value": "x"}, "rejected": "bad"},
        "'chosen' must be an answer of the assistant",
    ),
    "rejected with a system turn": (
        {
            "conversations": said(("human", "Q")),
            "chosen": "good",
            "rejected": [assistant("bad"), system("S"), assistant("b")],
        },
        "turn 3: system after assistant",
    ),
    "multiple choice whose key names no option": (
        {"question": "Q", "answer": "C", "options": {"A": "yes", "B": "no"}},
        "answer 'C' names none of the options A, B",
    ),
    "multiple choice with one option": (
        {"question": "Q", "answer": "A", "options": ["yes"]},
        "expected two or more options named A to K, got ['A']",
    ),
    "prompt of a preference that is empty": (
        {"prompt": [user(" ")], "chosen": "good", "rejected": "bad"},
        "the prompt of a preference must end with a user message that is not empty",
    ),
    "dialogues that share nothing": (
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("other"), assistant("A")]},
        "the prompt of a preference must end with a user message",
    ),
    **{
        f"margin {margin!r}": (
            {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": margin},
            f"field 'margin' must be a number, got {margin!r}",
        )
        for margin in ("2", True, [1], math.nan, math.inf)
    },
    "margin of whole dialogues that is no number": (
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")], "margin": "large"},
        "field 'margin' must be a number, got 'large'",
    ),
    "ranking of one answer": (
        {"question": "Q", "answers": ["A"]},
        "field 'answers' needs at least two answers to compare, got 1",
    ),
    "ranking of no answer": (
        {"question": "Q", "candidates": [], "answers": []},
        "no known format has the fields",
    ),
    "ranking with ranks for some": (
        {"question": "Q", "answers": [{"answer": "A", "rank": 2}, {"answer": "B", "rank": 1}, {"answer": "C"}]},
        "ranks must be one number for each of the 3 answers",
    ),
    "ranking by a number of another name": (
        {"question": "Q", "completions": [{"response": "A", "grade": 2}, {"response": "B", "grade": 9}]},
        "the completions hold numbers, but none is called 'rank' or 'score'",
    ),
    "ranking with a score that no float can hold": (
        {"question": "Q", "answers": ["A", "B"], "scores": [10**400, 1]},
        "scores must be one number for each of the 2 answers",
    ),
    "ranking in which all are equal": (
        {"question": "Q", "answers": ["A", "B", "C"], "ranks": [2, 2, 2]},
        "all answers of 'answers' have the same rank, so there is nothing to prefer",
    ),
    "scores that are all equal": (
        {"question": "Q", "responses": [{"text": "A", "score": 1}, {"text": "B", "score": 1.0}]},
        "all answers of 'responses' have the same rank",
    ),
    **{
        f"{name} {values!r} for three answers": (
            {"question": "Q", "answers": ["A", "B", "C"], name: values},
            f"{name} must be one number for each of the 3 answers",
        )
        for name, values in (
            ("ranks", [1, 2]),
            ("ranks", [1, 2, 3, 4]),
            ("ranks", [1, "2", 3]),
            ("ranks", [1, None, 3]),
            ("ranks", [False, True, True]),
            ("ranks", 1),
            ("scores", []),
            ("scores", [0.5, math.nan, 1]),
            ("scores", [0.5, math.inf, 1]),
            ("scores", {"A": 1, "B": 2, "C": 3}),
        )
    },
    "rank inside an answer that is no number": (
        {"question": "Q", "answers": [{"text": "A", "rank": 1}, {"text": "B", "rank": "last"}]},
        "ranks must be one number for each of the 2 answers",
    ),
    "ranked answer without text": (
        {"question": "Q", "answers": ["A", {"rank": 2}]},
        "an answer in 'answers' has no text; expected a string or an object with 'answer'",
    ),
    "ranked answer that is empty": ({"question": "Q", "answers": ["A", " \n"]}, "field 'answers[1]' is empty"),
    "ranked answer that is a number": (
        {"question": "Q", "answers": ["A", 5]},
        "field 'answers[1]' is int; expected a string or a message",
    ),
    "ranked answer of the user": (
        {"question": "Q", "answers": ["A", user("B")]},
        "must be an answer of the assistant",
    ),
    "ranked answers behind an answer": (
        {"messages": [user("Q"), assistant("A")], "answers": ["A", "B"]},
        "must end with a user message",
    ),
    "unknown keys": (
        {"frage": "Q", "antwort": "A"},
        "no known format has the fields ['antwort', 'frage']; expected one of: chosen + rejected transcripts; ",
    ),
    "completion with a prompt under another name": (
        {"question": "Q", "completion": "A"},
        "no known format has the fields ['completion', 'question']",
    ),
    "transcripts without marks": (
        {"chosen": "good", "rejected": "bad"},
        "'chosen' is no transcript, and there is no prompt",
    ),
    "steps without a label each": (
        {"prompt": "Q", "completions": ["a", "b"], "labels": [True]},
        "lists of as many steps and whether each is right",
    ),
    "fields without names": ({1: "Q", "x": "A"}, "the names of its fields must be strings"),
    "rubrics without points": (
        {"prompt": [user("Q")], "rubrics": [{"criterion": "short"}]},
        "a list of objects with criterion and points",
    ),
    "clinical case without solutions": (
        {"description": "D", "QA_pairs": [{"question": "Q"}]},
        "'QA_pairs' must be a list of objects with question and solution",
    ),
    "Huatuo list with a number": ({"data": ["Q", 3]}, "item 2 of the dialogue is int; expected a string"),
    "lists of different length": ({"input": ["Q"], "output": []}, "lists of as many strings"),
    "MOSS turn without an answer": ({"chat": {"turn_1": {"Human": "Q"}}}, "turn_1 must be an object with the strings"),
    "MOSS command that is none": (
        {"chat": {"turn_1": {"Human": "Q", "MOSS": "A", "Commands": "look it up"}}},
        "turn_1 has the command 'look it up'; expected NAME(",
    ),
    "MOSS text that is cut off": (
        {"plain_text": "[Human]: Q<eoh> [MOSS]: A"},
        "plain_text does not end with <eoa>; the row is cut off",
    ),
    "MOSS text between turns": (
        {"plain_text": "[Human]: Q<eoh> well [MOSS]: A<eoa>"},
        "plain_text holds 'well' outside of [Human]",
    ),
    "tree that begins with an answer": (
        {"text": "A", "role": "assistant", "replies": []},
        "a tree must begin with a message of the prompter",
    ),
    "tree in which one answers himself": (
        {"text": "Q", "role": "prompter", "replies": [{"text": "Q", "role": "prompter"}]},
        "has the role 'prompter' in reply to user; expected them in turns",
    ),
    "message of a tree without a name": (
        {"message_id": 7, "parent_id": None, "text": "Q", "role": "prompter"},
        "fields 'message_id' and 'parent_id' must be strings",
    ),
    "a number": (3, "expected an object with named fields, got int"),
    "a list": ([{"text": "x"}], "expected an object with named fields, got list"),
    "half a surrogate pair": ({"text": "fever \ud83d"}, "half a character (\\ud83d)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_record_is_refused_and_the_reason_named(name):
    record, reason = REFUSED[name]
    with pytest.raises(RowError, match=re.escape(reason)):
        to_canonical(record)


ORDER = {
    "preference before conversation": (
        {"conversations": said(("human", "Q")), "chosen": "good", "rejected": "bad", "text": "t"},
        Preference,
    ),
    "preference before instruction": ({"instruction": "I", "output": "A", "chosen": "a", "rejected": "b"}, Preference),
    "preference before question": ({"question": "Q", "answer": "A", "chosen": "a", "rejected": "b"}, Preference),
    "preference before ranking": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "answers": ["a", "b"]},
        Preference,
    ),
    "ranking before question": ({"question": "Q", "answer": "b", "answers": ["a", "b"], "ranks": [2, 1]}, Ranking),
    "ranking before instruction": (
        {"instruction": "I", "output": "A", "responses": ["a", "b"], "scores": [1, 2]},
        Ranking,
    ),
    "question before a ranking without order": ({"question": "Q", "answer": "b", "answers": ["b", "B"]}, Question),
    "instruction before an empty ranking": ({"instruction": "I", "output": "A", "responses": []}, Conversation),
    "ranking before conversation": (
        {"messages": [user("Q")], "responses": ["a", "b"], "scores": [1, 2], "text": "t"},
        Ranking,
    ),
    "question before text": ({"question": "Q", "answer": "A", "text": "t"}, Question),
    "conversation before text": ({"messages": [user("Q"), assistant("A")], "text": "t"}, Conversation),
    "instruction before text": ({"instruction": "I", "input": "", "output": "A", "text": "I A"}, Conversation),
}


@pytest.mark.parametrize("name", ORDER)
def test_a_record_with_the_keys_of_two_forms_is_read_as_the_richer_one(name):
    record, kind = ORDER[name]
    assert type(to_canonical(record)[0]) is kind


def test_data_format_forces_one_reading():
    record = {"instruction": "I", "output": "A", "text": "running text", "question": "Q", "answer": "5"}
    assert to_canonical(record, "text")[0] == Text("running text")
    assert to_canonical(record, "question")[0] == Question([user("Q")], "5", "5")
    assert to_canonical(record, "instruction")[0] == Conversation([user("I"), assistant("A")])
    with pytest.raises(RowError, match="the list of messages is missing or empty"):
        to_canonical(record, "conversation")
    with pytest.raises(RowError, match="field 'chosen' is NoneType"):
        to_canonical(record, "preference")


def test_the_pairs_of_a_ranking_are_all_that_differ_in_rank_best_first():
    a, b, c, d = ([assistant(text)] for text in "abcd")
    found = Ranking([user("Q")], [a, b, c, d], [1, 0, 2, 1], [OPENAI_TOOL]).pairs()
    expected = [(b, a), (b, d), (b, c), (a, c), (d, c)]
    assert found == [Preference([user("Q")], better, worse, [OPENAI_TOOL], None) for better, worse in expected]


@pytest.mark.parametrize("ranks", [[0, 1], [1, 0]])
def test_a_ranking_of_two_is_one_preference(ranks):
    best, worst = [assistant("best")], [assistant("worst")]
    answers = [best, worst] if ranks == [0, 1] else [worst, best]
    assert Ranking([user("Q")], answers, ranks).pairs() == [Preference([user("Q")], best, worst)]


def test_an_unknown_data_format_names_the_known_ones():
    known = (
        "auto, transcript_preference, conversation_preference, preference, ranking, rubric, choice, question, "
        "reasoning, tree, moss, dialogue_list, conversation, embedded_dialogue, instruction, text"
    )
    with pytest.raises(ValueError, match=f"--data_format 'sharegpt' is unknown; known: {known}"):
        adapter_named("sharegpt")


def test_whatever_a_record_holds_it_is_read_in_order_or_refused():
    """Seeded fuzzing: no record may end in another error than RowError, or give turns no template can write."""
    dice = random.Random(5)
    keys = [
        *("text", "completion", "content", "conversations", "messages", "system", "tools", "instruction", "input"),
        *("output", "history", "question", "answer", "prompt", "chosen", "rejected", "chosen_messages"),
        *("rejected_messages", "from", "value", "role", "human", "assistant", "tool_calls", "function", "name"),
        *("arguments", "answers", "responses", "ranks", "scores", "margin", "rank", "score"),
    ]
    words = ["", "Q", "\n\nHuman: a\n\nAssistant:", '{"name": "a"}', "[", "user", "assistant", "tool", "function_call"]
    speakers = ["human", "gpt", "system", "observation", "function_call"]

    def value(depth):
        kind = dice.randrange(9 if depth else 5)
        if kind < 4:
            return dice.choice(words)
        if kind == 4:
            return dice.choice([None, 0, 1.5, True, [], {}])
        if kind == 5:
            return [value(depth - 1) for _ in range(dice.randrange(3))]
        if kind == 6:
            return {dice.choice(keys): value(depth - 1) for _ in range(dice.randrange(4))}
        return said(*((dice.choice(speakers), dice.choice(words)) for _ in range(dice.randrange(5))))

    read = ranked = 0
    for _ in range(20_000):
        record = {dice.choice(keys): value(3) for _ in range(dice.randrange(1, 5))}
        if dice.random() < 0.3:
            turns = ((dice.choice(speakers), dice.choice(["Q", '{"name": "a"}'])) for _ in range(dice.randrange(6)))
            record["conversations"] = said(*turns)
        if dice.random() < 0.2:
            record["answers"] = [dice.choice(["A", "B", value(2)]) for _ in range(dice.randrange(4))]
        try:
            canonical, _ = to_canonical(record)
        except RowError:
            continue
        check_canonical(canonical)
        ranked += isinstance(canonical, Ranking)
        read += isinstance(canonical, (Conversation, Preference, Ranking))
    assert read > 100 and ranked > 50


# -- anything at all -------------------------------------------------------------------------------------------------

WHOLE = re.compile(r"S?(U(CT+)*[AC])+")
PROMPT = re.compile(r"S?(U(CT+)*[AC])*U(CT+)*")
ANSWER = re.compile(r"(CT+)*[AC](U(CT+)*[AC])*")


def check_messages(messages, order):
    """Roles in an order that templates can write; texts that are there; no key that nobody knows."""
    letters = {"system": "S", "user": "U", "tool": "T"}
    roles = ""
    for message in messages:
        calls = message.get("tool_calls")
        roles += letters.get(message["role"], "C" if calls else "A")
        assert set(message) <= {"role", "content", "tool_calls", "train"}, message
        assert isinstance(message["content"], str)
        assert message["content"].strip() or calls or message["role"] == "tool", "an empty message"
        assert (not calls and message.get("train", False) is False) or message["role"] == "assistant"
        for one in calls or []:
            assert one["type"] == "function" and isinstance(one["function"]["name"], str)
    assert order.fullmatch(roles), roles


def check_tools(tools):
    assert tools is None or (tools and all(isinstance(tool, dict) and "function" in tool for tool in tools))


def check_tree(tree, role):
    assert tree.role == role and tree.content.strip()
    ranks = [reply.rank for reply in tree.replies]
    known = [rank for rank in ranks if rank is not None]
    assert known == sorted(known) and ranks[len(known) :] == [None] * (len(ranks) - len(known))
    for reply in tree.replies:
        check_tree(reply, "user" if role == "assistant" else "assistant")


def check_canonical(canonical):
    """What every stage may rely on, whatever the record was."""
    match canonical:
        case Text(text):
            assert text.strip()
        case Conversation(messages, tools):
            check_messages(messages, WHOLE)
            check_tools(tools)
        case Preference(prompt, chosen, rejected, tools, margin):
            check_messages(prompt, PROMPT)
            for answer in (chosen, rejected):
                check_messages(answer, ANSWER)
            check_tools(tools)
            assert margin is None or math.isfinite(margin)
        case Ranking(prompt, answers, ranks, tools):
            check_messages(prompt, PROMPT)
            for answer in answers:
                check_messages(answer, ANSWER)
            check_tools(tools)
            assert len(answers) == len(ranks) > 1 and canonical.pairs()
            assert set(ranks) == set(range(max(ranks) + 1))
        case Question(prompt, answer, solution):
            check_messages(prompt, PROMPT)
            assert bool(answer.strip()) == bool(solution.strip())
        case Choice(question, options, answer, several, subject, language, explanation):
            assert question.strip() and isinstance(explanation, str) and language in ("zh", "en")
            assert subject is None or isinstance(subject, str)
            assert len(options) > 1 and all(isinstance(text, str) and text.strip() for text in options.values())
            if canonical.has_letters:
                assert list(options) == sorted(options) and set(options) <= set("ABCDEFGHIJK")
                assert set(answer) <= set(options) and list(answer) == sorted(set(answer))
                assert several or len(answer) < 2
            else:
                assert answer in options
        case Rubric(prompt, rubrics, answer):
            check_messages(prompt, PROMPT)
            assert rubrics and all(math.isfinite(item["points"]) for item in rubrics) and isinstance(answer, str)
        case Message(name, parent, role, content):
            assert isinstance(name, str) and (parent is None or parent) and role in ("user", "assistant")
            assert content.strip()
        case Tree():
            check_tree(canonical, "user")
        case _:
            raise AssertionError(f"no canonical record: {canonical!r}")


def check_stages(canonical):
    """Every stage takes it, or refuses it with a RowError; what it takes keeps the same rules."""
    for accept in (accept_text, accept_conversation, accept_preference):
        try:
            taken = accept(canonical)
        except RowError:
            continue
        for record in taken if isinstance(taken, list) else [taken]:
            check_canonical(record)
    try:
        taken = accept_prompt(canonical)
    except RowError:
        return
    for prompt in taken if isinstance(taken, list) else [taken]:
        check_messages(prompt.prompt, PROMPT)
        check_tools(prompt.tools)
        assert isinstance(prompt.reference, str)


NAMES = [
    *("text", "prompt", "question", "instruction", "input", "output", "answer", "completion", "chosen", "rejected"),
    *("conversations", "messages", "role", "from", "content", "value", "tool_calls", "tools", "history", "system"),
    *("options", "A", "B", "cop", "opa", "opb", "replies", "rank", "label", "labels", "completions", "data", "chat"),
    *("turn_1", "plain_text", "rubrics", "QA_pairs", "context", "contexts", "images", "Question", "weight", "train"),
]
WORDS = [
    *("", " ", "Q", "user", "gpt", "system", "tool", "function_call", "prompter", "B", "D", "yes", "#### 5", "None"),
    *("\n\nHuman: a\n\nAssistant:", "Human:a\nAssistant:", "User: a", '{"name": "a"}', "[{}]", "A. x B. y", "\ud83d"),
    *("[Human]: a<eoh> [MOSS]: b<eoa>", "<|Commands|>: F(1)<eoc>", '<div class="markdown"><p>a', "<![x", "NaN"),
    *("[" * 3_000, "\n" * 3_000, " A" * 999, "Assistant:" * 99, "<" * 999, "9" * 5_000, "\n\nHuman: " * 99),
]
LEAVES = st.one_of(
    *(st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(-3, 12), st.floats(), st.text(max_size=9)),
    st.sampled_from([10**4000, -(10**400), 1e308, [], {}, [[]], [{}]]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw):
    """A record of a public data set, some of whose values, at any depth, are replaced, taken away or doubled."""
    from test_datasets import ROWS  # which takes its helpers from here

    record = copy.deepcopy(draw(st.sampled_from(ROWS))[1])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        holders = [(record, name) for name in record]
        for holder, name in holders:  # grows while it is read
            inside = holder[name]
            if isinstance(inside, dict) and inside:
                holders += [(inside, key) for key in inside]
            elif isinstance(inside, list):
                holders += [(inside, place) for place in range(len(inside))]
        if not holders:
            break
        holder, name = draw(st.sampled_from(holders))
        action = draw(st.integers(0, 5))
        if action == 0:
            del holder[name]
        elif action == 1 and isinstance(holder, list):
            holder.insert(name, holder[name])
        elif action == 1:
            holder[draw(st.sampled_from(NAMES))] = holder.pop(name)
        elif action < 4:
            holder[name] = draw(st.sampled_from(WORDS))
        else:
            holder[name] = copy.deepcopy(draw(VALUES))  # the empty ones are one object each
    return dict(draw(st.permutations(list(record.items()))))


ANYTHING = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
FORMATS = st.sampled_from(["auto"] * 60 + [adapter.name for adapter in ADAPTERS])
OFTEN = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@OFTEN
@given(st.one_of(damaged(), damaged(), damaged(), ANYTHING), FORMATS, st.sampled_from([None, 0, 1]))
def test_whatever_a_record_holds_it_becomes_a_sound_record_or_a_row_error(record, data_format, first):
    before = json.dumps(record)  # in which NaN equals itself
    try:
        canonical, repairs = to_canonical(record, data_format, None, first)
    except RowError as error:
        assert len(str(error)) < 3000 and "\n" not in str(error) and str(error).encode()
    else:
        check_canonical(canonical)
        check_stages(canonical)
        assert set(repairs.counts) <= set(REPAIRS)
        json.dumps(vars(canonical), default=vars).encode()
    assert json.dumps(record) == before, "the record itself was changed"


def nested(depth, wrap=lambda inner: [inner], inner=None):
    """Something wrapped `depth` times, by default a list in a list."""
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def reply(role, *replies):
    return {"text": "Q", "role": role, "replies": list(replies)}


def calling(**call):
    return {"messages": [user("Q"), {**assistant(""), "tool_calls": [call]}]}


DEEP = 9_000
NESTED = {
    "replies of one role": lambda: nested(DEEP, lambda inner: reply("prompter", inner), {}),
    "replies": lambda: nested(DEEP, lambda inner: reply("prompter", reply("assistant", inner)), reply("prompter")),
    "list of replies": lambda: reply("prompter", nested(DEEP)),
    "arguments": lambda: calling(name="a", arguments=nested(DEEP)),
    "arguments in a string": lambda: calling(name="a", arguments="[" * 99_999),
    "tools in a string": lambda: {"messages": [user("Q"), assistant("A")], "tools": "[" * 99_999},
    "tools": lambda: {"messages": [user("Q"), assistant("A")], "tools": [{"function": nested(DEEP)}]},
    "answer": lambda: {"prompt": "Q", "chosen": nested(DEEP), "rejected": "B"},
    "option": lambda: {"question": "Q", "options": {"A": nested(DEEP), "B": "y"}, "answer": "A"},
    "key": lambda: {"question": "Q", "options": ["x", "y"], "answer": nested(DEEP)},
    "decision": lambda: {"question": "Q", "final_decision": nested(DEEP)},
    "margin": lambda: {"prompt": "Q", "chosen": "A", "rejected": "B", "margin": nested(DEEP)},
    "role": lambda: {"messages": [{"role": nested(DEEP), "content": "Q"}]},
    "unknown": lambda: {"x": nested(DEEP), "y": 2},
}


@pytest.mark.parametrize("name", NESTED)
def test_nesting_of_any_depth_is_a_row_error(name):
    with pytest.raises(RowError) as refused:
        to_canonical(NESTED[name]())
    assert len(str(refused.value)) < 3000


def test_ten_megabytes_in_one_string_are_read_or_refused_in_seconds():
    started = time.monotonic()
    for long in ("\n" * 10**7, "Human: " * 10**5, "A " * 10**5):
        for record in (
            {"text": f"a{long}"},
            {"conversations": said(("human", f"a{long}"), ("gpt", f"{long}b"))},
            {"prompt": f"\n\nHuman: a{long}", "chosen": f"{long}b", "rejected": "b"},
            {"instruction": f"Human: a{long}\nAssistant:", "input": "", "output": "b"},
            {"question": "Q", "options": f"A. x{long} B. y", "answer": "A"},
            {"question": "Q", "options": {"A": f"x{long}", "B": "y"}, "answer": f"z{long}"},
            {"plain_text": f"[Human]: a{long}<eoh> [MOSS]: b<eoa>"},
            {"data": [f"a{long}", f"{long}b"]},
            {"question": f"a{long}", "answer": f"{long}\n#### 5"},
        ):
            try:
                check_canonical(to_canonical(record)[0])
            except RowError:
                pass
    assert time.monotonic() - started < 60


# -- columns ---------------------------------------------------------------------------------------------------------


def test_columns_give_fields_the_names_that_adapters_know():
    columns = parse_columns(" prompt=问题, chosen = 好,rejected=坏 ")
    assert columns == {"prompt": "问题", "chosen": "好", "rejected": "坏"}
    record = {"问题": "Q", "好": "good", "坏": "bad", "system": "S", "text": "all of it"}
    expected = Preference([system("S"), user("Q")], [assistant("good")], [assistant("bad")])
    assert to_canonical(record, columns=columns)[0] == expected
    assert record == {"问题": "Q", "好": "good", "坏": "bad", "system": "S", "text": "all of it"}


def test_a_renamed_field_takes_the_place_of_one_that_had_the_name():
    record = {"prompt": "template", "frage": "Q", "completion": "A"}
    assert rename(record, {"prompt": "frage"}) == {"prompt": "Q", "completion": "A"}
    assert to_canonical(record, columns={"prompt": "frage"})[0] == Conversation([user("Q"), assistant("A")])


def test_one_field_may_serve_two_names_and_a_missing_one_is_passed_over():
    assert rename({"a": 1, "b": 2}, {"prompt": "a", "text": "a", "system": "none"}) == {"b": 2, "prompt": 1, "text": 1}


def test_a_field_that_columns_name_is_missed_where_its_fellows_are():
    with pytest.raises(RowError, match=r"there is no field '问题' \(--columns prompt=…\); it has \['x', 'y'\]"):
        to_canonical({"x": "Q", "y": "A"}, columns={"prompt": "问题", "completion": "y"})
    of_another_file = {"instruction": "Q", "output": "A"}
    assert to_canonical(of_another_file, columns={"prompt": "问题", "completion": "y"})[0].messages[0] == user("Q")


@pytest.mark.parametrize("text", [None, "", "  "])
def test_no_columns_are_none(text):
    assert parse_columns(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("promt=问题", "--columns 'promt=问题': 'promt' is unknown; known: text, prompt, question"),
        ("prompt", "--columns 'prompt' must be NAME=FIELD, such as prompt=问题"),
        ("prompt=", "--columns 'prompt=' must be NAME=FIELD"),
        ("prompt=a,prompt=b", "names prompt twice"),
    ],
)
def test_columns_that_cannot_be_read_say_why(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_columns(text)


def test_names_in_capitals_are_recognised_where_no_others_are():
    expected = Preference([user("Q")], [assistant("good")], [assistant("bad")])
    assert to_canonical({"Prompt": "Q", "CHOSEN": "good", "Rejected ": "bad"})[0] == expected
    assert to_canonical({"Prompt": "Q", "CHOSEN": "good", "Rejected": "bad"}, "preference")[0] == expected
    assert to_canonical({"Instruction": "Q", "Output": "A", "text": "all"})[0] == Conversation(
        [user("Q"), assistant("A")]
    )
    record = {"Text": "capital", "text": "small"}
    assert to_canonical(record)[0] == Text("small")
