"""OpenAI's API on paper: what a request may hold, how answers and errors look. No HTTP and no model.

A parameter that cannot be done right is refused, not ignored. Used by stagekit/openai_server.py.
"""

import json
import re
import time
import uuid
from collections import Counter

from stagekit import dialogues
from stagekit.commandline import LEAST_TEMPERATURE, is_temperature
from stagekit.records import RowError

# Parameters that ask for nothing as long as they have one of these values (or null), and that cannot be done here.
NEUTRAL = {
    **{"n": [1], "best_of": [1], "presence_penalty": [0], "frequency_penalty": [0], "top_logprobs": [0]},
    **{"logprobs": [False], "logit_bias": [{}], "echo": [False], "suffix": [""], "store": [False]},
    **{"response_format": [{"type": "text"}], "modalities": [["text"]], "service_tier": ["auto", "default"]},
    **{"parallel_tool_calls": [True], "functions": [[]], "function_call": ["none"]},
}
WITHOUT_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # about the caller, not the answer
COMMON = {"model", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options"}
OF_CHAT = COMMON | {"messages", "max_completion_tokens", "tools", "tool_choice"}
OF_COMPLETION = COMMON | {"prompt"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
OF_MESSAGE = {"role", "content", "name", "tool_calls", "tool_call_id"}
LARGEST = (1 << 63) - 1
MAX_MESSAGES = 2048  # as OpenAI's API has it; some templates take time in the square of their number
CALL_MARK = "<tool_call>"  # as template.py and Qwen write a call
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class ApiError(Exception):
    """What went wrong, in OpenAI's form.

    Attributes:
        status: of HTTP.
        body: the JSON of the response.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# -- requests --------------------------------------------------------------------------------------------------------


def check_parameters(payload: dict, known: set[str]) -> None:
    """Refuse what cannot be done here, unless its value asks for nothing.

    Raises:
        ApiError: a parameter is unknown, or its value asks for what cannot be done; so do all functions below.
    """
    for name, value in payload.items():
        if name in known or name in WITHOUT_EFFECT or value is None:
            continue
        if name not in NEUTRAL:
            raise ApiError(400, f"{name[:100]!r} is not a parameter this server knows", name[:100])
        if not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
        ):
            raise ApiError(400, f"{name} is not supported: leave it out, or give {json.dumps(NEUTRAL[name][0])}", name)


def read_number(payload: dict, name: str, low: float, high: float, whole: bool = False) -> float | None:
    """Read a number in a range, None where it is not given."""
    value = payload.get(name)
    if value is None:
        return None
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        raise ApiError(400, f"{name} must be a {'whole ' * whole}number from {low:g} to {high:g}", name)
    return value


def read_sampling(payload: dict) -> dict:
    """Read temperature and top_p, and a seed; what is not given is None."""
    sampling = {
        "temperature": read_number(payload, "temperature", 0, 2),
        "top_p": read_number(payload, "top_p", 0, 1),
        "seed": read_number(payload, "seed", -LARGEST, LARGEST, whole=True),
    }
    if not is_temperature(sampling["temperature"] or 0):
        raise ApiError(400, f"temperature must be 0 (greedy) or from {LEAST_TEMPERATURE} to 2", "temperature")
    if sampling["top_p"] == 0:
        raise ApiError(400, "top_p must be above 0", "top_p")
    for name in ("temperature", "top_p"):  # transformers takes no 1 for 1.0
        sampling[name] = None if sampling[name] is None else float(sampling[name])
    return sampling


def read_limit(payload: dict, ceiling: int | None) -> int | None:
    """Read how many tokens an answer may have, None where it is not given."""
    names = ("max_tokens", "max_completion_tokens")
    limits = {read_number(payload, name, 1, LARGEST, whole=True) for name in names} - {None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", "max_tokens")
    limit = next(iter(limits), None)
    if limit and ceiling and limit > ceiling:
        raise ApiError(400, f"max_tokens {limit} is above this server's limit of {ceiling}", "max_tokens")
    return limit


def read_stream(payload: dict) -> tuple[bool, bool]:
    """Read whether the answer is streamed, and whether its usage is sent with it."""
    stream, options = payload.get("stream") or False, payload.get("stream_options") or {}
    if not isinstance(stream, bool):
        raise ApiError(400, "stream must be true or false", "stream")
    if options and not (stream and isinstance(options, dict) and set(options) <= {"include_usage"}):
        raise ApiError(400, "stream_options may hold include_usage, where stream is true", "stream_options")
    return stream, bool(options.get("include_usage"))


def read_stops(payload: dict) -> list[str]:
    """Read the strings that end an answer."""
    stops = payload.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and 0 < len(stop) <= 256 for stop in stops):
        raise ApiError(400, "stop must be a string or a list of strings, each of 1 to 256 characters", "stop")
    if len(stops) > 16:
        raise ApiError(400, "stop may hold 16 strings", "stop")
    return stops


def read_messages(payload: dict) -> list[dict]:
    """Read the messages of a chat into the form templates take."""
    given = payload.get("messages")
    if isinstance(given, list) and len(given) > MAX_MESSAGES:
        raise ApiError(400, f"messages may hold {MAX_MESSAGES} messages, and these are {len(given)}", "messages")
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages must be a list of objects with role and content, and not empty", "messages")
    try:
        messages = _order_results(given, [_read_message(message, number) for number, message in enumerate(given, 1)])
    except RowError as error:
        raise ApiError(400, str(error), "messages") from None
    if messages[-1]["role"] not in ("user", "tool"):
        raise ApiError(400, "the last message must be the user's or a tool's", "messages")
    return messages


def _read_message(message, number):
    if not isinstance(message, dict):
        raise RowError(f"message {number} must be an object with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"message {number}: role must be one of {', '.join(ROLES)}")
    unknown = [name for name, value in message.items() if name not in OF_MESSAGE and value not in (None, [], "")]
    if unknown:
        raise RowError(f"message {number}: {unknown[0][:100]!r} is not supported")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise RowError(f"message {number}: only parts of type text are supported")
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    elif content is None and calls and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise RowError(f"message {number}: content must be a string or a list of text parts")
    for name, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool"), ("name", "tool")):
        if message.get(name) and role != owner:
            raise RowError(f"message {number}: {name} is not supported in {role} messages")
    if calls and not isinstance(calls, list):
        raise RowError(f"message {number}: tool_calls must be a list")
    read = {"role": ROLES[role], "content": content}
    return {**read, "tool_calls": dialogues.read_tool_calls(calls, number)} if calls else read


def _order_results(given, messages):
    """Put the results of calls into the order of the calls: templates tell by nothing else whose they are.

    Args:
        given: messages as they came, with the ids by which results name their calls.
        messages: the same as they were read.
    """
    keys, calls, ids = [], [], []
    owner = place = 0  # the number of the last message that is no result, and that of the call among its calls
    for number, (message, read) in enumerate(zip(given, messages, strict=True), 1):
        if read["role"] != "tool":
            owner, place, calls = number, 0, read.get("tool_calls", [])
            ids = [call.get("id") for call in message["tool_calls"]] if calls else []
        else:
            wanted, name = message.get("tool_call_id"), message.get("name")
            place = ids.index(wanted) + 1 if wanted in ids else 0 if wanted else place + 1  # without ids: as they come
            if not 0 < place <= len(calls):
                raise RowError(f"message {number}: the assistant message before it makes no such call")
            if name and name != calls[place - 1]["function"]["name"]:
                raise RowError(f"message {number}: name is not that of the function that was called")
        keys.append((owner, place))
    held = Counter(keys)
    for number, (owner, place) in enumerate(keys, 1):
        if held[owner, place] > 1:
            raise RowError(f"message {number}: its call has another result")
        if place > 1 and not held[owner, place - 1]:
            raise RowError(f"message {number}: the call before the one that it answers has no result")
    return [messages[index] for index in sorted(range(len(keys)), key=keys.__getitem__)]


def read_tools(payload: dict, chat_template: str) -> list[dict] | None:
    """Read the functions offered to the model, None where there are none or tool_choice forbids them."""
    choice = payload.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise ApiError(400, "tool_choice must be auto or none: a call cannot be forced here", "tool_choice")
    try:
        tools = dialogues.read_tools(payload)
    except RowError as error:
        raise ApiError(400, str(error), "tools") from None
    if tools and "tools" not in chat_template:
        raise ApiError(400, "the model's chat template takes no tools", "tools")
    return None if choice == "none" else tools


def read_prompt(payload: dict, vocabulary_size: int) -> str | list[int]:
    """Read the text of a completion, or its token ids."""
    prompt = payload.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and all(type(token) is int and 0 <= token < vocabulary_size for token in prompt)
    if not (isinstance(prompt, str) or is_ids):
        raise ApiError(400, "prompt must be one text, or one list of token ids of the model", "prompt")
    return prompt


# -- answers ---------------------------------------------------------------------------------------------------------


class Chat:
    """How answers of /v1/chat/completions look.

    Attributes:
        usual: tokens of an answer whose request names no limit; None: as many as the checkpoint says.
    """

    usual = None

    def __init__(self, model: str, tools: list[dict] | None):
        self.tools, self.id = tools, f"chatcmpl-{uuid.uuid4().hex}"
        self.common = {"created": int(time.time()), "model": model}

    def show(self, text: str, finish_reason: str | None) -> tuple[str, list[dict] | None]:
        """Part what is for the reader, without white space at its ends, from the calls that the model makes.

        Args:
            text: the answer so far, without the beginning of a CALL_MARK at its end.
            finish_reason: None while it grows.
        """
        calls = read_calls(text, self.tools) if self.tools and finish_reason == "stop" else None
        if calls:
            text = CALL.sub("", text).strip()
            text = "" if text.startswith(("{", "[")) else text  # a call without marks
        elif self.tools and finish_reason is None:
            text = text.partition(CALL_MARK)[0].strip()
            text = "" if text.startswith(("{", "[")) else text  # it may become a call without marks
        return text.strip(), calls

    def whole(self, text: str, calls: list[dict] | None, finish_reason: str) -> dict:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {"id": self.id, "object": "chat.completion", **self.common, "choices": [choice]}

    def chunk(self, delta: dict | None, finish_reason: str | None = None) -> dict:
        """A piece of a streamed answer; without delta the one that brings the usage."""
        choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]
        choices = [] if delta is None else choices
        return {"id": self.id, "object": "chat.completion.chunk", **self.common, "choices": choices}

    def first(self) -> list[dict]:
        """The pieces before any text."""
        return [self.chunk({"role": "assistant", "content": ""})]

    def part(self, text: str) -> dict:
        """A piece with text."""
        return self.chunk({"content": text})

    def last(self, calls: list[dict] | None, finish_reason: str) -> list[dict]:
        """The pieces after all text."""
        end = self.chunk({}, finish_reason)
        return (
            [self.chunk({"tool_calls": [{"index": n, **call} for n, call in enumerate(calls)]}), end]
            if calls
            else [end]
        )


class Completion:
    """How answers of /v1/completions look; its methods are those of Chat."""

    tools, usual = None, 16  # as OpenAI's API has it

    def __init__(self, model: str):
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.common = {"object": "text_completion", "created": int(time.time()), "model": model}

    def show(self, text: str, finish_reason: str | None) -> tuple[str, None]:
        return text, None

    def whole(self, text: str, calls: None, finish_reason: str) -> dict:
        return self.chunk(text, finish_reason)

    def chunk(self, text: str | None, finish_reason: str | None = None) -> dict:
        choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}]
        return {"id": self.id, **self.common, "choices": [] if text is None else choices}

    def first(self) -> list[dict]:
        return []

    def part(self, text: str) -> dict:
        return self.chunk(text)

    def last(self, calls: None, finish_reason: str) -> list[dict]:
        return [self.chunk("", finish_reason)]


def read_calls(text: str, tools: list[dict]) -> list[dict] | None:
    """Read the calls that an answer makes; None if it makes none, or broken ones, which are text.

    A call is JSON with name and arguments between marks, as template.py and Qwen write it. Llama 3.1 and Mistral write
    no marks (or ones that are control tokens): then the whole answer is JSON that calls functions among `tools`.
    """
    blocks, offered = CALL.findall(text), {tool["function"].get("name") for tool in tools}
    calls = []
    try:
        found = [json.loads(block) for block in blocks] if blocks else json.loads(text)
        for call in found if isinstance(found, list) else [found]:
            if not (blocks or call["name"] in offered):
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return calls or None
