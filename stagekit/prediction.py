"""Predictions: read the questions of files, keep what is answered, write the answers in the order of the questions.

Serves inference.py (one process) and inference_multigpu_demo.py (several). Imports no torch by itself: which GPUs a
process sees is settled after its questions were read, and before torch looks.
"""

import argparse
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from stagekit.choices import answer_text, is_choice, question_text
from stagekit.comparisons import is_ranking
from stagekit.dialogues import MESSAGE_KEYS, ROLES
from stagekit.fields import PROMPT_KEYS
from stagekit.files import file_type, find_files, read_records, read_text
from stagekit.formats import to_canonical
from stagekit.journal import Journal
from stagekit.records import Choice, Message, Preference, Question, Ranking, RowError, Rubric, Text, Tree

logger = logging.getLogger(__name__)

T = TypeVar("T")
ANSWER_FIELDS = ("answer", "output", "response", "completion")


# -- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A question of a data file: messages ending with user or tool, and the answer that stood there."""

    messages: list[dict]
    tools: list[dict] | None
    reference: str | None
    origin: str


def questions_of(data_file: str, read: Callable[[object], T]) -> list[tuple[T, str]]:
    """Read every question of a file or a directory; in .txt each line is one.

    Args:
        read: makes what is wanted of a record, such as {"question": …}, or raises RowError.

    Returns:
        [(what `read` returned, "file:line")].

    Raises:
        FileNotFoundError: no such file.
        ValueError: records that hold no question; the first ten are named by file and line.
    """
    found, errors = [], []
    for path in find_files(data_file):
        records = read_records(path)
        if file_type(path) == ".txt":
            lines = enumerate(read_text(path).split("\n"), 1)
            records = (({"question": line.strip()}, number) for number, line in lines if line.strip())
        for record, number in records:
            try:
                if isinstance(record, RowError):
                    raise record
                found.append((read(record), f"{path}:{number}"))
            except RowError as error:
                errors.append(f"{path}:{number}: {error}")
    if errors:
        raise ValueError("\n".join(errors[:10]) + (f"\n… and {len(errors) - 10:,} more" if len(errors) > 10 else ""))
    return found


def read_prompts(data_file: str, system_prompt: str | None) -> list[Prompt]:
    """Read the prompts of a file or a directory; those without a system message get the one given.

    Raises:
        FileNotFoundError, ValueError: as questions_of does.
    """
    prompts = []
    for (messages, tools, reference), origin in questions_of(data_file, read_prompt):
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        prompts.append(Prompt(messages, tools, reference, origin))
    return prompts


def read_prompt(record: object) -> tuple[list[dict], list[dict] | None, str | None]:
    """Read (prompt messages, tools, reference answer) from a record of any conversation or prompt format."""
    answered = True
    compared = isinstance(record, dict) and {"chosen", "chosen_messages", "response_chosen"} & record.keys()
    if isinstance(record, dict) and not compared and not is_ranking(record) and not is_choice(record):
        record, answered = _with_answer(record)
    canonical = to_canonical(record)[0]
    if isinstance(canonical, Ranking):
        canonical = canonical.pairs()[0]
    if isinstance(canonical, Text):
        raise RowError("running text holds no question; expected messages, question, instruction or prompt")
    if isinstance(canonical, Tree | Message):
        raise RowError("a tree of messages holds many questions; expected one question a record")
    if isinstance(canonical, Choice):
        messages, tools = [{"role": "user", "content": question_text(canonical)}], None
        reference = answer_text(canonical)
    elif isinstance(canonical, Question | Rubric):
        messages, tools = canonical.prompt, None
        reference = canonical.solution if isinstance(canonical, Question) else canonical.answer
    elif isinstance(canonical, Preference):
        messages, tools, reference = canonical.prompt, canonical.tools, canonical.chosen[-1]["content"]
    else:
        messages, tools, last = canonical.messages[:-1], canonical.tools, canonical.messages[-1]
        calls = [call["function"] for call in last.get("tool_calls", [])]
        reference = last["content"] or json.dumps(calls, ensure_ascii=False)
    return messages, tools, (reference or None) if answered else None


def _with_answer(record):
    """Return (record with an answer, whether it had one): a bare prompt gets a placeholder."""
    key = next((name for name in (*MESSAGE_KEYS, *PROMPT_KEYS) if name in record), None)
    asked, rest = record.get(key), {name: value for name, value in record.items() if name != key}
    if isinstance(asked, list) and asked and isinstance(asked[-1], dict):
        open_end = ROLES.get(str(asked[-1].get("from", asked[-1].get("role"))).lower()) in ("user", "tool")
        placeholder = [{"role": "assistant", "content": "…"}] if open_end else []
        return {**rest, "messages": [*asked, *placeholder]}, not open_end
    if key not in PROMPT_KEYS:
        return record, True
    name = next((name for name in ANSWER_FIELDS if record.get(name) not in (None, "")), None)
    answer = "…" if name is None else record[name]
    if not isinstance(answer, (str, int, float)):
        raise RowError(f"field {name!r} must be a string, got {type(answer).__name__}")
    if key == "instruction":
        return {**rest, "instruction": asked, "output": str(answer)}, name is not None
    return {**rest, "question": asked, "answer": str(answer)}, name is not None


# -- answers ---------------------------------------------------------------------------------------------------------


def describe_run(args: argparse.Namespace, source, chat, prompts: list[Prompt]) -> dict:
    """All that decides what the answers are: questions, model, template, settings; the header of a journal."""
    from stagekit.generation import model_fingerprints

    names = (
        "system_prompt",
        "max_new_tokens",
        "temperature",
        "top_p",
        "repetition_penalty",
        "load_in_4bit",
        "load_in_8bit",
    )
    questions = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return {
        "data_file": hashlib.sha256(questions.encode()).hexdigest(),
        "model": model_fingerprints(source),
        "template": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
        **{name: getattr(args, name) for name in names},
    }


def open_journal(output_file: str, header: dict, part: str = "") -> Journal:
    """Start a journal, or continue the one an interrupted run of the same questions, model and settings left.

    Args:
        output_file: where the answers go; the journal is OUTPUT_FILE.partial and `part`.
        header: what describe_run returned.

    Raises:
        ValueError: it is of another run, or --output_file is a directory.
    """
    if Path(output_file).is_dir():
        raise ValueError(f"--output_file {output_file} is a directory; name a file in it")
    Path(output_file).absolute().parent.mkdir(parents=True, exist_ok=True)
    return Journal(Path(f"{output_file}.partial{part}"), header)


def predict(loaded, settings, prompts: list[Prompt], journal: Journal, args: argparse.Namespace) -> None:
    """Answer every question that the journal does not hold yet, longest first, and write the output file.

    Raises:
        ValueError: the template refuses a question, or not even one answer at a time fits into memory.
    """
    waiting = [index for index in range(len(prompts)) if index not in journal.rows]
    num_shortened = answer_prompts(loaded, settings, prompts, waiting, journal, args.batch_size, len(prompts))
    journal.finish(args.output_file)
    report(args.output_file, journal.rows, num_shortened)


def answer_prompts(
    loaded, settings, prompts: list[Prompt], waiting: list[int], journal: Journal, batch_size: int, total: int | None
) -> int:
    """Answer some questions, longest first, and put each answer into the journal as soon as it is there.

    Args:
        waiting: their places in `prompts`.
        total: questions that the progress bar speaks of, those that are answered included; None shows no bar.

    Returns:
        How many were asked without their oldest exchanges.

    Raises:
        ValueError: the template refuses a question, or not even one answer at a time fits into memory.
    """
    from tqdm import tqdm

    from stagekit.generation import Answer, generate_batch, prompt_limit, run_in_batches
    from stagekit.prompts import fit_history, last_question

    def add(index, answer):
        prompt = prompts[index]
        row = {"index": index, "input": last_question(prompt.messages), "messages": prompt.messages}
        row["prediction"] = answer.text
        if prompt.reference is not None:
            row["reference"] = prompt.reference
        journal.add({**row, "finish_reason": answer.finish_reason, "new_tokens": answer.num_tokens})

    fitting, num_shortened = [], 0
    for index in waiting:
        prompt = prompts[index]
        try:
            fitted = fit_history(loaded.chat, prompt.messages, prompt_limit(loaded, settings), prompt.tools)
        except RowError as error:
            raise ValueError(f"{prompt.origin}: {error}") from None
        if fitted is None:
            add(index, Answer("", "prompt_too_long", 0))
        else:
            fitting.append((index, fitted[1]))
            num_shortened += len(fitted[0]) < len(prompt.messages)
    fitting.sort(key=lambda item: -len(item[1]))  # longest first: what does not fit the memory fails at once
    done = 0 if total is None else total - len(fitting)
    with tqdm(total=total, initial=done, unit="question", disable=total is None) as progress:

        def answer(batch):
            return generate_batch(loaded, [fitting[place][1] for place in batch], settings)

        for batch, answers in run_in_batches(len(fitting), batch_size, answer):
            for place, given in zip(batch, answers, strict=True):
                add(fitting[place][0], given)
            progress.update(len(batch))
    return num_shortened


def report(output_file: str, rows: dict[int, dict], num_shortened: int) -> None:
    """Say what was written, and which answers are not what they could be."""
    reasons = Counter(row["finish_reason"] for row in rows.values())
    logger.info("%s: %d answers", output_file, len(rows))
    if reasons["length"]:
        longest = max(row["new_tokens"] for row in rows.values())
        logger.info("%d cut off after --max_new_tokens %d", reasons["length"], longest)
    if num_shortened:
        logger.info("%d asked without their oldest exchanges, which do not fit the model's context", num_shortened)
    if reasons["prompt_too_long"]:
        logger.warning(
            "%d not asked: longer than the model's context (finish_reason prompt_too_long)", reasons["prompt_too_long"]
        )
