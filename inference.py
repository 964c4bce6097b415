"""Ask a trained model: chat in the terminal, or answer a file of questions.

Reads a directory that a stage wrote (or any model), and nothing else: base, adapter, chat template and stop tokens are
found there. --interactive talks, --data_file FILE writes one line of JSON for every question.

    python inference.py --lora_model outputs/sft --interactive
    python inference.py --lora_model outputs/sft --data_file data/eval/questions.jsonl --output_file predictions.jsonl
"""

import argparse
import contextlib

from stagekit.commandline import (
    Parser,
    add_generation_flags,
    add_model_flags,
    add_prediction_flags,
    add_switch,
    check_prediction_flags,
    choose_gpus,
    converse,
    loading_options,
    run,
    sampling_options,
)
from template import get_template


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("inference.py", __doc__)
    add_model_flags(parser.add_argument_group("model (--base_model or --lora_model is enough)"))
    task = parser.add_argument_group("task (one of the first two)")
    add_switch(task, "--interactive", "chat: `clear` forgets the conversation, `exit` leaves, Ctrl-C stops an answer")
    add_prediction_flags(task)
    add_generation_flags(
        parser.add_argument_group("generation (default: the checkpoint's generation_config.json, else as named here)"),
        temperature="0 takes the likeliest token; --data_file: 0, --interactive: the checkpoint's, else 0.7",
    )

    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    check_prediction_flags(args, parser)
    if bool(args.interactive) == bool(args.data_file):
        parser.error("give one of --interactive (chat) and --data_file FILE (answer its questions)")
    for name in ("output_file", "batch_size"):
        if args.interactive and getattr(args, name) is not None:
            parser.error(f"--{name} belongs to --data_file; a chat has none")


def main(args: argparse.Namespace) -> None:
    """Read the questions, load the model, answer."""
    if args.template_name:
        get_template(args.template_name)
    if not args.interactive:
        from stagekit import prediction

        prompts = prediction.read_prompts(args.data_file, args.system_prompt)
    choose_gpus(args.only_cpu, args.gpus)
    from stagekit import generation

    source = generation.find_source(args.base_model, args.lora_model)
    chat = generation.load_chat(source, args.tokenizer_path, args.template_name)
    if not args.interactive:
        header = prediction.describe_run(args, source, chat, prompts)
        journal = prediction.open_journal(args.output_file, header)
    loaded = generation.load_for_generation(source, chat, **loading_options(args))
    chosen = sampling_options(args)
    if args.temperature is None and args.data_file:
        chosen["temperature"] = 0.0
    settings = generation.choose_settings(loaded, **chosen)
    if args.interactive:
        talk(loaded, settings, args.system_prompt)
    else:
        prediction.predict(loaded, settings, prompts, journal, args)


# -- chat ------------------------------------------------------------------------------------------------------------


def talk(loaded, settings, system_prompt: str | None) -> None:
    """Answer what is typed, with all that was said before."""
    from stagekit.generation import PrefixCache, prompt_limit, stream, template_name
    from stagekit.prompts import fit_history

    source, limit = loaded.source, prompt_limit(loaded, settings)
    beginning = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages, trimmed, cache = beginning, False, PrefixCache()

    def answer(line, say, terminal):
        nonlocal messages, trimmed
        fitted = fit_history(loaded.chat, [*messages, {"role": "user", "content": line}], limit)
        if fitted is None:
            say(f"(this question does not fit: beside --max_new_tokens there is room for {limit} tokens)")
            return
        if len(fitted[0]) <= len(messages) and not trimmed:
            say("(the model's context is full: from here on the oldest exchanges are forgotten)")
            trimmed = True
        text = show(stream(loaded, fitted[1], settings, cache), say, terminal)
        if text:
            messages = [*fitted[0], {"role": "assistant", "content": text}]

    def forget():
        nonlocal messages, trimmed
        messages, trimmed = beginning, False

    model = f"model {source.adapter or source.base}, base {source.base}, template {template_name(loaded)}"
    converse(f"{model}. This is no medical advice.", answer, forget)


def show(answers, say, terminal: bool) -> str:
    """Print an answer while it grows, until it ends, Ctrl-C or no memory is left; return what there is of it."""
    from stagekit.generation import OutOfMemory

    text, reason = "", None
    if terminal:
        say("Assistant: ", end="")
    with contextlib.closing(answers):
        try:
            for answer in answers:
                print(answer.text[len(text) :], end="", flush=True)
                text, reason = answer.text, answer.finish_reason
        except KeyboardInterrupt:
            reason = "stopped"
        except OutOfMemory as error:
            reason = str(error)
    print(flush=True)
    if reason != "stop":
        say("(cut off by --max_new_tokens)" if reason == "length" else f"({reason})")
    return text


if __name__ == "__main__":
    arguments = parse_args()
    kept = "; the same command continues from what is answered" if arguments.data_file else ""
    run(main, arguments, "inference.py", kept)
