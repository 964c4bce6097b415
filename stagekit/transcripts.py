"""From dialogues that stand in one string, or in bare lists of strings, to messages. No files.

hh ("\\n\\nHuman: … \\n\\nAssistant: …"), OpenAssistant pairs ("prompter: …\\nassistant: …"), Belle and Guanaco
("Human:…\\nAssistant:…" inside an instruction), MOSS 002 and 003, HuatuoGPT's lists. A speaker's mark counts at the
start of a line only: inside a line, "Human:" is text.
"""

import re
from itertools import pairwise

from stagekit.dialogues import ROLES
from stagekit.records import Repairs, RowError, Unused, shown

START = re.compile(r"\s*(?:(?:Human|Hum|Assistant)[:：]|(?:prompter|assistant):)")
PARAGRAPHS = re.compile(r"(?:^|\n\n)[ \t]*(Human|Hum|Assistant)[:：]")
LINES = re.compile(r"(?:^|\n)[ \t]*(Human|Hum|Assistant)[:：]")
PROMPTER = re.compile(r"(?:^|\n)(prompter|assistant):")
# Belle writes Human and Assistant; Guanaco User and System, and four spellings of Assistant.
SPEAKER = r"(Human|User|System|Ass{1,2}ist[ae]n[tz])[ \t]*[:：]"
EMBEDDED = re.compile(rf"(?:^|\n)[ \t]*{SPEAKER}")
EMBEDDED_START = re.compile(r"\s*(?:Human|User)[ \t]*[:：]")
SYSTEM_START = re.compile(r"\s*System[ \t]*[:：].*\n[ \t]*(?:Human|User)[ \t]*[:：]")
INSIDE = re.compile(SPEAKER)
LISTED = re.compile(r"\s*(问|答|患者|医生)[:：]\s*")
MOSS_002 = re.compile(r"\[(Human|MOSS)\]:|<eo[ha]>")
MOSS_TURN = re.compile(r"turn_(\d{1,6})")
MOSS_MARKS = re.compile(r"\A\s*<\|[A-Za-z ]{1,20}\|>:|<eo[hctrm]>\s*\Z")
MOSS_CALL = re.compile(r"\s*([A-Za-z_]\w{0,40})\((.*)\)\s*", re.DOTALL)


def is_transcript(text: object) -> bool:
    """Whether a text begins with a speaker's mark of hh or of OpenAssistant pairs."""
    return isinstance(text, str) and START.match(text) is not None


def read_transcript(text: str, repairs: Repairs) -> list[dict]:
    """Cut a transcript into messages, the last of them empty where it ends with an open "Assistant:".

    hh separates its turns by empty lines, and quotes dialogues inside them; where a copy has lost those (machine
    translations), the marks at line starts count.
    """
    bare = text.lstrip()
    if bare.startswith(("prompter:", "assistant:")):
        pattern = PROMPTER
    else:
        pattern = PARAGRAPHS if text.startswith("\n\n") or PARAGRAPHS.search(bare, 1) else LINES
    parts = pattern.split(bare)[1:]
    messages = []
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        if mark == "Hum":
            mark = "Human"
            repairs.note("misspelt speaker's mark read")
        messages.append({"role": ROLES[mark.lower()], "content": content.strip()})
    return messages


# -- Belle and Guanaco -----------------------------------------------------------------------------------------------


def is_embedded(instruction: object, given: object) -> bool:
    """Whether an instruction, or the input of an empty one, is a dialogue and not a text about one.

    Belle's and Guanaco's begin with the user's mark, or with a line for the system and then the user's. An
    instruction with a mark in a later line only ("Summarise:\\nHuman: …") is a task, and would be torn apart.
    """
    text = instruction if isinstance(instruction, str) and instruction.strip() else given
    return isinstance(text, str) and bool(EMBEDDED_START.match(text) or SYSTEM_START.match(text))


def read_embedded(instruction: str, given: str, repairs: Repairs) -> list[dict]:
    """Cut the dialogue before the last answer into messages.

    Args:
        instruction: the dialogue so far, or "".
        given: the field `input`: the latest turn, with or without a mark, or "".
        repairs: counts misspelt marks, and marks that lack their line break.
    """
    messages = _cut_lines(instruction, repairs) if instruction.strip() else []
    if EMBEDDED.match(given.lstrip()):
        messages += _cut_lines(given, repairs)
    elif given.strip():
        if messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += f"\n{given.strip()}"
        else:
            messages.append({"role": "user", "content": given.strip()})
    return messages


def _cut_lines(text, repairs):
    before, *parts = EMBEDDED.split(text.strip())
    turns = [("system", before.strip())] if before.strip() else []
    for mark, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append((_role(mark, repairs), content.strip()))
    if turns and turns[-1][0] == "user":  # "… any idea?Assistant:" opens the answer all the same
        *_, last = None, *INSIDE.finditer(turns[-1][1])
        if last and last.end() == len(turns[-1][1]) and last[1].startswith("As"):
            repairs.note("missing line break before a speaker's mark")
            turns[-1:] = [("user", turns[-1][1][: last.start()].strip()), ("assistant", "")]
    turns = _cut_inside(turns, repairs)
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    return [{"role": role, "content": content} for role, content in turns]


def _cut_inside(turns, repairs):
    """Where two turns of one speaker follow each other and the first holds one mark of the other, cut it there."""
    cut = []
    for turn, after in pairwise([*turns, (None, "")]):
        role, content = turn
        marks = list(INSIDE.finditer(content)) if role == after[0] else []
        if len(marks) == 1 and {role, _role(marks[0][1], Repairs())} == {"user", "assistant"}:
            repairs.note("missing line break before a speaker's mark")
            other = _role(marks[0][1], repairs)
            cut += [(role, content[: marks[0].start()].strip()), (other, content[marks[0].end() :].strip())]
        else:
            cut.append(turn)
    return cut


def _role(mark, repairs):
    if mark.startswith("Ass") and mark != "Assistant":
        repairs.note("misspelt speaker's mark read")
    return "assistant" if mark.startswith("Ass") else ROLES[mark.lower()]


# -- MOSS ------------------------------------------------------------------------------------------------------------


def read_moss_002(text: str) -> list[dict]:
    """Cut "[Human]: …<eoh> [MOSS]: …<eoa> …" into messages.

    Raises:
        RowError: something stands between a closed turn and the next.
    """
    messages, open_turn, position = [], None, 0
    for mark in MOSS_002.finditer(text):
        between = text[position : mark.start()]
        if open_turn is None and between.strip():
            raise RowError(f"plain_text holds {shown(between.strip())} outside of [Human]: …<eoh> and [MOSS]: …<eoa>")
        if mark[1] and open_turn is None:
            open_turn, position = ROLES[mark[1].lower()], mark.end()
        elif not mark[1] and open_turn and mark[0] == {"user": "<eoh>", "assistant": "<eoa>"}[open_turn]:
            messages.append({"role": open_turn, "content": between.strip()})
            open_turn, position = None, mark.end()
    if open_turn or text[position:].strip():
        raise RowError("plain_text does not end with <eoa>; the row is cut off")
    return messages


def read_moss_003(chat: dict, instruction: str) -> list[dict]:
    """Read {"turn_1": {"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"}, …}, in the order of numbers.

    A command becomes a tool call, with the thoughts that led to it in front; what it gave back, a tool's result.

    Args:
        chat: the turns; each string carries marks of its own and says None where it is not used.
        instruction: the meta instruction, which names the tools as "Calculator: enabled. API: Calculate(expression)".

    Raises:
        RowError: a turn without Human and MOSS, or a command that is none.
    """
    numbered = [(int(found[1]), turn) for name, turn in chat.items() if (found := MOSS_TURN.fullmatch(name))]
    messages = []
    for number, turn in sorted(numbered, key=lambda item: item[0]):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("Human", "MOSS")):
            raise RowError(f"turn_{number} must be an object with the strings Human and MOSS")
        said = {name: _unmarked(turn.get(name)) for name in (*turn, "Inner Thoughts", "Commands", "Tool Responses")}
        answers = [{"role": "assistant", "content": said["MOSS"]}]
        if said["Commands"]:
            calls = [_moss_call(command, instruction, number) for command in _split_commands(said["Commands"])]
            called = {"role": "assistant", "content": "", "tool_calls": calls}
            answers = [called, {"role": "tool", "content": said["Tool Responses"]}, *answers]
        if said["Inner Thoughts"]:
            answers[0]["content"] = f"<think>\n{said['Inner Thoughts']}\n</think>\n\n{answers[0]['content']}"
        messages += [{"role": "user", "content": said["Human"]}, *answers]
    return messages


def _unmarked(value):
    text = MOSS_MARKS.sub("", value).strip() if isinstance(value, str) else ""
    return "" if text == "None" else text


def _split_commands(text):
    """'Search("a"), Search("b")' as two; a comma inside an argument is followed by no name with a bracket."""
    return re.split(r"(?<=\))[,;][ \t]{0,9}(?=[A-Za-z_]\w{0,40}\()", text)


def _moss_call(command, instruction, number):
    found = MOSS_CALL.fullmatch(command)
    if not found:
        raise RowError(f'turn_{number} has the command {shown(command)}; expected NAME("…")')
    parameter = re.search(rf"\b{re.escape(found[1])}\((\w{{1,40}})\)", instruction)
    argument = found[2].strip()
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    arguments = {parameter[1] if parameter else "input": argument}
    return {"type": "function", "function": {"name": found[1], "arguments": arguments}}


# -- lists -----------------------------------------------------------------------------------------------------------


def read_list(texts: list) -> list[dict]:
    """Read ["问：…", "答：…", …]: a mark says who speaks; without one, the place does.

    Raises:
        Unused: the list is empty.
        RowError: it holds something that is no string.
    """
    if not texts:
        raise Unused("empty dialogue", "field 'data' is empty")
    messages = []
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowError(f"item {place + 1} of the dialogue is {type(text).__name__}; expected a string")
        mark = LISTED.match(text)
        role = ROLES[mark[1]] if mark else ("user", "assistant")[place % 2]
        messages.append({"role": role, "content": text[mark.end() :] if mark else text})
    return messages


def read_columns(asked: list, answered: list) -> list[dict]:
    """Read two lists of strings, questions and their answers (the chat form of Chinese-Vicuna).

    Raises:
        RowError: lists of different length, or something in them that is no string.
    """
    if len(asked) != len(answered) or not all(isinstance(text, str) for text in (*asked, *answered)):
        raise RowError("fields 'input' and 'output' must be lists of as many strings: questions and their answers")
    return [
        {"role": role, "content": text}
        for pair in zip(asked, answered, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
