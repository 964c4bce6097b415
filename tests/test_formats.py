"""Each adapter on records as their data sets publish them; the expected records are written out by hand."""

import json
import math
import random
import re

import pytest

from stagekit.formats import (
    ADAPTERS,
    Conversation,
    Preference,
    Question,
    Ranking,
    RowError,
    Text,
    adapter_named,
    to_canonical,
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
    "two users in a row": (
        talk(("human", "Q"), ("human", "Q"), ("gpt", "A")),
        "wrong role order at turn 2: user after user; user and assistant must take turns",
    ),
    "two answers in a row": (talk(("human", "Q"), ("gpt", "A"), ("gpt", "A")), "turn 3: assistant after assistant"),
    "system in the middle": (talk(("human", "Q"), ("system", "S"), ("gpt", "A")), "turn 2: system after user"),
    "tool result without a call": (
        talk(("human", "Q"), ("gpt", "A"), ("observation", "1"), ("gpt", "A")),
        "turn 3: a tool result without a tool call before it",
    ),
    "tool result after the question": (talk(("human", "Q"), ("observation", "1"), ("gpt", "A")), "tool after user"),
    "empty question in the middle": (
        talk(("human", "Q"), ("gpt", "A"), ("human", " \n"), ("gpt", "A")),
        "turn 3 (user) is empty",
    ),
    "empty answer in the middle": (
        talk(("human", "Q"), ("gpt", ""), ("human", "Q"), ("gpt", "A")),
        "turn 2 (assistant) is empty",
    ),
    "missing value": ({"conversations": [{"from": "human"}]}, "message 1 has no text"),
    "value that is no string": (
        {"conversations": [{"from": "human", "value": 7}]},
        "message 1 has no text (field 'value' or 'content' is int)",
    ),
    "missing half of a pair": ({"conversation": [{"human": "Q", "assistant": None}]}, "message 1 has no text"),
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
    "rejected with two answers in a row": (
        {"conversations": said(("human", "Q")), "chosen": "good", "rejected": [assistant("bad"), assistant("worse")]},
        "turn 3: assistant after assistant",
    ),
    "multiple choice read as a question": (
        {"question": "Q", "answer": "A", "options": {"A": "yes", "B": "no"}},
        "no known format has the fields ['answer', 'options', 'question']",
    ),
    "two questions in a row in a preference": (
        {"conversations": said(("human", "Q"), ("human", "Q")), "chosen": "good", "rejected": "bad"},
        "turn 2: user after user",
    ),
    "prompt of a preference that is empty": (
        {"prompt": [user(" ")], "chosen": "good", "rejected": "bad"},
        "turn 1 (user) is empty",
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
        "no known format has the fields ['antwort', 'frage']; expected one of: conversations + chosen + rejected; ",
    ),
    "prompt and completion, which is no running text": (
        {"prompt": "Q", "completion": "A"},
        "no known format has the fields ['completion', 'prompt']",
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
    known = "auto, conversation_preference, preference, ranking, question, conversation, instruction, text"
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

    letters = {"system": "S", "user": "U", "tool": "T"}
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
        if isinstance(canonical, Conversation):
            dialogues = [canonical.messages]
        elif isinstance(canonical, Preference):
            dialogues = [[*canonical.prompt, *canonical.chosen], [*canonical.prompt, *canonical.rejected]]
        elif isinstance(canonical, Ranking):
            dialogues = [[*canonical.prompt, *answer] for answer in canonical.answers]
            assert set(canonical.ranks) == set(range(max(canonical.ranks) + 1)), record
            assert len(canonical.ranks) == len(dialogues) > 1 and canonical.pairs(), record
            ranked += 1
        else:
            continue
        for messages in dialogues:
            roles = "".join(
                letters.get(message["role"], "C" if message.get("tool_calls") else "A") for message in messages
            )
            assert re.fullmatch(r"S?(U(CT+)*[AC])+", roles), (roles, record)
            assert all(isinstance(message["content"], str) for message in messages)
        read += 1
    assert read > 100 and ranked > 50
