"""From the turns of a dialogue, in whatever spelling, to messages in the order that templates can write. No files.

Reads ShareGPT, OpenAI, LLaMA-Factory, axolotl and ms-swift turns with their tools, tool calls and loss weights.
"""

import json

from stagekit.html_answers import HTML_MARK, html_to_text
from stagekit.records import Repairs, RowError, Unused, shown

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
WEIGHT_KEYS = ("train", "loss_weight", "weight")  # of axolotl and LLaMA-Factory
AFTER = {None: ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


# -- turns -----------------------------------------------------------------------------------------------------------


def read_messages(turns: object, repairs: Repairs) -> list[dict]:
    """Fold {from, value}, {role, content} and {human, assistant} turns into messages (see records).

    Raises:
        Unused: the list is empty.
        RowError: it is no list of turns, or a role, a text or a tool call cannot be read.
    """
    if turns is None or turns == []:
        raise Unused("empty dialogue", "the list of messages is missing or empty")
    if not isinstance(turns, list):
        raise RowError("the list of messages is missing or empty")
    messages, has_html = [], False
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} must be an object such as {{'from': 'human', 'value': '…'}}")
        if "human" in turn and "assistant" in turn:
            for speaker, role in (("human", "user"), ("assistant", "assistant")):
                messages.append({"role": role, "content": read_content(turn[speaker], number, repairs)})
            continue
        name = turn.get("from")
        name = turn.get("role") if name is None else name
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise RowError(f"message {number} has the role {shown(name)}; known: {', '.join(sorted(ROLES))}")
        content = read_content(_value(turn, number), number, repairs)
        if role == "tool_call":
            message = {"role": "assistant", "content": "", "tool_calls": read_tool_calls(content, number)}
        else:
            message = {"role": role, "content": content}
            if turn.get("tool_calls"):
                message["role"] = "assistant"
                message["tool_calls"] = read_tool_calls(turn["tool_calls"], number)
        if message["role"] == "assistant":
            has_html = has_html or HTML_MARK in content
            if len(turn) > 2:
                _read_more(turn, message, number, repairs)
        messages.append(message)
    if has_html:
        _read_html(messages, repairs)
    return messages


def _value(turn, number):
    """What a turn says: its value or content, or what some copies of ShareGPT keep beside an empty one."""
    for key in ("value", "content", "markdown", "text"):
        value = turn.get(key)
        if value is not None:
            return value
    if not ("value" in turn or "content" in turn or turn.get("tool_calls")):
        raise RowError(f"message {number} has no text (field 'value' or 'content' is NoneType)")
    return None


def read_content(value: object, number: int, repairs: Repairs) -> str:
    """The text of message `number`: a string, a number, a list of parts that are text, or "" for nothing."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if is_number(value):
        repairs.note("number read as text")
        return number_to_text(value)
    if isinstance(value, list):  # OpenAI parts: [{"type": "text", "text": …}], LLaMA-Factory: {"type", "value"}
        texts = [_part(part) for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise RowError(f"message {number} has a part that is not text; only text can be trained on")
        return "".join(texts)
    raise RowError(f"message {number} has no text (field 'value' or 'content' is {type(value).__name__})")


def _part(part):
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        return part if isinstance(part, str) else None
    return part.get("text", part.get("value"))


def _read_more(turn, message, number, repairs):
    """What an assistant's turn may have beside its text: thoughts, and whether it is to be learnt."""
    thoughts = turn.get("reasoning_content")
    if isinstance(thoughts, str) and thoughts.strip():
        message["content"] = with_thoughts(thoughts, message["content"])
    for key in WEIGHT_KEYS:
        weight = turn.get(key)
        if weight is True or is_missing(weight):
            continue
        if weight is False or weight == 0:
            message["train"] = False
        elif not is_number(weight):
            raise RowError(f"message {number}: {key!r} must be a number or true or false, got {shown(weight)}")
        elif weight != 1:
            repairs.note("loss weight taken as 1")
    if turn.get("train_detail") or turn.get("training_detail"):
        repairs.note("training marks within an answer ignored")


def _read_html(messages, repairs):
    """Turn the answers of a dialogue that was copied from a web page into text."""
    for message in messages:
        if message["role"] == "assistant" and message["content"].lstrip().startswith("<"):
            text = html_to_text(message["content"])
            if text != message["content"]:
                message["content"] = text
                repairs.note("HTML turned into text")


def with_thoughts(thoughts: str, answer: str) -> str:
    """An answer behind the reasoning it came from, in the form that models of the Qwen3 and DeepSeek-R1 kind write."""
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{answer}"


def with_system(record: dict, messages: list[dict]) -> list[dict]:
    """Put the system prompt of a record's own field in front; a system turn among the messages goes before it."""
    system = next(
        (record[key] for key in SYSTEM_KEYS if isinstance(record.get(key), str) and record[key].strip()), None
    )
    if system is None or (messages[0]["role"] == "system" and messages[0]["content"].strip()):
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]


def is_missing(value: object) -> bool:
    """Null, or the NaN that pandas makes of it."""
    return value is None or (isinstance(value, float) and value != value)


def is_number(value: object) -> bool:
    """A finite number; the comparison is false for NaN and works for integers that no float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def number_to_text(value: int | float) -> str:
    """A number as a person would write it: pandas makes 310.0 of 310 where another row of the column is empty."""
    return str(int(value)) if isinstance(value, float) and abs(value) < 1e15 and value.is_integer() else str(value)


# -- tools -----------------------------------------------------------------------------------------------------------


def read_tool_calls(calls: object, number: int) -> list[dict]:
    """Read tool calls, as objects or as a JSON string, into [{"type": "function", "function": {name, arguments}}]."""
    if isinstance(calls, str):
        calls = _from_json(calls, f"message {number}: the tool call is not JSON")
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"message {number}: a tool call needs 'name' and 'arguments'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"message {number}: the arguments of the tool call are not JSON")
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not result:
        raise RowError(f"message {number}: a tool call needs 'name' and 'arguments'")
    return result


def read_tools(record: dict) -> list[dict] | None:
    """Read the tools offered in a record, a list or a JSON string, into the OpenAI form."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, "field 'tools' is not JSON") if tools.strip() else None
    if not tools or is_missing(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' must be a list of objects with name, description, parameters")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _from_json(text, problem):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{problem} ({error.msg})") from None
    except ValueError as error:  # an integer of more than 4300 digits
        raise RowError(f"{problem} ({error})") from None


# -- order -----------------------------------------------------------------------------------------------------------


def check_turns(messages: list[dict], repairs: Repairs) -> list[dict]:
    """Bring the messages of a whole dialogue into the order a template can write, or refuse them.

    Dropped and counted: answers before the first question, whatever follows the last answer, empty messages. Merged
    and counted: see mend. Refused: anything else out of order, for guessing would change what is learnt.

    Raises:
        Unused: nothing is left.
        RowError: roles out of order.
    """
    system, turns = _split_system(messages)
    while turns and (turns[-1]["role"] != "assistant" or _is_empty(turns[-1])):
        turns.pop()
        repairs.note("turn after the last answer dropped")
    turns = mend(turns, repairs)
    if not turns:
        raise Unused("no question followed by an answer", "no question followed by an answer is left in it")
    _check_order(turns)
    return system + turns


def check_prompt(messages: list[dict], repairs: Repairs, what: str = "the prompt") -> list[dict]:
    """The same for the messages before an answer, which end with user or tool; `what` names them in an error."""
    system, turns = _split_system(messages)
    turns = mend(turns, repairs)
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise RowError(f"{what} must end with a user message{'' if turns else ' that is not empty'}")
    _check_order(turns)
    return system + turns


def check_answer(messages: list[dict], repairs: Repairs, name: str) -> list[dict]:
    """The same for what follows a prompt: it begins and ends with assistant; `name` is its field.

    Raises:
        Unused: the answer is empty.
        RowError: roles out of order.
    """
    problem = f"{name!r} must be an answer of the assistant that is not empty"
    if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowError(problem)
    if _is_empty(messages[0]) or _is_empty(messages[-1]):
        raise Unused("empty answer", problem)
    turns = mend([{"role": "user", "content": name}, *messages], repairs)
    _check_order(turns)
    return turns[1:]


def mend(turns: list[dict], repairs: Repairs) -> list[dict]:
    """Drop what cannot stand in a dialogue, and merge neighbouring messages of one speaker.

    Copies of ShareGPT lack single messages, and people press return twice: then two messages of one speaker follow
    each other. Both were written in this place and both are meant, so they become one, joined by a blank line (the
    same text twice becomes one). Cutting one of them would lose an answer or half a question; refusing them would
    lose the dialogue. A text before a tool call becomes the text of the call, and calls in a row one message; a text
    after a call is not merged, for its result is missing between them.
    """
    kept = []
    for message in turns:
        role = message["role"]
        if not kept and role in ("assistant", "tool"):
            repairs.note("answer before the first question dropped")
        elif _is_empty(message):
            repairs.note("empty message dropped")
        elif kept and kept[-1]["role"] == role and _can_merge(kept[-1], message):
            kept[-1] = _merge(kept[-1], message)
            repairs.note("neighbouring messages of one speaker merged")
        else:
            kept.append(message)
    return kept


def _can_merge(first, second):
    if first["role"] == "assistant" and first.get("tool_calls"):
        return bool(second.get("tool_calls")) and not second["content"].strip()
    return first["role"] in ("user", "assistant")


def _merge(first, second):
    texts = [text for text in (first["content"], second["content"]) if text.strip()]
    message = {"role": first["role"], "content": texts[0] if len(set(texts)) == 1 else "\n\n".join(texts)}
    if calls := [*first.get("tool_calls", []), *second.get("tool_calls", [])]:
        message["tool_calls"] = calls
    if first.get("train") is False or second.get("train") is False:
        message["train"] = False
    return message


def _split_system(messages):
    """(the system message, if there is one that is not empty, the others), both as lists."""
    if messages and messages[0]["role"] == "system":
        return messages[:1] if messages[0]["content"].strip() else [], messages[1:]
    return [], list(messages)


def _check_order(turns):
    previous = None
    for number, message in enumerate(turns, 1):
        role = message["role"]
        if role not in AFTER[previous]:
            got = f"{role} after {previous}" if previous else f"{role} first"
            raise RowError(f"wrong role order at turn {number}: {got}; user and assistant must take turns")
        if role == "tool" and previous == "assistant" and not turns[number - 2].get("tool_calls"):
            raise RowError(f"wrong role order at turn {number}: a tool result without a tool call before it")
        previous = role


def _is_empty(message):
    return not message["content"].strip() and not message.get("tool_calls") and message["role"] != "tool"
