"""From conversations and documents to token ids and labels. No files, no model.

One renderer serves training, inference and the demo: the tokenizer's chat template. What a user wrote can never become
a control token: control strings inside contents are cut in two before they are tokenised, so they stay plain text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from stagekit.chat_templates import (
    PROBE,
    TEMPLATE_ERRORS,
    THOUGHTFUL_PROBE,
    THOUGHTS,
    Ends,
    Frame,
    added_tokens,
    answer_behind,
    asks_for_thoughts,
    choose_thinking,
    complete_template,
    find_ends,
    find_frame,
    follows_its_prompt,
    has_thoughts,
    is_marked,
    is_named,
    is_stable,
    render,
)
from stagekit.records import Conversation, RowError
from template import get_template

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy skips these positions
# Noncharacters of Unicode: they stand for a control string found in a content while the template is rendered.
GUARD = re.compile("\ufdd0([0-9]+)\ufdd1")


class Rewritten(Exception):
    """The template writes a turn otherwise when others follow it: there is no whole to cut answers from."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template whose answers can be told apart from prompts.

    Attributes:
        tokenizer: its chat_template is the one used for training, and is saved with the checkpoint.
        name: template name, or "own" for the tokenizer's.
        ends: what closes an answer; trained.
        stop_ids: token ids that end generation, the end-of-turn's first.
        stable: a plain conversation's rendering starts with the rendering of its beginning, and several answers can be
            learnt in one sample. False for templates that always rewrite history (Qwen3): then each answer is its own
            sample. A template that does so now and then (to drop thoughts, to move a system text) is found out by the
            conversation it does it to.
        thinks: the template has two prompts, for answers with thoughts and for answers without (enable_thinking).
        frame: writes plain conversations without Jinja; None where the template needs it.
        proven: the frame is one of template.py's. Others are compared with the template's rendering of every text.
    """

    tokenizer: object
    name: str
    ends: Ends
    stop_ids: list[int]
    stable: bool
    thinks: bool
    control: re.Pattern = field(repr=False)
    special: re.Pattern = field(repr=False)
    joiner: "Joiner" = field(repr=False)
    frame: Frame | None = field(repr=False)
    proven: bool = False

    @property
    def end_of_turn(self) -> str:
        """The text that closes an answer."""
        return self.ends.turn

    def thinking_of(self, message: dict) -> bool | None:
        """The enable_thinking under which an answer is learnt; None where the template knows no such choice."""
        return has_thoughts(message["content"]) if self.thinks else None


@dataclass
class Sample:
    """One training sequence.

    Attributes:
        input_ids, labels: lists of one length; labels hold IGNORE_INDEX where nothing is learnt, and always at the
            first token, which nothing predicts.
        turns: for each assistant message that is learnt here, its index -> its (start, end) in tokens.
        truncated: the last of them lost its end, and with it the end-of-turn token.
        thinking: enable_thinking of its prompt where that is not the answer's own (see encode_messages).
    """

    input_ids: list[int]
    labels: list[int]
    turns: dict[int, tuple[int, int]] = field(default_factory=dict)
    truncated: bool = False
    thinking: bool | None = None


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
    name, stops = "own", ()
    if template_name:
        template = get_template(template_name)
        tokenizer.chat_template, name = template.chat_template(), template.name
        stops = template.stop_strings(tokenizer.eos_token)
    elif tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; name one with --template_name, the one the model was "
            "trained with, or "
            "chatml for a base model whose vocabulary has <|im_end|> (vicuna suits any other)"
        )
    else:
        complete_template(tokenizer)
    try:
        ends = Ends(stops[0], stops[0]) if stops else find_ends(tokenizer)
        marked = is_marked(tokenizer.chat_template)
        follows = marked or follows_its_prompt(tokenizer)
        stable = all(is_stable(tokenizer, ends, probe) for probe in (PROBE, THOUGHTFUL_PROBE)[: 1 + marked])
        frame = find_frame(tokenizer, ends)
    except TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the chat template ({name}) cannot write a plain conversation ({error}); choose another with "
            "--template_name"
        ) from None
    if not follows:
        raise ValueError(
            "this tokenizer's chat template does not let an answer follow its generation prompt directly, so "
            "what is trained "
            "could differ from what is asked at inference; choose a named template with --template_name (qwen3, "
            "deepseek3, …)"
        )
    if not _is_token(tokenizer, ends.turn):
        raise ValueError(
            f"template {template_name or 'of the tokenizer'!r} ends an answer with {ends.turn!r}, which is "
            "not one token "
            "of this vocabulary, so nothing would learn to stop; choose a template that fits the tokenizer "
            "(vicuna and alpaca end with its own eos token)"
        )
    known = [stop for stop in (ends.turn, ends.call, *stops[1:]) if _is_token(tokenizer, stop)]
    stop_ids = [tokenizer.convert_tokens_to_ids(stop) for stop in known]
    stop_ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    thinks, proven = asks_for_thoughts(tokenizer) is not None, is_named(tokenizer.chat_template)
    patterns, stop_ids = _control_patterns(tokenizer), list(dict.fromkeys(stop_ids))
    return Chat(tokenizer, name, ends, stop_ids, stable, thinks, *patterns, Joiner(tokenizer), frame, proven)


def settle_thinking(chat: Chat, num_thoughtful: int, num_answers: int) -> str:
    """Let inference ask in the way most of the trained answers were asked; part of the template that is saved.

    Answers with thoughts are learnt behind the prompt that asks for them, the others behind the one that does not,
    also where the data has both. Then the more frequent kind is asked for where nobody says enable_thinking.

    Args:
        chat: what prepare_chat returned; nothing changes where its template knows no such choice.
        num_thoughtful: trained answers with thoughts.
        num_answers: all trained answers.

    Returns:
        What there is to say about it; "" where no answer has thoughts.
    """
    if not chat.thinks or not num_answers:
        return ""
    thinking = 2 * num_thoughtful > num_answers
    choose_thinking(chat.tokenizer, thinking)
    if not num_thoughtful:
        return ""
    asked = "for thoughts" if thinking else "for answers without"
    return (
        f"{num_thoughtful:,} of {num_answers:,} trained answers have thoughts: the template that is saved asks "
        f"{asked} unless enable_thinking says otherwise"
    )


def count_thoughtful(conversation: Conversation, samples: list[Sample]) -> int:
    """Count the learnt answers that have thoughts."""
    messages = conversation.messages
    return sum(has_thoughts(messages[turn]["content"]) for sample in samples for turn in sample.turns)


def _control_patterns(tokenizer):
    """(every added token, only the special ones) as patterns, longest first; the guard's own marks are control."""
    special = set(tokenizer.all_special_tokens) | set(added_tokens(tokenizer, special=True))
    every = special | set(added_tokens(tokenizer))
    marks = ["\ufdd0", "\ufdd1"]
    patterns = []
    for tokens in (every, special - {"<think>", "</think>"}):  # an answer may think in whatever tokens it takes
        ordered = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        patterns.append(re.compile("|".join(map(re.escape, [*ordered, *marks]))))
    return patterns


def _is_token(tokenizer, text):
    return bool(text) and len(tokenizer.encode(text, add_special_tokens=False)) == 1


# -- conversations ---------------------------------------------------------------------------------------------------


def encode_prompt(
    chat: Chat, messages: list[dict], tools: list[dict] | None = None, thinking: bool | None = None
) -> list[int]:
    """Token ids that inference sends for messages ending with a user or tool turn.

    Args:
        chat: what prepare_chat returned.
        messages, tools: of the conversation.
        thinking: ask for thoughts or for an answer without; None asks as the template says.

    Raises:
        RowError: the template refuses the messages.
    """
    guarded, tools, forged = _guarded(chat, messages, tools)
    return _encode_pieces(chat, _prompt_pieces(chat, guarded, tools, thinking), forged)[0]


def encode_conversation(
    chat: Chat, conversation: Conversation, max_length: int, train_on_inputs: bool = False
) -> tuple[list[Sample], int]:
    """Tokenise a conversation into samples of at most max_length tokens.

    A conversation that is too long becomes several samples, cut at turn borders: each carries the system prompt and as
    much recent history as fits, and every answer that fits at all is learnt exactly once. An answer that does not fit
    even with its own question alone is cut at the limit and gets no end-of-turn token. Answers with "train": False are
    shown as history and never learnt.

    Args:
        chat: what prepare_chat returned.
        conversation: checked messages (dialogues.check_turns).
        max_length: limit in tokens.
        train_on_inputs: learn the prompts as well.

    Returns:
        (samples, number of assistant turns that did not fit at all).

    Raises:
        RowError: the template refuses the conversation.
    """
    if chat.stable:
        try:
            return _encode_exchanges(chat, conversation, max_length, train_on_inputs)
        except Rewritten:
            pass
    return _encode_answers(chat, conversation, max_length, train_on_inputs)


def _learnt_turns(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]


def _encode_answers(chat, conversation, max_length, train_on_inputs):
    """encode_conversation with one answer a sample, behind as much of its own history as fits."""
    messages, samples, lost, earliest = conversation.messages, [], 0, 0
    for turn in _learnt_turns(messages):
        if any("</think>" in message["content"] for message in messages[:turn]):
            earliest = 0  # a history without its thoughts is shorter than they were: more of it may fit than before
        for first, shown in histories(messages[:turn]):
            if first < earliest:
                continue
            part, earliest = [*shown, messages[turn]], first
            sample, _ = _encode(chat, part, conversation.tools, [len(shown)], False, train_on_inputs)
            if len(sample.input_ids) <= max_length:
                break
        sample.turns = dict(zip([turn], sample.turns.values(), strict=False))
        if len(sample.input_ids) > max_length:
            sample, dropped = _truncate(sample, max_length)
            lost += dropped
        samples += [sample] if sample.turns else []
    return samples, lost


def _encode_exchanges(chat, conversation, max_length, train_on_inputs):
    """encode_conversation with as many exchanges (a question and what follows it) a sample as fit.

    Raises:
        Rewritten: the template does not write the conversation so that its prompts are beginnings of it.
    """
    messages, learnt = conversation.messages, _learnt_turns(conversation.messages)
    system = messages[:1] if messages[0]["role"] == "system" else []
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    exchanges = list(zip(starts, [*starts[1:], len(messages)], strict=True))
    exchanges = [exchange for exchange in exchanges if exchange[0] < max(learnt, default=0)]  # more teaches nothing
    if not exchanges:
        return [], 0

    def build(first, index, last):
        """(Sample, token ends of its exchanges): those from `first` to `last`, learnt from the one at `index` on."""
        begin, end = exchanges[first][0], exchanges[last][1]
        part, offset = system + messages[begin:end], begin - len(system)
        chosen = [turn - offset for turn in learnt if exchanges[index][0] <= turn < end]
        sample, spans = _encode(chat, part, conversation.tools, chosen, True, train_on_inputs)
        sample.turns = {turn + offset: span for turn, span in sample.turns.items()}
        return sample, [spans[end - 1 - offset][1] for _, end in exchanges[first : last + 1]]

    sample, reached = build(0, 0, len(exchanges) - 1)
    if len(sample.input_ids) <= max_length:
        return [sample], 0
    # What each exchange adds to a sample, in tokens: nearly always exact, and every sample is built to see. The first
    # is given too much rather than too little, so that history is not dropped for nothing.
    tail = len(sample.input_ids) - reached[-1]
    added = [end - before for end, before in zip(reached, [-tail, *reached[:-1]], strict=True)]
    samples, lost, first, index = [], 0, 0, 0
    while index < len(exchanges):
        if not any(exchanges[index][0] <= turn < exchanges[index][1] for turn in learnt):
            index += 1
            continue
        sample = build(first, index, index)[0]
        while (excess := len(sample.input_ids) - max_length) > 0 and first < index:
            while excess > 0 and first < index:
                excess -= added[first]
                first += 1
            sample = build(first, index, index)[0]
        last = index
        if len(sample.input_ids) > max_length:
            sample, dropped = _truncate(sample, max_length)
            lost += dropped
        else:
            room = max_length - len(sample.input_ids)
            while last + 1 < len(exchanges) and added[last + 1] <= room:
                last += 1
                room -= added[last]
            while last > index and len((longer := build(first, index, last)[0]).input_ids) > max_length:
                last -= 1
            sample = longer if last > index else sample
        samples += [sample] if sample.turns else []
        index = last + 1
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


def encode_messages(
    chat: Chat,
    messages: list[dict],
    tools: list[dict] | None,
    learnt: list[int],
    train_on_inputs: bool = False,
    thinking: bool | None = None,
) -> Sample:
    """Tokenise messages as one sample, whatever its length, and learn the answers with the given indices.

    Where the template rewrites their history, only the last message is learnt.

    Args:
        chat: what prepare_chat returned.
        messages, tools: of a conversation that ends with an answer.
        learnt: indices of answers.
        train_on_inputs: learn the prompts as well.
        thinking: the prompt the last answer stands behind, where it shall not be the answer's own kind: several
            answers to one prompt are compared behind the same tokens. Only where the template knows the choice.

    Raises:
        RowError: the template refuses the messages.
    """
    if chat.stable and (thinking is None or all(chat.thinking_of(messages[turn]) == thinking for turn in learnt)):
        try:
            return _encode(chat, messages, tools, learnt, True, train_on_inputs)[0]
        except Rewritten:
            pass
    return _encode(chat, messages, tools, learnt, False, train_on_inputs, thinking)[0]


def _encode(chat, messages, tools, learnt, whole, train_on_inputs, thinking=None):
    """(Sample, {index of an answer: (start, end)}); see encode_messages."""
    guarded, tools, forged = _guarded(chat, messages, tools)
    if whole:
        pieces = _whole_pieces(chat, guarded, tools)
    else:
        pieces = _last_answer(chat, guarded, tools, chat.thinking_of(messages[-1]) if thinking is None else thinking)
    input_ids, spans = _encode_pieces(chat, pieces, forged)
    turns = {turn: span for turn, span in spans.items() if turn in learnt}
    excluded = [index for index, message in enumerate(messages) if not message.get("train", True)]
    if train_on_inputs and all(turn in spans for turn in excluded):
        labels = list(input_ids)
        for start, end in (spans[turn] for turn in excluded):
            labels[start:end] = [IGNORE_INDEX] * (end - start)
    else:
        labels = [IGNORE_INDEX] * len(input_ids)
        for start, end in turns.values():
            labels[start:end] = input_ids[start:end]
    labels[0] = IGNORE_INDEX
    return Sample(input_ids, labels, turns, thinking=thinking), spans


# -- rendering -------------------------------------------------------------------------------------------------------


def _guarded(chat, messages, tools):
    """Replace control strings inside contents, tool calls and tools by guard marks.

    Answers may hold added tokens such as <think>; where the template knows thoughts, it is the one to write an empty
    one. Returns (messages, tools, control strings by their number).
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
        answer = message["role"] == "assistant"
        pattern = chat.special if answer else chat.control
        copy = {key: guard(value, pattern) for key, value in message.items() if key not in ("role", "train")}
        if answer and chat.thinks and (thoughts := THOUGHTS.match(copy["content"])) and not thoughts.group(1).strip():
            copy["content"] = copy["content"][thoughts.end() :]
        result.append({"role": message["role"], **copy})
    return result, guard(tools, chat.control), forged


def _write(chat, messages, tools, asked, thinking=None):
    """(text, places of its answers with their end-of-turn); [] where the template rewrites history.

    Raises:
        RowError: the template refuses the messages.
    """
    framed = chat.frame and chat.stable and not tools
    if asked:  # a frame knows one kind of prompt, and the template refuses to ask behind an answer
        framed = framed and messages[-1]["role"] == "user" and (thinking is False or not chat.thinks)
    written = chat.frame.write(messages) if framed else None
    if written and chat.proven:
        return written
    try:
        text, spans = render(chat.tokenizer, messages, tools, asked, thinking)
        if written and written[0] == text:
            return written
        if spans and chat.stable:
            return text, [(start, start + chat.ends.length(text[start:end])) for start, end in spans]
        return text, _spans_by_prefix(chat, messages, tools, text) if chat.stable else []
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the chat template refuses this conversation: {error}") from None


def _spans_by_prefix(chat, messages, tools, text):
    """Find the answers of a template without marks: each begins where its prompt is over. [] where one does not."""
    spans, before = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(chat.tokenizer, messages[:index], tools, True, chat.thinking_of(message))[0]
        end = chat.ends.first(text, len(prompt)) or (0 if chat.ends.written else len(text))
        if not (before <= len(prompt) < end and text.startswith(prompt) and _holds(text[len(prompt) : end], message)):
            return []
        spans.append((len(prompt), end))
        before = end
    return spans


def _holds(answer, message):
    """Whether what a template writes for an answer is what the message says."""
    thoughts = THOUGHTS.match(message["content"])
    parts = [thoughts.group(1), message["content"][thoughts.end() :]] if thoughts else [message["content"]]
    parts += [call["function"]["name"] for call in message.get("tool_calls") or []]
    return all(part.strip() in answer for part in parts)


def _cut(chat, messages, text, spans):
    """Cut a text where answers begin and end: [(text, index of the answer or None), …]."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) > len(turns):
        raise RowError(f"the chat template marks {len(spans)} answers in a conversation with {len(turns)}")
    pieces, position = [], 0
    for turn, (start, end) in zip(turns, spans, strict=False):
        pieces += [(text[position:start], None), (text[start:end], turn)]
        position = end
    return [*pieces, (text[position:], None)]


def _prompt_pieces(chat, messages, tools, thinking):
    return _cut(chat, messages, *_write(chat, messages, tools, True, thinking))


def _whole_pieces(chat, messages, tools):
    """The pieces of a conversation, all of whose answers can be learnt.

    Raises:
        Rewritten: it has no rendering that all its prompts are beginnings of.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    thinking = any(map(chat.thinking_of, answers)) if chat.thinks else None
    text, spans = _write(chat, messages, tools, False, thinking)
    if not spans:
        raise Rewritten
    pieces = _cut(chat, messages, text, spans)
    if not chat.ends.written and not pieces[-1][0]:
        answer, turn = pieces[-2]
        pieces[-2] = (answer + chat.ends.of(messages[turn]), turn)
    return pieces


def _last_answer(chat, messages, tools, thinking):
    """The pieces of a conversation whose last answer is learnt, for templates that rewrite history."""
    framed = chat.frame and not (tools or chat.stable or thinking)
    written = chat.frame.write(messages) if framed else None
    if written and written[0] == _render(chat, messages, tools, False, thinking):
        text, spans = written
        start, end = spans[-1]
        pieces, answer = [(text[:start], None)], text[start:end]
    else:
        pieces = _prompt_pieces(chat, messages[:-1], tools, thinking)
        answer = _said(chat, messages, tools, thinking, "".join(text for text, _ in pieces))
    if not chat.ends.written:
        answer += chat.ends.of(messages[-1])
    return [*pieces, (answer, len(messages) - 1)]


def _said(chat, messages, tools, thinking, prompt):
    """The text of the last answer and its end-of-turn, behind its prompt."""
    answer = answer_behind(prompt, _render(chat, messages, tools, False, thinking), messages[-1]["content"])
    if answer is None and messages[0]["role"] == "system":
        # Mistral moves a system text into the last question, and forgets it where an answer follows; what is said does
        # not depend on it.
        prompt, full = (_render(chat, part, tools, asked, thinking) for part, asked in _without_system(messages))
        answer = answer_behind(prompt, full, messages[-1]["content"])
    if answer is None:
        raise RowError("the chat template does not let this answer follow its prompt; use --template_name")
    if not _holds(answer, messages[-1]):
        raise RowError("the chat template leaves out a part of this answer; use --template_name")
    answer = answer[: chat.ends.length(answer)]
    if chat.ends.written and not answer.endswith((chat.ends.turn, chat.ends.call)):
        raise RowError("the chat template does not close this answer, and nothing would learn to; use --template_name")
    return answer


def _without_system(messages):
    return (messages[1:-1], True), (messages[1:], False)


def _render(chat, messages, tools, asked, thinking):
    try:
        return render(chat.tokenizer, messages, tools, asked, thinking)[0]
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the chat template refuses this conversation: {error}") from None


def _encode_pieces(chat, pieces, forged):
    """Tokenise pieces one by one; return (input_ids, {answer: (start, end) in tokens})."""
    texts, owners = [], []
    for text, owner in pieces:
        for number, part in enumerate(GUARD.split(text) if forged else [text]):
            cut = chat.joiner.cut(forged[int(part)]) if number % 2 else [part]
            texts += cut
            owners += [owner] * len(cut)
    input_ids, spans = [], {}
    for owner, ids in zip(owners, chat.joiner.encode(texts), strict=True):
        start, end = len(input_ids), len(input_ids) + len(ids)
        input_ids += ids
        if owner is not None and ids:
            spans[owner] = (spans.get(owner, (start,))[0], end)
    return input_ids, spans


def _plain_ids(tokenizer, text):
    return _batch_ids(tokenizer, [text])[0]


def _batch_ids(tokenizer, texts):
    """Token ids of each text without BOS or EOS; the backend is asked directly, which takes a fraction of the time."""
    backend = tokenizer.backend_tokenizer
    if backend.padding or backend.truncation or backend.encode_special_tokens:  # left there by another call
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


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

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of pieces that stand one behind the other."""
        if not self.needs_anchor:
            return _batch_ids(self.tokenizer, texts) if texts else []
        result, before = [], []
        for text in texts:
            result.append(self(text, before))
            before = result[-1] or before
        return result

    def cut(self, control: str) -> list[str]:
        """A control string in two, so that neither part is one: encoded as pieces they are ordinary text."""
        assert len(control) < 2 or not {control[:1], control[1:]} & set(self.added.values())
        return [control[:1], control[1:]]

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
    texts, position, joiner = [], 0, Joiner(tokenizer)
    for match in chat_control.finditer(text):
        texts += [text[position : match.start()], *joiner.cut(match.group())]
        position = match.end()
    input_ids = [token for ids in joiner.encode([*texts, text[position:]]) for token in ids]
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


# -- batches ----------------------------------------------------------------------------------------------------------


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
