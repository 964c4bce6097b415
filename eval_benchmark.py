r"""Measure a trained model: multiple choice, preferences, running text, safety, free and verifiable questions.

Reads   --lora_model or --base_model   a directory that a stage wrote, or any model; loaded once for all files
        --data_file                    benchmark files; what each is, its records tell:
          choice       CMB, CMExam, MedQA, MedMCQA, PubMedQA, C-Eval, CMMLU, MMLU, {"question", "options", "answer"};
                       by log-likelihood of the answers and, side by side, by generating one and reading it
          pairs        preferences and rankings; the model must be a reward model
          text         {"text"} or .txt; perplexity per token and byte
          safety       {"question", "kind", "must", "must_not"}; a check for listed phrases, no clinical judgement
          questions    {"question", "answer"} or conversations; BLEU-4, ROUGE-L, stopping, length, repetition
          verifiable   the same with "kind" choice, choices, yesno or number
Writes  --output_dir   results.json with 95 % intervals, FILE.jsonl with every answer and how it was judged

    python eval_benchmark.py --lora_model outputs/sft --data_file data/eval --output_dir outputs/sft/eval

Answers are greedy. What cannot be read counts as wrong, and is counted. The same command continues after an
interruption. Exit code 3: the files hold nothing for this kind of model.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from stagekit.commandline import (
    Parser,
    add_model_flags,
    check_flags,
    check_model_is_named,
    choose_gpus,
    command_line,
    loading_options,
    make_directory,
    run,
)
from stagekit.report_text import KINDS
from template import get_template

logger = logging.getLogger(__name__)

TASKS = ("choice", "pairs", "text", "safety", "questions", "verifiable")
MAX_NEW_TOKENS = 256
MAX_WINDOW = 4096  # tokens of running text read at once where nobody says otherwise: a long context costs much memory
# Flags that decide what is found; with files, models and template they are the header of the journal.
SETTINGS = (
    *("task", "first_option", "on_bad_row", "max_samples", "seed", "system_prompt", "num_shots", "max_new_tokens"),
    *("max_length", "stride", "tokenizer_path", "resize_emb", "load_in_4bit", "load_in_8bit", "only_cpu"),
)
LABELS = {
    "accuracy_loglikelihood": "accuracy by log-likelihood",
    "accuracy_generation": "accuracy by generation",
    "accuracy": "accuracy",
    "unparsed": "answers not readable",
    "pair_accuracy": "pairs in the right order",
    "perplexity": "perplexity per token",
    "perplexity_per_byte": "perplexity per byte",
    "bits_per_byte": "bits per byte",
    "safe": "safe by listed phrases",
    "bleu4": "BLEU-4",
    "rougeL": "ROUGE-L",
    "stop_rate": "answers that end",
    "answer_tokens": "tokens of an answer",
    "repetition": "4-grams repeated",
    "reward": "reward",
}


class NothingToMeasure(ValueError):
    """None of the files is for this kind of model; scripts/run_pipeline.sh goes on with the next one."""

    exit_code = 3


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("eval_benchmark.py", __doc__)
    add_model_flags(parser.add_argument_group("model (--base_model or --lora_model is enough)"))
    data = parser.add_argument_group("what is measured")
    data.add_argument("--data_file", help="files or directories, with commas (.jsonl .json .csv .tsv .parquet .txt)")
    data.add_argument("--output_dir", help="where results.json and the answers go; required")
    data.add_argument(
        "--task", default="auto", choices=["auto", *TASKS], help="take all files for this; default: told by records"
    )
    data.add_argument(
        "--on_bad_row",
        choices=["stop", "skip"],
        default="stop",
        help="stop: name unreadable rows and exit; skip: go on and write them to OUTPUT_DIR/rejected_rows.jsonl",
    )
    data.add_argument("--max_samples", type=int, help="at most this many rows of each file, drawn with --seed")
    data.add_argument("--seed", type=int, default=42, help="of --max_samples, default 42; nothing else is random")
    data.add_argument("--system_prompt", help="system message of questions that bring none")
    data.add_argument("--reward_model", help="directory reward_modeling.py wrote: scores the answers to questions")
    data.add_argument(
        "--export_lm_eval", help="directory to write choice and text tasks to, for lm-evaluation-harness"
    )
    choice = parser.add_argument_group("multiple choice")
    choice.add_argument("--num_shots", type=int, default=0, help="solved questions shown before each, default 0")
    choice.add_argument("--shots_file", help="where they come from; questions that are measured are never shown")
    choice.add_argument(
        "--first_option",
        type=int,
        choices=[0, 1],
        help="number of option A in MedMCQA's field cop; default: told by the file",
    )
    work = parser.add_argument_group("generation and running text")
    work.add_argument("--max_new_tokens", type=int, help="longest answer, 256 or half of the model's context")
    work.add_argument(
        "--batch_size", type=int, default=16, help="prompts at once, default 16; halved where memory runs out"
    )
    work.add_argument(
        "--max_length",
        type=int,
        help=f"window in which text is read, in tokens, default the model's context or {MAX_WINDOW}",
    )
    work.add_argument(
        "--stride", type=int, help="tokens a window of text goes on by, the others are context; default half of it"
    )
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    check_flags(args, parser, ("max_samples", "max_new_tokens", "batch_size", "max_length", "stride"))
    check_model_is_named(args, parser)
    for name, example in (("data_file", "data/eval"), ("output_dir", "outputs/sft/eval")):
        if not getattr(args, name):
            parser.error(f"--{name} is missing, such as {example}")
    if args.num_shots < 0:
        parser.error(f"--num_shots {args.num_shots} must be 0 or more")
    if bool(args.num_shots) != bool(args.shots_file):
        parser.error("--num_shots and --shots_file go together: how many solved questions to show, and from where")
    if args.stride and args.max_length and args.stride > args.max_length:
        parser.error(f"--stride {args.stride} is longer than the window, --max_length {args.max_length}")


def main(args: argparse.Namespace) -> None:
    """Read the files, load the model, ask it whatever it can be measured on, judge, write."""
    started = time.monotonic()
    if args.template_name:
        get_template(args.template_name)
    choose_gpus(args.only_cpu, args.gpus)
    from stagekit.benchmarks import read_benchmarks
    from stagekit.generation import find_source
    from stagekit.scoring import find_reward_model

    draw = {"max_samples": args.max_samples, "seed": args.seed, "system_prompt": args.system_prompt}
    benchmarks = read_benchmarks(args.data_file, args.task, args.first_option, args.on_bad_row, **draw)
    shots, shot_files = read_shots(args, benchmarks)
    files = [*benchmarks, *shot_files]
    scorer = find_scorer(args)
    source = scorer or find_source(args.base_model, args.lora_model)
    reward = find_reward_model(args.reward_model, flag="--reward_model") if args.reward_model else None
    benchmarks, skipped = choose_benchmarks(benchmarks, bool(scorer))
    check_outputs(args, files, benchmarks)
    output_dir = make_directory(args.output_dir, "--output_dir")
    from stagekit.data import REJECTED_ROWS
    from stagekit.journal import write_lines

    if rejected := [row for file in files for row in file.rejected]:
        write_lines(output_dir / REJECTED_ROWS, rejected)
        logger.warning("%d unreadable rows: %s", len(rejected), output_dir / REJECTED_ROWS)
    if scorer:
        journal, settings = ask_reward_model(args, source, benchmarks, output_dir)
    else:
        journal, settings = ask_policy(args, source, reward, benchmarks, shots, output_dir)
        if reward:
            score_questions(args, reward, benchmarks, journal)
    results = {
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line("python eval_benchmark.py"),
        "model": describe_model(args, source),
        "settings": {"data_file": args.data_file, **settings},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        "seconds": 0.0,
        "tasks": write_answers(benchmarks, journal.rows, source, output_dir),
        "skipped": skipped,
    }
    results["seconds"] = round(time.monotonic() - started, 1)
    write_results(results, output_dir)
    journal.remove()
    report(results, output_dir)


# -- what is measured ------------------------------------------------------------------------------------------------


def read_shots(args: argparse.Namespace, benchmarks: list) -> tuple[list, list]:
    """Read the solved questions of --shots_file, without those that are measured.

    Returns:
        (questions, the files they come from, read as benchmarks).

    Raises:
        ValueError: fewer than --num_shots are left.
    """
    from stagekit.benchmarks import read_benchmarks

    if not args.num_shots:
        return [], []
    measured = {number for benchmark in benchmarks for item in benchmark.items for number in item.hashes}
    files = read_benchmarks(args.shots_file, "choice", args.first_option, args.on_bad_row)
    items = [item for file in files for item in file.items]
    shots = [item.record for item in items if not measured & set(item.hashes)]
    if len(shots) < args.num_shots:
        raise ValueError(
            f"--shots_file {args.shots_file} has {len(items)} questions, of which {len(items) - len(shots)} are "
            f"measured: not enough for --num_shots {args.num_shots}"
        )
    return shots, files


def find_scorer(args: argparse.Namespace):
    """The checkpoint.Source of the model if it is a reward model, else None.

    Raises:
        ValueError: it is one, and a flag was given that only a model that writes can use.
    """
    from stagekit.arguments import ModelArguments
    from stagekit.checkpoint import resolve
    from stagekit.modeling import is_reward_model, load_config

    path = args.lora_model or args.base_model
    if not os.path.isdir(path):
        return None
    source = resolve(args.base_model, args.lora_model) if args.base_model else resolve(path)
    config = None if source.adapter else load_config(source, ModelArguments(model_name_or_path=path), scores=True)
    if not is_reward_model(source, config):
        return None
    for name in (
        *("tokenizer_path", "template_name", "resize_emb", "load_in_4bit", "load_in_8bit"),
        *("reward_model", "num_shots", "export_lm_eval"),
    ):
        if getattr(args, name):
            raise ValueError(f"--{name} is of no use here: {path} is a reward model")
    return source


def choose_benchmarks(benchmarks: list, scores: bool) -> tuple[list, dict[str, str]]:
    """Choose what this model can be measured on.

    Returns:
        (benchmarks, skipped): a reason for every file that is skipped, by its name.

    Raises:
        NothingToMeasure: nothing is left.
    """
    able = [benchmark for benchmark in benchmarks if (benchmark.task == "pairs") == scores]
    why = (
        "only pairs: a reward model scores answers and cannot write any"
        if scores
        else "no pairs: only a reward model puts answers in order; give it as --lora_model to measure them"
    )
    skipped = {benchmark.name: why for benchmark in benchmarks if benchmark not in able}
    if not able:
        raise NothingToMeasure(f"{benchmarks[0].path}: nothing to measure; {why}")
    return able, skipped


def check_outputs(args: argparse.Namespace, files: list, benchmarks: list) -> None:
    """Look, before any model is loaded, whether what will be written can be, and replaces nothing of the user's.

    Args:
        args: all of the flags.
        files: everything that was read.
        benchmarks: what will be measured of it.

    Raises:
        ValueError: an output would replace a file that is read, or a foreign README.md; nothing can be exported, or
            not there.
    """
    from stagekit.data import REJECTED_ROWS
    from stagekit.lm_eval_export import TITLE

    read, answers = {file.path.resolve() for file in files}, (f"{benchmark.name}.jsonl" for benchmark in benchmarks)
    for name in ("results.json", "results.journal", REJECTED_ROWS, *answers):
        path = Path(args.output_dir, name)
        if path.resolve() in read:
            raise ValueError(f"--output_dir {args.output_dir} would replace {path}, which is read; name another")
    if args.export_lm_eval:
        if not any(benchmark.task in ("choice", "text") for benchmark in benchmarks):
            raise ValueError("--export_lm_eval: there are no choice or text tasks among the files")
        readme = make_directory(args.export_lm_eval, "--export_lm_eval") / "README.md"
        if readme.is_file() and not readme.read_bytes().startswith(TITLE.encode()):
            raise ValueError(f"--export_lm_eval {args.export_lm_eval} would replace {readme}; name another directory")


# -- asking ----------------------------------------------------------------------------------------------------------


def open_journal(args: argparse.Namespace, benchmarks: list, output_dir: Path, **models: object):
    """Start a journal, or continue the one that an interrupted run of the same files, models and settings left."""
    from stagekit.checkpoint import file_sha256
    from stagekit.files import find_files
    from stagekit.journal import Journal

    shots = find_files(args.shots_file) if args.num_shots else []
    header = {
        "data_file": {benchmark.name: file_sha256(benchmark.path) for benchmark in benchmarks},
        "shots_file": [file_sha256(path) for path in shots],
        **models,
        **{name: getattr(args, name) for name in SETTINGS},
    }
    return Journal(output_dir / "results.journal", header, "--output_dir")


def ask_reward_model(args: argparse.Namespace, source, benchmarks: list, output_dir: Path) -> tuple:
    """Score all pairs; return (journal, settings of results.json)."""
    from stagekit.generation import model_fingerprints
    from stagekit.measuring import score_pairs
    from stagekit.scoring import load_reward_model

    journal = open_journal(args, benchmarks, output_dir, model=model_fingerprints(source))
    reward = load_reward_model(source, args.only_cpu)
    for benchmark in benchmarks:
        score_pairs(reward, benchmark, journal, args.batch_size)
    dtype = str(reward.model.dtype).removeprefix("torch.")
    return journal, {"batch_size": args.batch_size, "max_samples": args.max_samples, "seed": args.seed, "dtype": dtype}


def ask_policy(
    args: argparse.Namespace, source, reward_source, benchmarks: list, shots: list, output_dir: Path
) -> tuple:
    """Find answers and log-likelihoods; return (journal, settings of results.json)."""
    from stagekit import generation, measuring

    chat = generation.load_chat(source, args.tokenizer_path, args.template_name)
    template = hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest()
    models = {
        name: generation.model_fingerprints(own) for name, own in (("model", source), ("reward", reward_source)) if own
    }
    journal = open_journal(args, benchmarks, output_dir, template=template, **models)
    loaded = generation.load_for_generation(source, chat, **loading_options(args))
    most = args.max_new_tokens or min(MAX_NEW_TOKENS, (loaded.context_length or 2 * MAX_NEW_TOKENS) // 2)
    settings = generation.choose_settings(loaded, max_new_tokens=most, temperature=0.0)
    window, stride = choose_window(args, loaded.context_length)
    asked = {}
    for benchmark in benchmarks:
        if benchmark.task == "text":
            measuring.score_text(loaded, benchmark, journal, args.batch_size, window, stride)
            continue
        prompts = measuring.encode_items(loaded, settings, benchmark, shots, args.num_shots)
        if benchmark.task == "choice":
            measuring.score_choices(loaded, benchmark, prompts, journal, args.batch_size)
            asked[benchmark.name] = prompts
        measuring.generate_answers(loaded, settings, benchmark, prompts, journal, args.batch_size)
    if args.export_lm_eval:
        export(args, loaded, benchmarks, asked, window)
    return journal, {
        "max_new_tokens": most,
        "temperature": 0.0,
        "repetition_penalty": settings.repetition_penalty,
        **{name: getattr(args, name) for name in ("system_prompt", "num_shots", "shots_file", "max_samples", "seed")},
        **{name: getattr(args, name) for name in ("batch_size", "reward_model", "load_in_4bit", "load_in_8bit")},
        "reward_fingerprints": models.get("reward"),
        **{"max_length": window, "stride": stride, "template": chat.name},
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def score_questions(args: argparse.Namespace, reward_source, benchmarks: list, journal) -> None:
    """Score the answers to free questions with --reward_model, now that the policy has left the memory."""
    from accelerate.utils.memory import clear_device_cache

    from stagekit.measuring import score_generated
    from stagekit.scoring import load_reward_model

    questions = [benchmark for benchmark in benchmarks if benchmark.task == "questions"]
    if not questions:
        return
    clear_device_cache(garbage_collection=True)
    reward = load_reward_model(reward_source, args.only_cpu)
    for benchmark in questions:
        score_generated(reward, benchmark, journal, args.batch_size)


def choose_window(args: argparse.Namespace, context_length: int | None) -> tuple[int, int]:
    """(longest window, stride) in which running text is read, in tokens.

    Raises:
        ValueError: the window is longer than the model's context, or shorter than the stride.
    """
    window = args.max_length or min(MAX_WINDOW, context_length or MAX_WINDOW)
    stride = args.stride or max(1, window // 2)
    if context_length and window > context_length:
        raise ValueError(f"--max_length {window} is longer than the model's context of {context_length} tokens")
    if stride > window:
        raise ValueError(f"--stride {stride} is longer than the window of {window} tokens (--max_length)")
    return window, stride


def export(args: argparse.Namespace, loaded, benchmarks: list, asked: dict[str, list], window: int) -> None:
    """Write choice and text tasks for lm-evaluation-harness."""
    from stagekit.choices import candidates
    from stagekit.lm_eval_export import export_choices, export_text, write_readme
    from stagekit.measuring import candidates_of

    directory, exported = make_directory(args.export_lm_eval, "--export_lm_eval"), []
    for benchmark in benchmarks:
        if benchmark.task == "text":
            texts = [item.record.text for item in benchmark.items]
            exported.append(export_text(directory, benchmark.name, loaded.chat, texts, window))
        elif benchmark.task == "choice":
            items = [
                (*prompt, candidates(item.record), candidates_of(loaded.chat, item, prompt), item.record.answer)
                for item, prompt in zip(benchmark.items, asked[benchmark.name], strict=True)
                if prompt is not None
            ]
            exported.append(export_choices(directory, benchmark.name, loaded.chat, items))
    tokenizer = args.tokenizer_path or loaded.source.tokenizer or loaded.source.base
    write_readme(directory, exported, loaded, tokenizer)
    logger.info("%s: %d tasks for lm-evaluation-harness, README.md says how to run it", directory, len(exported))


# -- what comes out --------------------------------------------------------------------------------------------------


def write_answers(benchmarks: list, found: dict[str, dict], source, output_dir: Path) -> dict[str, dict]:
    """Judge everything, write FILE.jsonl for every benchmark, and return the tasks of results.json."""
    from stagekit.benchmarks import is_seen
    from stagekit.checkpoint import file_sha256
    from stagekit.journal import write_lines
    from stagekit.seen_prompts import SEEN_PROMPTS, load_seen_prompts
    from stagekit.verdicts import judge

    seen, tasks = load_seen_prompts(source.directory), {}
    known = bool(source.directory) and Path(source.directory, SEEN_PROMPTS).is_file()
    for benchmark in benchmarks:
        rows, result = judge(benchmark, found)
        for item, row in zip(benchmark.items, rows, strict=True):
            row |= {"origin": item.origin, "seen_in_training": is_seen(item, seen) if known else None}
        write_lines(output_dir / f"{benchmark.name}.jsonl", rows)
        tasks[benchmark.name] = {
            "task": benchmark.task,
            "data_file": str(benchmark.path),
            "sha256": file_sha256(benchmark.path),
            "num": len(rows),
            "seen_in_training": sum(row["seen_in_training"] for row in rows) if known else None,
            **result,
        }
    return tasks


def describe_model(args: argparse.Namespace, source) -> dict:
    """Which model was measured."""
    from stagekit.generation import model_fingerprints

    return {
        "path": args.lora_model or args.base_model,
        "stage": source.stage["stage"] if source.stage else None,
        "base": source.base,
        "fingerprints": model_fingerprints(source),
    }


def write_results(results: dict, output_dir: Path) -> None:
    """Write results.json, which tools.report reads."""
    from stagekit.journal import write_whole

    write_whole(output_dir / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def report(results: dict, output_dir: Path) -> None:
    """Print a table of everything that was measured."""
    lines = [("file", "task", "measure", "value", "95 % interval", "n")]
    for name, task in results["tasks"].items():
        head = (name, task["task"])
        for metric, found in task["metrics"].items():
            lines.append((*head, LABELS[metric], *show_metric(metric, found)))
            head = ("", "")
        for kind, metrics in task.get("by_kind", {}).items():
            lines += [("", "", f"  {kind}: {LABELS[m]}", *show_metric(m, found)) for m, found in metrics.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [
            text.rjust(width) if place > 2 else text.ljust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    for note in notes(results):
        print(note)
    print(f"saved: {output_dir / 'results.json'}")


def show_metric(name: str, found: dict) -> tuple[str, str, str]:
    """(value, interval, n) as the table shows them."""
    unit = 100 if KINDS[name] == "share" else 1
    numbers = [
        f"{unit * found[key]:.1f}" if unit == 100 else f"{found[key]:.4g}"
        for key in ("value", "low", "high")
        if key in found
    ]
    value, interval = numbers[0] + (" %" if unit == 100 else ""), " to ".join(numbers[1:])
    return value, interval, f"{found['n']:,}"


def notes(results: dict) -> list[str]:
    """What a reader of the table must know."""
    lines = []
    for name, task in results["tasks"].items():
        if task["seen_in_training"]:
            lines.append(f"{name}: seen in training: {task['seen_in_training']} of {task['num']}")
        lines += [f"{name}: {error}" for error in task["errors"][:3]]
        if len(task["errors"]) > 3:
            lines.append(f"{name}: … and {len(task['errors']) - 3} more")
        if "by_subject" in task:
            lines.append(f"{name}: by subject ({len(task['by_subject'])}) in results.json")
        if task["task"] == "safety":
            lines.append(f"{name}: answers were searched for listed phrases; that is no clinical judgement")
    if all(task["seen_in_training"] is None for task in results["tasks"].values()):
        lines.append("whether training has seen these prompts is not known: the model has no seen_prompts.npy")
    return lines + [f"{name}: skipped; {why}" for name, why in results["skipped"].items()]


if __name__ == "__main__":
    run(main, parse_args(), "eval_benchmark.py", "; the same command continues from what is measured")
