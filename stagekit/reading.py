"""From files to rows on disk, converted by several processes, with an account of every row."""

import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stagekit.choices import first_option, needs_first_option
from stagekit.files import read_records
from stagekit.formats import adapter_named, parse_columns, to_canonical
from stagekit.ledger import UNREADABLE, Ledger, Rejected
from stagekit.parallel import map_in_order, num_cores
from stagekit.records import NO_PARENT, Message, RowError, Unused
from stagekit.rows import Row, Rows, Spool
from stagekit.seen_prompts import prompt_hash
from stagekit.trees import grow_trees

BATCH_BYTES = 1 << 20  # of records that a process converts at a time
SMALL_BYTES = 8 << 20  # of files below which more processes do not pay off
MAX_READERS = 8  # processes; more wait for the one that reads the file


def load_rows(files: list[Path], accept, data_args, parts: list[int] | None = None) -> tuple[Rows, Ledger, Rejected]:
    """Read every record of the files into rows.

    Args:
        files: what find_files returned.
        accept: function from a canonical record to the one the stage trains on, or a list of such; raises RowError for
            a kind it cannot take.
        data_args: DataArguments; on_bad_row may also be "report": like skip, and no row at all is no error.
        parts: for each file the number of the part of a mixture it belongs to.

    Returns:
        (rows, ledger, rejected): ledger.used is filled in later, when it is known what fits.

    Raises:
        ValueError: a file or a row that cannot be read (under --on_bad_row stop: the first ten are named).
    """
    if data_args.data_format != "auto":
        adapter_named(data_args.data_format)
    reading = _Reading(accept, data_args, Ledger(files=[str(path) for path in files]))
    batches, workers = reading.batches(files, parts or [0] * len(files)), _reading_workers(files, data_args)
    with tqdm(desc="reading", unit="row", delay=2, mininterval=0.5) as progress:
        for batch, outcomes in map_in_order(reading.convert, batches, workers):
            reading.take(batch, outcomes)
            progress.update(len(outcomes))
    spool, ledger, rejected = reading.spool, reading.ledger, reading.rejected
    spool.flush()
    rejected.check()
    if not len(spool) and data_args.on_bad_row != "report":
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in ledger.dropped.items())
        raise ValueError(f"{ledger.files[0]}: none of the {ledger.read:,} rows can be used ({reasons})")
    return Rows(spool, np.arange(len(spool))), ledger, rejected


def _reading_workers(files, data_args):
    """Processes that pay off: one reads and writes the files, and a few keep up with it."""
    worthwhile = sum(path.stat().st_size for path in files) >= SMALL_BYTES
    return min(data_args.preprocessing_num_workers or (num_cores() if worthwhile else 1), MAX_READERS)


@dataclass
class _Batch:
    """Some records of a file, in order.

    Attributes:
        path, part: of the file.
        records: each a pickled (record, line).
        first_option: see to_canonical.
        is_last: the file ends here.
    """

    path: Path
    part: int
    records: list[bytes]
    first_option: int | None
    is_last: bool


class _Outcome(NamedTuple):
    """What a record of a file became: rows, or a message of a tree, or nothing for an error.

    Attributes:
        origin: "file:line".
        rows: (packed row, its prompt_hash) of each.
        repairs: by kind.
        message, error: or None.
    """

    origin: str
    rows: list[tuple[bytes, int]] = []
    repairs: Counter | None = None
    message: Message | None = None
    error: RowError | None = None


class _Reading:
    """What load_rows has read so far."""

    def __init__(self, accept, data_args, ledger):
        self.accept, self.data_args, self.ledger = accept, data_args, ledger
        self.columns = parse_columns(data_args.columns)
        self.spool = Spool(data_args.data_cache_dir)
        self.rejected = Rejected(data_args.on_bad_row != "stop")
        self.messages: list[tuple[Message, int, str]] = []  # of the file at hand: with its row's number and origin

    def batches(self, files, parts):
        """Read the files; every batch holds about BATCH_BYTES, or a single record."""
        for path, part in zip(files, parts, strict=True):
            first, settled = self.data_args.first_option, self.data_args.first_option is not None
            records, size = [], 0
            for record, line in read_records(path, self.data_args.txt_documents):
                if not settled and needs_first_option(record):
                    first, settled = first_option(record for record, _ in read_records(path)), True
                packed = _pack(record, line)
                if records and size + len(packed) > BATCH_BYTES:
                    yield _Batch(path, part, records, first, False)
                    records, size = [], 0
                records.append(packed)
                size += len(packed)
            yield _Batch(path, part, records, first, True)

    def convert(self, batch):
        """What became of each record of a batch; done in any process."""
        return [self._convert(*pickle.loads(packed), batch) for packed in batch.records]

    def _convert(self, record, line, batch):
        origin = f"{batch.path}:{line}"
        try:
            if isinstance(record, RowError):
                raise record
            canonical, repairs = to_canonical(record, self.data_args.data_format, self.columns, batch.first_option)
            if isinstance(canonical, Message):
                return _Outcome(origin, [], repairs.counts, canonical)
            return _Outcome(origin, self.rows_of(canonical, origin), repairs.counts)
        except RowError as error:
            return _Outcome(origin, error=error)

    def rows_of(self, canonical, origin):
        """Make the rows of a record that the stage takes."""
        accepted = self.accept(canonical)
        records = accepted if isinstance(accepted, list) else [accepted]
        return [(Row(record, origin).packed(), prompt_hash(record)) for record in records]

    def take(self, batch, outcomes):
        """Enter what became of a batch; rows that are messages of trees are linked when their file ends."""
        for outcome, packed in zip(outcomes, batch.records, strict=True):
            if outcome.error:
                record = pickle.loads(packed)[0]
                self.leave_out(outcome.error, outcome.origin, None if isinstance(record, RowError) else record)
            elif outcome.message:
                self.messages.append((outcome.message, self.ledger.read, outcome.origin))
            else:
                self.add(outcome.rows, batch.part, [self.ledger.read])
            self.ledger.repaired.update(outcome.repairs or {})
            self.ledger.read += 1
        if batch.is_last:
            self.link_messages(batch.part)

    def link_messages(self, part):
        """Make trees of the messages of a file."""
        places = {id(message): (source, origin) for message, source, origin in self.messages}
        trees, left_over = grow_trees(message for message, _, _ in self.messages)
        self.messages = []
        for tree, members in trees:
            try:
                rows = self.rows_of(tree, places[id(members[0])][1])
                self.add(rows, part, [places[id(message)][0] for message in members])
            except RowError as error:
                for message in members:
                    self.leave_out(error, places[id(message)][1], vars(message))
        for message in left_over:
            self.leave_out(Unused(NO_PARENT), places[id(message)][1], vars(message))

    def add(self, rows, part, sources):
        """Write what rows of the file became; all of it stays on one side when data is held out."""
        group = rows[0][1]
        for packed, prompt in rows:
            self.spool.append(packed, prompt, part, sources, group)

    def leave_out(self, error, origin, row):
        """Count and keep a row that is not used; only those that cannot be read may stop the run."""
        unused = isinstance(error, Unused)
        self.ledger.drop(error.reason if unused else UNREADABLE)
        self.rejected.add(origin, str(error), row, stops=not unused)


def _pack(record, line):
    try:
        return pickle.dumps((record, line), protocol=5)
    except RecursionError:
        return pickle.dumps((RowError("it is nested too deep to be read"), line))
