r"""Rejection sampling: let a policy answer each prompt several times, score the answers, keep the best and the worst.

Reads   --model_name_or_path   the policy: a directory that a stage wrote, or any model
        --data_file            prompts: conversations, questions, preferences, rankings (their answers are not shown)
        --reward_model_path    what reward_modeling.py wrote; beside it or instead --reward_functions accuracy
Writes  --output_dir           sft.jsonl          each prompt with its best answer, for supervised_finetuning.py
                               preferences.jsonl  best and worst answer, for dpo_training.py and reward_modeling.py
                               answers.jsonl      all answers with their scores, to look at
                               summary.json       what was counted, with which settings

    python rejection_sampling.py --model_name_or_path outputs/sft --reward_model_path outputs/rm \
        --data_file data/finetune --output_dir outputs/samples
    python dpo_training.py --model_name_or_path outputs/sft --train_file_dir outputs/samples/preferences.jsonl ...

Give a stage one of the files, not the directory. Sampling comes first, then the policy leaves the memory and the
reward model scores: one model at a time. Every finished prompt is in answers.journal at once, from which the same
command continues after an interruption; the journal stays, so that other rewards and limits need no new answers.
The score of an answer is the reward model's (at its end-of-turn, which is put behind an answer that was cut off) plus
the weighted sum of the functions, minus --missing_eos_penalty where it was cut off: as in ppo_training.py.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import random
import statistics
from collections import defaultdict
from pathlib import Path

from stagekit.commandline import (
    Parser,
    add_model_flags,
    add_switch,
    check_flags,
    choose_gpus,
    loading_options,
    make_directory,
    run,
)
from template import get_template

logger = logging.getLogger(__name__)

# What decides the answers; with the prompts, the model and its template it is the journal's header.
SAMPLING = (
    *("seed", "num_generations", "batch_size", "temperature", "top_p", "max_new_tokens", "max_prompt_length"),
    *("load_in_4bit", "load_in_8bit"),
)
# What decides, beside the rewards, which of them are kept.
KEEPING = ("missing_eos_penalty", "keep_cut", "min_score", "min_margin", "max_samples", "system_prompt")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; nothing heavy is imported for that."""
    parser = Parser("rejection_sampling.py", __doc__)
    model = parser.add_argument_group("policy (--model_name_or_path is enough)")
    model.add_argument("--model_name_or_path", help="a stage's directory, model directory or hub name")
    add_model_flags(model)
    reward = parser.add_argument_group("rewards (one of the first two, or both)")
    reward.add_argument("--reward_model_path", help="directory reward_modeling.py wrote")
    reward.add_argument(
        "--reward_functions",
        help="functions of stagekit/rewards.py with commas (accuracy, format, language, repetition, length, math), or "
        "path/to/file.py:function",
    )
    reward.add_argument("--reward_weights", help="one number for each function; default 1 each")
    reward.add_argument(
        "--missing_eos_penalty", type=float, default=1.0, help="taken from the score of a cut answer, default 1"
    )
    add_switch(reward, "--allow_untrained_reward_model", "use one that shows no accuracy above chance")
    data = parser.add_argument_group("data")
    data.add_argument("--data_file", help="files or directories of prompts, with commas; required")
    data.add_argument("--data_format", default="auto", help="force one reading of the records; README lists them")
    data.add_argument(
        "--on_bad_row",
        choices=["stop", "skip"],
        default="stop",
        help="stop: name unreadable rows and exit; skip: go on and write them to OUTPUT_DIR/rejected_rows.jsonl",
    )
    data.add_argument("--max_samples", type=int, help="use at most this many prompts, drawn with --seed")
    data.add_argument("--system_prompt", help="system message of prompts that bring none")
    data.add_argument("--output_dir", help="where the files go; required")
    tokens = parser.add_argument_group("sampling")
    tokens.add_argument("--num_generations", type=int, default=8, help="answers to each prompt, default 8")
    tokens.add_argument("--temperature", type=float, default=1.0, help="default 1: the policy's own distribution")
    tokens.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this total: 1")
    tokens.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens, default 256")
    tokens.add_argument(
        "--max_prompt_length",
        type=int,
        default=512,
        help="longest prompt in tokens, default 512; the oldest exchanges give way, longer prompts are left out",
    )
    tokens.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="answers generated, or scored, at once, default 8; halved where memory runs out. Another batch size "
        "draws other answers",
    )
    tokens.add_argument("--seed", type=int, default=42, help="same seed and batch size, same files; default 42")
    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--min_score", type=float, help="keep no best answer below it, alone or in a pair")
    kept.add_argument(
        "--min_margin", type=float, default=0.01, help="a pair's scores differ by at least this, default 0.01"
    )
    add_switch(kept, "--keep_cut", "let answers be best that --max_new_tokens cut off; they may always be worst")
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def _check(args, parser):
    counts = ("num_generations", "max_new_tokens", "max_prompt_length", "batch_size", "max_samples")
    check_flags(args, parser, (*counts, "min_margin"))
    if args.temperature == 0:
        parser.error(f"--temperature {args.temperature} must be above 0: greedy answers are all the same")
    if not (args.model_name_or_path or args.base_model or args.lora_model):
        parser.error("--model_name_or_path is missing: name the policy, such as outputs/sft")
    if args.model_name_or_path and args.base_model:
        parser.error("--model_name_or_path and --base_model exclude each other; give one")
    for name, example in (("data_file", "data/finetune"), ("output_dir", "outputs/samples")):
        if not getattr(args, name):
            parser.error(f"--{name} is missing, such as {example}")
    if not (args.reward_model_path or args.reward_functions):
        parser.error("--reward_model_path or --reward_functions is missing: something must score the answers")
    if args.reward_weights and not args.reward_functions:
        parser.error("--reward_weights are those of --reward_functions, which is missing")


def main(args: argparse.Namespace) -> None:
    """Read the prompts, sample, score, choose, write."""
    if args.template_name:
        get_template(args.template_name)
    choose_gpus(args.only_cpu, args.gpus)
    from accelerate.utils.memory import clear_device_cache

    from stagekit.generation import find_source, load_chat, model_fingerprints
    from stagekit.journal import Journal
    from stagekit.rewards import load_rewards

    functions = load_rewards(args.reward_functions, args.reward_weights)
    reward = find_trained_reward_model(args) if args.reward_model_path else None
    source = find_source(args.model_name_or_path or args.base_model, args.lora_model)
    chat = load_chat(source, args.tokenizer_path, args.template_name)
    prompts, ledger, rejected = read_prompts(args, chat)
    output_dir = prepare_output_dir(args.output_dir, rejected)
    asked = json.dumps([dataclasses.asdict(prompt) for prompt in prompts], sort_keys=True)
    header = {
        "data_file": hashlib.sha256(asked.encode()).hexdigest(),
        "model": model_fingerprints(source),
        "template": hashlib.sha256(chat.tokenizer.chat_template.encode()).hexdigest(),
        **{name: getattr(args, name) for name in SAMPLING},
    }
    journal = Journal(output_dir / "answers.journal", header, "--output_dir")
    sample(args, source, chat, [prompt.input_ids for prompt in prompts], journal)
    clear_device_cache(garbage_collection=True)  # the policy leaves the memory
    groups = score(args, functions, prompts, journal)
    choices = [choose(group, args.keep_cut, args.min_score, args.min_margin) for group in groups]
    summary = {
        **count(groups, choices),
        "data": {name: getattr(ledger, name) for name in ("read", "used", "dropped", "repaired", "files")},
        "policy": {"name_or_path": source.adapter or source.base, "fingerprints": header["model"]},
        "reward": describe_rewards(args, reward),
        "settings": {name: getattr(args, name) for name in (*SAMPLING, *KEEPING)},
    }
    write_files(output_dir, prompts, groups, choices, summary)
    report(summary, output_dir)


# -- what goes in ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the data has it, and as the policy sees it.

    Attributes:
        messages, tools, reference: as in prompts.Prompt.
        shown, input_ids: what is left of the messages under --max_prompt_length, and their tokens.
        origin: "file:line".
    """

    messages: list[dict]
    tools: list[dict] | None
    reference: str
    shown: list[dict]
    input_ids: list[int]
    origin: str


def read_prompts(args: argparse.Namespace, chat) -> tuple:
    """Read the prompts, draw --max_samples of them, and tokenise the ones that fit.

    Returns:
        (prompts, ledger, rejected): a list of Prompt; ledger and ledger.Rejected of the rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: rows that hold no prompt, named by file and line; no prompt fits.
    """
    import numpy as np
    from tqdm import tqdm

    from stagekit.arguments import DataArguments
    from stagekit.data import draw
    from stagekit.files import find_files
    from stagekit.ledger import PROMPT_TOO_LONG
    from stagekit.prompts import accept_prompt, fit_prompt
    from stagekit.reading import load_rows
    from stagekit.records import RowError

    def with_system(prompt):
        if args.system_prompt and prompt.prompt[0]["role"] != "system":
            system = {"role": "system", "content": args.system_prompt}
            prompt = dataclasses.replace(prompt, prompt=[system, *prompt.prompt])
        return prompt

    def accept(record):
        found = accept_prompt(record)
        return list(map(with_system, found)) if isinstance(found, list) else with_system(found)

    data_args = DataArguments(train_file_dir=args.data_file, data_format=args.data_format, on_bad_row=args.on_bad_row)
    rows, ledger, rejected = load_rows(find_files(args.data_file), accept, data_args)
    rows = draw(rows, args.max_samples, args.seed)
    prompts, fitting = [], np.zeros(len(rows), dtype=bool)
    for place, row in enumerate(tqdm(rows, desc="reading prompts", unit="row", mininterval=0.5)):
        record = row.record
        try:
            found = fit_prompt(chat, record, args.max_prompt_length)
        except RowError as error:
            raise ValueError(f"{row.origin}: {error}") from None
        if found is not None:
            fitting[place] = True
            prompts.append(Prompt(record.prompt, record.tools, record.reference, found[1], found[0], row.origin))
    if not prompts:
        raise ValueError(f"{rows[0].origin}: no prompt fits --max_prompt_length {args.max_prompt_length}")
    return prompts, rows.keep(fitting, PROMPT_TOO_LONG).settle(ledger), rejected


def find_trained_reward_model(args: argparse.Namespace):
    """Look, before anything is sampled, whether --reward_model_path can score; return its checkpoint.Source.

    Raises:
        ValueError: it is not there, writes answers, or shows no accuracy above chance.
    """
    from stagekit.checks import reward_model_is_trained
    from stagekit.scoring import find_reward_model

    source = find_reward_model(args.reward_model_path)
    found, _ = reward_model_is_trained(source.stage, source.directory, args.allow_untrained_reward_model)
    logger.info("reward model %s: %s", source.directory, found)
    return source


def prepare_output_dir(output_dir: str, rejected) -> Path:
    """Make the directory, and note there which rows were left out (ledger.Rejected)."""
    from stagekit.data import REJECTED_ROWS

    path = make_directory(output_dir, "--output_dir")
    rejected.save(path / REJECTED_ROWS)
    if rejected.count:
        logger.warning("rows that were left out, and why: %s", path / REJECTED_ROWS)
    return path


# -- sampling and scoring --------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace, source, chat, prompt_ids: list[list[int]], journal) -> None:
    """Answer every prompt that the journal does not hold yet --num_generations times, and add it there.

    The answers wanted, longest prompts first, are cut into batches at fixed places, and each batch is drawn with a
    seed of its own: an interrupted run draws the unfinished batches again as they were.

    Raises:
        ValueError: the model's context is too short, or not even one answer at a time fits into memory.
    """
    import torch
    from tqdm import tqdm

    from stagekit.generation import choose_settings, generate_batch, load_for_generation, run_in_batches

    if len(journal.rows) == len(prompt_ids):
        return
    loaded = load_for_generation(source, chat, **loading_options(args))
    chosen = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    settings = choose_settings(loaded, **chosen, repetition_penalty=1.0, top_k=0)
    longest = max(map(len, prompt_ids))
    if loaded.context_length and longest + args.max_new_tokens > loaded.context_length:
        raise ValueError(
            f"a prompt of {longest} tokens and --max_new_tokens {args.max_new_tokens} are more than the model's "
            f"context of {loaded.context_length}; lower one of --max_prompt_length and --max_new_tokens"
        )
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))  # what does not fit fails first
    wanted = [index for index in order for _ in range(args.num_generations)]

    def answer(batch):
        if all(wanted[place] in journal.rows for place in batch):
            return None
        torch.manual_seed(random.Random(f"{args.seed} {batch.start}").getrandbits(63))
        return generate_batch(loaded, [prompt_ids[wanted[place]] for place in batch], settings)

    answers = defaultdict(list)
    with tqdm(total=len(wanted), desc="sampling", unit="answer") as progress:
        for batch, found in run_in_batches(len(wanted), args.batch_size, answer):
            for index, each in zip([wanted[place] for place in batch], found or [], strict=found is not None):
                answers[index].append(dataclasses.asdict(each))
                if len(answers[index]) == args.num_generations and index not in journal.rows:
                    journal.add({"index": index, "answers": answers.pop(index)})
            progress.update(len(batch))


def score(args: argparse.Namespace, functions: list, prompts: list[Prompt], journal) -> list[list[dict]]:
    """Score the answers of the journal; equal answers to one prompt are scored once.

    Returns:
        A list for each prompt: {"text", "stopped", "num_tokens", "rewards", "score"} for each answer. A reward is None
        where a function had nothing to read, which counts 0, and where the answer is too long for the reward model,
        which leaves it without a score.
    """
    from stagekit.prompts import last_question

    answers = [journal.rows[index]["answers"] for index in range(len(prompts))]
    texts = [list(dict.fromkeys(answer["text"] for answer in group)) for group in answers]
    rewards = [{text: {} for text in group} for group in texts]
    if args.reward_model_path:
        for (index, number), value in score_with_model(args, prompts, texts):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"--reward_model_path {args.reward_model_path} gave the score {value}")
            rewards[index][texts[index][number]]["reward_model"] = value
    places = [(index, text) for index, group in enumerate(texts) for text in group]
    asked = [last_question(prompt.shown) for prompt in prompts]
    for function in functions:
        given = ([asked[index] for index, _ in places], [text for _, text in places])
        judged = function.score_all(*given, [prompts[index].reference for index, _ in places])
        for (index, text), judgement in zip(places, judged, strict=True):
            rewards[index][text][function.name] = judgement.score if judgement.parsed else None
    weights = {"reward_model": 1.0, **{function.name: function.weight for function in functions}}

    def scored(answer, found):
        stopped, total = answer["finish_reason"] == "stop", None
        if found.get("reward_model", 0.0) is not None:
            total = sum(weights[name] * (value or 0.0) for name, value in found.items())
            total = round(total - args.missing_eos_penalty * (not stopped), 6)
        found = {name: value if value is None else round(value, 6) for name, value in found.items()}
        kept = {"text": answer["text"], "stopped": stopped, "num_tokens": answer["num_tokens"]}
        return {**kept, "rewards": found, "score": total}

    return [
        [scored(answer, found[answer["text"]]) for answer in group]
        for group, found in zip(answers, rewards, strict=True)
    ]


def score_with_model(args: argparse.Namespace, prompts: list[Prompt], texts: list[list[str]]):
    """Yield ((prompt, answer), score) for every text; all the answers to a prompt see the same part of it."""
    from tqdm import tqdm

    from stagekit.generation import run_in_batches
    from stagekit.scoring import load_reward_model, score_answers

    reward = load_reward_model(args.reward_model_path, args.only_cpu)
    items = [
        (prompt.shown, [[{"role": "assistant", "content": text}] for text in group], prompt.tools)
        for prompt, group in zip(prompts, texts, strict=True)
    ]

    def work(batch):
        return list(score_answers(reward, [items[place] for place in batch], reward.max_length, len(batch)))

    with tqdm(total=sum(map(len, texts)), desc="scoring", unit="answer") as progress:
        for batch, found in run_in_batches(len(items), args.batch_size, work):
            yield from (((batch[place], number), value) for (place, number), value in found)
            progress.update(len(found))


# -- what comes out --------------------------------------------------------------------------------------------------


def choose(group: list[dict], keep_cut: bool, min_score: float | None, min_margin: float) -> dict:
    """Choose the best and the worst answer to a prompt; of equal scores the first.

    Returns:
        {"candidate", "best", "worst"}: places in the group, or None. The candidate is the best of those that may be
        best: they say something, without half characters, and ended by themselves unless keep_cut. It is "best" if it
        reaches min_score, and "worst" is there if it makes a pair with that.
    """
    scores = [answer["score"] for answer in group]
    filled = [place for place, answer in enumerate(group) if scores[place] is not None and answer["text"]]
    able = [
        place for place in filled if (group[place]["stopped"] or keep_cut) and "\ufffd" not in group[place]["text"]
    ]
    candidate = max(able, key=scores.__getitem__, default=None)
    best = worst = None
    if candidate is not None and (min_score is None or scores[candidate] >= min_score):
        best = candidate
        worst = min(filled, key=scores.__getitem__)
        if margin(group, best, worst) < min_margin or group[best]["text"] == group[worst]["text"]:
            worst = None
    return {"candidate": candidate, "best": best, "worst": worst}


def margin(group: list[dict], best: int, worst: int) -> float:
    """By how much the best answer is better."""
    return round(group[best]["score"] - group[worst]["score"], 6)


def count(groups: list[list[dict]], choices: list[dict]) -> dict:
    """Numbers over all prompts; "random" is the mean score of the answers to the prompts that "best" is over."""
    answers = [answer for group in groups for answer in group]
    scores = [[answer["score"] for answer in group if answer["score"] is not None] for group in groups]
    chosen = list(zip(groups, scores, choices, strict=True))

    def mean(values):
        values = list(values)
        return round(statistics.fmean(values), 6) if values else None

    def scores_of(name):
        return [group[choice[name]]["score"] for group, _, choice in chosen if choice[name] is not None]

    return {
        "prompts": len(groups),
        "answers": len(answers),
        "kept": len(scores_of("best")),
        "pairs": len(scores_of("worst")),
        "cut": sum(not answer["stopped"] for answer in answers),
        "empty": sum(not answer["text"] for answer in answers),
        "repeated": sum(len(group) - len({answer["text"] for answer in group}) for group in groups),
        "unread": {name: sum(answer["rewards"][name] is None for answer in answers) for name in answers[0]["rewards"]},
        "mean_score": {
            "all": mean(score for own in scores for score in own),
            "random": mean(statistics.fmean(own) for _, own, choice in chosen if choice["candidate"] is not None),
            "best": mean(scores_of("candidate")),
            "kept": mean(scores_of("best")),
        },
        "share_without_spread": round(sum(len(set(own)) < 2 for own in scores) / len(groups), 6),
    }


def describe_rewards(args: argparse.Namespace, reward) -> dict:
    """Where the scores come from, with fingerprints of the reward model and of users' own functions."""
    from stagekit.checkpoint import file_sha256
    from stagekit.generation import model_fingerprints

    files = [name.rpartition(":")[0] for name in (args.reward_functions or "").split(",") if ".py:" in name]
    return {
        "model": reward and {"name_or_path": args.reward_model_path, "fingerprints": model_fingerprints(reward)},
        "functions": args.reward_functions,
        "weights": args.reward_weights,
        "files": {path.strip(): file_sha256(path.strip()) for path in files},
    }


def write_files(output_dir: Path, prompts: list[Prompt], groups: list, choices: list[dict], summary: dict) -> None:
    """Write the four files, each whole or not at all; a directory with summary.json has the others."""
    from stagekit.journal import write_lines, write_whole

    chosen, pairs, answers = [], [], []
    for prompt, group, choice in zip(prompts, groups, choices, strict=True):
        tools = {"tools": prompt.tools} if prompt.tools else {}
        reference = {"reference": prompt.reference} if prompt.reference else {}
        asked = {"origin": prompt.origin, "prompt": prompt.messages, **tools, **reference}
        # "samples" is a key of no data format: a stage that is given the directory stops, instead of reading all twice
        answers.append({**asked, "best": choice["best"], "worst": choice["worst"], "samples": group})
        if choice["best"] is None:
            continue
        best = [{"role": "assistant", "content": group[choice["best"]]["text"]}]
        chosen.append({"messages": [*prompt.messages, *best], **tools, "score": group[choice["best"]]["score"]})
        if choice["worst"] is not None:
            worst = [{"role": "assistant", "content": group[choice["worst"]]["text"]}]
            better = margin(group, choice["best"], choice["worst"])
            pairs.append({"prompt": prompt.messages, **tools, "chosen": best, "rejected": worst, "margin": better})
    (output_dir / "summary.json").unlink(missing_ok=True)
    write_lines(output_dir / "sft.jsonl", chosen)
    write_lines(output_dir / "preferences.jsonl", pairs)
    write_lines(output_dir / "answers.jsonl", answers)
    write_whole(output_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def report(summary: dict, output_dir: Path) -> None:
    """Print what was found, and what should make the reader think."""
    mean, prompts, answers = summary["mean_score"], summary["prompts"], summary["answers"]
    lines = [
        ("prompts", f"{prompts:,}"),
        *((f"  left out: {reason}", f"{number:,}") for reason, number in summary["data"]["dropped"].items()),
        ("answers", f"{answers:,}"),
        ("  cut off", f"{summary['cut']:,}"),
        ("best answers kept", f"{summary['kept']:,}"),
        ("pairs", f"{summary['pairs']:,}"),
        ("mean score of a random answer", "-" if mean["random"] is None else f"{mean['random']:+.3f}"),
        ("mean score of the best answer", "-" if mean["best"] is None else f"{mean['best']:+.3f}"),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value:>10}")
    print(f"saved: {output_dir}")
    if summary["share_without_spread"] > 0.5:
        logger.warning(
            "the answers to %.0f %% of the prompts all score the same: best-of-n has nothing to choose there; other "
            "prompts, a higher --temperature or more --num_generations help",
            100 * summary["share_without_spread"],
        )
    if summary["cut"] > answers / 2:
        logger.warning("%d of %d answers were cut off; raise --max_new_tokens", summary["cut"], answers)
    for name, unread in summary["unread"].items():
        if unread > answers / 2:
            logger.warning("%s could not read %d of %d answers", name, unread, answers)
    if not summary["kept"]:
        logger.warning("no answer was kept: sft.jsonl and preferences.jsonl are empty")


if __name__ == "__main__":
    arguments = parse_args()
    run(main, arguments, "rejection_sampling.py", "; the same command continues from what is answered")
