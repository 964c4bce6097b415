"""What stands in a record that a stage takes: its messages, its texts, their language. No files, no tokens."""

import json
from collections import Counter

from stagekit.duplicates import units
from stagekit.prompts import Prompt
from stagekit.records import Conversation, Preference, Ranking, Text

MOSTLY = 0.8  # share of its words a text must have in a language to be called by it


def messages_of(record: Text | Conversation | Preference | Ranking | Prompt) -> list[dict]:
    """All messages of a record: the prompt, then those of every answer. Running text has none."""
    if isinstance(record, Conversation):
        return record.messages
    if isinstance(record, Preference):
        return [*record.prompt, *record.chosen, *record.rejected]
    if isinstance(record, Ranking):
        return [*record.prompt, *(message for answer in record.answers for message in answer)]
    if isinstance(record, Prompt):
        reference = {"role": "assistant", "content": record.reference}
        return [*record.prompt, *([reference] if record.reference.strip() else [])]
    return []


def texts_of(record: Text | Conversation | Preference | Ranking | Prompt) -> list[str]:
    """All that people or models wrote in a record, message by message; tool calls as JSON."""
    if isinstance(record, Text):
        return [record.text]
    texts = []
    for message in messages_of(record):
        texts.append(message["content"])
        texts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return [text for text in texts if text.strip()]


def language_of(texts: list[str], least: int = 1) -> str:
    """Tell a language by its script: "zh", "en" (any that writes Latin letters), "mixed" or "other".

    A Chinese character counts as much as a word of letters; numbers do not count. From a tenth of kana on, a text is
    Japanese, which is "other", as is what holds fewer than `least` words.
    """
    scripts = Counter(_script(unit[0]) for text in texts for unit in units(text))
    total = sum(scripts.values()) - scripts["number"]
    if total < least or scripts["kana"] * 10 >= total:
        return "other"
    return next((name for name in ("zh", "en", "other") if scripts[name] >= MOSTLY * total), "mixed")


def _script(char):
    if "\u3400" <= char <= "\u9fff" or "\U00020000" <= char <= "\U000323af":
        return "zh"
    if "\u3040" <= char <= "\u30ff":
        return "kana"
    if char.isnumeric():
        return "number"
    return "en" if char < "\u0250" else "other"
