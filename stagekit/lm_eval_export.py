"""Measured tasks as files for EleutherAI's lm-evaluation-harness (0.4), so that anyone can check the numbers with it.

Prompts are written as rendered, to the last blank and control token: the harness tokenises them to the ids measured
here, and applies neither a chat template nor shots of its own. What it would tokenise otherwise is left out and
counted.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from stagekit.generation import LoadedModel, model_arguments
from stagekit.journal import write_lines, write_whole
from stagekit.likelihood import text_windows
from stagekit.tokenization import Chat

CHOICE = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
TITLE = "# Tasks for lm-evaluation-harness"
TEXT = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
num_fewshot: 0
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1
"""


@dataclass(frozen=True)
class Exported:
    """A task that was written; `max_length` is the window of running text, None for choices."""

    task: str
    num: int
    left_out: int
    compare: str
    max_length: int | None = None


def task_name(name: str) -> str:
    """A name for the harness, which has thousands of tasks of its own."""
    return "stagekit_" + re.sub(r"\W+", "_", name)


def export_choices(
    directory: Path, name: str, chat: Chat, items: list[tuple[list[dict], list[int], list[str], list[list[int]], str]]
) -> Exported:
    """Write multiple-choice questions.

    Args:
        directory: where the files go.
        name: of the benchmark.
        chat: what load_chat returned.
        items: (messages, ids of the prompt, candidates, ids of each of them, right candidate).
    """
    task, lines = task_name(name), []
    for messages, prompt_ids, candidates, ids, answer in items:
        prompt = _render(chat, messages, add_generation_prompt=True)
        texts = [_continuation(chat, messages, prompt, text, own) for text, own in zip(candidates, ids, strict=True)]
        if all(_is_same(chat, prompt, prompt_ids, text, own) for text, own in zip(texts, ids, strict=True)):
            lines.append({"prompt": prompt, "choices": texts, "gold": candidates.index(answer)})
    write_lines(directory / f"{task}.jsonl", lines)
    write_whole(directory / f"{task}.yaml", CHOICE.format(task=task))
    return Exported(task, len(lines), len(items) - len(lines), "acc is accuracy_loglikelihood")


def _render(chat, messages, add_generation_prompt):
    return chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _continuation(chat, messages, prompt, answer, ids):
    """The text that follows the prompt: the answer, and the end-of-turn where it was scored."""
    full = _render(chat, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    text = full[len(prompt) :]
    end = text.rfind(chat.end_of_turn)
    return text[: end + len(chat.end_of_turn)] if ids[-1] == chat.stop_ids[0] else text[:end]


def _is_same(chat, prompt, prompt_ids, text, ids):
    """Whether plain tokenisation gives the ids that were measured, also where the harness moves blanks.

    It counts white space at the end of a prompt to the answer: the same for all candidates, so their order stays.
    """
    whole = _plain_ids(chat, prompt + text)
    before = _plain_ids(chat, prompt.rstrip())
    return whole == prompt_ids + ids and whole[: len(before)] == before


def _plain_ids(chat, text):
    return chat.tokenizer.encode(text, add_special_tokens=False)


def export_text(directory: Path, name: str, chat: Chat, texts: list[str], max_length: int) -> Exported:
    """Write documents whose perplexity per byte is measured in windows of max_length tokens."""
    task, lines = task_name(name), []
    for text in texts:
        ((_, ids),) = text_windows(chat.tokenizer, text, 2**40, 2**40)
        if ids == _plain_ids(chat, text):
            lines.append({"text": text})
    write_lines(directory / f"{task}.jsonl", lines)
    write_whole(directory / f"{task}.yaml", TEXT.format(task=task))
    compare = (
        f"byte_perplexity is perplexity_per_byte; longer documents need --stride {max_length} when measuring here"
    )
    return Exported(task, len(lines), len(texts) - len(lines), compare, max_length)


def write_readme(directory: Path, exported: list[Exported], loaded: LoadedModel, tokenizer: str) -> None:
    """Write README.md with the commands that measure the exported tasks with the harness."""
    tasks = "\n".join(
        f"- `{item.task}`: {item.num} items"
        + (f", {item.left_out} left out, which it would tokenise otherwise" if item.left_out else "")
        + f"; {item.compare}"
        for item in exported
    )
    commands = "\n".join(
        command(loaded, tokenizer, [item.task for item in exported if item.max_length == max_length], max_length)
        for max_length in dict.fromkeys(item.max_length for item in exported)
    )
    text = f"""{TITLE}

{tasks}

Prompts are complete: chat template, control tokens and shots are in the text. Apply none of them again. Run it in this
directory, for the tasks name their files relative to it:

    pip install "lm-eval[hf]>=0.4.13,<0.5"
{commands}
{why_merge(loaded)}
A set of several letters ends with the end-of-turn token: only so can sets of different sizes be compared. The harness
counts the white space at a prompt's end to the answers, so its log-likelihoods differ from those in the results by a
constant for each question. Generated answers are not exported: how they are read decides the number.
"""
    write_whole(directory / "README.md", text)


def why_merge(loaded: LoadedModel) -> str:
    """Why the harness cannot put this adapter on its base, as a paragraph; empty where it can, or there is none."""
    if not loaded.source.adapter:
        return ""
    rows, tokens = loaded.model.get_input_embeddings().weight.shape[0], len(loaded.chat.tokenizer)
    if loaded.source.merged:
        reason = "the adapter stands on a base with other adapters merged into it, which the harness cannot do"
    elif rows != tokens:
        reason = (
            f"the harness would first cut the base's {rows} embeddings to the tokenizer's {tokens} tokens, which is "
            "another model than the adapter was trained on"
        )
    else:
        return ""
    return f"\n`MERGED_MODEL`: {reason}.\nMake one model of both with `python -m tools.merge_adapter`.\n"


def command(loaded: LoadedModel, tokenizer: str, tasks: list[str], max_length: int | None) -> str:
    """The harness' command line for some tasks."""
    source, merged = loaded.source, bool(why_merge(loaded))
    arguments = {"pretrained": "MERGED_MODEL" if merged else _absolute(source.base)}
    revision = model_arguments(source).model_revision
    arguments |= {"revision": revision} if revision and not merged else {}
    arguments |= {"peft": _absolute(source.adapter)} if source.adapter and not merged else {}
    arguments |= {"tokenizer": _absolute(tokenizer), "dtype": str(loaded.model.dtype).removeprefix("torch.")}
    arguments |= {"add_bos_token": "False", **({"max_length": str(max_length)} if max_length else {})}
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(loaded.model, f"is_{name.replace('load', 'loaded')}", False):
            arguments[name] = "True"
    given = shlex.quote(",".join(f"{name}={value}" for name, value in arguments.items()))
    return (
        f"    lm_eval run --model hf --include_path . --tasks {','.join(tasks)} --batch_size 8 \\\n"
        f"        --model_args {given} --output_path results --log_samples"
    )


def _absolute(name):
    return str(Path(name).resolve()) if Path(name).is_dir() else name
