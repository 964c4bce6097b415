"""From whatever a data file holds to one canonical record (records.py). Pure functions: no files, no tokens.

A record is recognised by its fields; the first adapter of ADAPTERS whose test matches reads it. To add one, write
`is_x` and `read_x` beside the others and a line in ADAPTERS, in the place its test needs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from stagekit.choices import is_choice, question_of, to_choice
from stagekit.comparisons import (
    CHOSEN_KEYS,
    RANKED_KEYS,
    REJECTED_KEYS,
    is_conversation_preference,
    is_preference,
    is_ranking,
    is_transcript_preference,
    read_conversation_preference,
    read_preference,
    read_ranking,
    read_transcript_preference,
)
from stagekit.dialogues import (
    MESSAGE_KEYS,
    check_prompt,
    check_turns,
    is_missing,
    is_number,
    read_messages,
    read_tools,
    with_system,
    with_thoughts,
)
from stagekit.fields import (
    INSTRUCTION_KEYS,
    PROMPT_KEYS,
    REFERENCE_KEYS,
    TEXT_KEYS,
    answer_of,
    any_prompt,
    assistant,
    is_conversation,
    is_stepwise,
    messages_of,
    optional_text,
    prompt_of,
    text_of,
)
from stagekit.records import (
    Canonical,
    Choice,
    Conversation,
    Message,
    Question,
    Repairs,
    RowError,
    Rubric,
    Text,
    Tree,
    Unused,
    shown,
)
from stagekit.transcripts import (
    MOSS_TURN,
    is_embedded,
    read_columns,
    read_embedded,
    read_list,
    read_moss_002,
    read_moss_003,
)
from stagekit.trees import is_tree, read_tree

MEDIA_KEYS = ("images", "videos", "audios")
# What --columns can rename a field to: every name that some adapter reads.
COLUMNS = (
    *("text", "prompt", "question", "instruction", "input", "query", "output", "response", "completion", "answer"),
    *("history", "system", "messages", "conversations", "tools", "chosen", "rejected", "margin", "answers", "ranks"),
    *("scores", "options", "explanation", "label"),
)
OPTIONAL = ("input", "history", "system", "tools", "margin", "ranks", "scores", "explanation", "label")


@dataclass(frozen=True)
class Adapter:
    """One way to read a record. `name` is what --data_format takes; `code` is the letter the docs use."""

    code: str
    name: str
    matches: Callable[[dict], bool]
    read: Callable[[dict, Repairs], Canonical]
    expects: str


def to_canonical(
    record: object,
    data_format: str = "auto",
    columns: dict[str, str] | None = None,
    first_option: int | None = None,
) -> tuple[Canonical, Repairs]:
    """Read one record of a data file.

    Args:
        record: what the file holds: a dict, or a string for a plain line of text.
        data_format: "auto" or the name of an adapter.
        columns: what parse_columns returned: the record's own field for each name that is to be renamed.
        first_option: the number of option A in the field `cop`, from choices.first_option over the whole file; a
            record that counts from 0 or from 1 does not tell which.

    Raises:
        Unused: it can be read, but there is nothing in it to learn from.
        RowError: no adapter fits, or the fitting one finds the record broken.
    """
    repairs = Repairs()
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise RowError(f"expected an object with named fields, got {type(record).__name__}")
    given = record
    if columns:
        record = rename(record, columns)
    adapter, record = _find_adapter(record, data_format)
    if adapter is None:
        known = "; ".join(adapter.expects for adapter in ADAPTERS)
        raise RowError(f"no known format has the fields {_names(given)}; expected one of: {known}")
    if not record.keys().isdisjoint(MEDIA_KEYS) and any(record.get(key) for key in MEDIA_KEYS):
        raise Unused("comes with images, sound or video", "it comes with images, sound or video; only text is learnt")
    try:
        if adapter.code == "Q":
            canonical = read_choice(record, repairs, first_option)
        else:
            canonical = adapter.read(record, repairs)
        _check_characters(vars(canonical))
    except RecursionError:
        raise RowError("it is nested too deep to be read") from None
    return canonical, repairs


def _names(record):
    names = sorted(map(str, record))
    return f"[{', '.join(map(shown, names[:20]))}]" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _find_adapter(record, data_format):
    """(adapter or None, the record as it is to be read: with lower-case names where only those match)."""
    try:
        lower = None if "".join(record).islower() else _lower_names(record)
    except TypeError:
        raise RowError("the names of its fields must be strings") from None
    if data_format != "auto":
        adapter = adapter_named(data_format)
        fits = lower is None or adapter.matches(record) or not adapter.matches(lower)
        return adapter, record if fits else lower
    *others, text = ADAPTERS  # text matches nearly anything, so it comes after the lower-case names
    for candidates in (others, (text,)):
        for names in (record, lower):
            if names is not None:
                for adapter in candidates:
                    if adapter.matches(names):
                        return adapter, names
    return None, record


def _lower_names(record):
    lower = {name.strip().lower(): value for name, value in record.items()}
    return {**lower, **{name: value for name, value in record.items() if name.islower()}}


def _check_characters(value):
    # JSON may hold half of a surrogate pair ("\ud83d", an emoji cut in two), which no tokenizer takes.
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = ord(error.object[error.start])
                text = f"it holds half a character (\\u{half:04x}), as when text is cut inside an emoji"
                raise RowError(text) from None
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_characters(name)
            _check_characters(item)
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)
    elif isinstance(value, (Tree, Message)):
        _check_characters(vars(value))


def adapter_named(name: str) -> Adapter:
    """Look an adapter up by the name --data_format takes."""
    for adapter in ADAPTERS:
        if name == adapter.name:
            return adapter
    raise ValueError(f"--data_format {name!r} is unknown; known: auto, {', '.join(a.name for a in ADAPTERS)}")


# -- columns ---------------------------------------------------------------------------------------------------------


def parse_columns(text: str | None) -> dict[str, str] | None:
    """Read --columns "prompt=问题,chosen=好" into {"prompt": "问题", "chosen": "好"}; None for nothing.

    Raises:
        ValueError: not of this form, or a name on the left that no adapter reads.
    """
    if not text or not text.strip():
        return None
    columns = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        target, equals, source = (piece.strip() for piece in part.partition("="))
        if not (target and equals and source):
            raise ValueError(f"--columns {part!r} must be NAME=FIELD, such as prompt=问题,chosen=好,rejected=坏")
        if target not in COLUMNS:
            raise ValueError(f"--columns {part!r}: {target!r} is unknown; known: {', '.join(COLUMNS)}")
        if target in columns:
            raise ValueError(f"--columns {text!r} names {target} twice")
        columns[target] = source
    return columns


def rename(record: dict, columns: dict[str, str]) -> dict:
    """Give fields the names that adapters know; a field that had such a name before gives way.

    A record with none of the fields is of another file, and stays as it is.

    Args:
        record: of a file.
        columns: {name an adapter reads: the record's own field}; OPTIONAL ones may be missing.

    Raises:
        RowError: it has some of the fields and lacks another.
    """
    found = {target: record[source] for target, source in columns.items() if source in record}
    lacking = [target for target in columns if target not in found and target not in OPTIONAL]
    if lacking and found:
        names = ", ".join(f"{columns[target]!r} (--columns {target}=…)" for target in lacking)
        raise RowError(f"there is no field {names}; it has {_names(record)}")
    used = {columns[target] for target in found}
    return {**{name: value for name, value in record.items() if name not in used}, **found}


# -- text ------------------------------------------------------------------------------------------------------------


def is_text(record):
    if "completion" in record and any(key in record for key in PROMPT_KEYS):
        return False  # an answer without its question is no running text
    if any(isinstance(record.get(key), str) for key in TEXT_KEYS) or ("text" in record and is_missing(record["text"])):
        return True
    # one string, whatever its name, beside numbers at most: a second string or a list might be what was meant
    kinds = [type(value) for value in record.values() if not is_missing(value)]
    return kinds.count(str) == 1 and all(kind in (str, int, float, bool) for kind in kinds)


def read_text(record, repairs):
    key = next((key for key in TEXT_KEYS if isinstance(record.get(key), str)), None)
    if key is None and "text" not in record:
        key = next((key for key in record if isinstance(record[key], str)), None)
    text = record.get(key or "text")
    if isinstance(text, str) and text.strip():
        return Text(text)
    if isinstance(text, str) or ("text" in record and is_missing(text)):
        raise Unused("empty text", f"field {key or 'text'!r} is empty")
    raise RowError(f"field 'text' must be a string, got {type(text).__name__}")


# -- conversations ---------------------------------------------------------------------------------------------------


def read_conversation(record, repairs):
    return _conversation(messages_of(record, repairs), record, repairs)


def _conversation(messages, record, repairs):
    """A checked dialogue; of one whose answer is marked as bad (KTO), nothing is to be learnt."""
    messages = check_turns(messages, repairs)
    if _is_marked_bad(record):
        messages = [{**m, "train": False} if m["role"] == "assistant" else m for m in messages]
    return Conversation(messages, read_tools(record))


def _is_marked_bad(record):
    for key in ("label", "kto_tag"):
        value = record.get(key)
        if value is False or (isinstance(value, str) and value.strip().lower() == "false"):
            return True
    return False


def is_list(record):
    data = record.get("data")
    if isinstance(data, list):  # a name that other kinds may use for something else
        others = record.keys() & {*MESSAGE_KEYS, *TEXT_KEYS, *PROMPT_KEYS}
        return not others and (isinstance(data[0], str) if data else len(record) == 1)
    return isinstance(record.get("input"), list) and isinstance(record.get("output"), list)


def read_dialogue_list(record, repairs):
    if isinstance(record.get("data"), list):
        messages = read_list(record["data"])
    elif isinstance(record.get("input"), list) and isinstance(record.get("output"), list):
        messages = read_columns(record["input"], record["output"])
    else:
        raise RowError("field 'data' must be a list of strings, or 'input' and 'output' lists of as many")
    if not messages:
        raise Unused("empty dialogue", "the lists of questions and answers are empty")
    return _conversation(with_system(record, messages), record, repairs)


def is_moss(record):
    text, chat = record.get("plain_text"), record.get("chat")
    if isinstance(text, str) and ("<eoh>" in text or "<eoa>" in text):
        return True
    return isinstance(chat, dict) and any(isinstance(name, str) and MOSS_TURN.fullmatch(name) for name in chat)


def read_moss(record, repairs):
    instruction = next((record[key] for key in ("prefix", "meta_instruction") if isinstance(record.get(key), str)), "")
    if isinstance(record.get("chat"), dict):
        messages = read_moss_003(record["chat"], instruction)
    else:
        messages = read_moss_002(text_of(record, "plain_text", repairs))
    if instruction.strip():
        messages = [{"role": "system", "content": instruction.strip()}, *messages]
    return _conversation(messages, record, repairs)


# -- instructions ----------------------------------------------------------------------------------------------------


def is_embedded_dialogue(record):
    return "instruction" in record and "output" in record and is_embedded(record["instruction"], record.get("input"))


def read_embedded_dialogue(record, repairs):
    asked = [optional_text(record, key, repairs) for key in ("instruction", "input")]
    messages = with_system(record, read_embedded(*asked, repairs) or [{"role": "user", "content": ""}])
    return _conversation([*messages, assistant(text_of(record, "output", repairs))], record, repairs)


def is_instruction(record):
    return any(question in record and answer in record for question, answer in INSTRUCTION_KEYS) or is_stepwise(record)


def read_instruction(record, repairs):
    if is_stepwise(record):
        return _read_steps(record, repairs)
    pairs = (pair for pair in INSTRUCTION_KEYS if pair[0] in record and pair[1] in record)
    question, answer = next(pairs, INSTRUCTION_KEYS[0])
    prompt = prompt_of(record, question, repairs)
    if isinstance(record.get(answer), (list, dict)) and question == "prompt":  # TRL's messages
        return _conversation([*prompt, *answer_of(record[answer], answer, repairs)], record, repairs)
    return _conversation([*prompt, assistant(text_of(record, answer, repairs))], record, repairs)


def _read_steps(record, repairs):
    """TRL's steps of a solution, each with whether it is right: learnt as one answer where all of them are."""
    steps, labels = record["completions"], record["labels"]
    if len(steps) != len(labels) or not all(isinstance(step, str) for step in steps):
        raise RowError("fields 'completions' and 'labels' must be lists of as many steps and whether each is right")
    if not steps or not any(step.strip() for step in steps):
        raise Unused("empty answer", "field 'completions' is empty")
    answer = "\n".join(step.strip() for step in steps if step.strip())
    marked = {**record, "label": all(label is True or label == 1 for label in labels)}
    return _conversation([*prompt_of(record, "prompt", repairs), assistant(answer)], marked, repairs)


# -- questions -------------------------------------------------------------------------------------------------------


# Fields beside a prompt that make more of it than a prompt; any other may stand there and is passed over.
MORE_THAN_A_PROMPT = {
    *(*MESSAGE_KEYS, *RANKED_KEYS, *CHOSEN_KEYS, *REJECTED_KEYS, *TEXT_KEYS),
    *("instruction", "query", "response", "output", "rubrics", "plain_text", "chat", "data", "samples"),
}


def is_question(record):
    if "question" in record:
        answered = any(key in record and not isinstance(record[key], (list, dict)) for key in REFERENCE_KEYS[:2])
        return answered or len(record) == 1
    if "open-ended verifiable question" in record and "ground-true answer" in record:
        return True
    if isinstance(record.get("qa_pairs", record.get("QA_pairs")), list):
        return True
    if len(record) == 1 and not record.keys().isdisjoint(PROMPT_KEYS):
        return True
    return isinstance(record.get("prompt"), (str, list)) and record.keys().isdisjoint(MORE_THAN_A_PROMPT)


def read_question(record, repairs):
    if isinstance(record.get("qa_pairs", record.get("QA_pairs")), list):
        return _read_case(record, repairs)
    if "open-ended verifiable question" in record:
        key, name = "open-ended verifiable question", "ground-true answer"
    else:
        key = next((key for key in ("question", *PROMPT_KEYS) if key in record), "question")
        name = next((name for name in REFERENCE_KEYS if name in record), None)
    if name and key == "prompt" and _is_empty(record[name]):
        name = None
    if name is None and key == "question" and len(record) > 1:
        name = "answer"  # which is missing
    prompt = any_prompt(record, repairs) if key == "prompt" else prompt_of(record, key, repairs)
    solution = text_of(record, name, repairs) if name else ""
    return Question(check_prompt(prompt, repairs), _final(solution), solution)


def _is_empty(value):
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def _final(solution):
    """The answer that gsm8k sets apart: the reasoning, then a last line "#### 1,234"."""
    before, mark, last = solution.rpartition("####")
    answer = last.strip()
    if not mark or not answer or "\n" in answer or (before and not before.endswith("\n")):
        return solution
    return re.sub(r"(?<=\d),(?=\d{3})", "", answer)


def _read_case(record, repairs):
    """A case with several questions (CMB-Clin) as one dialogue; the case stands before the first."""
    pairs = record.get("qa_pairs", record.get("QA_pairs"))
    case = record.get("description")
    case = case.strip() if isinstance(case, str) else ""
    messages = []
    for pair in pairs:
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("question", "solution")):
            raise RowError("field 'QA_pairs' must be a list of objects with question and solution")
        question = f"{case}\n\n{pair['question']}" if case and not messages else pair["question"]
        messages += [{"role": "user", "content": question}, assistant(pair["solution"])]
    if not messages:
        raise Unused("empty dialogue", "field 'QA_pairs' is empty")
    return _conversation(with_system(record, messages), record, repairs)


def is_reasoning(record):
    return "question" in record and "complex_cot" in record and "response" in record


def read_reasoning(record, repairs):
    prompt = check_prompt(prompt_of(record, "question", repairs), repairs)
    answer = text_of(record, "response", repairs)
    thoughts = record.get("complex_cot")
    thoughts = thoughts if isinstance(thoughts, str) else ""
    return Question(prompt, answer, with_thoughts(thoughts, answer) if thoughts.strip() else answer)


def is_multiple_choice(record):
    return is_choice(record) or _is_undecided(record)


def _is_undecided(record):
    """PubMedQA's questions without a decision (pqa_unlabeled): the long answer is all there is."""
    context = record.get("context")
    return "question" in record and isinstance(context, dict) and "contexts" in context


def read_choice(record: dict, repairs: Repairs, first_option: int | None = None) -> Choice | Question:
    """Read a question with options, or PubMedQA's without a decision; see choices.to_choice and to_canonical."""
    if is_choice(record) or not _is_undecided(record):
        return to_choice(record, first_option, to_measure=False)
    long_answer = record.get("long_answer")
    long_answer = long_answer.strip() if isinstance(long_answer, str) else ""
    return Question([{"role": "user", "content": question_of(record)}], long_answer, long_answer)


def is_rubric(record):
    return isinstance(record.get("rubrics"), list) and isinstance(record.get("prompt"), list)


def read_rubric(record, repairs):
    if not isinstance(record.get("prompt"), list) or not isinstance(record.get("rubrics"), list):
        raise RowError("fields 'prompt' and 'rubrics' must be lists: of messages, and of criteria with their points")
    prompt = check_prompt(with_system(record, read_messages(record["prompt"], repairs)), repairs)
    rubrics = [_criterion(item) for item in record["rubrics"]]
    if not rubrics:
        raise RowError("field 'rubrics' is empty")
    data = record.get("ideal_completions_data")
    ideal = data.get("ideal_completion") if isinstance(data, dict) else None
    return Rubric(prompt, rubrics, ideal.strip() if isinstance(ideal, str) else "")


def _criterion(item):
    if not isinstance(item, dict) or not isinstance(item.get("criterion"), str) or not is_number(item.get("points")):
        raise RowError("field 'rubrics' must be a list of objects with criterion and points")
    tags = item.get("tags") if isinstance(item.get("tags"), list) else []
    return {
        "criterion": item["criterion"],
        "points": item["points"],
        "tags": [tag for tag in tags if isinstance(tag, str)],
    }


# Order matters: preferences before conversations and instructions (they carry the same fields), questions with options
# before those without, trees before bare prompts, text last.
ADAPTERS = (
    Adapter(
        "H",
        "transcript_preference",
        is_transcript_preference,
        read_transcript_preference,
        "chosen + rejected transcripts",
    ),
    Adapter(
        "S",
        "conversation_preference",
        is_conversation_preference,
        read_conversation_preference,
        "conversations + chosen + rejected",
    ),
    Adapter("P", "preference", is_preference, read_preference, "prompt|question + chosen + rejected"),
    Adapter("K", "ranking", is_ranking, read_ranking, "prompt|question + answers (best first, or with ranks|scores)"),
    Adapter("B", "rubric", is_rubric, read_rubric, "prompt + rubrics"),
    Adapter("Q", "choice", is_multiple_choice, read_choice, "question + options (+ answer, explanation)"),
    Adapter("V", "question", is_question, read_question, "question + answer, or a prompt alone"),
    Adapter("R", "reasoning", is_reasoning, read_reasoning, "Question + Complex_CoT + Response"),
    Adapter("O", "tree", is_tree, read_tree, "message_id + parent_id + role + text, or a prompt with replies"),
    Adapter("M", "moss", is_moss, read_moss, "plain_text with <eoh> and <eoa>, or chat with turn_1, …"),
    Adapter("L", "dialogue_list", is_list, read_dialogue_list, "data (a list of strings in turns)"),
    Adapter("C", "conversation", is_conversation, read_conversation, "conversations|messages (+ system, tools)"),
    Adapter(
        "E",
        "embedded_dialogue",
        is_embedded_dialogue,
        read_embedded_dialogue,
        "instruction that begins with Human:|User: + output",
    ),
    Adapter(
        "I",
        "instruction",
        is_instruction,
        read_instruction,
        "instruction (+ input) + output, or prompt + completion, or query + response",
    ),
    Adapter("T", "text", is_text, read_text, "text"),
)
