"""From whatever a data file holds to one canonical record. Pure functions: no files, no tokens.

A record is recognised by its keys; the first adapter of ADAPTERS whose test matches reads it. To add one, write
`is_x` and `read_x` beside the others and a line in ADAPTERS, in the place its test needs.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

# Spellings of the roles in ShareGPT, OpenAI, FastChat, ms-swift, OpenAssistant and older medical sets.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer", "question", "问", "患者"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "bing", "bard", "model", "moss", "belle", "answer", "答", "医生"),
        "assistant",
    ),
    **dict.fromkeys(("system", "system_prompt", "meta_instruction"), "system"),
    **dict.fromkeys(("tool", "observation", "observations", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
}
SYSTEM_KEYS = ("system", "system_prompt", "meta_instruction")
MESSAGE_KEYS = ("conversations", "messages", "conversation", "items")
PROMPT_KEYS = ("prompt", "question", "instruction", "query")


class RowError(ValueError):
    """A record that cannot be read; the text says what is wrong and what was expected."""


@dataclass(frozen=True)
class Text:
    """Running text for pretraining."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages in the order system?, then user/tool and assistant in turns, ending with assistant."""

    messages: list[dict]
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt (messages ending with user or tool) and two continuations of it, better and worse.

    `margin` says by how much it is better, on whatever scale the data has; None where the data does not say.
    """

    prompt: list[dict]
    chosen: list[dict]
    rejected: list[dict]
    tools: list[dict] | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Ranking:
    """A prompt and several answers to it (each a list of messages) with their ranks: 0 is best, equal ranks tie."""

    prompt: list[dict]
    answers: list[list[dict]]
    ranks: list[int]
    tools: list[dict] | None = None

    def pairs(self) -> list[Preference]:
        """Every pair of answers of which one is better, best first."""
        order = sorted(range(len(self.ranks)), key=lambda index: self.ranks[index])
        return [
            Preference(self.prompt, self.answers[better], self.answers[worse], self.tools)
            for position, better in enumerate(order)
            for worse in order[position + 1 :]
            if self.ranks[better] < self.ranks[worse]
        ]


@dataclass(frozen=True)
class Question:
    """A prompt (messages ending with user), the answer to compare with, and the worked solution it was taken from."""

    prompt: list[dict]
    answer: str
    solution: str


Canonical = Text | Conversation | Preference | Ranking | Question


@dataclass(frozen=True)
class Adapter:
    """One way to read a record. `name` is what --data_format takes; `code` is the letter the docs use."""

    code: str
    name: str
    matches: Callable[[dict], bool]
    read: Callable[[dict, "Repairs"], Canonical]
    expects: str


@dataclass
class Repairs:
    """What was mended in a record so that it could be read, by kind. Never silent: the ledger counts it."""

    counts: Counter = field(default_factory=Counter)

    def note(self, kind: str) -> None:
        self.counts[kind] += 1


def to_canonical(record: object, data_format: str = "auto") -> tuple[Canonical, Repairs]:
    """Read one record of a data file.

    Args:
        record: what the file holds: a dict, or a string for a plain line of text.
        data_format: "auto" or the name of an adapter.

    Raises:
        RowError: no adapter fits, or the fitting one finds the record broken.
    """
    repairs = Repairs()
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise RowError(f"expected an object with named fields, got {type(record).__name__}")
    if data_format == "auto":
        adapter = next((adapter for adapter in ADAPTERS if adapter.matches(record)), None)
    else:
        adapter = adapter_named(data_format)
    if adapter is None:
        known = "; ".join(adapter.expects for adapter in ADAPTERS)
        raise RowError(f"no known format has the fields {sorted(map(str, record))}; expected one of: {known}")
    canonical = adapter.read(record, repairs)
    _check_characters(canonical)
    return canonical, repairs


def _check_characters(canonical):
    # JSON may hold half of a surrogate pair ("\ud83d", an emoji cut in two), which no tokenizer takes.
    try:
        json.dumps(vars(canonical), ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise RowError(f"it holds half a character (\\u{half:04x}), as when text is cut inside an emoji") from None


def adapter_named(name: str) -> Adapter:
    """Look an adapter up by the name --data_format takes."""
    for adapter in ADAPTERS:
        if name == adapter.name:
            return adapter
    raise ValueError(f"--data_format {name!r} is unknown; known: auto, {', '.join(a.name for a in ADAPTERS)}")


# -- text ------------------------------------------------------------------------------------------------------------


def is_text(record):
    if "completion" in record and any(key in record for key in PROMPT_KEYS):
        return False  # an answer without its question is no running text
    return (
        any(isinstance(record.get(key), str) for key in ("text", "completion", "content"))
        or len([value for value in record.values() if isinstance(value, str)]) == len(record) == 1
    )


def read_text(record, repairs):
    for key in ("text", "completion", "content", *record):
        if isinstance(record.get(key), str):
            if not record[key].strip():
                raise RowError(f"field {key!r} is empty")
            return Text(record[key])
    raise RowError(f"field 'text' must be a string, got {type(record.get('text')).__name__}")


# -- conversations ---------------------------------------------------------------------------------------------------


def is_conversation(record):
    return any(key in record for key in MESSAGE_KEYS)


def read_conversation(record, repairs):
    messages = read_messages(_first(record, MESSAGE_KEYS), repairs)
    return Conversation(check_turns(_with_system(record, messages), repairs), read_tools(record))


def read_messages(turns: object, repairs: Repairs) -> list[dict]:
    """Fold {from, value}, {role, content} and {human, assistant} turns into messages with role and content."""
    if not isinstance(turns, list) or not turns:
        raise RowError("the list of messages is missing or empty")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} must be an object such as {{'from': 'human', 'value': '…'}}")
        if "human" in turn and "assistant" in turn:
            messages += [
                {"role": "user", "content": _content(turn["human"], number)},
                {"role": "assistant", "content": _content(turn["assistant"], number)},
            ]
            continue
        name = turn.get("from", turn.get("role"))
        role = ROLES.get(str(name).lower())
        if role is None:
            raise RowError(f"message {number} has the role {name!r}; known: {', '.join(sorted(ROLES))}")
        content = _content(turn.get("value", turn.get("content")), number, allow_none="tool_calls" in turn)
        if role == "tool_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": read_tool_calls(content, number)})
        elif turn.get("tool_calls"):
            calls = read_tool_calls(turn["tool_calls"], number)
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
        else:
            messages.append({"role": role, "content": content})
    return messages


def _content(value, number, allow_none=False):
    if isinstance(value, list):  # OpenAI parts: [{"type": "text", "text": …}], LLaMA-Factory: {"type", "value"}
        texts = [part.get("text", part.get("value")) if isinstance(part, dict) else None for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise RowError(f"message {number} has a part that is not text; only text can be trained on")
        value = "".join(texts)
    if value is None and allow_none:
        return ""
    if not isinstance(value, str):
        raise RowError(f"message {number} has no text (field 'value' or 'content' is {type(value).__name__})")
    return value


def read_tool_calls(calls: object, number: int) -> list[dict]:
    """Read tool calls, as objects or as a JSON string, into [{"type": "function", "function": {name, arguments}}]."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except json.JSONDecodeError as error:
            raise RowError(f"message {number}: the tool call is not JSON ({error.msg})") from None
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"message {number}: a tool call needs 'name' and 'arguments'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as error:
                raise RowError(
                    f"message {number}: the arguments of the tool call are not JSON ({error.msg})"
                ) from None
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def read_tools(record: dict) -> list[dict] | None:
    """Read the tools offered in a record, a list or a JSON string, into the OpenAI form."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(f"field 'tools' is not JSON ({error.msg})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' must be a list of objects with name, description, parameters")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def check_turns(messages: list[dict], repairs: Repairs) -> list[dict]:
    """Bring messages into the order a template can write, or refuse them.

    Dropped and counted as repairs: empty user/assistant messages at either end, answers before the first question,
    questions after the last answer. Refused: anything else out of order, for guessing would change what is learnt.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    if system and not system[0]["content"].strip():
        system = []
    turns = messages[1:] if messages and messages[0]["role"] == "system" else list(messages)
    while turns and turns[0]["role"] in ("assistant", "tool"):
        turns.pop(0)
        repairs.note("answer before the first question dropped")
    while turns and (turns[-1]["role"] != "assistant" or _is_empty(turns[-1])):
        turns.pop()
        repairs.note("turn after the last answer dropped")
    if not turns:
        raise RowError("no question followed by an answer is left in it")
    previous = None
    for number, message in enumerate(turns, 1):
        role = message["role"]
        after = {None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
        if role not in after[previous]:
            got = f"{role} after {previous}" if previous else f"{role} first"
            raise RowError(f"wrong role order at turn {number}: {got}; user and assistant must take turns")
        if role == "tool" and previous == "assistant" and not turns[number - 2].get("tool_calls"):
            raise RowError(f"wrong role order at turn {number}: a tool result without a tool call before it")
        if _is_empty(message):
            raise RowError(f"turn {number} ({role}) is empty")
        previous = role
    return system + turns


def _is_empty(message):
    return not message["content"].strip() and not message.get("tool_calls") and message["role"] != "tool"


def _with_system(record, messages):
    system = next(
        (record[key] for key in SYSTEM_KEYS if isinstance(record.get(key), str) and record[key].strip()), None
    )
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _first(record, keys):
    return next((record[key] for key in keys if key in record), None)


# -- instructions and questions --------------------------------------------------------------------------------------


def is_instruction(record):
    return "instruction" in record and "output" in record


def read_instruction(record, repairs):
    prompt = _prompt_of(record, "instruction")
    answer = _text(record, "output")
    messages = [*prompt, {"role": "assistant", "content": answer}]
    return Conversation(check_turns(messages, repairs), read_tools(record))


def is_question(record):
    return "question" in record and isinstance(record.get("answer"), str) and "options" not in record


def read_question(record, repairs):
    solution = answer = _text(record, "answer")
    if "####" in answer:  # gsm8k: the reasoning, then "#### 1,234"
        answer = answer.rsplit("####", 1)[1].strip().replace(",", "")
    return Question(_prompt_of(record, "question"), answer, solution)


def _prompt_of(record, key):
    """System, history [[q, a], …] and the question itself (with Alpaca's `input` below it) as messages."""
    question = _text(record, key)
    extra = record.get("input")
    if key == "instruction" and isinstance(extra, str) and extra.strip():
        question = f"{question}\n{extra}"
    messages = []
    history = record.get("history") or []
    for pair in history if isinstance(history, (list, tuple)) else [None]:
        texts = pair if isinstance(pair, (list, tuple)) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise RowError("field 'history' must be a list of [question, answer] pairs")
        messages += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return _with_system(record, [*messages, {"role": "user", "content": question}])


def _text(record, key):
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"field {key!r} is {'empty' if isinstance(value, str) else 'missing or not a string'}")
    return value


# -- preferences -----------------------------------------------------------------------------------------------------

HUMAN_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant|prompter|assistant):")


def is_conversation_preference(record):
    if "chosen_messages" in record and "rejected_messages" in record:
        return True
    if "chosen" not in record or "rejected" not in record:
        return False
    return is_conversation(record) or (
        isinstance(record["chosen"], list) and not any(isinstance(record.get(key), (str, list)) for key in PROMPT_KEYS)
    )


def read_conversation_preference(record, repairs):
    chosen = record.get("chosen_messages", record.get("chosen"))
    rejected = record.get("rejected_messages", record.get("rejected"))
    if is_conversation(record):
        prompt = _with_system(record, read_messages(_first(record, MESSAGE_KEYS), repairs))
        chosen, rejected = _answer(chosen, "chosen", repairs), _answer(rejected, "rejected", repairs)
    else:  # two whole dialogues: what they share at the start is the prompt
        chosen, rejected = read_messages(chosen, repairs), read_messages(rejected, repairs)
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return _preference(prompt, chosen, rejected, record, repairs)


def is_preference(record):
    return (
        any(key in record for key in PROMPT_KEYS)
        and any(key in record for key in ("chosen", "response_chosen"))
        and any(key in record for key in ("rejected", "response_rejected"))
    )


def read_preference(record, repairs):
    prompt = _any_prompt(record, repairs)
    chosen = _answer(_first(record, ("chosen", "response_chosen")), "chosen", repairs)
    rejected = _answer(_first(record, ("rejected", "response_rejected")), "rejected", repairs)
    return _preference(prompt, chosen, rejected, record, repairs)


def _any_prompt(record, repairs):
    """The prompt of an answer to be compared: messages, a transcript, or a question with its history."""
    key = next((key for key in PROMPT_KEYS if key in record), "prompt")
    if isinstance(record.get(key), list):
        return _with_system(record, read_messages(record[key], repairs))
    if HUMAN_TURN.match(str(record.get(key))):
        return _transcript(_text(record, key))
    return _prompt_of(record, key)


def _transcript(text):
    """Cut '\\n\\nHuman: … \\n\\nAssistant: … \\n\\nAssistant:' or 'prompter: …\\nassistant: …' into messages."""
    parts = HUMAN_TURN.split(text)[1:]
    turns = [(ROLES[role.lower()], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    return [{"role": role, "content": content} for role, content in turns]


def _answer(value, name, repairs):
    if isinstance(value, str):
        value = value.strip().removeprefix("Assistant:").strip()
        if not value:
            raise RowError(f"field {name!r} is empty")
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"field {name!r} is {type(value).__name__}; expected a string or a message")
    return read_messages(value, repairs)


def _is_number(value):
    """A finite number; the comparison is false for NaN and works for integers that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _margin(record):
    value = record.get("margin")
    if value is None:
        return None
    if not _is_number(value):
        raise RowError(f"field 'margin' must be a number, got {value!r}")
    return float(value)


def _preference(prompt, chosen, rejected, record, repairs):
    if not any(message["role"] == "user" for message in prompt) or prompt[-1]["role"] not in ("user", "tool"):
        raise RowError("the prompt of a preference must end with a user message")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        ends = (answer[0]["role"], answer[-1]["role"]) if answer else ()
        if ends != ("assistant", "assistant") or _is_empty(answer[-1]):
            raise RowError(f"{name!r} must be an answer of the assistant that is not empty")
    prompt = check_turns([*prompt, *chosen], repairs)[: -len(chosen)]
    check_turns([*prompt, *rejected], Repairs())
    return Preference(prompt, chosen, rejected, read_tools(record), _margin(record))


RANKED_KEYS = ("answers", "responses", "completions", "candidates")


def is_ranking(record):
    """Several answers with an order, or without one but with no single answer that the record would be about."""
    return (
        any(key in record for key in (*PROMPT_KEYS, *MESSAGE_KEYS))
        and any(isinstance(record.get(key), list) and record[key] for key in RANKED_KEYS)
        and ("ranks" in record or "scores" in record or not ("answer" in record or "output" in record))
    )


def read_ranking(record, repairs):
    key = next((key for key in RANKED_KEYS if isinstance(record.get(key), list) and record[key]), RANKED_KEYS[0])
    items = record.get(key) or []
    if len(items) < 2:
        raise RowError(f"field {key!r} needs at least two answers to compare, got {len(items)}")
    if is_conversation(record):
        prompt = _with_system(record, read_messages(_first(record, MESSAGE_KEYS), repairs))
    else:
        prompt = _any_prompt(record, repairs)
    answers = [_answer(_answer_text(item, key), f"{key}[{index}]", repairs) for index, item in enumerate(items)]
    ranks = _ranks(record, items, key)
    if len(set(ranks)) < 2:
        raise RowError(f"all answers of {key!r} have the same rank, so there is nothing to prefer")
    for answer in answers[1:]:  # each with the first one: the same demands as on a pair
        _preference(prompt, answers[0], answer, {}, Repairs())
    prompt = _preference(prompt, answers[0], answers[1], {}, repairs).prompt
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
        if not isinstance(values, list) or len(values) != len(items) or not all(map(_is_number, values)):
            raise RowError(f"{name}s must be one number for each of the {len(items)} {key}")
        levels = sorted({sign * value for value in values})
        return [levels.index(sign * value) for value in values]
    if any(_is_number(value) for item in items if isinstance(item, dict) for value in item.values()):
        raise RowError(
            f"the {key} hold numbers, but none is called 'rank' or 'score'; name the one that orders them so"
        )
    return list(range(len(items)))


# Order matters: preferences before conversations and instructions (they carry the same keys), text last.
ADAPTERS = (
    Adapter(
        "S",
        "conversation_preference",
        is_conversation_preference,
        read_conversation_preference,
        "conversations + chosen + rejected",
    ),
    Adapter("P", "preference", is_preference, read_preference, "prompt|question + chosen + rejected"),
    Adapter("K", "ranking", is_ranking, read_ranking, "prompt|question + answers (best first, or with ranks|scores)"),
    Adapter("V", "question", is_question, read_question, "question + answer"),
    Adapter("C", "conversation", is_conversation, read_conversation, "conversations|messages (+ system, tools)"),
    Adapter("I", "instruction", is_instruction, read_instruction, "instruction (+ input) + output"),
    Adapter("T", "text", is_text, read_text, "text"),
)
