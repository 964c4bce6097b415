"""Speed and memory of reading files of records, against the standard library, pyarrow and the datasets library.

    python -m benchmarks.reading --output benchmarks/results/reading_cpu.md
    python -m benchmarks.reading --megabytes 200

Files of one size are made up: conversations of medical words, as JSON lines, as one array on one line and as parquet,
and instructions as csv. Each way reads every row of a file as a Python object, in a process of its own, in turns.
"""

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from benchmarks.table import publish

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WORDS = (
    "患者 症状 发热 咳嗽 头痛 胸闷 腹泻 乏力 皮疹 感染 病毒 血压 血糖 体温 建议 需要 可以 避免 及时 继续 停止 减少 "
    "监测 复查 就诊 fever cough headache rash infection pressure should drink water rest doctor twice daily meals"
).split()
NAMES = {"lines": "reading.jsonl", "array": "reading.json", "csv": "reading.csv", "parquet": "reading.parquet"}
TITLES = {"lines": "JSON lines", "array": "one array on one line", "csv": "csv", "parquet": "parquet (snappy)"}
PLAIN = {
    "lines": "`json.loads` of every line",
    "array": "`json.load`",
    "csv": "`csv.DictReader`",
    "parquet": "`pyarrow`, `read_table().to_pylist()`",
}
WAYS = ("read_records", "plain", "datasets")


def parse_command_line():
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the rows as JSON lines, in 10**6 bytes")
    parser.add_argument("--rounds", type=int, default=3, help="readings of which medians are taken")
    parser.add_argument("--directory", help="where the files are written; default a temporary one")
    parser.add_argument("--output", help="also write the table to this file")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FORM", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


# -- files -----------------------------------------------------------------------------------------------------------


def text(rng):
    """Between 20 and 120 words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(20, 120)))


def write_files(directory, num_bytes):
    """Write the files; return {form: path} and the number of rows in each."""
    import pyarrow
    import pyarrow.parquet

    rng, paths, written, num_rows = random.Random(0), {form: directory / name for form, name in NAMES.items()}, 0, 0
    parts = {"from": pyarrow.string(), "value": pyarrow.string()}
    schema = pyarrow.schema({"conversations": pyarrow.list_(pyarrow.struct(parts)), "score": pyarrow.float64()})
    with (
        open(paths["lines"], "w", encoding="utf-8") as lines,
        open(paths["array"], "w", encoding="utf-8") as array,
        open(paths["csv"], "w", encoding="utf-8", newline="") as table,
        pyarrow.parquet.ParquetWriter(paths["parquet"], schema) as parquet,
    ):
        writer = csv.writer(table)
        writer.writerow(["instruction", "input", "output"])
        waiting = []
        while written < num_bytes:
            texts = [text(rng) for _ in range(4)]
            turns = [{"from": "gpt" if turn % 2 else "human", "value": said} for turn, said in enumerate(texts)]
            row = {"conversations": turns, "score": rng.random()}
            line = json.dumps(row, ensure_ascii=False)
            lines.write(line + "\n")
            array.write(("[" if not num_rows else ", ") + line)
            writer.writerow([texts[0], texts[1], f"{texts[2]}\n{texts[3]}"])
            waiting.append(row)
            written += len(line.encode()) + 1
            num_rows += 1
            if len(waiting) == 10_000 or written >= num_bytes:
                parquet.write_table(pyarrow.Table.from_pylist(waiting, schema))
                waiting.clear()
        array.write("]")
    return paths, num_rows


# -- ways ------------------------------------------------------------------------------------------------------------


def rows_of(way, form, path):
    """An iterable over all rows of a file, each a Python object."""
    if way == "read_records":
        from stagekit.files import read_records

        return (record for record, _ in read_records(Path(path)))
    if way == "datasets":
        import datasets

        kind = {"lines": "json", "array": "json"}.get(form, form)
        cache = tempfile.mkdtemp(dir=Path(path).parent)
        return datasets.load_dataset(kind, data_files=path, split="train", cache_dir=cache)
    if form == "parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if form == "csv":
        csv.field_size_limit(2**31 - 1)
        return csv.DictReader(open(path, encoding="utf-8", newline=""))
    if form == "array":
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    return (json.loads(line) for line in open(path, encoding="utf-8"))


def measure(way, form, path):
    """Read a file in this process and print what it took; what has to be imported is imported before."""
    if way == "read_records":
        import stagekit.files  # noqa: F401
    if way == "datasets":
        import datasets

        datasets.disable_progress_bars()
    if form == "parquet":
        import pyarrow.parquet  # noqa: F401
    start = time.perf_counter()
    num_rows = sum(1 for _ in rows_of(way, form, path))
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count what the parent held
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"rows": num_rows, "seconds": seconds, "peak": peak}))


def measure_apart(way, form, path):
    """measure() in a process of its own; None where the way cannot read the file."""
    command = [sys.executable, "-m", "benchmarks.reading", "--measure", way, form, str(path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        print(f"{way} of {path.name}: {result.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def main():
    """Read every file every way in turn, and print a table of medians."""
    args = parse_command_line()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        paths, num_rows = write_files(Path(directory), args.megabytes * 10**6)
        lines, found = [], {}
        for number in range(args.rounds):
            for form, path in paths.items():
                for way in WAYS:
                    got = measure_apart(way, form, path)
                    if got and got["rows"] != num_rows:
                        sys.exit(f"{way} found {got['rows']:,} of {num_rows:,} rows in {path.name}")
                    found.setdefault((form, way), []).append(got)
                    print(f"round {number + 1}, {form}, {way}: {got}", file=sys.stderr)
        for form, path in paths.items():
            size = path.stat().st_size
            titles = {"read_records": "**read_records**", "plain": PLAIN[form], "datasets": "`datasets.load_dataset`"}
            for way in WAYS:
                title = f"| {TITLES[form]}, {size / 10**6:,.0f} MB | {titles[way]} |"
                if None in found[form, way]:
                    lines.append(f"{title} cannot read it | | |")
                    continue
                seconds = statistics.median(got["seconds"] for got in found[form, way])
                peak = statistics.median(got["peak"] for got in found[form, way]) / 2**20
                lines.append(f"{title} {size / seconds / 10**6:,.0f} | {num_rows / seconds:,.0f} | {peak:,.0f} |")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("pyarrow", "datasets"))
    head = [
        "# Reading files of records",
        "",
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, {versions}; the same "
        f"{num_rows:,} made-up rows in each file (csv: their texts); medians of {args.rounds} readings from the page "
        f"cache, each in a process of its own that reads every row as a Python object; the datasets library writes "
        f"its own copy first (`python -m benchmarks.reading --megabytes {args.megabytes}`).",
        "",
        "| file | read with | MB/s | rows/s | peak memory (MiB) |",
        "|---|---|---:|---:|---:|",
    ]
    publish(head + lines, args.output)


if __name__ == "__main__":
    main()
