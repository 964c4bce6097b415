"""Ask a trained model: chat in the terminal, or answer a file of questions.

Reads a directory that a stage wrote (or any model), and nothing else: base, adapter, chat template and stop tokens are
found there. --interactive talks, --data_file FILE writes one line of JSON for every question.

    python inference.py --lora_model outputs/sft --interactive
    python inference.py --lora_model outputs/sft --data_file data/eval/questions.jsonl --output_file predictions.jsonl
"""

import argparse
import contextlib
import hashlib
import json
import logging
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from stagekit.commandline import Parser, add_model_flags, add_switch, check_flags, choose_gpus, run
from template import get_template

logger = logging.getLogger(__name__)

ANSWER_FIELDS = ("answer", "output", "response", "completion")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("inference.py", __doc__)
    add_model_flags(parser.add_argument_group("model (--base_model or --lora_model is enough)"))
    task = parser.add_argument_group("task (one of the first two)")
    add_switch(task, "--interactive", "chat: `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer")
    task.add_argument(
        "--data_file",
        help="file or directory of questions: .txt has one a line; .jsonl and .json any conversation, instruction, "
        "question or preference format, where a last answer is the reference and not shown to the model",
    )
    task.add_argument(
        "--output_file",
        default="predictions.jsonl",
        help="where the answers go, default predictions.jsonl (replaced if it exists). Until all are there they "
        "stand in OUTPUT_FILE.partial, from which the same command continues after an interruption",
    )
    task.add_argument("--system_prompt", help="system message of conversations that bring none")
    task.add_argument("--batch_size", type=int, default=4, help="questions answered at once, default 4")
    task.add_argument("--debug", action="store_true", help="show tracebacks (also STAGEKIT_DEBUG=1)")
    tokens = parser.add_argument_group(
        "generation (default: the checkpoint's generation_config.json, else as named here)"
    )
    tokens.add_argument(
        "--max_new_tokens", type=int, help="longest answer in tokens, 512 or half of the model's context"
    )
    tokens.add_argument(
        "--temperature",
        type=float,
        help="0 takes the likeliest token; --data_file: 0, --interactive: the checkpoint's, else 0.7",
    )
    tokens.add_argument("--top_p", type=float, help="sample among the likeliest tokens of this total probability: 0.9")
    tokens.add_argument("--repetition_penalty", type=float, help="above 1: avoid tokens that were used before: 1.0")

    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    check_flags(args, parser, ("max_new_tokens", "batch_size", "repetition_penalty"))
    if args.temperature is not None and args.temperature < 0:
        parser.error(f"--temperature {args.temperature} must be 0 (greedy) or more")
    if not (args.base_model or args.lora_model):
        parser.error("--base_model or --lora_model is missing: name a model, or a directory that a stage wrote")
    if bool(args.interactive) == bool(args.data_file):
        parser.error("give one of --interactive (chat) and --data_file FILE (answer its questions)")


def main(args: argparse.Namespace) -> None:
    """Read the questions, load the model, answer."""
    if args.template_name:
        get_template(args.template_name)
    prompts = None if args.interactive else read_prompts(args.data_file, args.system_prompt)
    choose_gpus(args.only_cpu, args.gpus)
    from stagekit import generation

    source = generation.find_source(args.base_model, args.lora_model)
    chat = generation.load_chat(source, args.tokenizer_path, args.template_name)
    journal = None if args.interactive else open_journal(args, source, chat, prompts)
    loaded = generation.load_for_generation(
        source,
        chat,
        only_cpu=args.only_cpu,
        resize_emb=args.resize_emb,
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
    )
    settings = generation.choose_settings(
        loaded,
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.temperature is None and args.data_file else args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    if args.interactive:
        converse(loaded, settings, args.system_prompt)
    else:
        predict(loaded, settings, prompts, journal, args)


# -- chat ------------------------------------------------------------------------------------------------------------


def converse(loaded, settings, system_prompt: str | None) -> None:
    """Talk until `exit` or end of input. Without a terminal stdout gets the answers and stderr everything else."""
    from stagekit.generation import PrefixCache, fit_history, prompt_limit, stream

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then has line editing and a history)
    for channel in (sys.stdin, sys.stdout):
        channel.reconfigure(errors="replace")

    def say(text, end="\n"):
        print(text, end=end, file=sys.stdout if terminal else sys.stderr, flush=True)

    source, limit = loaded.source, prompt_limit(loaded, settings)
    recorded = (source.stage or {}).get("template") or {}
    template = recorded.get("name", "own") if loaded.chat.name == "own" else loaded.chat.name
    say(f"model {source.adapter or source.base}, base {source.base}, template {template}. This is no medical advice.")
    say("`clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer.")
    beginning = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages, trimmed, cache = beginning, False, PrefixCache()
    while True:
        try:
            if not terminal:
                say("User: ", end="")
            line = input("User: " if terminal else "").strip()
            if not sys.stdin.isatty():  # nobody's keyboard has shown it
                say(line)
            if line.lower() == "exit":
                return
            if line.lower() == "clear":
                messages, trimmed = beginning, False
                say("(the conversation is forgotten)")
            if not line or line.lower() == "clear":
                continue
            fitted = fit_history(loaded.chat, [*messages, {"role": "user", "content": line}], limit)
            if fitted is None:
                say(f"(this question does not fit: beside --max_new_tokens there is room for {limit} tokens)")
                continue
            if len(fitted[0]) <= len(messages) and not trimmed:
                say("(the model's context is full: from here on the oldest exchanges are forgotten)")
                trimmed = True
            text = show(stream(loaded, fitted[1], settings, cache), say, terminal)
            if text:
                messages = [*fitted[0], {"role": "assistant", "content": text}]
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(`exit` or Ctrl-D leaves)")


def show(answers, say, terminal: bool) -> str:
    """Print an answer while it grows, until it ends or Ctrl-C; return what there is of it."""
    text, reason = "", None
    if terminal:
        say("Assistant: ", end="")
    with contextlib.closing(answers):
        try:
            for answer in answers:
                print(answer.text[len(text) :], end="", flush=True)
                text, reason = answer.text, answer.finish_reason
        except KeyboardInterrupt:
            reason = "interrupted"
    print(flush=True)
    if reason != "stop":
        say("(stopped)" if reason == "interrupted" else "(cut off by --max_new_tokens)")
    return text


# -- questions from files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A question of a data file: messages ending with user or tool, and the answer that stood there."""

    messages: list[dict]
    tools: list[dict] | None
    reference: str | None
    origin: str


def read_prompts(data_file: str, system_prompt: str | None) -> list[Prompt]:
    """Read every question of a file or a directory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: records that hold no question; the first ten are named by file and line.
    """
    from stagekit.data import find_files, read_records, read_text
    from stagekit.formats import RowError

    prompts, errors = [], []
    for path in find_files(data_file):
        records = read_records(path)
        if path.name.removesuffix(".gz").endswith(".txt"):
            lines = enumerate(read_text(path).split("\n"), 1)
            records = (({"question": line.strip()}, number) for number, line in lines if line.strip())
        for record, number in records:
            try:
                if isinstance(record, RowError):
                    raise record
                messages, tools, reference = read_prompt(record)
                if system_prompt and messages[0]["role"] != "system":
                    messages = [{"role": "system", "content": system_prompt}, *messages]
                prompts.append(Prompt(messages, tools, reference, f"{path}:{number}"))
            except RowError as error:
                errors.append(f"{path}:{number}: {error}")
    if errors:
        raise ValueError("\n".join(errors[:10]) + (f"\n… and {len(errors) - 10:,} more" if len(errors) > 10 else ""))
    return prompts


def read_prompt(record: object) -> tuple[list[dict], list[dict] | None, str | None]:
    """Read (prompt messages, tools, reference answer) from a record of any conversation or prompt format."""
    from stagekit.formats import Preference, Question, Ranking, RowError, Text, is_ranking, to_canonical

    answered = True
    compared = isinstance(record, dict) and {"chosen", "chosen_messages", "response_chosen"} & record.keys()
    if isinstance(record, dict) and not compared and not is_ranking(record):
        record, answered = _with_answer(record)
    canonical = to_canonical(record)[0]
    if isinstance(canonical, Ranking):
        canonical = canonical.pairs()[0]
    if isinstance(canonical, Text):
        raise RowError("running text holds no question; expected messages, question, instruction or prompt")
    if isinstance(canonical, Question):
        messages, tools, reference = canonical.prompt, None, canonical.solution
    elif isinstance(canonical, Preference):
        messages, tools, reference = canonical.prompt, canonical.tools, canonical.chosen[-1]["content"]
    else:
        messages, tools, last = canonical.messages[:-1], canonical.tools, canonical.messages[-1]
        calls = [call["function"] for call in last.get("tool_calls", [])]
        reference = last["content"] or json.dumps(calls, ensure_ascii=False)
    return messages, tools, reference if answered else None


def _with_answer(record):
    """Return (record with an answer, whether it had one): a bare prompt gets a placeholder."""
    from stagekit.formats import MESSAGE_KEYS, PROMPT_KEYS, ROLES, RowError

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


# -- answers in files ------------------------------------------------------------------------------------------------


def open_journal(args: argparse.Namespace, source, chat, prompts: list[Prompt]):
    """Start a journal, or continue the one an interrupted run of the same questions, model and settings left.

    Raises:
        ValueError: it is of another run, or --output_file is a directory.
    """
    from stagekit.generation import model_fingerprints
    from stagekit.journal import Journal

    if Path(args.output_file).is_dir():
        raise ValueError(f"--output_file {args.output_file} is a directory; name a file in it")
    Path(args.output_file).absolute().parent.mkdir(parents=True, exist_ok=True)
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
    header = {
        "data_file": hashlib.sha256(questions.encode()).hexdigest(),
        "model": model_fingerprints(source),
        "template": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
        **{name: getattr(args, name) for name in names},
    }
    return Journal(Path(f"{args.output_file}.partial"), header)


def predict(loaded, settings, prompts: list[Prompt], journal, args: argparse.Namespace) -> None:
    """Answer every question that the journal does not hold yet, longest first, and write the output file.

    Raises:
        ValueError: the template refuses a question, or not even one answer at a time fits into memory.
    """
    from tqdm import tqdm

    from stagekit.formats import RowError
    from stagekit.generation import Answer, fit_history, generate_batch, prompt_limit, run_in_batches

    def add(index, answer):
        prompt = prompts[index]
        asked = next(message["content"] for message in reversed(prompt.messages) if message["role"] == "user")
        row = {"index": index, "input": asked, "messages": prompt.messages, "prediction": answer.text}
        if prompt.reference is not None:
            row["reference"] = prompt.reference
        journal.add({**row, "finish_reason": answer.finish_reason, "new_tokens": answer.num_tokens})

    waiting, num_shortened = [], 0
    for index, prompt in enumerate(prompts):
        if index in journal.rows:
            continue
        try:
            fitted = fit_history(loaded.chat, prompt.messages, prompt_limit(loaded, settings), prompt.tools)
        except RowError as error:
            raise ValueError(f"{prompt.origin}: {error}") from None
        if fitted is None:
            add(index, Answer("", "prompt_too_long", 0))
        else:
            waiting.append((index, fitted[1]))
            num_shortened += len(fitted[0]) < len(prompt.messages)
    waiting.sort(key=lambda item: -len(item[1]))  # longest first: what does not fit the memory fails at once
    with tqdm(total=len(prompts), initial=len(prompts) - len(waiting), unit="question") as progress:

        def answer(batch):
            return generate_batch(loaded, [waiting[place][1] for place in batch], settings)

        for batch, answers in run_in_batches(len(waiting), args.batch_size, answer):
            for place, given in zip(batch, answers, strict=True):
                add(waiting[place][0], given)
            progress.update(len(batch))
    reasons = Counter(row["finish_reason"] for row in journal.rows.values())
    journal.finish(args.output_file)
    logger.info("%s: %d answers", args.output_file, len(prompts))
    if reasons["length"]:
        logger.info("%d cut off after --max_new_tokens %d", reasons["length"], settings.max_new_tokens)
    if num_shortened:
        logger.info("%d asked without their oldest exchanges, which do not fit the model's context", num_shortened)
    if reasons["prompt_too_long"]:
        logger.warning(
            "%d not asked: longer than the model's context (finish_reason prompt_too_long)", reasons["prompt_too_long"]
        )


if __name__ == "__main__":
    arguments = parse_args()
    kept = "; the same command continues from what is answered" if arguments.data_file else ""
    run(main, arguments, "inference.py", kept)
