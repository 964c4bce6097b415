"""From rows to a tokenised dataset on disk: in chunks, by several processes, with bounded memory.

A stage says how a chunk of rows is encoded (encode_samples here, pairs.encode_pairs, prompts.encode_prompts);
write_dataset runs that over all rows, keeps the account, and writes what comes back as it comes.
"""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from stagekit.ledger import NO_ROOM, REFUSED, Ledger, Rejected
from stagekit.parallel import choose_workers, map_in_order
from stagekit.records import Conversation, RowError
from stagekit.rows import Row, Rows
from stagekit.tokenization import IGNORE_INDEX, Sample, count_thoughtful

T = TypeVar("T")
CHUNK_ROWS, CHUNK_BYTES = 1000, 8 << 20  # rows encoded, and packed, together: what packs depends on no other setting
NUM_PROBES = 64
TOKENS = {"input_ids", "labels", "lengths", "prompt_ids"} | {
    f"{side}_{name}" for side in ("chosen", "rejected") for name in ("ids", "labels")
}


@dataclass(frozen=True)
class Probe:
    """A conversation of the data and one of the samples made from it; the checks look at some of them."""

    conversation: Conversation
    sample: Sample
    origin: str


@dataclass
class Candidate:
    """A conversation, the samples made from it, and where it stands."""

    conversation: Conversation
    samples: list[Sample]
    origin: str

    def interest(self) -> int:
        """How likely something is wrong with it: cut answers, tools, split conversations, many turns."""
        turns = sum(len(sample.turns) for sample in self.samples)
        cut = any(sample.truncated for sample in self.samples)
        return cut * 8 + bool(self.conversation.tools) * 4 + (len(self.samples) > 1) * 2 + turns


@dataclass
class Chunk:
    """What became of some rows.

    Attributes:
        columns: one list a column, one item a row of the dataset.
        ledger: what was counted of samples, turns, pairs and tokens.
        dropped: reason by position of the row.
        refused: rows that stop the run, as (position, reason).
        candidates: what the checks may look at.
    """

    columns: dict[str, list] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    dropped: dict[int, str] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    def encode(self, rows: list[Row], encode: Callable) -> Iterator[tuple[int, Row, object]]:
        """Encode rows one by one: (position, row, what `encode` made of its record); refused ones are noted."""
        for position, row in enumerate(rows):
            try:
                yield position, row, encode(row.record)
            except RowError as error:
                self.refused.append((position, str(error)))


def encode_samples(rows: list[Row], encode: Callable, block_size: int, packing: bool) -> Chunk:
    """Encode a chunk of documents or conversations, packed if asked.

    Args:
        rows: a chunk.
        encode: function from a canonical record to (samples, number of answers that did not fit).
        block_size: length of a packed row in tokens.
        packing: put several samples into a row.

    Returns:
        A Chunk with the columns input_ids, labels, and lengths of the samples in each row.
    """
    chunk, samples = Chunk(), []
    ledger = chunk.ledger
    for position, row, (found, lost) in chunk.encode(rows, encode):
        ledger.turns.update({"dropped": lost} if lost else {})
        if not found:
            chunk.dropped[position] = NO_ROOM
            continue
        for sample in found:
            ledger.turns.update({"trained": len(sample.turns)} if sample.turns else {})
            if sample.truncated:
                ledger.turns["truncated"] += 1
                ledger.truncated += 1
        samples += found
        if isinstance(row.record, Conversation):
            thoughtful = count_thoughtful(row.record, found)
            ledger.turns.update({"with thoughts": thoughtful} if thoughtful else {})
            chunk.candidates.append(Candidate(row.record, found, row.origin))
    ledger.samples = len(samples)
    ledger.tokens["used"] = sum(len(sample.input_ids) for sample in samples)
    ledger.tokens["trained"] = sum(len(sample.labels) - sample.labels.count(IGNORE_INDEX) for sample in samples)
    groups = pack(samples, block_size) if packing else [[index] for index in range(len(samples))]
    ledger.packed_rows = len(groups) if packing else 0
    chunk.columns = {
        "input_ids": [[token for index in group for token in samples[index].input_ids] for group in groups],
        "labels": [[label for index in group for label in samples[index].labels] for group in groups],
        "lengths": [[len(samples[index].input_ids) for index in group] for group in groups],
    }
    return chunk


# -- datasets --------------------------------------------------------------------------------------------------------


def write_dataset(
    rows: Rows,
    ledger: Ledger,
    encode_chunk: Callable[[list[Row]], Chunk],
    path: Path,
    rejected: Rejected,
    num_workers: int | None = None,
    description: str = "tokenising",
) -> list[Probe]:
    """Encode rows into an Arrow file and close their ledger.

    Args:
        rows: of a split.
        ledger: of the split; what became of the rows, and what was counted, is filled in.
        encode_chunk: function from some rows to a Chunk; depends on nothing but them.
        path: the file to write; datasets.Dataset.from_file reads it.
        rejected: takes rows that cannot be encoded.
        num_workers: processes; None: one for each core, if the data is worth it.
        description: for the progress bar.

    Returns:
        Up to NUM_PROBES probes.

    Raises:
        ValueError: rows that cannot be encoded (the first are named), or nothing left to learn from.
    """
    import pyarrow
    from tqdm import tqdm

    def work(part):
        chunk = encode_chunk(part)
        chunk.candidates, first = _hardest(chunk.candidates), chunk.candidates[: NUM_PROBES // 2]
        chunk.candidates = first + [item for item in chunk.candidates if all(item is not other for other in first)]
        columns, chunk.columns = chunk.columns, {}
        return len(part), chunk, _record_batch(columns)

    hardest, first, writer = [], [], None
    progress = tqdm(total=len(rows), desc=description, unit="row", mininterval=0.5)
    with open(path, "wb") as file, progress:
        for start, (count, chunk, batch) in map_chunks(rows, work, num_workers):
            for position, reason in chunk.dropped.items():
                rows.drop([rows.indices[start + position]], reason)
            for position, reason in chunk.refused:
                row = rows[start + position]
                rejected.add(row.origin, reason, dataclasses.asdict(row.record))
                rows.drop([rows.indices[start + position]], REFUSED)
            ledger.add(chunk.ledger)
            hardest = _hardest(hardest + chunk.candidates)
            first = (first + chunk.candidates)[: NUM_PROBES // 2]
            if batch is not None:
                writer = writer or pyarrow.ipc.new_stream(file, batch.schema)
                writer.write_batch(batch)
            progress.update(count)
        if writer:
            writer.close()
    rejected.check()
    rows.settle(ledger)
    if not ledger.samples:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in ledger.dropped.items())
        raise ValueError(f"{ledger.files[0]}: nothing is left to learn from ({reasons})")
    return choose_probes(hardest, first)


def plan_chunks(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Cut rows into chunks of at most CHUNK_ROWS rows and, if they are more than one, about CHUNK_BYTES bytes.

    Args:
        sizes: bytes of each row.

    Returns:
        (start, end) of each chunk.
    """
    chunks, start, size = [], 0, 0
    for index, row_size in enumerate(sizes.tolist()):
        if index > start and (index - start == CHUNK_ROWS or size + row_size > CHUNK_BYTES):
            chunks.append((start, index))
            start, size = index, 0
        size += row_size
    return [*chunks, (start, len(sizes))] if len(sizes) else []


def map_chunks(rows: Rows, work: Callable[[list[Row]], T], num_workers: int | None) -> Iterator[tuple[int, T]]:
    """Do some work on all rows, chunk by chunk; see parallel.map_in_order.

    Args:
        rows: of a split.
        work: function from the rows of a chunk to something that can be pickled.
        num_workers: processes; None: one for each core, if the data is worth it.

    Yields:
        (place of the first row of the chunk, what `work` returned), in order.

    Raises:
        ValueError: a process was killed.
    """
    chunks = plan_chunks(rows.sizes())
    workers = min(choose_workers(num_workers, len(rows)), len(chunks))
    for (start, _), result in map_in_order(lambda chunk: work(rows[slice(*chunk)]), chunks, workers):
        yield start, result


def _record_batch(columns):
    """Columns as Arrow, tokens as int32; None where there is no row."""
    import pyarrow

    if not columns or not next(iter(columns.values())):
        return None
    tokens = pyarrow.list_(pyarrow.int32())
    arrays = {name: pyarrow.array(values, tokens if name in TOKENS else None) for name, values in columns.items()}
    return pyarrow.RecordBatch.from_pydict(arrays)


# -- probes ----------------------------------------------------------------------------------------------------------


def _hardest(candidates):
    return sorted(candidates, key=lambda candidate: -candidate.interest())[: NUM_PROBES // 2]


def choose_probes(hardest: list[Candidate], first: list[Candidate]) -> list[Probe]:
    """What the checks look at: first what is likely to go wrong, then the first rows."""
    probes = [Probe(item.conversation, sample, item.origin) for item in hardest + first for sample in item.samples]
    distinct = {(probe.origin, tuple(probe.sample.turns), tuple(probe.sample.input_ids)): probe for probe in probes}
    return list(distinct.values())[:NUM_PROBES]


# -- packing ---------------------------------------------------------------------------------------------------------


def pack(samples: list[Sample], block_size: int) -> list[list[int]]:
    """Group samples into rows of at most block_size tokens: best fit, longest first. No sample is cut or dropped.

    Args:
        samples: none longer than block_size.

    Returns:
        Lists of indices into samples, one a row, deterministic.
    """
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in order:
        length = len(samples[index].input_ids)
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(index)
        else:
            left, row = block_size, len(rows)
            rows.append([index])
        if left - length > 0:
            insort(room, (left - length, row))
    return rows
