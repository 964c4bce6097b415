"""The fields of a record that several adapters read: its dialogue, its prompt, an answer. No files, no tokens."""

import re

from stagekit.dialogues import MESSAGE_KEYS, is_missing, is_number, number_to_text, read_messages, with_system
from stagekit.records import Repairs, RowError, Unused
from stagekit.transcripts import is_transcript, read_transcript

PROMPT_KEYS = ("prompt", "question", "instruction", "query")
REFERENCE_KEYS = ("answer", "std_answer", "ground_truth", "reference", "solution")
# A question and what answers it, by the names of Alpaca, ms-swift and TRL.
INSTRUCTION_KEYS = (("instruction", "output"), ("query", "response"), ("prompt", "completion"), ("prompt", "response"))
TEXT_KEYS = ("text", "completion", "content")
NO_INPUT = ("<noinput>", "noinput", "<无输入>", "无输入", "<no input>")  # what some Alpaca rows say for no input
ANSWERS = {answer for _, answer in INSTRUCTION_KEYS} | {*REFERENCE_KEYS, "complex_cot", "ground-true answer"}


def is_conversation(record: dict) -> bool:
    """Whether a record holds the turns of a dialogue."""
    return not record.keys().isdisjoint(MESSAGE_KEYS)


def messages_of(record: dict, repairs: Repairs) -> list[dict]:
    """The dialogue of a record behind its system prompt, as it is, unchecked."""
    key = next((key for key in MESSAGE_KEYS if key in record), None)
    if key is None:
        raise RowError("the list of messages is missing or empty")
    return with_system(record, read_messages(record[key], repairs))


def is_stepwise(record: dict) -> bool:
    """Whether a record holds the steps of a solution, each marked right or wrong (TRL), and not answers to compare."""
    return (
        "prompt" in record and isinstance(record.get("completions"), list) and isinstance(record.get("labels"), list)
    )


def any_prompt(record: dict, repairs: Repairs) -> list[dict]:
    """The prompt of an answer to be compared: messages, a transcript, or a question with its history."""
    key = next((key for key in PROMPT_KEYS if key in record), "prompt")
    if not is_transcript(record.get(key)):
        return prompt_of(record, key, repairs)
    messages = read_transcript(record[key], repairs)
    if messages[-1] == assistant(""):
        messages.pop()
    return with_system(record, messages or [{"role": "user", "content": ""}])


def prompt_of(record: dict, key: str, repairs: Repairs) -> list[dict]:
    """The messages of a prompt: system, history [[q, a], …] and the question (with Alpaca's `input` below it)."""
    if isinstance(record.get(key), list):
        return with_system(record, read_messages(record[key], repairs))
    question = text_of(record, key, repairs)
    if key == "instruction":
        question = _with_input(question, optional_text(record, "input", repairs), repairs)
    messages = []
    history = record.get("history")
    history = [] if is_missing(history) or history == "" else history
    for pair in history if isinstance(history, (list, tuple)) else [None]:
        texts = pair if isinstance(pair, (list, tuple)) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RowError("field 'history' must be a list of [question, answer] pairs")
        messages += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return with_system(record, [*messages, {"role": "user", "content": question}])


def _with_input(instruction, given, repairs):
    if given.strip().lower() in NO_INPUT:
        repairs.note("placeholder in place of an input dropped")
        return instruction
    if found := re.match(r"\s*输入[:：]\s*(?=\S)", given):
        repairs.note("word 'input' before an input removed")
        given = given[found.end() :]
    return f"{instruction}\n{given}" if given.strip() else instruction


def optional_text(record: dict, key: str, repairs: Repairs) -> str:
    """A field that may be missing, null or empty, which is "", and else must be a string or a number."""
    value = record.get(key)
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return ""
    return text_of(record, key, repairs)


def text_of(record: dict, key: str, repairs: Repairs) -> str:
    """A field that must be a string with something in it; a number is written out.

    Raises:
        Unused: it is empty or null.
        RowError: it is missing, or anything else.
    """
    value = record.get(key)
    if is_number(value):
        repairs.note("number read as text")
        return number_to_text(value)
    if isinstance(value, str) and value.strip():
        return value
    if key in record and (isinstance(value, str) or is_missing(value)):
        raise Unused("empty answer" if key in ANSWERS else "empty text", f"field {key!r} is empty")
    raise RowError(f"field {key!r} is missing or not a string")


def assistant(text: str) -> dict:
    """An answer as a message."""
    return {"role": "assistant", "content": text}


def answer_of(value: object, name: str, repairs: Repairs) -> list[dict]:
    """An answer to compare: a string, a message or several; `name` is its field.

    Raises:
        Unused: it is empty.
        RowError: it is none of these.
    """
    if isinstance(value, str):
        value = value.strip().removeprefix("Assistant:").strip()
        if not value:
            raise Unused("empty answer", f"field {name!r} is empty")
        return [assistant(value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"field {name!r} is {type(value).__name__}; expected a string or a message")
    return read_messages(value, repairs)
