"""From preferences to pairs of token sequences: what reward modelling, DPO and ORPO train on. No files, no model.

A sequence ends with the end-of-turn token of its answer, the very token at which generation stops: there a reward
model gives its score, in training, in scoring and in PPO alike.
"""

from collections import Counter
from dataclasses import dataclass

from stagekit.chat_templates import has_thoughts
from stagekit.encoding import Candidate, Chunk
from stagekit.ledger import ANSWER_TOO_LONG, IDENTICAL
from stagekit.records import Conversation, Preference, Ranking
from stagekit.tokenization import IGNORE_INDEX, Chat, Sample, encode_messages, histories


@dataclass
class Pair:
    """A better and a worse continuation of one prompt.

    Attributes:
        chosen, rejected: prompt and answer; labels hold the answer's tokens only.
        weight: 1 for a pair of its own, 1/n for each of the n pairs of a ranking.
        margin: how much better, 0 where the data does not say.
        shortened: the prompt lost its beginning even within its last exchange.
    """

    chosen: Sample
    rejected: Sample
    weight: float = 1.0
    margin: float = 0.0
    shortened: bool = False


def encode_preference(
    chat: Chat, record: Preference | Ranking, max_length: int, whole_answers: bool
) -> tuple[list[Pair], Counter]:
    """Tokenise a preference, or a ranking as all its pairs, into sequences of at most max_length tokens.

    The answer comes first: a prompt that is too long loses its oldest exchanges, then its beginning, down to a quarter
    of max_length. Only an answer that does not fit beside that is cut, and loses its end-of-turn.

    Args:
        chat: what prepare_chat returned.
        record: what data.accept_preference returned.
        max_length: limit in tokens for prompt and answer together.
        whole_answers: leave out pairs with an answer that would be cut (a reward model scores at its end).

    Returns:
        (pairs, left out): pairs that were left out are counted by reason.

    Raises:
        RowError: the template refuses the conversation.
    """
    preferences = record.pairs() if isinstance(record, Ranking) else [record]
    pairs, left_out = [], Counter()
    for preference in preferences:
        found = _encode_pair(chat, preference, max_length, whole_answers)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            left_out[found] += 1
    for pair in pairs:
        pair.weight = 1 / len(pairs)
    return pairs, left_out


def _encode_pair(chat, preference, max_length, whole_answers):
    """A Pair, or why there is none."""
    if preference.chosen == preference.rejected:
        return IDENTICAL
    answers = [preference.chosen, preference.rejected]
    samples, shortened, whole = encode_answers(chat, preference.prompt, answers, preference.tools, max_length)
    if whole_answers and not all(whole):
        return ANSWER_TOO_LONG
    chosen, rejected = samples
    if chosen.input_ids == rejected.input_ids:
        return IDENTICAL
    return Pair(chosen, rejected, margin=preference.margin or 0.0, shortened=shortened)


def encode_answers(
    chat: Chat, prompt: list[dict], answers: list[list[dict]], tools: list[dict] | None, max_length: int
) -> tuple[list[Sample], bool, list[bool]]:
    """Tokenise answers behind one prompt, each up to its end-of-turn, all with the same part of the prompt.

    Args:
        chat: what prepare_chat returned.
        prompt: messages ending with user or tool.
        answers: continuations of it, each a list of messages ending with assistant.
        tools: offered in the prompt.
        max_length: limit in tokens; see encode_preference for what gives way.

    Returns:
        (samples, shortened, whole): one sample an answer; whether the prompt lost its beginning within its last
        exchange; for each answer, whether it is whole.

    Raises:
        RowError: the template refuses the conversation.
    """
    # Behind one prompt, also where the template has two: with thoughts if any answer has some.
    thinking = any(chat.thinking_of(answer[-1]) for answer in answers) if chat.thinks else None
    for _, shown in histories(prompt):
        samples = [_encode_answer(chat, shown, answer, tools, len(prompt), thinking) for answer in answers]
        if max(len(sample.input_ids) for sample in samples) <= max_length:
            return samples, False, [True] * len(samples)
    starts = [min(start for start, _ in sample.turns.values()) for sample in samples]
    lengths = [len(sample.input_ids) - start for sample, start in zip(samples, starts, strict=True)]
    kept = max(max_length - max(lengths), min(*starts, max_length // 4))
    for sample, start in zip(samples, starts, strict=True):
        _cut(sample, max(0, start - kept), max_length, chat.tokenizer.bos_token_id)
    whole = [length + min(start, kept) <= max_length for length, start in zip(lengths, starts, strict=True)]
    return samples, max(starts) > kept, whole


def _encode_answer(chat, shown, answer, tools, num_prompt, thinking):
    """One answer behind what is shown of a prompt of num_prompt messages."""
    messages, begin = [*shown, *answer], len(shown)
    learnt = [index for index in range(begin, len(messages)) if messages[index]["role"] == "assistant"]
    sample, offset = encode_messages(chat, messages, tools, learnt, thinking=thinking), num_prompt - begin
    end = max(end for _, end in sample.turns.values())  # what a template writes behind it is never generated
    sample.input_ids, sample.labels = sample.input_ids[:end], sample.labels[:end]
    sample.turns = {turn + offset: span for turn, span in sample.turns.items()}
    return sample


def _cut(sample, count, max_length, bos):
    """Take `count` tokens from the beginning (but a BOS), and what is then over max_length from the end."""
    turns = {turn: (begin - count, end - count) for turn, (begin, end) in sample.turns.items()}
    turns = {turn: span for turn, span in turns.items() if span[0] < max_length}
    length = min(max(end for _, end in turns.values()), max_length)  # a cut between two answers ends with the first
    sample.truncated = any(end > max_length for _, end in turns.values())
    first = sample.input_ids[:1] if count and sample.input_ids[0] == bos else sample.input_ids[count : count + 1]
    sample.input_ids = (first + sample.input_ids[count + 1 :])[:length]
    sample.labels = sample.labels[count:][:length]
    sample.turns = {turn: (begin, min(end, max_length)) for turn, (begin, end) in turns.items()}


def encode_pairs(rows: list, encode) -> Chunk:
    """Encode a chunk of preferences and rankings.

    Args:
        rows: of rows.Row.
        encode: function from a canonical record to (pairs, left out), see encode_preference.

    Returns:
        An encoding.Chunk, one item a pair in each column.
    """
    chunk, pairs = Chunk(), []
    ledger = chunk.ledger
    for position, row, (found, left_out) in chunk.encode(rows, encode):
        if not found:
            chunk.dropped[position] = left_out.most_common(1)[0][0]
            continue
        if isinstance(row.record, Ranking):
            ledger.pairs["from rankings"] += len(found)
            ledger.pairs.update({f"of rankings left out: {reason}": count for reason, count in left_out.items()})
        pairs += found
        record = row.record if isinstance(row.record, Preference) else row.record.pairs()[0]
        if has_thoughts(record.chosen[-1]["content"]):
            ledger.turns["with thoughts"] += len(found)
        if not (found[0].shortened or left_out):
            for answer, sample in ((record.chosen, found[0].chosen), (record.rejected, found[0].rejected)):
                conversation = Conversation([*record.prompt, *answer], record.tools)
                chunk.candidates.append(Candidate(conversation, [sample], row.origin))
    samples = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
    ledger.samples = len(pairs)
    ledger.truncated = sum(sample.truncated for sample in samples)
    shortened = sum(pair.shortened for pair in pairs)
    ledger.pairs.update({"whose prompt lost its beginning": shortened} if shortened else {})
    ledger.tokens["used"] = sum(len(sample.input_ids) for sample in samples)
    ledger.tokens["trained"] = sum(len(sample.labels) - sample.labels.count(IGNORE_INDEX) for sample in samples)
    chunk.columns = {
        "chosen_ids": [pair.chosen.input_ids for pair in pairs],
        "chosen_labels": [pair.chosen.labels for pair in pairs],
        "rejected_ids": [pair.rejected.input_ids for pair in pairs],
        "rejected_labels": [pair.rejected.labels for pair in pairs],
        "weight": [pair.weight for pair in pairs],
        "margin": [pair.margin for pair in pairs],
    }
    return chunk


class PairCollator:
    """Make a batch of pairs: the chosen sequences, then the rejected ones, padded on the right.

    Padding is marked by the attention mask and carries no label; its id must be one that ends no sequence, for
    transformers finds the position a reward model scores by looking for the last token that is not padding.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows of a dataset of pairs.

        Returns:
            input_ids, attention_mask, completion_mask: (2 * pairs, seq_len); weights, margins: (pairs,) fp32.
        """
        import torch

        ids = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
        labels = [row["chosen_labels"] for row in rows] + [row["rejected_labels"] for row in rows]
        width = -(-max(map(len, ids)) // 8) * 8  # tensor cores like multiples of 8
        batch = {
            "input_ids": [list(row) + [self.pad_token_id] * (width - len(row)) for row in ids],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in ids],
            "completion_mask": [
                [int(label != IGNORE_INDEX) for label in row] + [0] * (width - len(row)) for row in labels
            ],
        }
        batch = {name: torch.tensor(value) for name, value in batch.items()}
        batch["weights"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        batch["margins"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):  # where DPO has computed them beforehand
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


def padding_id(tokenizer, stop_ids: list[int]) -> int:
    """A token id to pad pairs with: the tokenizer's own, unless it ends answers."""
    candidates = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *range(len(stop_ids) + 1))
    return next(candidate for candidate in candidates if candidate is not None and candidate not in stop_ids)
