"""What a tokenizer's chat template does, found by rendering probes; what it lacks is written before it.

No token ids and no user's data here: stagekit/tokenization.py makes samples with what is found out.
"""

import functools
import logging
import re
from dataclasses import dataclass

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from template import complete, get_template, is_completed, thinking_default, with_thinking_default

logger = logging.getLogger(__name__)

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
NAMED = re.compile(r'\{#- Prompt template "([^"]+)"')
# What a template may raise: Jinja's own errors, and Python's where it takes a value for what it is not.
TEMPLATE_ERRORS = (jinja2.exceptions.TemplateError, TypeError, ValueError, AttributeError, LookupError)
THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
OPEN_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
NO_THOUGHTS = "<think>\n\n</think>\n\n"

PROBE = [
    {"role": "user", "content": "alpha"},
    {"role": "assistant", "content": "beta"},
    {"role": "user", "content": "gamma"},
    {"role": "assistant", "content": "delta"},
]
LONG_PROBE = [*PROBE, {"role": "user", "content": "zeta"}, {"role": "assistant", "content": "eta"}]
# Some templates rewrite history only where there are thoughts to drop, or a system text.
THOUGHTFUL_PROBE = [PROBE[0], {**PROBE[1], "content": "<think>\nepsilon\n</think>\n\nbeta"}, *PROBE[2:]]
SYSTEM_PROBE = [{"role": "system", "content": "omega"}, *PROBE]
TOOL_PROBE = [
    PROBE[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "kappa", "arguments": {"lambda": "omicron"}}}],
    },
    {"role": "tool", "content": "sigma"},
    PROBE[1],
]
TOOLS = [{"type": "function", "function": {"name": "upsilon", "description": "", "parameters": {"type": "object"}}}]


def render(tokenizer, messages, tools=None, add_generation_prompt=False, thinking=None):
    """Render with transformers' own engine.

    Args:
        tokenizer: with a chat template.
        messages, tools, add_generation_prompt: as apply_chat_template takes them.
        thinking: what enable_thinking says to the template; None leaves that to its default.

    Returns:
        (text, [(start, end), …] of the answers, [] without generation marks).
    """
    marked = is_marked(tokenizer.chat_template)
    result = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=marked,
        **({} if thinking is None else {"enable_thinking": thinking}),
        **tokenizer.special_tokens_map,
    )
    return result[0][0], result[1][0] if marked else []


@functools.lru_cache
def is_marked(source: str) -> bool:
    """Whether a template says itself what an answer is."""
    return bool(GENERATION_MARK.search(source))


def has_thoughts(content: str) -> bool:
    """Whether an answer begins with <think>…</think> that holds more than white space."""
    found = THOUGHTS.match(content)
    return bool(found and found.group(1).strip())


def added_tokens(tokenizer, special: bool = False) -> list[str]:
    """The added tokens of a tokenizer, or only those that are control tokens."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special or not special]


# -- what it lacks ---------------------------------------------------------------------------------------------------


def complete_template(tokenizer) -> None:
    """Write before the tokenizer's own template what it lacks: see template.complete.

    What it writes in another way than asked stays; only what it refuses or leaves out is brought into another form.

    Raises:
        ValueError: named variants without one called "default".
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        if "default" not in source:
            raise ValueError(
                f"the tokenizer has the chat templates {', '.join(sorted(source))} and none called 'default'; choose "
                "a named template with --template_name"
            )
        source = tokenizer.chat_template = source["default"]
    if is_completed(source) or is_marked(source):
        return
    additions = []

    def writes(messages, tools, *words, asked=False, more=()):
        tokenizer.chat_template = complete(source, [*additions, *more])
        try:
            text = render(tokenizer, messages, tools, asked)[0]
        except TEMPLATE_ERRORS:
            return False
        return all(word in text for word in words)

    if not writes(SYSTEM_PROBE[:2], None, "omega", "alpha", asked=True):
        additions.append("system")
    dialogue = (TOOL_PROBE, TOOLS, "kappa", "omicron", "sigma", "beta")
    forms = ((), ("arguments",), ("ids",), ("arguments", "ids"))
    form = next((form for form in forms if writes(*dialogue, more=form)), ("tools",))
    if form != ("tools",) and not writes(*dialogue, "upsilon", more=form):
        form = (*form, "listing")
    additions += form
    tokenizer.chat_template = complete(source, additions)
    additions += _ways_to_think(tokenizer, source)
    tokenizer.chat_template = complete(source, additions)
    if tokenizer.chat_template != source:
        fixed = ["date"] if complete(source, ()) != source else []
        logger.info("the tokenizer's chat template was completed: %s", ", ".join([*additions, *fixed]))


def _ways_to_think(tokenizer, source):
    try:
        prompts = [render(tokenizer, PROBE[:1], None, True, thinking)[0] for thinking in (False, True)]
    except TEMPLATE_ERRORS:  # prepare_chat will say so
        return []
    if "<think>" not in source:
        return []
    if prompts[0] != prompts[1]:
        return ["thinking"]
    return ["thinking", "thoughts"] if prompts[1].rstrip().endswith("<think>") else []


def asks_for_thoughts(tokenizer) -> bool | None:
    """Whether the template asks for thoughts where nobody says so; None if it knows no such choice."""
    return thinking_default(tokenizer.chat_template)


def choose_thinking(tokenizer, thinking: bool) -> None:
    """Let the template ask for thoughts, or for answers without, where nobody says which."""
    tokenizer.chat_template = with_thinking_default(tokenizer.chat_template, thinking)


# -- what it does ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """How answers end.

    Attributes:
        turn: the text that closes an answer; trained.
        call: the same for an answer that calls a tool.
        written: the template writes it behind the last answer. Otherwise (GLM-4) it opens the turn that follows, and
            is added to what is trained.
    """

    turn: str
    call: str
    written: bool = True

    def of(self, message: dict) -> str:
        """The end of this answer."""
        return self.call if message.get("tool_calls") else self.turn

    def length(self, text: str) -> int:
        """Length of a text up to and including its last end; the whole text's where it has none."""
        found = [text.rfind(end) + len(end) for end in {self.turn, self.call} if end in text]
        return max(found, default=len(text))

    def first(self, text: str, start: int) -> int | None:
        """Where the first end behind `start` is over; None if there is none."""
        found = [(place, len(end)) for end in {self.turn, self.call} if (place := text.find(end, start)) >= 0]
        return sum(min(found)) if found else None


def find_ends(tokenizer) -> Ends:
    """Find out how the template closes an answer."""
    text = render(tokenizer, PROBE)[0]
    tokens, control = added_tokens(tokenizer), added_tokens(tokenizer, special=True)
    tail = text.rpartition("delta")[2]
    if turn := _first_of(tokens, tail):
        return Ends(turn, turn)
    turn = _first_of(tokens, text.partition("beta")[2].partition("gamma")[0])
    if not turn:
        end = tokenizer.eos_token or tail.strip()
        return Ends(end, end)
    try:
        called = render(tokenizer, TOOL_PROBE, TOOLS)[0]
    except TEMPLATE_ERRORS:
        called = ""
    call = _first_of(control, called.rpartition("omicron")[2].partition("sigma")[0])
    return Ends(turn, call or turn, written=False)


def _first_of(tokens, text):
    """The token that comes first in a text, "" for none."""
    return min((token for token in tokens if token and token in text), key=text.index, default="")


def follows_its_prompt(tokenizer) -> bool:
    """Whether an answer of the template follows its generation prompt, so that what is trained is what is asked."""
    thinking = None if asks_for_thoughts(tokenizer) is None else False
    prompt = render(tokenizer, PROBE[:3], None, True, thinking)[0]
    full = render(tokenizer, PROBE, None, False, thinking)[0]
    said = answer_behind(prompt, full, "delta")
    return said is not None and said.lstrip().startswith("delta")


def answer_behind(prompt: str, full: str, content: str) -> str | None:
    """The text with which an answer follows its prompt.

    Where the prompt opens a thought, or closes one, and where the template drops an answer's thoughts, it is put
    together: what the template writes behind everything but that, and the thoughts as the data has them.

    Args:
        prompt: rendered with a generation prompt.
        full: the same messages and the answer.
        content: the answer's own text.

    Returns:
        The text, or None where the answer does not follow.
    """
    stem = OPEN_THOUGHT.sub("", prompt)
    opening = prompt[len(stem) :]
    if not full.startswith(stem):
        return None
    said, thoughts = full[len(stem) :], THOUGHTS.match(content)
    if thoughts and thoughts.group(1).strip() not in said:
        said = f"<think>\n{thoughts.group(1).strip()}\n</think>\n\n" + said.lstrip("\n")
    if said.startswith(opening):
        return said[len(opening) :]
    if said.lstrip().startswith("<think>") or not NO_THOUGHTS.startswith(opening):
        return None
    return said if "</think>" in opening else (NO_THOUGHTS + said)[len(opening) :]


def is_stable(tokenizer, ends: Ends, probe: list[dict]) -> bool:
    """Whether the rendering of a conversation starts with that of its beginnings, and of every prompt in it."""
    full, thinks = render(tokenizer, probe)[0], asks_for_thoughts(tokenizer) is not None
    for turn, message in enumerate(probe):
        if message["role"] == "assistant":
            thinking = has_thoughts(message["content"]) if thinks else None
            prompt = render(tokenizer, probe[:turn], None, True, thinking)[0]
            answered = render(tokenizer, probe[: turn + 1])[0]
            length = len(prompt) + ends.length(answered[len(prompt) :])
            if not (answered.startswith(prompt) and full.startswith(answered[:length])):
                return False
    return True


@dataclass(frozen=True)
class Frame:
    """What a template writes around the texts of a plain conversation, so that it can be written without Jinja.

    Attributes:
        opening: before the first question of a conversation without a system text.
        system: before and behind a system text; None if a frame cannot write one.
        prompt: behind the last question: what ends the prompt.
        lead: what an answer begins with before its own text, such as a blank.
        answered: behind a question of the history, up to the answer's own text: prompt and lead where the template is
            stable.
        between: behind an answer, before the next question.
        closing: behind the last answer.
        end: length of what `between` and `closing` begin with and is trained.
        stripped: roles whose texts lose the white space at their ends.
    """

    opening: str
    system: tuple[str, str] | None
    prompt: str
    lead: str
    answered: str
    between: str
    closing: str
    end: tuple[int, int]
    stripped: frozenset[str]

    def write(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]] | None:
        """Write a conversation, or a prompt if it ends with a question.

        Returns:
            (text, [(start, end), …] of the answers with their end-of-turn), or None for what is not plain: tools,
            thoughts, turns out of order.
        """
        turns, pieces = messages, [self.opening]
        if messages[0]["role"] == "system":
            if self.system is None:
                return None
            turns, pieces = messages[1:], [self.system[0], self._text(messages[0]), self.system[1]]
        length, spans, last = sum(map(len, pieces)), [], len(turns) - 1
        for number, message in enumerate(turns):
            if message["role"] != ("user", "assistant")[number % 2] or message.get("tool_calls"):
                return None
            text = self._text(message)
            if number % 2:
                if "</think>" in text:
                    return None
                spans.append((length - len(self.lead), length + len(text) + self.end[number == last]))
                new = (text, self.closing if number == last else self.between)
            elif number == last - 1:
                new = (text, self.prompt, self.lead)
            else:
                new = (text, self.prompt if number == last else self.answered)
            pieces += new
            length += sum(map(len, new))
        return "".join(pieces), spans

    def _text(self, message):
        return message["content"].strip() if message["role"] in self.stripped else message["content"]


def find_frame(tokenizer, ends: Ends) -> Frame | None:
    """Find the frame of a template; None where there is none that writes all the probes as the template does."""
    thinking = None if asks_for_thoughts(tokenizer) is None else False

    def written(messages):
        return render(tokenizer, messages, None, messages[-1]["role"] == "user", thinking)[0]

    parts, asked = _around(written(PROBE), PROBE), _around(written(PROBE[:1]), PROBE[:1])
    if not (parts and asked and parts[0] == asked[0] and parts[3].startswith(asked[1])):
        return None
    opening, answered, between, header, closing = parts
    end = (between.find(ends.turn) + len(ends.turn), closing.find(ends.turn) + len(ends.turn) if ends.written else 0)
    try:
        around_system = _around(written(SYSTEM_PROBE), SYSTEM_PROBE)
    except TEMPLATE_ERRORS:
        around_system = None
    systems = [tuple(around_system[:2])] if around_system and around_system[2:] == parts[1:] else []
    for system in (*systems, None):  # without, where a system text is no turn of its own
        spaced = [{**message, "content": f" {message['content']}\n"} for message in SYSTEM_PROBE[system is None :]]
        text = written(spaced)
        stripped = frozenset(message["role"] for message in spaced if message["content"] not in text)
        lead = header.removeprefix(asked[1])
        frame = Frame(opening, system, asked[1], lead, answered, between, closing, end, stripped)
        probes = [LONG_PROBE, PROBE, PROBE[:3], PROBE[:2], PROBE[:1], spaced]
        probes += [SYSTEM_PROBE, SYSTEM_PROBE[:4], SYSTEM_PROBE[:2]] if system else []
        if all(frame.write(probe)[0] == written(probe) for probe in probes):
            return frame
    return None


def _around(text, messages):
    """What stands before, between and behind the contents of messages; None where one is not written just once."""
    parts = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found or message["content"] in text:
            return None
        parts.append(before)
    return [*parts, text]


def is_named(source: str) -> bool:
    """Whether a template is one of template.py, letter by letter, whatever its thinking_default."""
    found = NAMED.match(source)
    if not found:
        return False
    try:
        written = get_template(found.group(1)).chat_template()
    except ValueError:
        return False
    return with_thinking_default(source, False) == with_thinking_default(written, False)
