"""Prompts a policy answers by itself, as far as they fit, with what its answers may be compared with."""

import json
from dataclasses import dataclass

from stagekit.choices import question_text
from stagekit.encoding import Chunk
from stagekit.ledger import PROMPT_TOO_LONG
from stagekit.records import (
    Canonical,
    Choice,
    Conversation,
    Message,
    Preference,
    Question,
    Ranking,
    RowError,
    Rubric,
    Tree,
)
from stagekit.tokenization import Chat, encode_prompt, histories


@dataclass(frozen=True)
class Prompt:
    """Messages ending with user or tool, and the answer the data has, "" where it has none."""

    prompt: list[dict]
    reference: str
    tools: list[dict] | None = None


def accept_prompt(record: Canonical) -> Prompt | list[Prompt]:
    """What a policy can be asked: the prompt of anything that has one; of a tree every message of the user's.

    The reference is the answer that the data holds up as right: letters of a choice, a number, a word or free text.
    An answer that is marked as not to be learnt is none.

    Raises:
        RowError: there is no prompt.
    """
    if isinstance(record, Tree):
        return [Prompt(question.prompt, question.answer) for question in record.questions()]
    if isinstance(record, Question | Rubric):
        return Prompt(record.prompt, record.answer)
    if isinstance(record, Choice):
        return Prompt([{"role": "user", "content": question_text(record)}], record.answer)
    if isinstance(record, Conversation):
        last = record.messages[-1]
        return Prompt(record.messages[:-1], "" if last.get("train") is False else last["content"], record.tools)
    if isinstance(record, Preference):
        return Prompt(record.prompt, record.chosen[-1]["content"], record.tools)
    if isinstance(record, Ranking):
        return Prompt(record.prompt, record.best[-1]["content"], record.tools)
    kind = "one message of a tree" if isinstance(record, Message) else "running text"
    raise RowError(f"this stage needs prompts (a question or a conversation), and this is {kind}")


def fit_history(
    chat: Chat, messages: list[dict], limit: int | None, tools: list[dict] | None = None
) -> tuple[list[dict], list[int]] | None:
    """Drop the oldest exchanges until a prompt fits; the system message stays.

    Args:
        chat: what prepare_chat returned.
        messages: ending with a user or tool message.
        limit: in tokens; None without limit.
        tools: functions offered to the model.

    Returns:
        (the messages left, their input_ids), or None when the last exchange alone does not fit.

    Raises:
        RowError: the template refuses the messages.
    """
    for _, shown in histories(messages):
        input_ids = encode_prompt(chat, shown, tools)
        if limit is None or len(input_ids) <= limit:
            return shown, input_ids
    return None


def fit_prompt(chat: Chat, record: Prompt, max_prompt_length: int) -> tuple[list[int], list[dict]] | None:
    """Make a prompt of at most max_prompt_length tokens; the oldest exchanges give way, the system stays.

    Returns:
        (token ids, messages shown), or None where even the last exchange is too long: a cut question is another one.
    """
    fitted = fit_history(chat, record.prompt, max_prompt_length, record.tools)
    return fitted and fitted[::-1]


def last_question(messages: list[dict]) -> str:
    """The last user's words, which is what reward functions are shown."""
    return next(message["content"] for message in reversed(messages) if message["role"] == "user")


def encode_prompts(rows: list, chat: Chat, max_prompt_length: int) -> Chunk:
    """Encode a chunk of prompts.

    Args:
        rows: of rows.Row with Prompt records.
        chat, max_prompt_length: see fit_prompt.

    Returns:
        An encoding.Chunk with the columns prompt_ids, prompt (the last user's words), reference, and conversation:
        what was shown, as JSON {"messages", "tools"}. There are no samples to probe.
    """
    chunk, kept = Chunk(), []
    for position, row, found in chunk.encode(rows, lambda record: fit_prompt(chat, record, max_prompt_length)):
        if found is None:
            chunk.dropped[position] = PROMPT_TOO_LONG
        else:
            kept.append((row.record, *found))
    chunk.ledger.samples = len(kept)
    chunk.ledger.tokens["used"] = sum(len(ids) for _, ids, _ in kept)
    chunk.columns = {
        "prompt_ids": [ids for _, ids, _ in kept],
        "prompt": [last_question(shown) for _, _, shown in kept],
        "reference": [record.reference for record, _, _ in kept],
        "conversation": [
            json.dumps({"messages": shown, "tools": record.tools}, ensure_ascii=False) for record, _, shown in kept
        ],
    }
    return chunk
