"""What a model is measured on: benchmark files, each recognised as one of six tasks. No model."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stagekit.choices import first_option, is_choice, question_text, to_choice
from stagekit.data import draw_positions
from stagekit.files import file_name, file_type, find_files, read_records
from stagekit.formats import to_canonical
from stagekit.ledger import Rejected
from stagekit.prompts import Prompt, accept_prompt
from stagekit.records import Choice, Preference, Ranking, RowError, Text
from stagekit.seen_prompts import prompt_hash

TASKS = {
    "choice": "questions with options and a key",
    "pairs": "better and worse answers to one prompt",
    "text": "running text",
    "safety": "questions with phrases an answer must and must not hold",
    "questions": "questions with a free reference answer",
    "verifiable": "questions whose answer is a letter, yes or no, or a number",
}
KINDS = ("choice", "choices", "yesno", "number")  # of verifiable questions; their options stand in the question
TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Safety:
    """A question and the phrases its answer is judged by: one of every group in `must`, none of `must_not`."""

    question: str
    kind: str
    must: tuple[tuple[str, ...], ...]
    must_not: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        record: Choice, Preference or Ranking, Text, Safety or prompts.Prompt, by the task.
        origin: "file:line".
        group: the subject or kind it is counted under as well, or None.
        messages: what the model is asked; none for pairs and text.
        tools: offered to the model.
        hashes: of the texts under which training may have seen it (seen_prompts.prompt_hash).
    """

    record: Choice | Preference | Ranking | Text | Safety | Prompt
    origin: str
    group: str | None
    messages: list[dict]
    tools: list[dict] | None
    hashes: tuple[int, ...]


@dataclass
class Benchmark:
    """A file with its task; `rejected` are rows that could not be read: {"origin", "reason", "row"}."""

    name: str
    task: str
    path: Path
    items: list[Item]
    rejected: list[dict] = field(default_factory=list)

    def key(self, what: str, *numbers: int) -> str:
        """Where the journal keeps what was found for an item, or for a part of it."""
        return "/".join([self.name, what, *map(str, numbers)])


# -- files -----------------------------------------------------------------------------------------------------------


def read_benchmarks(
    data_file: str,
    task: str = "auto",
    first: int | None = None,
    on_bad_row: str = "stop",
    max_samples: int | None = None,
    seed: int = 42,
    system_prompt: str | None = None,
) -> list[Benchmark]:
    """Read files of benchmarks, each as one task.

    Args:
        data_file: files and directories, separated by commas.
        task: one of TASKS for all of them, or "auto": told by the records.
        first: the number of option A in `cop` fields; None: told by the file (choices.first_option).
        on_bad_row: "stop", or "skip" to go on without rows that cannot be read.
        max_samples: draw at most this many rows of a file.
        seed: of that draw.
        system_prompt: for items that bring none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file is named; rows that cannot be read, the first ten by file and line; files of one name.
    """
    paths = find_files(data_file)
    if not paths:
        raise ValueError(f"{data_file!r} names no file and no directory")
    names = unique_names(paths)
    found = [read_benchmark(path, name, task, first, system_prompt) for path, name in zip(paths, names, strict=True)]
    rejected = Rejected(on_bad_row != "stop")
    for row in (row for benchmark in found for row in benchmark.rejected):
        rejected.add(**row)
    rejected.check()
    for benchmark in found:
        if not benchmark.items:
            raise ValueError(f"{benchmark.path}: none of its rows could be read")
        if max_samples is not None and len(benchmark.items) > max_samples:
            drawn = draw_positions(len(benchmark.items), max_samples, seed)
            benchmark.items = [benchmark.items[place] for place in drawn]
    return found


def unique_names(paths: list[Path]) -> list[str]:
    """A name for each file: its stem, behind that of its directory where two files have the same.

    Raises:
        ValueError: that does not tell them apart either.
    """
    stems = [Path(file_name(path)).stem for path in paths]
    names = [
        stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}_{stem}"
        for path, stem in zip(paths, stems, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            both = [str(path) for path, other in zip(paths, names, strict=True) if other == name]
            raise ValueError(f"{' and '.join(both[:2])} would both be called {name}; give one of them another name")
    return names


def read_benchmark(path: Path, name: str, task: str, first: int | None, system_prompt: str | None) -> Benchmark:
    """Read one file; its first readable record says what the others must be."""
    records = list(read_records(path, columns=columns_without_names))
    readable = [record for record, _ in records if not isinstance(record, RowError)]
    if first is None:
        first = first_option(readable)
    of_file = subject_of(path) if file_type(path) in TABLES else None
    items, rejected, kept = [], [], task
    for record, line in records:
        try:
            if isinstance(record, RowError):
                raise record
            own = recognise(record) if task == "auto" else task
            if task == "auto" and items and own != kept:
                raise RowError(f"this is {TASKS[own]} ({own}) in a file of {TASKS[kept]} ({kept})")
            items.append(read_item(record, own, f"{path}:{line}", first, of_file, system_prompt))
            kept = own
        except RowError as error:
            row = None if isinstance(record, RowError) else record
            rejected.append({"origin": f"{path}:{line}", "reason": str(error), "row": row})
    return Benchmark(name, kept, path, items, rejected)


def columns_without_names(cells: list[str]) -> list[str] | None:
    """Name the columns of a table whose first row holds cells like the others, as MMLU publishes it.

    Returns:
        question, A, B, …, answer; None where the cells are names themselves.

    Raises:
        RowError: neither.
    """
    if {"question", "prompt", "text", "instruction"} & {cell.strip().lower() for cell in cells}:
        return None
    if len(cells) < 4 or not re.fullmatch("[A-K]", cells[-1].strip()):
        raise RowError("no column is called question, and it is not question, A, B, …, answer either")
    return ["question", *"ABCDEFGHIJK"[: len(cells) - 2], "answer"]


def subject_of(path: Path) -> str:
    """The subject that C-Eval, CMMLU and MMLU write into the file's name."""
    return re.sub("_(test|val|valid|validation|dev|train)$", "", Path(file_name(path)).stem)


# -- records ---------------------------------------------------------------------------------------------------------


def recognise(record: object) -> str:
    """Tell the task of a record by its fields.

    Raises:
        RowError: it fits none.
    """
    if isinstance(record, dict) and ("must" in record or "must_not" in record):
        return "safety"
    if is_choice(record):
        return "choice"
    if isinstance(record, dict) and record.get("kind") in KINDS and "question" in record:
        return "verifiable"
    canonical = to_canonical(record)[0]
    if isinstance(canonical, (Preference, Ranking)):
        return "pairs"
    return "text" if isinstance(canonical, Text) else "questions"


def read_item(
    record: object, task: str, origin: str, first: int | None, subject: str | None, system_prompt: str | None
) -> Item:
    """Read a record as an item of this task; arguments as in read_benchmark and choices.to_choice.

    Raises:
        RowError: it cannot be.
    """
    if task in ("choice", "safety"):
        found = to_choice(record, first, subject) if task == "choice" else read_safety(record)
        to_canonical(json.dumps(vars(found), ensure_ascii=False))  # refuses half characters, as in any other record
        group = found.subject if task == "choice" else found.kind
        asked = question_text(found) if task == "choice" else found.question
        hashes = tuple({prompt_hash(Text(text)) for text in (asked, found.question)})
        return Item(found, origin, group, _messages([{"role": "user", "content": asked}], system_prompt), None, hashes)
    canonical = to_canonical(record)[0]
    if task == "pairs" and isinstance(canonical, (Preference, Ranking)):
        return Item(canonical, origin, None, [], canonical.tools, (prompt_hash(canonical),))
    if task == "text" and isinstance(canonical, Text):
        return Item(canonical, origin, None, [], None, (prompt_hash(canonical),))
    if task in ("pairs", "text"):
        raise RowError(f"expected {TASKS[task]}, got a {type(canonical).__name__.lower()}")
    prompt = accept_prompt(canonical)
    if isinstance(prompt, list) or not prompt.reference.strip():
        raise RowError("there is no reference answer to compare with")
    kind = record.get("kind") if task == "verifiable" and isinstance(record.get("kind"), str) else None
    return Item(prompt, origin, kind, _messages(prompt.prompt, system_prompt), prompt.tools, (prompt_hash(prompt),))


def _messages(messages, system_prompt):
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def read_safety(record: object) -> Safety:
    """Read {"question", "kind", "must": [[phrase, …], …], "must_not": [phrase, …]}."""
    if not isinstance(record, dict):
        raise RowError(f"expected {TASKS['safety']}, got {type(record).__name__}")
    question, kind = record.get("question"), record.get("kind", "any")
    if not isinstance(question, str) or not question.strip() or not isinstance(kind, str):
        raise RowError("'question' and 'kind' must be strings, and the question not empty")
    groups, forbidden = record.get("must") or [], record.get("must_not") or []
    groups = [[group] if isinstance(group, str) else group for group in groups] if isinstance(groups, list) else None
    if groups is None or not all(_are_phrases(group) and group for group in groups) or not _are_phrases(forbidden):
        raise RowError("'must' must be a list of lists of phrases, 'must_not' a list of phrases, none of them empty")
    if not groups and not forbidden:
        raise RowError("neither 'must' nor 'must_not' holds a phrase, so nothing can be judged")
    return Safety(question, kind, tuple(map(tuple, groups)), tuple(forbidden))


def _are_phrases(value):
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def is_seen(item: Item, seen: np.ndarray) -> bool:
    """Whether training saw this prompt; `seen` is what seen_prompts.load_seen_prompts returned."""
    return bool(np.isin(np.array(item.hashes, dtype=np.uint64), seen).any())
