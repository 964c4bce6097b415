"""Ask a trained model: chat in the terminal, or answer a file of questions.

Reads a directory that a stage wrote (or any model), and nothing else: base, adapter, chat template and stop tokens are
found there. --interactive talks, --data_file FILE writes one line of JSON for every question.

    python inference.py --lora_model outputs/sft --interactive
    python inference.py --lora_model outputs/sft --data_file data/eval/questions.jsonl --output_file predictions.jsonl
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import logging
import os
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from template import get_template

logger = logging.getLogger(__name__)

ANSWER_FIELDS = ("answer", "output", "response", "completion")


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser(
        prog="inference.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def switch(group, name, text):
        group.add_argument(name, nargs="?", const=True, default=False, type=_boolean, metavar="True|False", help=text)

    model = parser.add_argument_group("model (--base_model or --lora_model is enough)")
    model.add_argument("--base_model", help="model directory, hub name, or a stage's directory")
    model.add_argument("--lora_model", help="adapter directory, such as outputs/sft; it knows its base and template")
    model.add_argument("--tokenizer_path", help="tokenizer, if not the one saved with the adapter or the model")
    model.add_argument(
        "--template_name", help="prompt template of template.py; default: the tokenizer's chat template"
    )
    switch(model, "--resize_emb", "add embedding rows when the tokenizer has more tokens than the model")
    switch(model, "--load_in_4bit", "quantise the base to NF4: a quarter of the memory, slightly other answers")
    switch(model, "--load_in_8bit", "quantise the base to int8: half of the memory")
    switch(model, "--only_cpu", "use no GPU (fp32)")
    model.add_argument(
        "--gpus", help='GPUs to use, such as "0" or "0,1": the layers are spread over them; default: all'
    )
    task = parser.add_argument_group("task (one of the first two)")
    switch(task, "--interactive", "chat: `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer")
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

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        parser.error(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} {unknown[0]}{hint}")
    _check(args, parser)
    return args


def _check(args, parser):
    for name in ("max_new_tokens", "batch_size", "repetition_penalty"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)} must be above 0")
    if args.temperature is not None and args.temperature < 0:
        parser.error(f"--temperature {args.temperature} must be 0 (greedy) or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p} must be above 0 and at most 1")
    if not (args.base_model or args.lora_model):
        parser.error("--base_model or --lora_model is missing: name a model, or a directory that a stage wrote")
    if bool(args.interactive) == bool(args.data_file):
        parser.error("give one of --interactive (chat) and --data_file FILE (answer its questions)")
    for first, second in (("only_cpu", "gpus"), ("load_in_4bit", "load_in_8bit")):
        if getattr(args, first) and getattr(args, second):
            parser.error(f"--{first} and --{second} exclude each other; give one")


def _boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def main(args: argparse.Namespace) -> None:
    """Read the questions, load the model, answer."""
    if args.template_name:
        get_template(args.template_name)
    prompts = None if args.interactive else read_prompts(args.data_file, args.system_prompt)
    if args.only_cpu or args.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if args.only_cpu else args.gpus
    from stagekit import generation  # with torch, which reads CUDA_VISIBLE_DEVICES once

    if args.gpus and generation.num_gpus() < args.gpus.count(",") + 1:
        raise ValueError(f"--gpus {args.gpus}: {generation.num_gpus()} of these GPUs can be used here")
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
    from stagekit.generation import fit_history, prompt_limit, stream

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
    messages, trimmed = beginning, False
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
            text = show(stream(loaded, fitted[1], settings), say, terminal)
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


class Journal:
    """OUTPUT_FILE.partial: a line that says of which run, then a row for every answer, as they come.

    Attributes:
        rows: what is answered, by index of the question.
    """

    def __init__(self, path: Path, header: dict):
        lines, size = [], 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    lines.append(json.loads(line) if line.endswith(b"\n") else None)
                except ValueError:
                    lines.append(None)
                if lines[-1] is None:  # torn by an interruption: what stands from here on is written again
                    lines.pop()
                    break
                size += len(line)
        if lines and lines[0] != header:
            changed = [name for name, value in header.items() if lines[0].get(name) != value]
            raise ValueError(
                f"{path} holds answers of an interrupted run with other {', '.join(changed)}; repeat that command to "
                "continue it, or delete the file, or choose another --output_file"
            )
        self.path, self.rows = path, {row["index"]: row for row in lines[1:]}
        self.file = open(path, "ab")
        self.file.truncate(size)
        if not lines:
            self._append(header)

    def add(self, row: dict) -> None:
        self.rows[row["index"]] = row
        self._append(row)

    def _append(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def finish(self, target: str) -> None:
        """Write all rows in the order of their questions, in one rename, and remove the journal."""
        lines = [json.dumps(self.rows[index], ensure_ascii=False) + "\n" for index in sorted(self.rows)]
        temporary = Path(f"{target}.tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, target)
        self.file.close()
        self.path.unlink()


def open_journal(args: argparse.Namespace, source, chat, prompts: list[Prompt]) -> Journal:
    """Start a journal, or continue the one an interrupted run of the same questions, model and settings left.

    Raises:
        ValueError: it is of another run, or --output_file is a directory.
    """
    from stagekit.checkpoint import DELIVERED, base_fingerprint, directory_files, fingerprint, stage_fingerprint

    if Path(args.output_file).is_dir():
        raise ValueError(f"--output_file {args.output_file} is a directory; name a file in it")
    Path(args.output_file).absolute().parent.mkdir(parents=True, exist_ok=True)
    if source.stage:
        model = [source.stage["base_model"].get("fingerprint"), stage_fingerprint(source.stage)]
    else:
        adapter = fingerprint(directory_files(source.adapter, DELIVERED)) if source.adapter else None
        model = [base_fingerprint(source.base), adapter]
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
        "model": model,
        "template": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
        **{name: getattr(args, name) for name in names},
    }
    return Journal(Path(f"{args.output_file}.partial"), header)


def predict(loaded, settings, prompts: list[Prompt], journal: Journal, args: argparse.Namespace) -> None:
    """Answer every question that the journal does not hold yet, longest first, and write the output file.

    Raises:
        ValueError: the template refuses a question, or a batch does not fit into memory.
    """
    import torch
    from tqdm import tqdm

    from stagekit.formats import RowError
    from stagekit.generation import Answer, fit_history, generate_batch, prompt_limit

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
        for start in range(0, len(waiting), args.batch_size):
            batch = waiting[start : start + args.batch_size]
            try:
                answers = generate_batch(loaded, [input_ids for _, input_ids in batch], settings)
            except torch.OutOfMemoryError:
                raise ValueError(
                    f"--batch_size {args.batch_size} does not fit into memory; repeat with a smaller one"
                ) from None
            for (index, _), answer in zip(batch, answers, strict=True):
                add(index, answer)
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
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    for name in ("stagekit", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        main(arguments)
    except (ValueError, FileNotFoundError) as error:
        if arguments.debug or os.environ.get("STAGEKIT_DEBUG"):
            traceback.print_exc()
        print(f"inference.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = "; the same command continues from what is answered" if arguments.data_file else ""
        print(f"interrupted{kept}", file=sys.stderr)
        sys.exit(130)
