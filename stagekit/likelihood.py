"""How likely a model finds texts: candidate answers behind a prompt, and running text in windows.

A sequence is padded on the right, where a causal model does not look, so that its numbers do not depend on what else
is in the batch. Logits are computed only where a token is scored, and log-softmax is taken in fp32.
"""

from collections.abc import Iterator

import torch

from stagekit.chat_templates import asks_for_thoughts
from stagekit.records import Conversation
from stagekit.tokenization import document_control, encode_document, encode_messages
from stagekit.trainers import CHUNK_TOKENS, keeps_logits


def candidate_ids(chat, messages: list[dict], answer: str, whole: bool) -> list[int]:
    """Token ids with which an answer follows a prompt, exactly as training renders it.

    Args:
        chat: what load_chat returned.
        messages: the prompt, ending with user or tool.
        answer: text of the answer.
        whole: with the end-of-turn token. Candidates that are beginnings of one another ("A", "AB") can only be
            compared with it: without, the shorter one is never less likely.

    Raises:
        records.RowError: the template refuses the messages.
    """
    conversation = Conversation([*messages, {"role": "assistant", "content": answer}])
    thinking = asks_for_thoughts(chat.tokenizer)  # as encode_prompt does, behind whose ids these stand
    sample = encode_messages(chat, conversation.messages, None, [len(messages)], thinking=thinking)
    start, end = sample.turns[len(messages)]
    ids = sample.input_ids[start:end]
    return ids if whole or ids[-1] != chat.stop_ids[0] else ids[:-1]


@torch.no_grad()
def score_candidates(model: torch.nn.Module, items: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """Log-likelihoods of candidates behind their prompts, in one forward pass.

    A candidate that others begin with costs nothing: letters of one token each take one sequence a question.

    Args:
        model: causal, in eval mode.
        items: (ids of the prompt, ids of each candidate); none of them empty.

    Returns:
        For each item, the summed log-probability of each candidate's tokens, in nats.
    """
    rows = [  # (item, ids behind the prompt): the last token of a candidate is only predicted, never read
        (number, ids) for number, (_, candidates) in enumerate(items) for ids in _longest([c[:-1] for c in candidates])
    ]
    sequences = [items[number][0] + list(ids) for number, ids in rows]
    starts = [len(items[number][0]) - 1 for number, _ in rows]
    logits, place = _logits(model, sequences, starts)
    found = [[None] * len(candidates) for _, candidates in items]
    for row, (number, ids) in enumerate(rows):
        first = place[starts[row]]
        for index, candidate in enumerate(items[number][1]):
            if found[number][index] is None and ids[: len(candidate) - 1] == tuple(candidate[:-1]):
                found[number][index] = _sum_logps(logits[row, first : first + len(candidate)], candidate)
    return found


def _longest(beginnings):
    """The different sequences that no other one begins with."""
    ordered = sorted({tuple(ids) for ids in beginnings})  # a sequence stands right before those it begins
    pairs = zip(ordered, [*ordered[1:], None], strict=True)
    return [ids for ids, after in pairs if after is None or after[: len(ids)] != ids]


def _logits(model, sequences, starts):
    """(batch, kept, vocab) logits from each sequence's start on, and {position: place among the kept}."""
    width = max(map(len, sequences))
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=model.device)
    spans = (range(start, len(ids)) for start, ids in zip(starts, sequences, strict=True))
    kept = sorted(set().union(*spans))
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if not keeps_logits(model):
        logits = model(**inputs).logits
        return logits, {position: position for position in range(width)}
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        # accelerate would move positions to the first device, and the states they choose from are on the last
        logits = model(**inputs, logits_to_keep=width - kept[0]).logits
        return logits, {position: position - kept[0] for position in range(kept[0], width)}
    logits = model(**inputs, logits_to_keep=torch.tensor(kept, device=model.device)).logits
    return logits, {position: number for number, position in enumerate(kept)}


def _sum_logps(logits, tokens):
    """Summed log-probability of tokens, each under its row of (tokens, vocab) logits."""
    wanted = torch.tensor(tokens, device=logits.device)
    parts = zip(logits.split(CHUNK_TOKENS), wanted.split(CHUNK_TOKENS), strict=True)
    return sum(
        -torch.nn.functional.cross_entropy(part.float(), target, reduction="none").double().sum().item()
        for part, target in parts
    )


# -- running text ----------------------------------------------------------------------------------------------------


def text_windows(tokenizer, text: str, max_length: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text into windows in which every token is scored once, behind as much of the text as fits.

    The first token follows the tokenizer's BOS, or EOS where it has none; no end token is scored.

    Args:
        tokenizer: its control strings in the text stay plain text, as in training.
        text: a document.
        max_length: longest window in tokens, the scored ones included.
        stride: tokens scored in every window but the first, which scores all of its own; at most max_length.

    Yields:
        (context, scored): token ids; the scored ones follow the context.
    """
    (sample,) = encode_document(document_control(tokenizer), tokenizer, text, block_size=2**62)
    ids, bos = sample.input_ids[:-1], tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if bos is None else bos
    ids = ids if ids[0] == prefix else [prefix, *ids]
    done = 1
    while done < len(ids):
        end = min(len(ids), max_length + 1 if done == 1 else done + stride)
        begin = max(0, end - 1 - max_length)  # the last token is predicted, not read
        yield ids[begin:done], ids[done:end]
        done = end
