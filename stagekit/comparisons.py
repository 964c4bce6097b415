"""Adapters of records with answers to compare: pairs, whole dialogues, transcripts, rankings. No files, no tokens.

`is_x(record)` tests a record and `read_x(record, repairs)` reads it, for a line of formats.ADAPTERS.
"""

from stagekit.dialogues import (
    MESSAGE_KEYS,
    check_answer,
    check_prompt,
    is_missing,
    is_number,
    mend,
    read_messages,
    read_tools,
    with_system,
)
from stagekit.fields import PROMPT_KEYS, answer_of, any_prompt, is_conversation, is_stepwise, messages_of
from stagekit.records import Preference, Ranking, Repairs, RowError, Unused, shown
from stagekit.transcripts import is_transcript, read_transcript

CHOSEN_KEYS = ("chosen", "response_chosen")
REJECTED_KEYS = ("rejected", "response_rejected", "rejected_response")
RANKED_KEYS = ("answers", "responses", "completions", "candidates")


def is_transcript_preference(record):
    return (
        isinstance(record.get("chosen"), str)
        and isinstance(record.get("rejected"), str)
        and record.keys().isdisjoint(PROMPT_KEYS)
        and record.keys().isdisjoint(MESSAGE_KEYS)
    )


def read_transcript_preference(record, repairs):
    sides, counted = [], []
    for name in ("chosen", "rejected"):
        own = Repairs()
        if not is_transcript(record.get(name)):
            raise RowError(
                f"field {name!r} is no transcript, and there is no prompt; expected 'Human: … Assistant: …'"
            )
        messages = read_transcript(record[name], own)
        while messages and messages[-1]["role"] == "user":
            messages.pop()
            own.note("turn after the last answer dropped")
        if not messages:
            raise Unused("no question followed by an answer", f"field {name!r} holds no answer")
        if not messages[-1]["content"]:
            raise Unused("empty answer", f"the last answer of {name!r} is empty")
        sides.append(mend(messages, own))
        counted.append(own.counts)
    repairs.counts |= counted[0] | counted[1]  # of what both sides share, once
    prompt, chosen, rejected = _part(*sides)
    if len(chosen) > 1 or len(rejected) > 1:
        repairs.note("dialogues compared from where they part")
    return _preference(prompt, chosen, rejected, record, repairs)


def _part(chosen, rejected):
    """(what two dialogues share at the start, the rest of each)."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or chosen[shared - 1]["role"] not in ("user", "tool"):
        raise Unused(
            "the two answers belong to different questions",
            "the prompt of a preference must end with a user message, and the two dialogues share none",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def is_conversation_preference(record):
    if "chosen_messages" in record and "rejected_messages" in record:
        return True
    if "rejected_messages" in record or "rejected_response" in record:
        return is_conversation(record)
    if "chosen" not in record or "rejected" not in record:
        return False
    return is_conversation(record) or (
        isinstance(record["chosen"], list) and not any(isinstance(record.get(key), (str, list)) for key in PROMPT_KEYS)
    )


def read_conversation_preference(record, repairs):
    if "chosen_messages" in record or not is_conversation(record):  # two whole dialogues
        sides = []
        for name in ("chosen", "rejected"):
            side = record.get(f"{name}_messages", record.get(name))
            if not isinstance(side, list):
                raise RowError(f"field {name!r} is {type(side).__name__}; expected a list of messages")
            sides.append(read_messages(side, repairs))
        return _preference(*_part(*sides), record, repairs)
    messages = messages_of(record, repairs)
    if "chosen" in record:
        chosen, rejected = (
            _side(record, ("chosen",), "chosen", repairs),
            _side(record, REJECTED_KEYS, "rejected", repairs),
        )
        return _preference(messages, chosen, rejected, record, repairs)
    if isinstance(record.get("rejected_messages"), list):  # ms-swift: both dialogues whole ...
        rejected = with_system(record, read_messages(record["rejected_messages"], repairs))
        return _preference(*_part(messages, rejected), record, repairs)
    # ... or the one with the better answer, and the worse answer
    asked = max((place for place, message in enumerate(messages, 1) if message["role"] in ("user", "tool")), default=0)
    rejected = _side(record, REJECTED_KEYS, "rejected", repairs)
    return _preference(messages[:asked], messages[asked:], rejected, record, repairs)


def is_preference(record):
    if record.keys().isdisjoint(REJECTED_KEYS) or record.keys().isdisjoint(PROMPT_KEYS):
        return False
    return any(key in record for key in CHOSEN_KEYS) or ("response" in record and "rejected_response" in record)


def read_preference(record, repairs):
    prompt = any_prompt(record, repairs)
    chosen = _side(record, (*CHOSEN_KEYS, "response"), "chosen", repairs)
    return _preference(prompt, chosen, _side(record, REJECTED_KEYS, "rejected", repairs), record, repairs)


def _side(record, keys, name, repairs):
    key = next((key for key in keys if key in record), None)
    if key is not None and is_missing(record[key]):
        raise Unused("empty answer", f"field {name!r} is empty")
    return answer_of(record.get(key), name, repairs)


def _margin(record):
    value = record.get("margin")
    if value is None:
        return None
    if not is_number(value):
        raise RowError(f"field 'margin' must be a number, got {shown(value)}")
    return float(value)


def _preference(prompt, chosen, rejected, record, repairs):
    prompt = check_prompt(prompt, repairs, "the prompt of a preference")
    chosen, rejected = check_answer(chosen, repairs, "chosen"), check_answer(rejected, repairs, "rejected")
    return Preference(prompt, chosen, rejected, read_tools(record), _margin(record))


def is_ranking(record):
    """Several answers with an order, or without one but with no single answer that the record would be about."""
    return (
        not record.keys().isdisjoint(RANKED_KEYS)
        and any(isinstance(record.get(key), list) and record[key] for key in RANKED_KEYS)
        and any(key in record for key in (*PROMPT_KEYS, *MESSAGE_KEYS))
        and ("ranks" in record or "scores" in record or not ("answer" in record or "output" in record))
        and not is_stepwise(record)
    )


def read_ranking(record, repairs):
    key = next((key for key in RANKED_KEYS if isinstance(record.get(key), list) and record[key]), RANKED_KEYS[0])
    items = record.get(key) if isinstance(record.get(key), list) else []
    if len(items) < 2:
        raise RowError(f"field {key!r} needs at least two answers to compare, got {len(items)}")
    if is_conversation(record):
        prompt = messages_of(record, repairs)
    else:
        prompt = any_prompt(record, repairs)
    answers = [answer_of(_answer_text(item, key), f"{key}[{index}]", repairs) for index, item in enumerate(items)]
    ranks = _ranks(record, items, key)
    if len(set(ranks)) < 2:
        raise RowError(f"all answers of {key!r} have the same rank, so there is nothing to prefer")
    prompt = check_prompt(prompt, repairs, "the prompt of a ranking")
    answers = [check_answer(answer, repairs, f"{key}[{index}]") for index, answer in enumerate(answers)]
    return Ranking(prompt, answers, ranks, read_tools(record))


def _answer_text(item, key):
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return item
    text = next((item[name] for name in ("text", "answer", "response", "content", "output") if name in item), None)
    if text is None:
        raise RowError(f"an answer in {key!r} has no text; expected a string or an object with 'answer'")
    return text


def _ranks(record, items, key):
    """Ranks of the answers, 0 the best: from ranks or scores beside or inside them, else the order they stand in."""
    for name, sign in (("rank", 1), ("score", -1), ("overall_score", -1), ("rating", -1)):
        values = record.get(name + "s")
        if values is None and any(isinstance(item, dict) and name in item for item in items):
            values = [item.get(name) if isinstance(item, dict) else None for item in items]
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(items) or not all(map(is_number, values)):
            raise RowError(f"{name}s must be one number for each of the {len(items)} {key}")
        levels = sorted({sign * value for value in values})
        return [levels.index(sign * value) for value in values]
    if any(is_number(value) for item in items if isinstance(item, dict) for value in item.values()):
        raise RowError(
            f"the {key} hold numbers, but none is called 'rank' or 'score'; name the one that orders them so"
        )
    return list(range(len(items)))
