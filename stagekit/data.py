"""From files on disk to training and held-out rows, with an account of every row: the ledger."""

import codecs
import gzip
import hashlib
import json
import logging
import os
import random
import shutil
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stagekit.formats import (
    Canonical,
    Conversation,
    Preference,
    Question,
    Ranking,
    RowError,
    Text,
    adapter_named,
    to_canonical,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".txt")
SEEN_PROMPTS = "seen_prompts.npy"  # 64-bit hashes of the prompts a stage and its ancestors trained on
REJECTED_ROWS = "rejected_rows.jsonl"


@dataclass(frozen=True)
class Row:
    """A canonical record and where it stands: "file:line"."""

    record: Canonical
    origin: str


@dataclass
class Ledger:
    """What became of every row: read == used + dropped, always."""

    read: int = 0
    used: int = 0
    dropped: Counter = field(default_factory=Counter)  # by reason, in rows
    repaired: Counter = field(default_factory=Counter)  # by kind
    truncated: int = 0  # samples that lost their end, and with it the end-of-turn token
    samples: int = 0  # a long conversation becomes several
    packed_rows: int = 0
    turns: Counter = field(default_factory=Counter)  # assistant turns: trained, truncated, dropped
    pairs: Counter = field(default_factory=Counter)  # of preferences: where they come from, what they lost
    tokens: Counter = field(default_factory=Counter)  # used, trained
    files: list[str] = field(default_factory=list)

    def drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.dropped[reason] += count

    def close(self) -> "Ledger":
        """Check the sum and return the ledger."""
        assert self.read == self.used + sum(self.dropped.values()), f"the ledger does not add up: {self}"
        return self

    def lines(self, title: str) -> list[str]:
        """The ledger as a table for people."""
        rows = [("rows read", self.read), ("rows used", self.used)]
        rows += [(f"  dropped: {reason}", count) for reason, count in sorted(self.dropped.items())]
        rows += [(f"  repaired: {kind}", count) for kind, count in sorted(self.repaired.items())]
        rows += [("samples", self.samples), ("samples that lost their end", self.truncated)]
        rows += [(f"pairs {kind}", count) for kind, count in sorted(self.pairs.items())]
        rows += [(f"assistant turns {kind}", count) for kind, count in sorted(self.turns.items())]
        rows += [(f"tokens {kind}", count) for kind, count in sorted(self.tokens.items(), reverse=True)]
        if self.packed_rows:
            rows.append(("packed rows", self.packed_rows))
        width = max(len(name) for name, _ in rows)
        files = ", ".join(self.files[:3]) + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")
        return [f"{title} data: {files}", *(f"  {name:<{width}}  {count:>12,}" for name, count in rows)]


@dataclass
class Splits:
    """Rows for training and for measuring, each with its ledger."""

    train: list[Row]
    validation: list[Row]
    train_ledger: Ledger
    validation_ledger: Ledger
    rejected: list[dict] = field(default_factory=list)  # bad rows, under --on_bad_row skip


# -- files -----------------------------------------------------------------------------------------------------------


def find_files(paths: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """List the data files named by a comma-separated list of files and directories, in sorted order.

    Args:
        paths: names, separated by commas.
        suffixes: of the files to take from directories.

    Raises:
        FileNotFoundError: a path does not exist, or a directory holds no data file.
    """
    files = []
    for name in filter(None, (part.strip() for part in paths.split(","))):
        path = Path(name)
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise FileNotFoundError(f"{name}: no such file or directory (looked from {Path.cwd()})")
        found = sorted(
            file for file in path.rglob("*") if has_data_suffix(file.relative_to(path), suffixes) and file.is_file()
        )
        unread = tuple({".csv", ".tsv", ".parquet", ".zip"}.difference(suffixes))
        others = sorted(file.name for file in path.rglob("*") if file.name.endswith(unread))
        if others:
            logger.warning(
                "%s: %d file(s) are not read, e.g. %s: convert them to .jsonl", name, len(others), others[0]
            )
        if not found:
            raise FileNotFoundError(
                f"{name}: no data in this directory; expected files ending in {', '.join(suffixes)}"
            )
        files += found
    return list(dict.fromkeys(files))


def has_data_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """True for data files, gzipped or not, that are not hidden and stand in no hidden directory."""
    return file_name(path).endswith(suffixes) and not any(part.startswith(".") for part in path.parts)


def file_name(path: Path) -> str:
    """The name that says what is in a file: without .gz."""
    return path.name.removesuffix(".gz")


def read_text(path: Path) -> str:
    """Read a file as UTF-8, unzipping it if needed; a byte-order mark is skipped.

    Raises:
        ValueError: the file is empty, not UTF-8, not gzip, or only a pointer to a file.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); download it again") from None
    if raw.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{path}: this is a Git-LFS pointer, not the data; run `git lfs pull` where it came from")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = ""
        try:
            raw.decode("gb18030")
            hint = f"; it reads as GBK: iconv -f GB18030 -t UTF-8 {path.name} > new{path.suffix}"
        except UnicodeDecodeError:
            pass
        raise ValueError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}){hint}") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; remove it or fill it")
    return text


def read_records(path: Path, txt_documents: str = "blank_line") -> Iterator[tuple[object, int]]:
    """Yield (record, line number) for every record of a file; a broken record is yielded as a RowError.

    JSON is recognised by its first character, not by the file's name: lines, one array, or a dict of records by id.
    """
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".txt"):
        yield from _documents(text, txt_documents)
    elif text.lstrip()[0] == "[":
        yield from _array_items(text)
    else:
        lines = text.split("\n")  # not splitlines(): JSON strings may hold U+2028 raw
        whole = _whole_object(text, lines)
        if whole is not None:
            by_id = whole and all(isinstance(value, dict) for value in whole.values())
            first = next(number for number, line in enumerate(lines, 1) if line.strip())
            yield from ((record, first) for record in (whole.values() if by_id else [whole]))
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line), number
                except json.JSONDecodeError as error:
                    yield RowError(f"broken JSON at column {error.colno} ({error.msg})"), number


def _whole_object(text, lines):
    """The object that the file is as a whole, on one line or indented; None for a file of lines."""
    filled = [line for line in lines if line.strip()]
    try:
        whole = json.loads(filled[0])
        return whole if len(filled) == 1 and isinstance(whole, dict) else None
    except json.JSONDecodeError:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return None


def _documents(text, separator):
    if separator == "file":
        yield text.strip(), 1
        return
    start, lines = 1, []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip() and (separator == "blank_line" or not lines):
            if not lines:
                start = number
            lines.append(line.rstrip("\r"))
            if separator == "blank_line":
                continue
        if lines:
            yield "\n".join(lines), start
            lines = []


def _array_items(text):
    decoder, line = json.JSONDecoder(), 1
    position = text.index("[") + 1
    line += text.count("\n", 0, position)
    while True:
        stop = position
        while stop < len(text) and text[stop] in " \t\r\n,":
            stop += 1
        line += text.count("\n", position, stop)
        if stop >= len(text):
            yield RowError("the array does not end; the file is cut off"), line
            return
        if text[stop] == "]":
            if text[stop + 1 :].strip():
                line += text.count("\n", stop, len(text) - len(text[stop + 1 :].lstrip()))
                yield RowError("something follows the end of the array, and would be lost"), line
            return
        try:
            record, position = decoder.raw_decode(text, stop)
        except json.JSONDecodeError as error:
            # Behind a broken item nothing tells where the next one starts.
            yield (
                RowError(f"broken JSON at column {error.colno} ({error.msg}); the rest of the array is lost"),
                error.lineno,
            )
            return
        yield record, line
        line += text.count("\n", stop, position)


# -- rows ------------------------------------------------------------------------------------------------------------


def load_rows(files: list[Path], accept, data_args) -> tuple[list[Row], Ledger, list[dict]]:
    """Read every record of the files into rows.

    Args:
        files: what find_files returned.
        accept: function from a canonical record to the one the stage trains on; raises RowError for a kind it cannot.
        data_args: DataArguments.

    Returns:
        (rows, ledger, rejected): ledger.used is filled in later, when it is known what fits.

    Raises:
        ValueError: a file or a row that cannot be read (under --on_bad_row stop: the first ten are named).
    """
    if data_args.data_format != "auto":
        adapter_named(data_args.data_format)
    ledger, rows, rejected = Ledger(files=[str(path) for path in files]), [], []
    for path in files:
        for record, line in read_records(path, data_args.txt_documents):
            ledger.read += 1
            try:
                if isinstance(record, RowError):
                    raise record
                canonical, repairs = to_canonical(record, data_args.data_format)
                rows.append(Row(accept(canonical), f"{path}:{line}"))
                ledger.repaired.update(repairs.counts)
            except RowError as error:
                ledger.drop("unreadable")
                row = None if isinstance(record, RowError) else record
                rejected.append({"origin": f"{path}:{line}", "reason": str(error), "row": row})
    if rejected and data_args.on_bad_row == "stop":
        named = [f"{item['origin']}: {item['reason']}" for item in rejected[:10]]
        rest = f"\n… and {len(rejected) - 10:,} more" if len(rejected) > 10 else ""
        remedy = "(mend the data, or go on without such rows: --on_bad_row skip)"
        raise ValueError("\n".join(named) + rest + ("\n" if len(named) > 1 else " ") + remedy)
    if not rows:
        raise ValueError(f"{ledger.files[0]}: none of the {ledger.read} rows could be read")
    return rows, ledger, rejected


def write_rejected(rejected: list[dict], output_dir: str | Path) -> None:
    """Write the rows that were left out to rejected_rows.jsonl, each with its origin and what was wrong."""
    if rejected:
        path = Path(output_dir, REJECTED_ROWS)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # half of a surrogate pair is no UTF-8
        logger.warning("%d unreadable rows were written to %s", len(rejected), path)


def load_splits(data_args, accept, seed: int) -> Splits:
    """Read training and held-out rows; hold a seeded share out where no validation data was given.

    Rows with the same prompt go to the same side, so that nothing is measured on what was trained.
    """
    train_files = find_files(data_args.train_file_dir)
    validation_files = find_files(data_args.validation_file_dir) if data_args.validation_file_dir else []
    shared = {path.resolve() for path in train_files} & {path.resolve() for path in validation_files}
    if shared:
        logger.warning(
            "--train_file_dir and --validation_file_dir share %d file(s), e.g. %s: %g%% of the training rows are held "
            "out instead, so that no number is measured on training rows",
            len(shared),
            sorted(map(str, shared))[0],
            data_args.validation_split_percentage,
        )
        validation_files = []
    rows, ledger, rejected = load_rows(train_files, accept, data_args)
    if validation_files:
        held_out, held_out_ledger, more = load_rows(validation_files, accept, data_args)
        rejected += more
    else:
        rows, held_out = hold_out(rows, data_args.validation_split_percentage / 100, seed)
        ledger.read -= len(held_out)
        held_out_ledger = Ledger(read=len(held_out), files=list(ledger.files))
    rows = draw(rows, data_args.max_train_samples, seed, ledger)
    held_out = draw(held_out, data_args.max_eval_samples, seed, held_out_ledger)
    return Splits(rows, held_out, ledger, held_out_ledger, rejected)


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, held out), keeping rows with the same prompt together.

    Raises:
        ValueError: fewer than two different prompts.
    """
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(prompt_hash(row.record), []).append(index)
    if len(groups) < 2:
        raise ValueError(
            f"{rows[0].origin}: with one prompt only, nothing can be held out; give --validation_file_dir"
        )
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    wanted, chosen = max(1, round(share * len(rows))), set()
    for key in keys[:-1]:
        if len(chosen) >= wanted:
            break
        chosen.update(groups[key])
    train = [row for index, row in enumerate(rows) if index not in chosen]
    return train, [row for index, row in enumerate(rows) if index in chosen]


def draw(rows: list[Row], limit: int | None, seed: int, ledger: Ledger) -> list[Row]:
    """Draw at most `limit` rows, keeping their order; the others are dropped as "not drawn"."""
    if limit is None or len(rows) <= limit:
        return rows
    ledger.drop("not drawn (--max_…_samples)", len(rows) - limit)
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


# -- leakage ---------------------------------------------------------------------------------------------------------


def prompt_text(record: Canonical) -> str:
    """The text that identifies a record: what the user opened with, or the document.

    A short opening ("你好") says nothing; then all the user wrote counts.
    """
    if isinstance(record, Text):
        return record.text
    messages = record.messages if isinstance(record, Conversation) else record.prompt  # also prompts.Prompt
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return texts[0] if texts and len(texts[0]) >= 8 else "\n".join(texts)


def prompt_hash(record: Canonical) -> int:
    """64 bits of sha256 over the prompt, blind to case, width, white space and punctuation."""
    text = unicodedata.normalize("NFKC", prompt_text(record)).lower()
    text = "".join(char for char in text if unicodedata.category(char)[0] in "LN")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def prompt_hashes(rows: list[Row]) -> np.ndarray:
    """Sorted unique prompt hashes, (n,) uint64."""
    return np.unique(np.array([prompt_hash(row.record) for row in rows], dtype=np.uint64))


def load_seen_prompts(directory: str | Path | None) -> np.ndarray:
    """Hashes a stage directory carries from itself and its ancestors; empty for a plain base model."""
    path = Path(directory, SEEN_PROMPTS) if directory else None
    return np.load(path, allow_pickle=False) if path and path.is_file() else np.empty(0, dtype=np.uint64)


# -- kinds -----------------------------------------------------------------------------------------------------------


def accept_text(record: Canonical) -> Text:
    """What pretraining takes: running text."""
    if isinstance(record, Text):
        return record
    raise RowError(f"pretraining needs running text (field 'text'), and this is a {type(record).__name__.lower()}")


def accept_conversation(record: Canonical) -> Conversation:
    """What fine-tuning takes: conversations, questions with their solution, the chosen side of preferences."""
    if isinstance(record, Conversation):
        return record
    if isinstance(record, Question):
        return Conversation([*record.prompt, {"role": "assistant", "content": record.solution}])
    if isinstance(record, Preference):
        return Conversation([*record.prompt, *record.chosen], record.tools)
    if isinstance(record, Ranking):
        best = record.answers[record.ranks.index(0)]
        return Conversation([*record.prompt, *best], record.tools)
    raise RowError("fine-tuning needs a conversation, and this is running text (pretraining.py takes it)")


def accept_preference(record: Canonical) -> Preference | Ranking:
    """What reward modelling, DPO and ORPO take: a better and a worse answer to one prompt, or a ranking of several."""
    if isinstance(record, (Preference, Ranking)):
        return record
    raise RowError(
        "this stage compares answers (fields 'chosen' and 'rejected', or ranked 'answers'), and this is a "
        f"{type(record).__name__.lower()}"
    )


# -- cache -----------------------------------------------------------------------------------------------------------


def cache_key(files: list[Path], *parts: object) -> str:
    """sha256 over file contents and whatever else decides the tokenised result."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path}\0".encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def cached(key: str, directory: str | None, build):
    """Build tokenised data once and read it ever after; on every machine the first process builds, the others wait.

    Args:
        key: what cache_key returned.
        directory: --data_cache_dir, or None for a folder in the datasets library's own cache.
        build: function without arguments returning ({split: columns}, meta); meta must be JSON.

    Returns:
        ({split: datasets.Dataset}, meta)
    """
    import datasets

    path = Path(directory or Path(datasets.config.HF_DATASETS_CACHE, "stagekit"), key)
    if not path.is_dir() and os.environ.get("LOCAL_RANK", "0") == "0":
        splits, meta = build()
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        datasets.disable_progress_bars()
        for name, columns in splits.items():
            datasets.Dataset.from_dict(columns).save_to_disk(str(temporary / name))
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        try:
            temporary.rename(path)
        except OSError:  # another run was faster
            shutil.rmtree(temporary)
    while not path.is_dir():
        time.sleep(0.2)
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    names = [item.name for item in path.iterdir() if item.is_dir()]
    return {name: datasets.load_from_disk(str(path / name)) for name in names}, meta


def ledger_dict(ledger: Ledger) -> dict:
    """The ledger as stage.json stores it."""
    return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(ledger).items()}


def ledger_from_dict(stored: dict) -> Ledger:
    """Inverse of ledger_dict."""
    counters = {"dropped", "repaired", "turns", "pairs", "tokens"}
    return Ledger(**{key: Counter(value) if key in counters else value for key, value in stored.items()})
