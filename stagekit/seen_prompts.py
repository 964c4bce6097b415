"""Which prompts a checkpoint and its ancestors were trained on, as hashes that travel with it."""

import hashlib
import re
import unicodedata
from pathlib import Path

import numpy as np

from stagekit.records import Canonical, Conversation, Text

SEEN_PROMPTS = "seen_prompts.npy"  # 64-bit hashes of the prompts a stage and its ancestors trained on
NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def prompt_text(record: Canonical) -> str:
    """The text that identifies a record: what the user opened with, or the document.

    A short opening ("你好") says nothing; then all the user wrote counts.
    """
    if isinstance(record, Text):
        return record.text
    messages = record.messages if isinstance(record, Conversation) else record.prompt  # also prompts.Prompt
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return texts[0] if texts and len(texts[0]) >= 8 else "\n".join(texts)


def prompt_hash(record: Canonical) -> int:
    """64 bits of sha256 over the prompt, blind to case, width, white space and punctuation."""
    text = unicodedata.normalize("NFKC", prompt_text(record)).lower()
    text = NEITHER_LETTER_NOR_DIGIT.sub("", text)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def load_seen_prompts(directory: str | Path | None) -> np.ndarray:
    """Hashes a stage directory carries from itself and its ancestors; empty for a plain base model."""
    path = Path(directory, SEEN_PROMPTS) if directory else None
    return np.load(path, allow_pickle=False) if path and path.is_file() else np.empty(0, dtype=np.uint64)
