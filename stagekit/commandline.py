"""The command line of programs that answer questions: errors in one line, flags they share. Standard library only.

Stages, whose arguments are transformers' as well, have arguments.parse_args instead.
"""

import argparse
import contextlib
import difflib
import ipaddress
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

SHARD_SIZE = "5GB"
LEAST_TEMPERATURE = 1e-4  # above 0; logits divided by much less are infinite, and their softmax is no number


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations, whose errors are one line and name the nearest known flag."""

    def __init__(self, prog: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=form, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show tracebacks (also STAGEKIT_DEBUG=1)")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            nearest = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            self.error(f"unknown {'flag' if unknown[0].startswith('-') else 'argument'} {unknown[0]}{hint}")
        return parsed


def add_switch(group, name: str, text: str) -> None:
    """Declare a flag that is False by default, and True bare or with a value that says so."""
    group.add_argument(name, nargs="?", const=True, default=False, type=_boolean, metavar="True|False", help=text)


def _boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def add_model_flags(group, gpus: str = "the layers are spread over them") -> None:
    """Declare which model answers, and how it is loaded; `gpus` says what happens on several GPUs."""
    group.add_argument("--base_model", help="model directory, hub name, or a stage's directory")
    group.add_argument("--lora_model", help="adapter directory, such as outputs/sft; it knows its base and template")
    group.add_argument("--tokenizer_path", help="tokenizer, if not the one saved with the adapter or the model")
    group.add_argument(
        "--template_name", help="prompt template of template.py; default: the tokenizer's chat template"
    )
    add_switch(group, "--resize_emb", "add embedding rows when the tokenizer has more tokens than the model")
    add_switch(group, "--load_in_4bit", "quantise the base to NF4: a quarter of the memory, slightly other answers")
    add_switch(group, "--load_in_8bit", "quantise the base to int8: half of the memory")
    add_switch(group, "--only_cpu", "use no GPU (fp32)")
    group.add_argument("--gpus", help=f'GPUs to use, such as "0" or "0,1": {gpus}; default: all')


def add_prediction_flags(group) -> None:
    """Declare which questions are answered, and where the answers go."""
    group.add_argument(
        "--data_file",
        help="file or directory of questions: .txt has one a line; .jsonl and .json any conversation, instruction, "
        "question or preference format, where a last answer is the reference and not shown to the model",
    )
    group.add_argument(
        "--output_file",
        help="where the answers go, default predictions.jsonl (replaced if it exists). Until all are there they "
        "stand in OUTPUT_FILE.partial, from which the same command continues after an interruption",
    )
    group.add_argument("--system_prompt", help="system message of conversations that bring none")
    group.add_argument("--batch_size", type=int, help="questions answered at once, default 4")


def add_generation_flags(group, temperature: str) -> None:
    """Declare how tokens are chosen; `temperature` is the help of that flag, whose default differs."""
    group.add_argument(
        "--max_new_tokens", type=int, help="longest answer in tokens, 512 or half of the model's context"
    )
    group.add_argument("--temperature", type=float, help=temperature)
    group.add_argument("--top_p", type=float, help="sample among the likeliest tokens of this total probability: 0.9")
    group.add_argument("--repetition_penalty", type=float, help="above 1: avoid tokens that were used before: 1.0")


def add_shard_flag(group, kind: str = "") -> None:
    """Declare how large a file of weights may be; `kind` begins its help."""
    group.add_argument("--max_shard_size", help=f"{kind}largest weight file, default {SHARD_SIZE}")


def loading_options(args: argparse.Namespace) -> dict:
    """What generation.load_for_generation takes of add_model_flags' flags."""
    return {name: getattr(args, name) for name in ("only_cpu", "resize_emb", "load_in_4bit", "load_in_8bit")}


def sampling_options(args: argparse.Namespace) -> dict:
    """What generation.choose_settings takes of add_generation_flags' flags; None where one was not given."""
    return {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "repetition_penalty")}


def check_model_is_named(args: argparse.Namespace, parser: Parser) -> None:
    """End the program where add_model_flags' flags name no model."""
    if not (args.base_model or args.lora_model):
        parser.error("--base_model or --lora_model is missing: name a model, or a directory that a stage wrote")


def check_prediction_flags(args: argparse.Namespace, parser: Parser) -> None:
    """End the program where the flags of what answers questions cannot work; complete add_prediction_flags' flags."""
    check_flags(args, parser, ("max_new_tokens", "batch_size", "repetition_penalty"))
    check_model_is_named(args, parser)
    for name, default in (("output_file", "predictions.jsonl"), ("batch_size", 4)):
        if args.data_file and getattr(args, name) is None:
            setattr(args, name, default)


def is_temperature(value: float) -> bool:
    """Whether answers can be drawn at it; 0 takes the likeliest token."""
    return value == 0 or value >= LEAST_TEMPERATURE


def check_flags(args: argparse.Namespace, parser: Parser, positive: tuple[str, ...]) -> None:
    """End the program where values of shared flags cannot work; `positive` names the flags that must be above 0."""
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)} must be above 0")
    temperature, top_p, shard_size = (getattr(args, name, None) for name in ("temperature", "top_p", "max_shard_size"))
    if temperature is not None and not is_temperature(temperature):
        parser.error(f"--temperature {temperature} must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
    if top_p is not None and not 0 < top_p <= 1:
        parser.error(f"--top_p {top_p} must be above 0 and at most 1")
    if shard_size is not None and not re.fullmatch(r"\d+(\.\d+)? ?([KMGT]I?)?B", shard_size.upper()):
        parser.error(f"--max_shard_size {shard_size!r} is no size such as 5GB or 500MB")
    for first, second in (("only_cpu", "gpus"), ("load_in_4bit", "load_in_8bit")):
        if getattr(args, first, None) and getattr(args, second, None):
            parser.error(f"--{first} and --{second} exclude each other; give one")


def choose_gpus(only_cpu: bool, gpus: str | None) -> None:
    """Let this process see the GPUs it was given; torch, which looks once, must not be imported before.

    Raises:
        ValueError: there are fewer.
    """
    if only_cpu or gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if only_cpu else gpus
    import torch

    if gpus and torch.cuda.device_count() < gpus.count(",") + 1:
        raise ValueError(f"--gpus {gpus}: {torch.cuda.device_count()} of these GPUs can be used here")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_loopback(host_header: str) -> bool:
    """Whether a request's Host header calls this machine by its own name.

    A web page whose name leads to 127.0.0.1 (DNS rebinding) stands there with that name.
    """
    with contextlib.suppress(ValueError):
        return is_loopback(urlsplit(f"//{host_header}").hostname or "")
    return False


def converse(greeting: str, answer: Callable[[str, Callable, bool], None], forget: Callable[[], None]) -> None:
    """Talk until `exit` or end of input. Without a terminal stdout gets the answers and stderr everything else.

    Args:
        greeting: the first line.
        answer: given the user's line, say(text, end) for whatever is no answer, and whether this is a terminal.
        forget: begins a new conversation.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then has line editing and a history)
    for channel in (sys.stdin, sys.stdout):
        channel.reconfigure(errors="replace")

    def say(text, end="\n"):
        print(text, end=end, file=sys.stdout if terminal else sys.stderr, flush=True)

    say(greeting)
    say("`clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer.")
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
                forget()
                say("(the conversation is forgotten)")
            elif line:
                answer(line, say, terminal)
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(`exit` or Ctrl-D leaves)")


def make_directory(name: str, flag: str) -> Path:
    """Make a directory that a flag names.

    Raises:
        ValueError: there is something else of that name.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {name} is no directory")
    path.mkdir(parents=True, exist_ok=True)
    return path


def command_line(program: str) -> str:
    """What was typed, as a shell takes it again; `program` is its beginning, such as "python -m tools.report"."""
    return shlex.join([*program.split(), *sys.argv[1:]])


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str, if_interrupted: str) -> None:
    """Run a program's main(): what a user can mend is one line and an exit code; --debug shows the traceback.

    The code is 2, or what an error has as `exit_code`.
    """
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    for name in ("stagekit", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        main(args)
    except (ValueError, OSError) as error:
        if args.debug or os.environ.get("STAGEKIT_DEBUG"):
            traceback.print_exc()
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        print(f"interrupted{if_interrupted}", file=sys.stderr)
        sys.exit(130)
