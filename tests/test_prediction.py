"""Prompts and references read from records of every format, for whatever predicts."""

import json

import pytest
from conftest import write_jsonl
from test_generation import said

from stagekit import prediction

CALL = {"name": "dose", "arguments": {"kg": 20}}
HISTORY = [said("user", "a"), said("assistant", "b"), said("user", "c")]


@pytest.mark.parametrize(
    "record, messages, reference",
    [
        ({"messages": [*HISTORY, said("assistant", "d")]}, HISTORY, "d"),
        ({"messages": HISTORY}, HISTORY, None),
        ({"prompt": HISTORY}, HISTORY, None),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [said("user", "a")],
            "b",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}], "system": "s"},
            [said("system", "s"), said("user", "a")],
            None,
        ),
        ({"conversation": [{"human": "a", "assistant": "b"}]}, [said("user", "a")], "b"),
        ({"question": "a", "answer": "b"}, [said("user", "a")], "b"),
        ({"question": "a", "answer": "so #### 7"}, [said("user", "a")], "so #### 7"),
        ({"question": "a", "answer": 7}, [said("user", "a")], "7"),
        ({"question": "a"}, [said("user", "a")], None),
        ({"question": "a", "answer": ""}, [said("user", "a")], None),
        ({"prompt": "a"}, [said("user", "a")], None),
        ({"prompt": "a", "response": "b"}, [said("user", "a")], "b"),
        ({"query": "a", "system": "s"}, [said("system", "s"), said("user", "a")], None),
        ({"instruction": "a", "input": "b", "output": "c"}, [said("user", "a\nb")], "c"),
        ({"instruction": "a", "input": "", "output": "c"}, [said("user", "a")], "c"),
        ({"instruction": "a", "input": "b"}, [said("user", "a\nb")], None),
        ({"instruction": "c", "history": [["a", "b"]]}, HISTORY, None),
        ({"question": "a", "response_chosen": "b", "response_rejected": "c"}, [said("user", "a")], "b"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, [said("user", "a")], "b"),
        (
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}}
            | {"rejected": {"from": "gpt", "value": "c"}},
            [said("user", "a")],
            "b",
        ),
    ],
)
def test_every_format_gives_its_prompt_and_its_reference(record, messages, reference):
    assert prediction.read_prompt(record) == (messages, None, reference)


def test_tools_and_calls_are_read():
    tool = {"name": "dose", "description": "d", "parameters": {}}
    call = {"from": "function_call", "value": json.dumps(CALL)}
    record = {"conversations": [{"from": "human", "value": "a"}, call], "tools": json.dumps([tool])}
    messages, tools, reference = prediction.read_prompt(record)
    assert messages == [said("user", "a")] and tools == [{"type": "function", "function": tool}]
    assert json.loads(reference) == [CALL]
    record["conversations"].append({"from": "observation", "value": "300 mg"})
    messages, _, reference = prediction.read_prompt(record)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"] and reference is None


def test_a_directory_is_read_whole_and_a_txt_line_by_line(tmp_path):
    (tmp_path / "b.txt").write_text("\ufefffirst\n\n  second \r\nthird\n", encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", [{"question": "zero"}])
    (tmp_path / "c.json").write_text(json.dumps([{"question": "fourth"}, {"question": "fifth"}]))
    prompts = prediction.read_prompts(str(tmp_path), None)
    assert [prompt.messages[0]["content"] for prompt in prompts] == [
        "zero",
        "first",
        "second",
        "third",
        "fourth",
        "fifth",
    ]
    assert [prompt.origin for prompt in prompts][2] == f"{tmp_path}/b.txt:3"


def test_the_system_prompt_is_for_records_without_one(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "a"}, {"question": "a", "system": "own"}])
    prompts = prediction.read_prompts(str(path), "given")
    assert [prompt.messages[0] for prompt in prompts] == [said("system", "given"), said("system", "own")]
