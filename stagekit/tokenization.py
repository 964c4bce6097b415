"""From conversations and documents to token ids and labels. No files, no model.

One renderer serves training, inference and the demo: the tokenizer's chat template. What a user wrote can never become
a control token: control strings inside contents are cut in two before they are tokenised, so they stay plain text.
"""

import re
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from stagekit.formats import Conversation, RowError
from template import get_template

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy skips these positions
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Noncharacters of Unicode: they stand for a control string found in a content while the template is rendered.
GUARD = re.compile("\ufdd0([0-9]+)\ufdd1")
# Settings of known templates, tried in this order when an answer does not follow its prompt directly. Qwen3 and its
# relatives open an answer with an empty think block unless thinking is off.
SETTINGS = ({}, {"enable_thinking": "false"})


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template whose answers can be told apart from prompts.

    Attributes:
        tokenizer: its chat_template is the one used for training, and is saved with the checkpoint.
        name: template name, or "own" for the tokenizer's.
        end_of_turn: the text that closes an answer; trained.
        stop_ids: token ids that end generation, end_of_turn's first.
        stable: a conversation's rendering starts with the rendering of its beginning. False for templates that
            rewrite history (Qwen3 and DeepSeek-R1 drop earlier thoughts): then each answer is its own sample.
    """

    tokenizer: object
    name: str
    end_of_turn: str
    stop_ids: list[int]
    stable: bool
    control: re.Pattern = field(repr=False)
    special: re.Pattern = field(repr=False)
    joiner: "Joiner" = field(repr=False)


@dataclass
class Sample:
    """One training sequence.

    Attributes:
        input_ids, labels: lists of one length; labels hold IGNORE_INDEX where nothing is learnt, and always at the
            first token, which nothing predicts.
        turns: for each assistant message that is learnt here, its index -> its (start, end) in tokens.
        truncated: the last of them lost its end, and with it the end-of-turn token.
    """

    input_ids: list[int]
    labels: list[int]
    turns: dict[int, tuple[int, int]] = field(default_factory=dict)
    truncated: bool = False


# -- templates -------------------------------------------------------------------------------------------------------


def prepare_chat(tokenizer, template_name: str | None) -> Chat:
    """Choose the chat template, put it into the tokenizer and find out how it behaves.

    Args:
        tokenizer: a fast tokenizer.
        template_name: a template of template.py, or None for the tokenizer's own.

    Raises:
        ValueError: no template, a stop string the vocabulary does not hold as one token, or a template whose answers
            cannot be told apart from its prompts.
    """
    if template_name:
        template = get_template(template_name)
        tokenizer.chat_template = template.chat_template()
        stops = template.stop_strings(tokenizer.eos_token)
    elif tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; name one with --template_name, the one the model was "
            "trained with, or "
            "chatml for a base model whose vocabulary has <|im_end|> (vicuna suits any other)"
        )
    else:
        stops = ()
        _choose_settings(tokenizer)
    control, special = _control_patterns(tokenizer)
    end_of_turn = stops[0] if stops else _find_end_of_turn(tokenizer)
    stop_ids = [
        tokenizer.convert_tokens_to_ids(stop) for stop in (end_of_turn, *stops[1:]) if _is_token(tokenizer, stop)
    ]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stop_ids:
        stop_ids.append(tokenizer.eos_token_id)
    if not _is_token(tokenizer, end_of_turn):
        raise ValueError(
            f"template {template_name or 'of the tokenizer'!r} ends an answer with {end_of_turn!r}, which is "
            "not one token "
            "of this vocabulary, so nothing would learn to stop; choose a template that fits the tokenizer "
            "(vicuna and alpaca end with its own eos token)"
        )
    name, joiner = template_name or "own", Joiner(tokenizer)
    return Chat(tokenizer, name, end_of_turn, stop_ids, _is_stable(tokenizer), control, special, joiner)


PROBE = [
    {"role": "user", "content": "alpha"},
    {"role": "assistant", "content": "beta"},
    {"role": "user", "content": "gamma"},
    {"role": "assistant", "content": "delta"},
]
# Some templates rewrite history only where there are thoughts to drop.
THOUGHTFUL_PROBE = [PROBE[0], {**PROBE[1], "content": "<think>\nepsilon\n</think>\n\nbeta"}, *PROBE[2:]]


def _choose_settings(tokenizer):
    """Write into the template the first of SETTINGS under which an answer directly follows its prompt."""
    if GENERATION_MARK.search(tokenizer.chat_template):
        return
    template = tokenizer.chat_template
    for settings in SETTINGS:
        tokenizer.chat_template = "".join(f"{{%- set {k} = {v} %}}" for k, v in settings.items()) + template
        prompt, full = _render(tokenizer, PROBE[:3], None, True)[0], _render(tokenizer, PROBE, None, False)[0]
        if full.startswith(prompt) and full[len(prompt) :].lstrip(" ").startswith("delta"):
            return
    tokenizer.chat_template = template
    raise ValueError(
        "this tokenizer's chat template does not let an answer follow its generation prompt directly, so "
        "what is trained "
        "could differ from what is asked at inference; choose a named template with --template_name (qwen3, "
        "deepseek3, …)"
    )


def _find_end_of_turn(tokenizer):
    tail = _render(tokenizer, PROBE, None, False)[0].rsplit("delta", 1)[1]
    found = [token for token in _added_tokens(tokenizer) if token and token in tail]
    if found:
        return min(found, key=tail.index)
    return tokenizer.eos_token or tail.strip()


def _is_stable(tokenizer):
    for probe in (PROBE, THOUGHTFUL_PROBE):
        first, answered, asked = (_render(tokenizer, probe[:count], None, count % 2 == 1)[0] for count in (1, 2, 3))
        again, full = _render(tokenizer, probe[:3], None, False)[0], _render(tokenizer, probe, None, False)[0]
        if not (full.startswith(asked) and again.startswith(answered) and answered.startswith(first)):
            return False
    return True


def _added_tokens(tokenizer):
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def _control_patterns(tokenizer):
    """(every added token, only the special ones) as patterns, longest first; the guard's own marks are control."""
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    every = special | set(_added_tokens(tokenizer))
    marks = ["\ufdd0", "\ufdd1"]
    patterns = []
    for tokens in (every, special):
        ordered = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        patterns.append(re.compile("|".join(map(re.escape, [*ordered, *marks]))))
    return patterns


def _is_token(tokenizer, text):
    return bool(text) and len(tokenizer.encode(text, add_special_tokens=False)) == 1


def _render(tokenizer, messages, tools, add_generation_prompt):
    """Render with transformers' own engine; return (text, [(start, end), …] of the answers, [] without marks)."""
    marked = bool(GENERATION_MARK.search(tokenizer.chat_template))
    result = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=marked,
        **tokenizer.special_tokens_map,
    )
    return result[0][0], result[1][0] if marked else []


# -- conversations ---------------------------------------------------------------------------------------------------


def encode_prompt(chat: Chat, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    """Token ids that inference sends for messages ending with a user or tool turn."""
    pieces, forged = _pieces(chat, messages, tools, add_generation_prompt=True)
    return _encode_pieces(chat, pieces, forged)[0]


def encode_conversation(
    chat: Chat, conversation: Conversation, max_length: int, train_on_inputs: bool = False
) -> tuple[list[Sample], int]:
    """Tokenise a conversation into samples of at most max_length tokens.

    A conversation that is too long becomes several samples, cut at turn borders: each carries the system prompt and as
    much recent history as fits, and every answer that fits at all is learnt exactly once. An answer that does not fit
    even with its own question alone is cut at the limit and gets no end-of-turn token.

    Args:
        chat: what prepare_chat returned.
        conversation: checked messages (formats.check_turns).
        max_length: limit in tokens.
        train_on_inputs: learn the prompts as well.

    Returns:
        (samples, number of assistant turns that did not fit at all).

    Raises:
        RowError: the template refuses the conversation.
    """
    messages = conversation.messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if chat.stable:  # a target is a whole exchange: a question and what follows up to the next one
        targets = [(start, end) for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)]
    else:  # a target is one answer, with everything before it as its prompt
        targets = [
            (max(start for start in starts if start < index), index + 1)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def build(first, begin, end):
        """Encode messages[first:end] behind the system prompt; learn the answers from message `begin` on."""
        offset = first - len(system)
        learnt = [i - offset for i in range(begin, end) if messages[i]["role"] == "assistant"]
        if not chat.stable:
            learnt = learnt[-1:]
        part = system + messages[first:end]
        sample = encode_messages(chat, part, conversation.tools, learnt, train_on_inputs)
        sample.turns = {turn + offset: span for turn, span in sample.turns.items()}
        return sample

    samples, lost, index, first = [], 0, 0, starts[0]
    while index < len(targets):
        begin, end = targets[index]
        if not chat.stable:  # history without its thoughts is shorter: more of it may fit than before the last answer
            first = starts[0]
        sample = build(first, begin, end)
        while len(sample.input_ids) > max_length and first < begin:
            first = next(start for start in starts if start > first)
            sample = build(first, begin, end)
        if len(sample.input_ids) > max_length:
            sample, dropped = _truncate(sample, max_length)
            lost += dropped
        elif chat.stable:
            while index + 1 < len(targets):
                longer = build(first, begin, targets[index + 1][1])
                if len(longer.input_ids) > max_length:
                    break
                sample, index = longer, index + 1
        if sample.turns:
            samples.append(sample)
        index += 1
    return samples, lost


def histories(prompt: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """Give a prompt as it is, then without its oldest exchange, and so on down to the last one; the system stays.

    Yields:
        (index in `prompt` of the first message behind the system prompt, messages).
    """
    num_system = int(prompt[0]["role"] == "system")
    for first, message in enumerate(prompt):
        if message["role"] == "user":
            yield first, [*prompt[:num_system], *prompt[first:]]


def _guarded(chat, messages, tools):
    """Replace control strings inside contents, tool calls and tools by guard marks.

    Answers may hold added tokens such as <think>. Returns (messages, tools, control strings by their number).
    """
    forged = []

    def mark(match):
        forged.append(match.group())
        return f"\ufdd0{len(forged) - 1}\ufdd1"

    def guard(value, pattern):
        if isinstance(value, str):
            return pattern.sub(mark, value)
        if isinstance(value, list):
            return [guard(item, pattern) for item in value]
        if isinstance(value, dict):
            return {guard(key, pattern): guard(item, pattern) for key, item in value.items()}
        return value

    result = []
    for message in messages:
        pattern = chat.special if message["role"] == "assistant" else chat.control
        result.append({key: value if key == "role" else guard(value, pattern) for key, value in message.items()})
    return result, guard(tools, chat.control), forged


def _pieces(chat, messages, tools, add_generation_prompt):
    """Render messages and cut the text where answers begin and end: [(text, index of the answer or None), …]."""
    guarded, tools, forged = _guarded(chat, messages, tools)
    try:
        text, spans = _render(chat.tokenizer, guarded, tools, add_generation_prompt)
        if not spans and chat.stable:
            spans = _spans_by_prefix(chat, guarded, tools, text)
    except jinja2.exceptions.TemplateError as error:
        raise RowError(f"the chat template refuses this conversation: {error}") from None
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) > len(turns):
        raise RowError(f"the chat template marks {len(spans)} answers in a conversation with {len(turns)}")
    pieces, position = [], 0
    for turn, (start, end) in zip(turns, spans, strict=False):
        end = start + _trained_length(chat, text[start:end])
        pieces += [(text[position:start], None), (text[start:end], turn)]
        position = end
    return [*pieces, (text[position:], None)], forged


def _trained_length(chat, answer):
    """Length of an answer up to and including its end-of-turn; what stands behind it (\\n, EOS) is the template's."""
    end = answer.rfind(chat.end_of_turn)
    return len(answer) if end < 0 else end + len(chat.end_of_turn)


def _spans_by_prefix(chat, messages, tools, text):
    """Find the answers of a template without marks: what rendering one message more adds to the prompt before it."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _render(chat.tokenizer, messages[:index], tools, True)[0]
            full = _render(chat.tokenizer, messages[: index + 1], tools, False)[0]
            if not (full.startswith(prompt) and text.startswith(full.rstrip())):
                raise RowError("the chat template rewrites earlier turns of this conversation; use --template_name")
            spans.append((len(prompt), min(len(full), len(text))))
    return spans


def encode_messages(
    chat: Chat, messages: list[dict], tools: list[dict] | None, learnt: list[int], train_on_inputs: bool = False
) -> Sample:
    """Tokenise messages as one sample, whatever its length, and learn the answers with the given indices.

    Where the template is not stable, only the last message can be learnt.

    Raises:
        RowError: the template refuses the messages.
    """
    if chat.stable:
        pieces, forged = _pieces(chat, messages, tools, False)
    else:
        pieces, forged = _last_answer(chat, messages, tools)
    input_ids, owners = _encode_pieces(chat, pieces, forged)
    turns = {}
    for position, owner in enumerate(owners):
        if owner in learnt:
            turns[owner] = (turns.get(owner, (position,))[0], position + 1)
    labels = list(input_ids) if train_on_inputs else [IGNORE_INDEX] * len(input_ids)
    for start, end in turns.values():
        labels[start:end] = input_ids[start:end]
    labels[0] = IGNORE_INDEX
    return Sample(input_ids, labels, turns)


def _last_answer(chat, messages, tools):
    """The pieces of a conversation whose last answer is learnt, for templates that rewrite history."""
    guarded, tools, forged = _guarded(chat, messages, tools)
    try:
        prompt = _render(chat.tokenizer, guarded[:-1], tools, True)[0]
        full = _render(chat.tokenizer, guarded, tools, False)[0]
    except jinja2.exceptions.TemplateError as error:
        raise RowError(f"the chat template refuses this conversation: {error}") from None
    if not full.startswith(prompt):
        raise RowError("the chat template does not let this answer follow its prompt; use --template_name")
    answer = full[len(prompt) :]
    return [(prompt, None), (answer[: _trained_length(chat, answer)], len(messages) - 1)], forged


def _encode_pieces(chat, pieces, forged):
    """Tokenise pieces one by one; return (input_ids, owners): for each token the answer it belongs to, or None."""
    input_ids, owners = [], []
    for text, owner in pieces:
        parts = GUARD.split(text)  # text, index of a forged control string, text, …
        for number, part in enumerate(parts):
            ids = chat.joiner.neutral(forged[int(part)], input_ids) if number % 2 else chat.joiner(part, input_ids)
            input_ids += ids
            owners += [owner] * len(ids)
    return input_ids, owners


def _plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Joiner:
    """Tokenises the next piece of a text, so that the pieces give the ids of the whole.

    Byte-level tokenizers need no help. SentencePiece ones put a blank before the start of a text, and some of them
    before everything that follows a control token: their pieces are tokenised behind an anchor, which is then removed.
    """

    ANCHORS = ("\n", "a", "0", "。")  # tried in this order: an anchor must not melt into what follows it

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @cached_property
    def needs_anchor(self) -> bool:
        """Whether a text is tokenised otherwise at the start than behind something."""
        newline, letter, both = (_plain_ids(self.tokenizer, text) for text in ("\n", "a", "\na"))
        return both[len(newline) :] != letter

    @cached_property
    def added(self) -> dict[int, str]:
        """Control tokens by their ids."""
        return {key: token.content for key, token in self.tokenizer.added_tokens_decoder.items()}

    def __call__(self, text: str, before: list[int]) -> list[int]:
        """Token ids of a piece that stands behind the ids `before`."""
        if not text or not before or not self.needs_anchor:
            return _plain_ids(self.tokenizer, text) if text else []
        control = self.added.get(before[-1])
        for anchor in [control] if control else self.ANCHORS:
            anchor_ids, ids = _plain_ids(self.tokenizer, anchor), _plain_ids(self.tokenizer, anchor + text)
            if ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return _plain_ids(self.tokenizer, text)

    def neutral(self, text: str, before: list[int]) -> list[int]:
        """Token ids of a control string as ordinary text: it is cut behind its first character."""
        head = self(text[:1], before)
        ids = head + self(text[1:], head or before)
        assert len(text) < 2 or self.tokenizer.convert_tokens_to_ids(text) not in ids
        return ids


def _truncate(sample, max_length):
    """Cut a sample at max_length; return it and how many of its answers are lost as a whole."""
    kept = {turn: (start, min(end, max_length)) for turn, (start, end) in sample.turns.items() if start < max_length}
    truncated = any(end > max_length for turn, (_, end) in sample.turns.items() if turn in kept)
    cut = Sample(sample.input_ids[:max_length], sample.labels[:max_length], kept, truncated)
    return cut, len(sample.turns) - len(kept)


def answer_runs(labels: list[int]) -> list[tuple[int, int]]:
    """The stretches of learnt tokens as (start, end)."""
    runs, start = [], None
    for index, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = index
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, index))
            start = None
    return runs


# -- documents -------------------------------------------------------------------------------------------------------


def encode_document(chat_control: re.Pattern, tokenizer, text: str, block_size: int) -> list[Sample]:
    """Tokenise running text into pieces of at most block_size tokens; the last one ends with EOS.

    Nothing is dropped: a longer document continues in the next piece. Control strings inside it stay plain text.
    """
    input_ids, position, join = [], 0, Joiner(tokenizer)
    for match in [*chat_control.finditer(text), None]:
        stop = match.start() if match else len(text)
        input_ids += join(text[position:stop], input_ids)
        if match:
            input_ids += join.neutral(match.group(), input_ids)
            position = match.end()
    if _adds_bos(tokenizer):
        input_ids.insert(0, tokenizer.bos_token_id)
    input_ids.append(tokenizer.eos_token_id)
    samples = []
    for start in range(0, len(input_ids), block_size):
        ids = input_ids[start : start + block_size]
        samples.append(Sample(ids, [IGNORE_INDEX, *ids[1:]]))
    if len(samples) > 1 and len(samples[-1].input_ids) == 1:  # a lone EOS: nothing predicts it, so nothing is learnt
        samples.pop()
    return samples


def _adds_bos(tokenizer):
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def document_control(tokenizer) -> re.Pattern:
    """Pattern of the control strings of a tokenizer."""
    return _control_patterns(tokenizer)[0]


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A conversation of the data and one of the samples made from it; the checks look at some of them."""

    conversation: Conversation
    sample: Sample
    origin: str


NUM_PROBES = 64


def tokenize_rows(rows, ledger, encode, block_size: int, packing: bool, num_workers: int | None, description: str):
    """Tokenise rows into the columns of a dataset, and close their ledger.

    Args:
        rows: list of data.Row.
        ledger: their data.Ledger; used, dropped, truncated, turns and tokens are filled in.
        encode: function from a canonical record to (samples, number of answers that did not fit).
        block_size: length of a packed row in tokens.
        packing: put several samples into a row.
        num_workers: processes; None or 1 works in this one.
        description: for the progress bar.

    Returns:
        (columns, probes): {"input_ids", "labels", "lengths"} as lists of rows, and up to NUM_PROBES probes.

    Raises:
        ValueError: a row the template refuses, or nothing left to learn.
    """
    encoded = map_rows(rows, encode, num_workers, description)
    samples, probes = [], []
    for row, (found, lost) in zip(rows, encoded, strict=True):
        ledger.turns.update({"dropped": lost} if lost else {})
        if not found:
            ledger.drop("does not fit the length limit")
            continue
        ledger.used += 1
        for sample in found:
            ledger.turns.update({"trained": len(sample.turns)} if sample.turns else {})
            if sample.truncated:
                ledger.turns.update({"truncated": 1})
                ledger.truncated += 1
        samples += found
        if isinstance(row.record, Conversation):
            probes.append((row.record, found, row.origin))
    if not samples:
        raise ValueError(f"{ledger.files[0]}: no sample is left to learn from; raise the length limit")
    ledger.samples = len(samples)
    ledger.tokens["used"] = sum(len(sample.input_ids) for sample in samples)
    ledger.tokens["trained"] = sum(label != IGNORE_INDEX for sample in samples for label in sample.labels)
    groups = pack(samples, block_size) if packing else [[index] for index in range(len(samples))]
    ledger.packed_rows = len(groups) if packing else 0
    ledger.close()
    columns = {
        "input_ids": [[token for index in group for token in samples[index].input_ids] for group in groups],
        "labels": [[label for index in group for label in samples[index].labels] for group in groups],
        "lengths": [[len(samples[index].input_ids) for index in group] for group in groups],
    }
    return columns, choose_probes(probes)


def choose_probes(candidates: list[tuple[Conversation, list[Sample], str]]) -> list[Probe]:
    """Choose what the checks look at: first what is likely to go wrong (cut answers, split conversations, tools, many
    turns), then the first rows.

    Args:
        candidates: a conversation, the samples made from it, and where it stands.
    """

    def difficulty(item):
        conversation, samples, _ = item
        turns = sum(len(sample.turns) for sample in samples)
        return -(
            any(sample.truncated for sample in samples) * 8
            + bool(conversation.tools) * 4
            + (len(samples) > 1) * 2
            + turns
        )

    chosen = sorted(candidates, key=difficulty)[: NUM_PROBES // 2] + candidates[: NUM_PROBES // 2]
    probes = [Probe(talk, sample, origin) for talk, samples, origin in chosen for sample in samples]
    distinct = {(probe.origin, tuple(probe.sample.turns), tuple(probe.sample.input_ids)): probe for probe in probes}
    return list(distinct.values())[:NUM_PROBES]


def map_rows(rows, encode, num_workers: int | None, description: str) -> list:
    """Encode the record of every row, in order, with a progress bar; an error names the row."""
    from tqdm import tqdm

    def one(index):
        try:
            return encode(rows[index].record)
        except RowError as error:
            raise ValueError(f"{rows[index].origin}: {error}") from None

    progress = {"total": len(rows), "desc": description, "unit": "row", "mininterval": 0.5}
    if not num_workers or num_workers == 1:
        return [one(index) for index in tqdm(range(len(rows)), **progress)]
    import multiprocessing

    global _one  # a forked worker inherits it, so rows need not travel
    _one = one
    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        return list(tqdm(pool.imap(_call_one, range(len(rows)), chunksize=64), **progress))


def _call_one(index):
    return _one(index)


# -- packing ---------------------------------------------------------------------------------------------------------


def pack(samples: list[Sample], block_size: int) -> list[list[int]]:
    """Group samples into rows of at most block_size tokens: best fit, longest first. No sample is cut or dropped.

    Args:
        samples: none longer than block_size.

    Returns:
        Lists of indices into samples, one a row, deterministic.
    """
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in order:
        length = len(samples[index].input_ids)
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(index)
        else:
            left, row = block_size, len(rows)
            rows.append([index])
        if left - length > 0:
            insort(room, (left - length, row))
    return rows


class Collator:
    """Make a batch of packed rows.

    Positions restart at every sample, and no attention mask is passed: from that, transformers (>= 5) builds the
    block-diagonal mask that keeps samples apart (masking_utils.find_packed_sequence_indices; with FlashAttention, its
    variable-length kernel, which wants all samples in one row: flatten). Padding is one more sample without labels.
    Models without position_ids (Bloom) get an attention mask instead, and only one sample a row.
    """

    def __init__(self, pad_token_id: int, takes_position_ids: bool = True, flatten: bool = False):
        self.pad_token_id = pad_token_id
        self.takes_position_ids = takes_position_ids
        self.flatten = flatten

    @classmethod
    def for_model(cls, config, tokenizer, model_args, training_args) -> "Collator":
        """The collator a model needs."""
        from stagekit.modeling import takes_position_ids

        if model_args.flash_attn:  # one row holds the whole batch; held-out rows are counted one by one
            training_args.per_device_eval_batch_size = 1
        return cls(tokenizer.pad_token_id, takes_position_ids(config), flatten=model_args.flash_attn)

    def __call__(self, rows: list[dict]) -> dict:
        """Collate rows {"input_ids", "labels", "lengths"} into tensors of shape (batch, seq_len)."""
        import torch

        if self.flatten:
            rows = [{key: [item for row in rows for item in row[key]] for key in ("input_ids", "labels", "lengths")}]
        longest = max(len(row["input_ids"]) for row in rows)
        width = longest if self.flatten else -(-longest // 8) * 8  # tensor cores like multiples of 8
        batch = {"input_ids": [], "labels": []}
        batch["position_ids" if self.takes_position_ids else "attention_mask"] = []
        for row in rows:
            padding = width - len(row["input_ids"])
            batch["input_ids"].append(list(row["input_ids"]) + [self.pad_token_id] * padding)
            batch["labels"].append(list(row["labels"]) + [IGNORE_INDEX] * padding)
            if self.takes_position_ids:
                positions = [position for length in row["lengths"] for position in range(length)]
                batch["position_ids"].append(positions + list(range(padding)))
            else:
                batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * padding)
        return {key: torch.tensor(value) for key, value in batch.items()}


def preview(tokenizer, sample: Sample, color: bool = True) -> str:
    """Write a sample with the learnt tokens in green (or between ⟦ and ⟧ without colour)."""
    on, off = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    text, position = "", 0
    for start, end in answer_runs(sample.labels):
        text += tokenizer.decode(sample.input_ids[position:start], clean_up_tokenization_spaces=False)
        text += on + tokenizer.decode(sample.input_ids[start:end], clean_up_tokenization_spaces=False) + off
        position = end
    return text + tokenizer.decode(sample.input_ids[position:], clean_up_tokenization_spaces=False)
