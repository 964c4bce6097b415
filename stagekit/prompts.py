"""Prompts a policy answers by itself, as far as they fit, with what its answers may be compared with."""

import json
from dataclasses import dataclass

from stagekit.formats import Canonical, Conversation, Preference, Question, Ranking, RowError
from stagekit.tokenization import Chat, encode_prompt, histories, map_rows

TOO_LONG = "prompt longer than --max_prompt_length"


@dataclass(frozen=True)
class Prompt:
    """Messages ending with user or tool, and the answer the data has, "" where it has none."""

    prompt: list[dict]
    reference: str
    tools: list[dict] | None = None


def accept_prompt(record: Canonical) -> Prompt:
    """What a policy can be asked: the prompt of anything that has one."""
    if isinstance(record, Question):
        return Prompt(record.prompt, record.answer)
    if isinstance(record, Conversation):
        return Prompt(record.messages[:-1], record.messages[-1]["content"], record.tools)
    if isinstance(record, Preference):
        return Prompt(record.prompt, record.chosen[-1]["content"], record.tools)
    if isinstance(record, Ranking):
        return Prompt(record.prompt, record.answers[record.ranks.index(0)][-1]["content"], record.tools)
    raise RowError("this stage needs prompts (a question or a conversation), and this is running text")


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


def tokenize_prompts(rows, ledger, chat: Chat, max_prompt_length: int, num_workers: int | None, description: str):
    """Tokenise rows into the columns of a dataset of prompts, and close their ledger.

    Args:
        rows: list of data.Row with Prompt records.
        ledger: their data.Ledger.
        chat, max_prompt_length: see fit_prompt.
        num_workers, description: see tokenization.map_rows.

    Returns:
        (columns, []): prompt_ids, prompt (the last user's words), reference, and conversation: what was shown, as
        JSON {"messages", "tools"}. There are no samples to probe.

    Raises:
        ValueError: a row the template refuses, or no prompt left.
    """
    encoded = map_rows(rows, lambda record: fit_prompt(chat, record, max_prompt_length), num_workers, description)
    kept = [(row.record, *found) for row, found in zip(rows, encoded, strict=True) if found is not None]
    ledger.drop(TOO_LONG, len(rows) - len(kept))
    if not kept:
        raise ValueError(f"{ledger.files[0]}: no prompt fits --max_prompt_length {max_prompt_length}")
    ledger.used = ledger.samples = len(kept)
    ledger.tokens["used"] = sum(len(ids) for _, ids, _ in kept)
    ledger.close()
    columns = {
        "prompt_ids": [ids for _, ids, _ in kept],
        "prompt": [last_question(shown) for _, _, shown in kept],
        "reference": [record.reference for record, _, _ in kept],
        "conversation": [
            json.dumps({"messages": shown, "tools": record.tools}, ensure_ascii=False) for record, _, shown in kept
        ],
    }
    return columns, []
