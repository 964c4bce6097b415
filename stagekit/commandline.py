"""The command line of programs that answer questions: errors in one line, flags they share. Standard library only.

Stages, whose arguments are transformers' as well, have arguments.parse_args instead.
"""

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations, whose errors are one line and name the nearest known flag."""

    def __init__(self, prog: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=form, allow_abbrev=False)

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


def add_model_flags(group) -> None:
    """Declare which model answers, and how it is loaded."""
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
    group.add_argument(
        "--gpus", help='GPUs to use, such as "0" or "0,1": the layers are spread over them; default: all'
    )


def check_flags(args: argparse.Namespace, parser: Parser, positive: tuple[str, ...]) -> None:
    """End the program where values of shared flags cannot work; `positive` names the flags that must be above 0."""
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)} must be above 0")
    if getattr(args, "top_p", None) is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p} must be above 0 and at most 1")
    for first, second in (("only_cpu", "gpus"), ("load_in_4bit", "load_in_8bit")):
        if getattr(args, first) and getattr(args, second):
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


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, prog: str, if_interrupted: str) -> None:
    """Run a program's main(): what a user can mend is one line and exit code 2; --debug shows the traceback."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    for name in ("stagekit", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        main(args)
    except (ValueError, OSError) as error:
        if args.debug or os.environ.get("STAGEKIT_DEBUG"):
            traceback.print_exc()
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted{if_interrupted}", file=sys.stderr)
        sys.exit(130)
