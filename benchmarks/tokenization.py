"""From a file of conversations to tokenised samples with loss masks: speed and memory, against two common ways.

    python -m benchmarks.tokenization                                    # 20,000 made-up conversations
    python -m benchmarks.tokenization --data_file my.jsonl --tokenizer Qwen/Qwen3-0.6B-Base
    python -m benchmarks.tokenization --ways own --num_rows 700000 --processes 2 --rounds 1      # a file of 1 GB

All read the same jsonl file of {"messages": …}, use the same tokenizer and chat template, learn the answers only, and
end with samples of input ids and labels on disk. Compared are this project's own way, the datasets library's map over
apply_chat_template(return_assistant_tokens_mask=True), and the preparation of TRL's SFTTrainer (assistant_only_loss).
Each measurement is a process of its own, and the ways take turns. Memory is the largest sum over a process and its
children, shared pages counted once.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import psutil

from benchmarks.table import hardware, publish
from stagekit.parallel import num_cores

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "own": "this project",
    "map": "datasets.map, apply_chat_template",
    "trl": "TRL SFTTrainer",
}
ZH = "患者 症状 发热 咳嗽 头痛 胸闷 腹泻 乏力 感染 血压 血糖 用药 饮水 休息 复查 就医 建议 注意 可以 需要 如果".split()
EN = "patient symptom fever cough headache doctor advice rest water drug dose pressure sugar test visit may if".split()


def parse_command_line():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_file", help='jsonl of {"messages": [{"role", "content"}, …]}; default: made up')
    parser.add_argument("--tokenizer", help="directory or hub name; default: byte-level BPE learnt from data/")
    parser.add_argument("--num_rows", type=int, default=20_000, help="conversations that are made up")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--processes", default="1,2", help="numbers of processes, with commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, with commas")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    parser.add_argument("--output", help="also write the table to this file")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--num_processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_up(path: Path, count: int) -> None:
    """Write conversations of one to four exchanges; lengths as in collections of consultations."""
    dice = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words, join = (ZH, "") if number % 3 else (EN, " ")
            messages = [{"role": "system", "content": "Answer as a doctor."}] if number % 5 == 0 else []
            for _ in range(dice.choice([1, 1, 1, 2, 3, 4])):
                for role, longest in (("user", 40), ("assistant", 160)):
                    text = join.join(dice.choices(words, k=dice.randint(4, longest)))
                    messages.append({"role": role, "content": text})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of 16,000 tokens learnt from data/, with ChatML."""
    from tools.build_starter_model import build_tokenizer, corpus

    build_tokenizer(corpus(ROOT / "data"), 16_000).save_pretrained(directory)


def measure(args) -> None:
    """One way in this process: prints {"seconds", "samples", "tokens", "trained"}."""
    work = Path(tempfile.mkdtemp(dir=args.directory))
    os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    seconds, found = {"own": measure_own, "map": measure_map, "trl": measure_trl}[args.measure](args, tokenizer, work)
    print(json.dumps({"seconds": seconds, **found}))


def measure_own(args, tokenizer, work):
    """reading.load_rows and encoding.write_dataset, as supervised_finetuning.py calls them."""
    from stagekit.arguments import DataArguments
    from stagekit.data import accept_conversation
    from stagekit.encoding import encode_samples, write_dataset
    from stagekit.reading import load_rows
    from stagekit.tokenization import encode_conversation, prepare_chat

    start = time.perf_counter()
    chat = prepare_chat(tokenizer, None)

    def encode(record):
        return encode_conversation(chat, record, args.max_length)

    rows, ledger, rejected = load_rows(
        *([Path(args.data_file)], accept_conversation),
        DataArguments(train_file_dir=args.data_file, preprocessing_num_workers=args.num_processes),
    )
    write_dataset(
        *(rows, ledger, lambda chunk: encode_samples(chunk, encode, args.max_length, packing=False)),
        *(work / "train.arrow", rejected, args.num_processes),
    )
    seconds = time.perf_counter() - start
    return seconds, {"samples": ledger.samples, "tokens": ledger.tokens["used"], "trained": ledger.tokens["trained"]}


def measure_map(args, tokenizer, work):
    """The datasets library's map, one conversation a call, as tutorials write it."""
    from datasets import load_dataset

    def encode(row):
        found = tokenizer.apply_chat_template(
            row["messages"],
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=args.max_length,
        )
        ids, mask = found["input_ids"], found["assistant_masks"]
        return {"input_ids": ids, "labels": [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]}

    start = time.perf_counter()
    data = load_dataset("json", data_files=args.data_file, split="train")
    data = data.map(encode, remove_columns=data.column_names, num_proc=args.num_processes)
    return time.perf_counter() - start, count(data)


def measure_trl(args, tokenizer, work):
    """What SFTTrainer does with a dataset when it is made."""
    from datasets import load_dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **size))
    settings = SFTConfig(
        output_dir=str(work),
        max_length=args.max_length,
        assistant_only_loss=True,
        dataset_num_proc=args.num_processes,
        use_cpu=True,
        report_to=[],
    )
    start = time.perf_counter()
    data = load_dataset("json", data_files=args.data_file, split="train")
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    data = trainer.train_dataset
    return seconds, count(data, "assistant_masks" if "assistant_masks" in data.column_names else "labels")


def count(data, mask="labels"):
    """Samples, tokens and learnt tokens of a tokenised dataset."""
    import numpy as np

    table = data.with_format("numpy")
    tokens = trained = 0
    for batch in table.iter(1000):
        tokens += sum(len(ids) for ids in batch["input_ids"])
        learnt = -100 if mask == "labels" else 0
        trained += sum(int(np.sum(np.asarray(row) != learnt)) for row in batch[mask])
    return {"samples": len(data), "tokens": tokens, "trained": trained}


def main():
    args = parse_command_line()
    if args.measure:
        return measure(args)
    with tempfile.TemporaryDirectory() as directory:
        given = (args.data_file, args.tokenizer)
        if not args.data_file:
            args.data_file = str(Path(directory, "conversations.jsonl"))
            make_up(Path(args.data_file), args.num_rows)
        if not args.tokenizer:
            args.tokenizer = str(Path(directory, "tokenizer"))
            make_tokenizer(Path(args.tokenizer))
        processes = [int(number) for number in args.processes.split(",")]
        found = {(way, number): [] for number in processes for way in args.ways.split(",")}
        for _ in range(args.rounds):
            for (way, number), results in found.items():
                flags = {"measure": way, "num_processes": number, "directory": directory, "data_file": args.data_file}
                flags |= {"tokenizer": args.tokenizer, "max_length": args.max_length}
                command = [sys.executable, "-m", "benchmarks.tokenization"]
                command += [f"--{name}={value}" for name, value in flags.items()]
                results.append(run_watched(command))
        publish(table(args, given, found), args.output)


def run_watched(command: list[str]) -> dict:
    """Run a measurement and add its "peak": bytes of it and its children, shared pages counted once."""
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = [0]

    def watch():
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                family = [process, *process.children(recursive=True)]
                peak[0] = max(peak[0], sum(member.memory_full_info().pss for member in family))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return {**json.loads(printed.splitlines()[-1]), "peak": peak[0]}


def table(args, given, found) -> list[str]:
    """The results as Markdown."""
    rows = sum(1 for _ in open(args.data_file, encoding="utf-8"))
    data = given[0] or f"{rows:,} made-up conversations"
    packages = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("datasets", "trl", "transformers", "tokenizers")
    )
    lines = [
        "# From a file of conversations to samples with loss masks",
        "",
        f"{hardware()}; {packages}; {data}, {Path(args.data_file).stat().st_size / 1e6:.0f} MB; medians of "
        f"{args.rounds} runs, the ways in turns (`python -m benchmarks.tokenization`).",
        "",
        "| processes | way | rows/s | against this project | tokens | learnt tokens | peak memory (MB) |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    seconds = {key: statistics.median(result["seconds"] for result in results) for key, results in found.items()}
    for (way, number), results in found.items():
        own = seconds.get(("own", number))
        ratio = "" if way == "own" or not own else compared(seconds[way, number], own)
        peak = statistics.median(result["peak"] for result in results) / 1e6
        lines.append(
            f"| {number} | {WAYS[way]} | {rows / seconds[way, number]:,.0f} | {ratio} | {results[0]['tokens']:,} | "
            f"{results[0]['trained']:,} | {peak:,.0f} |"
        )
    most = max(number for _, number in found)
    others = [way for way, number in found if way != "own" and number == 1]
    if ("own", most) in found and most == num_cores() and others:
        ratios = "; ".join(f"{WAYS[way]} is {compared(seconds[way, 1], seconds['own', most])}" for way in others)
        lines += ["", f"As they come, this project with all {most} cores and the others with one process: {ratios}."]
    return lines


def compared(seconds, own):
    """How a way compares with this project, in words."""
    return f"{seconds / own:.1f} times slower" if seconds > own else f"{own / seconds:.1f} times faster"


if __name__ == "__main__":
    main()
