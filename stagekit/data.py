"""What a stage trains on and what it is measured on: rows found, held out, mixed and drawn, each accounted for."""

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stagekit.choices import answer_text, options_text, question_text
from stagekit.files import find_files
from stagekit.hub import fetch_dataset
from stagekit.ledger import DUPLICATES, NOT_DRAWN, NOT_MIXED, Ledger, Rejected
from stagekit.parallel import choose_workers
from stagekit.reading import load_rows
from stagekit.records import (
    Canonical,
    Choice,
    Conversation,
    Message,
    Preference,
    Question,
    Ranking,
    RowError,
    Rubric,
    Text,
    Tree,
    Unused,
)
from stagekit.rows import Rows

logger = logging.getLogger(__name__)

REJECTED_ROWS = "rejected_rows.jsonl"


@dataclass(frozen=True)
class Sources:
    """Files of training data, each with the number of the part of a mixture it belongs to, and held-out data."""

    names: list[str]
    train: list[Path]
    parts: list[int]
    validation: list[Path]


@dataclass
class Splits:
    """Rows for training and for measuring, each with its ledger; `rejected` are those that could not be read."""

    train: Rows
    validation: Rows
    train_ledger: Ledger
    validation_ledger: Ledger
    rejected: Rejected


# -- splits -----------------------------------------------------------------------------------------------------------


def load_splits(data_args, accept, seed: int, sources: Sources | None = None) -> Splits:
    """Read training and held-out rows; hold a seeded share out where no validation data was given.

    Rows with the same prompt go to the same side, so that nothing is measured on what was trained.

    Args:
        data_args: DataArguments.
        accept: see load_rows.
        seed: of all draws.
        sources: what find_sources returned, where somebody has asked before.
    """
    sources = sources or find_sources(data_args)
    names, validation_files = sources.names, sources.validation
    shared = {path.resolve() for path in sources.train} & {path.resolve() for path in validation_files}
    if shared:
        logger.warning(
            "--train_file_dir and --validation_file_dir share %d file(s), e.g. %s: %g%% of the training rows are held "
            "out instead, so that no number is measured on training rows",
            len(shared),
            sorted(map(str, shared))[0],
            data_args.validation_split_percentage,
        )
        validation_files = []
    weights = mixing_weights(data_args.mixing_weights, names)
    rows, ledger, rejected = load_rows(sources.train, accept, data_args, sources.parts)
    rows = drop_duplicates(rows, data_args.dedup, data_args.preprocessing_num_workers)
    if validation_files:
        held_out, held_out_ledger, more = load_rows(validation_files, accept, data_args)
        held_out = drop_duplicates(held_out, data_args.dedup, data_args.preprocessing_num_workers)
        rejected.take(more)
    else:
        rows, held_out = hold_out(rows, data_args.validation_split_percentage / 100, seed)
        held_out_ledger = Ledger(read=held_out.num_sources(), files=list(ledger.files))
        ledger.read -= held_out_ledger.read
    if weights is None:
        rows = draw(rows, data_args.max_train_samples, seed)
    else:
        rows, ledger.shares = mix(rows, names, weights, data_args.mixing_epoch, data_args.max_train_samples, seed)
    held_out = draw(held_out, data_args.max_eval_samples, seed)
    return Splits(rows, held_out, ledger, held_out_ledger, rejected)


def find_sources(data_args, cache_dir: str | None = None) -> Sources:
    """Find the files that the arguments name; what is in a hub is downloaded, to cache_dir or the hub's own cache.

    Raises:
        FileNotFoundError, ValueError: see files.find_files and hub.fetch_dataset.
    """
    names = [name for name in (part.strip() for part in (data_args.train_file_dir or "").split(",")) if name]
    found: dict[Path, int] = {}
    for number, name in enumerate(names):
        for path in find_files(name):
            found.setdefault(path, number)  # a file named twice belongs to the first
    if data_args.dataset_name:
        asked = (data_args.dataset_name, data_args.dataset_split, data_args.dataset_hub)
        for path in fetch_dataset(*asked, cache_dir):
            found.setdefault(path, len(names))
        names.append(data_args.dataset_name)
    validation = find_files(data_args.validation_file_dir) if data_args.validation_file_dir else []
    return Sources(names, list(found), list(found.values()), validation)


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows into (train, held out), keeping rows with the same prompt together.

    Raises:
        ValueError: fewer than two different prompts.
    """
    keys, counts = np.unique(rows.column("groups"), return_counts=True)
    if len(keys) < 2:
        raise ValueError(
            f"{rows[0].origin}: with one prompt only, nothing can be held out; give --validation_file_dir"
        )
    order = list(range(len(keys)))
    random.Random(seed).shuffle(order)
    wanted, chosen, taken = max(1, round(share * len(rows))), [], 0
    for index in order[:-1]:
        if taken >= wanted:
            break
        chosen.append(keys[index])
        taken += counts[index]
    return rows.split(np.isin(rows.column("groups"), chosen))


def draw(rows: Rows, limit: int | None, seed: int) -> Rows:
    """Draw at most `limit` rows, keeping their order; the others are dropped as "not drawn"."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows.order(draw_positions(len(rows), limit, seed), NOT_DRAWN)


def draw_positions(count: int, limit: int, seed: int) -> np.ndarray:
    """`limit` of `count` positions, in order, (limit,) int64."""
    return np.array(sorted(random.Random(seed).sample(range(count), limit)), dtype=np.int64)


# -- mixtures and duplicates ------------------------------------------------------------------------------------------


def mixing_weights(text: str | None, names: list[str]) -> list[float] | None:
    """Read --mixing_weights; the result sums to 1.

    Raises:
        ValueError: not one positive number for each part of --train_file_dir.
    """
    if text is None:
        return None
    try:
        weights = [float(item) for item in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"--mixing_weights {text!r}: give one positive number for each of the {len(names)} parts of "
            f"--train_file_dir ({', '.join(names)})"
        )
    return [weight / sum(weights) for weight in weights]


def mix(
    rows: Rows, names: list[str], weights: list[float], epoch: str, limit: int | None, seed: int
) -> tuple[Rows, dict]:
    """Take rows of each part in proportion to its weight.

    Args:
        rows: of all parts.
        names: of the parts.
        weights: of the parts, summing to 1.
        epoch: "first_exhausted": no row twice, so that the part which is shortest for its weight is used up and rows
            of the others are left out; "all_exhausted": every row at least once, so that other parts are repeated.
        limit: most rows of an epoch, or None.
        seed: decides which rows are left out, and which are repeated once more than others.

    Returns:
        (rows, {name: {"rows", "taken", "share"}}): what each part has, how many rows of it an epoch holds, and which
        share of the epoch they are.

    Raises:
        ValueError: a part without rows.
    """
    members = [np.flatnonzero(rows.column("parts") == part) for part in range(len(names))]
    for name, found in zip(names, members, strict=True):
        if not len(found):
            raise ValueError(f"{name}: no row of this part of the mixture is left for training")
    sizes = [len(found) / weight for found, weight in zip(members, weights, strict=True)]
    total = max(sizes) if epoch == "all_exhausted" else min(sizes)
    total = min(total, limit or total)
    taken = []
    for number, (found, weight) in enumerate(zip(members, weights, strict=True)):
        passes, rest = divmod(max(1, round(total * weight)), len(found))
        taken.append(np.concatenate([found] * passes + [found[draw_positions(len(found), rest, seed + number)]]))
    count = sum(map(len, taken))
    shares = {
        name: {"rows": len(found), "taken": len(part), "share": len(part) / count}
        for name, found, part in zip(names, members, taken, strict=True)
    }
    return rows.order(np.sort(np.concatenate(taken), kind="stable"), NOT_MIXED), shares


def drop_duplicates(rows: Rows, kind: str, num_workers: int | None = None) -> Rows:
    """Keep the first of rows that say the same.

    Args:
        rows: of a split.
        kind: "none"; "exact": the same texts; "near": also nearly the same (see duplicates.py).
        num_workers: processes for "near"; None: one for each core, if the data is worth it.
    """
    if kind == "none":
        return rows
    from stagekit.duplicates import find_repeats
    from stagekit.texts import texts_of

    texts = ("\n".join(texts_of(row.record)) for row in rows)
    workers = 1 if kind == "exact" else choose_workers(num_workers, len(rows))
    repeats = find_repeats(texts, kind, total=len(rows), num_workers=workers)
    return rows.keep(np.array([earlier is None for earlier in repeats]), DUPLICATES[kind])


# -- kinds ------------------------------------------------------------------------------------------------------------


def accept_text(record: Canonical) -> Text:
    """What pretraining takes: anything, as running text.

    Messages are joined by empty lines. Of preferences and rankings the better answer counts, of a tree its best
    thread; a question with options comes with them, its answer and the explanation.

    Raises:
        Unused: there is no answer that may be learnt.
        RowError: a single message of a tree, which says nothing without the others.
    """
    if isinstance(record, Text):
        return record
    if isinstance(record, Tree):
        record = _threads(record)[0]
    if isinstance(record, Choice):
        parts = [record.question, options_text(record), answer_text(record)]
    elif isinstance(record, Question | Rubric) and not record.answer:
        parts = [message["content"] for message in record.prompt]
    else:
        messages = accept_conversation(record).messages
        parts = [message["content"] for message in messages if message.get("train") is not False]
    return Text("\n\n".join(part for part in parts if part.strip()))


def accept_conversation(record: Canonical) -> Conversation | list[Conversation]:
    """What fine-tuning takes: dialogues, and whatever has a question and an answer worth learning.

    The solution of questions, the chosen side of preferences, the first of the best answers of rankings, the key of
    multiple choice with its explanation, the ideal answer of rubrics, every thread of a tree.

    Raises:
        Unused: there is no answer, or none that may be learnt.
        RowError: it has no question.
    """
    if isinstance(record, Conversation):
        if all(m.get("train") is False for m in record.messages if m["role"] == "assistant"):
            raise Unused("marked as not to be learnt", "its answers are marked as bad, or as not to be learnt")
        return record
    if isinstance(record, Tree):
        return _threads(record)
    if isinstance(record, Preference):
        return Conversation([*record.prompt, *record.chosen], record.tools)
    if isinstance(record, Ranking):
        return Conversation([*record.prompt, *record.best], record.tools)
    if isinstance(record, Question | Choice | Rubric):
        if not record.answer:
            raise Unused("no answer in the data", "fine-tuning needs an answer, and this is a question alone")
        if isinstance(record, Choice):
            asked, answer = [{"role": "user", "content": question_text(record)}], answer_text(record)
        else:
            asked, answer = record.prompt, record.solution if isinstance(record, Question) else record.answer
        return Conversation([*asked, {"role": "assistant", "content": answer}])
    if isinstance(record, Message):
        raise RowError("this is one message of a tree, which says nothing without the others")
    raise RowError("fine-tuning needs a conversation, and this is running text (pretraining.py takes it)")


def _threads(tree):
    threads = tree.threads()
    if not threads:
        raise Unused("a tree without an answer", "nobody answered in this tree")
    return threads


def accept_preference(record: Canonical) -> Preference | Ranking | list[Ranking]:
    """What reward modelling, DPO and ORPO take: a better and a worse answer to one prompt, or rankings of several.

    Raises:
        Unused: a tree in which no two answers to one message are ranked.
        RowError: nothing is compared.
    """
    if isinstance(record, (Preference, Ranking)):
        return record
    if isinstance(record, Tree):
        if rankings := record.rankings():
            return rankings
        raise Unused("a tree without ranked answers", "no two answers to one message of this tree are ranked")
    raise RowError(
        "this stage compares answers (fields 'chosen' and 'rejected', or ranked 'answers'), and this is a "
        f"{type(record).__name__.lower()}"
    )


# -- cache ------------------------------------------------------------------------------------------------------------


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


def cached(key: str, directory: str | None, build) -> Path:
    """Build tokenised data once and find it ever after; on every machine the first process builds, the others wait.

    They wait for the directory to appear and in no collective, so that no process group times out meanwhile.

    Args:
        key: what cache_key returned.
        directory: --data_cache_dir, or None for a folder in the datasets library's own cache.
        build: function that fills the directory it is given.

    Returns:
        The directory.
    """
    import datasets

    path = Path(directory or Path(datasets.config.HF_DATASETS_CACHE, "stagekit"), key)
    if not path.is_dir() and os.environ.get("LOCAL_RANK", "0") == "0":
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            build(temporary)
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # else another run was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # nothing else is in it: no trace is left of what failed
                path.parent.rmdir()
    while not path.is_dir():
        time.sleep(0.2)
    return path
