"""What a stage makes of a row at a length limit: samples, cut answers, or nothing; by its own encode function."""

from collections.abc import Callable
from dataclasses import dataclass

from stagekit import pairs, prompts
from stagekit.data import accept_conversation, accept_preference, accept_text
from stagekit.ledger import NO_ROOM, PROMPT_TOO_LONG
from stagekit.records import Canonical
from stagekit.tokenization import IGNORE_INDEX, Chat, Sample, document_control, encode_conversation, encode_document

ACCEPT = {
    "pt": accept_text,
    "sft": accept_conversation,
    **dict.fromkeys(("rm", "dpo", "orpo"), accept_preference),
    **dict.fromkeys(("ppo", "grpo"), prompts.accept_prompt),
}
# The stages' own defaults, of the flag that limits a row: --block_size, --max_length, --max_prompt_length.
DEFAULT_LIMITS = {"pt": 1024, "sft": 1024, "rm": 1024, "dpo": 1024, "orpo": 1024, "ppo": 512, "grpo": 512}
UNLIMITED = 2**40


@dataclass(slots=True)
class Fit:
    """What becomes of one row at one limit.

    Attributes:
        samples: sequences (pairs, prompts) made from it.
        longest: tokens of the longest of them; 0 where there is none.
        tokens, trained: of all of them, and those among them that are learnt.
        truncated: samples that lost their end, and with it the end-of-turn token.
        lost: assistant turns of a conversation that did not fit at all.
        learnt: those that are learnt.
        shortened: the prompt lost its oldest exchanges, or its beginning.
        dropped: why nothing is left of it, or "".
    """

    samples: int = 0
    longest: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    lost: int = 0
    learnt: int = 0
    shortened: bool = False
    dropped: str = ""


def make_fitter(stage: str, tokenizer, chat: Chat | None) -> Callable[[Canonical, int], Fit]:
    """The function from (record, limit in tokens) to its Fit for a stage.

    The function raises RowError where the chat template refuses the record.

    Args:
        stage: a key of ACCEPT.
        tokenizer: what pretraining needs.
        chat: what tokenization.prepare_chat returned; the other stages need it.
    """
    if stage == "pt":
        control = document_control(tokenizer)
        return lambda record, limit: _fit_document(control, tokenizer, record, limit)
    fit = {"sft": _fit_conversation, "ppo": _fit_prompt, "grpo": _fit_prompt}.get(stage)
    if fit:
        return lambda record, limit: fit(chat, record, limit)
    return lambda record, limit: _fit_preference(chat, record, limit, whole_answers=stage == "rm")


def samples_to_show(
    stage: str, tokenizer, chat: Chat | None, record: Canonical, limit: int
) -> list[tuple[str, Sample]]:
    """The first samples that a stage makes of a record, each with a name, for tokenization.preview."""
    if stage == "pt":
        return [("text", encode_document(document_control(tokenizer), tokenizer, record.text, limit)[0])]
    if stage == "sft":
        return [("conversation", sample) for sample in encode_conversation(chat, record, limit)[0][:1]]
    if stage in ("ppo", "grpo"):
        fitted = prompts.fit_prompt(chat, record, limit)
        return [("prompt", Sample(fitted[0], [IGNORE_INDEX] * len(fitted[0])))] if fitted else []
    found, _ = pairs.encode_preference(chat, record, limit, whole_answers=stage == "rm")
    return [item for pair in found[:1] for item in (("chosen", pair.chosen), ("rejected", pair.rejected))]


def _fit_document(control, tokenizer, record, limit):
    return _sum_up(encode_document(control, tokenizer, record.text, limit))


def _fit_conversation(chat, record, limit):
    samples, lost = encode_conversation(chat, record, limit)
    fit = _sum_up(samples)
    fit.lost, fit.learnt = lost, sum(len(sample.turns) for sample in samples)
    fit.dropped = "" if samples else NO_ROOM
    return fit


def _fit_preference(chat, record, limit, whole_answers):
    found, left_out = pairs.encode_preference(chat, record, limit, whole_answers)
    fit = _sum_up([sample for pair in found for sample in (pair.chosen, pair.rejected)])
    fit.samples, fit.shortened = len(found), any(pair.shortened for pair in found)
    fit.dropped = "" if found else left_out.most_common(1)[0][0]
    return fit


def _fit_prompt(chat, record, limit):
    fitted = prompts.fit_prompt(chat, record, limit)
    if fitted is None:
        return Fit(dropped=PROMPT_TOO_LONG)
    ids, shown = fitted
    return Fit(1, len(ids), len(ids), shortened=len(shown) < len(record.prompt))


def _sum_up(samples):
    lengths = [len(sample.input_ids) for sample in samples]
    return Fit(
        samples=len(samples),
        longest=max(lengths, default=0),
        tokens=sum(lengths),
        trained=sum(label != IGNORE_INDEX for sample in samples for label in sample.labels),
        truncated=sum(sample.truncated for sample in samples),
    )
