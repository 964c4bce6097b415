"""Rows on disk: written once, read in any order and by any process, so that memory does not grow with the data."""

import os
import pickle
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stagekit.ledger import Ledger
from stagekit.records import Canonical

USED = 0  # what Spool.fates holds for a record that nothing has dropped


@dataclass(frozen=True)
class Row:
    """A canonical record and where it stands: "file:line"."""

    record: Canonical
    origin: str

    def packed(self) -> bytes:
        """The row as a spool keeps it."""
        return pickle.dumps((self.record, self.origin), protocol=5)


class Spool:
    """A temporary file of rows, and what must be known of each without reading it.

    A forked process reads the same file: pread has no position that two could move.

    Attributes:
        prompts: (num_rows,) uint64, seen_prompts.prompt_hash of each.
        groups: (num_rows,) uint64, equal for records that must stay on one side when data is held out.
        parts: (num_rows,) int64, index of the source in --train_file_dir.
        sources: for each row the numbers of the rows of the files it was made from.
        fates: USED, or 1 + the index in `reasons` of why it was dropped.
    """

    def __init__(self, directory: str | os.PathLike | None = None):
        self.file = tempfile.TemporaryFile(dir=directory if directory and os.path.isdir(directory) else None)
        self.offsets = array("q", [0])
        self.prompts, self.groups, self.parts = array("Q"), array("Q"), array("q")
        self.sources, self.source_ends = array("q"), array("q")
        self.fates, self.reasons = array("h"), []

    def __len__(self) -> int:
        return len(self.parts)

    def append(self, packed: bytes, prompt: int, part: int, sources: Iterable[int], group: int) -> None:
        """Write a row (Row.packed) behind the others."""
        size = self.file.write(packed)
        self.offsets.append(self.offsets[-1] + size)
        self.prompts.append(prompt)
        self.parts.append(part)
        self.groups.append(group)
        self.sources.extend(sources)
        self.source_ends.append(len(self.sources))
        self.fates.append(USED)

    def flush(self) -> None:
        """Make everything written readable; call it once, behind the last append."""
        self.file.flush()

    def read(self, index: int) -> Row:
        start, end = self.offsets[index], self.offsets[index + 1]
        return Row(*pickle.loads(os.pread(self.file.fileno(), end - start, start)))

    def reason(self, name: str) -> int:
        """The number that stands for a reason in `fates`."""
        if name not in self.reasons:
            self.reasons.append(name)
        return 1 + self.reasons.index(name)

    def source_range(self, index: int) -> range:
        return range(self.source_ends[index - 1] if index else 0, self.source_ends[index])


class Rows(Sequence):
    """Some rows of a spool, in an order; a row may stand in it several times (mixtures).

    Attributes:
        spool: where they are.
        indices: (len(self),) int64, places in the spool.
        total: (n,) int64, the rows this split began with; those that are not in `indices` were dropped.
    """

    def __init__(self, spool: Spool, indices: np.ndarray, total: np.ndarray | None = None):
        self.spool = spool
        self.indices = indices
        self.total = indices if total is None else total

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.spool.read(place) for place in self.indices[index].tolist()]
        return self.spool.read(int(self.indices[index]))

    def __iter__(self) -> Iterator[Row]:
        for place in self.indices.tolist():
            yield self.spool.read(place)

    def column(self, name: str) -> np.ndarray:
        """prompts, groups or parts of these rows, (len(self),)."""
        return np.frombuffer(getattr(self.spool, name), dtype=np.uint64 if name in HASHES else np.int64)[self.indices]

    def sizes(self) -> np.ndarray:
        """Bytes of each row on disk, (len(self),)."""
        return np.diff(np.frombuffer(self.spool.offsets, dtype=np.int64))[self.indices]

    def num_sources(self) -> int:
        """Rows of the files behind these."""
        return len({self.spool.sources[i] for place in self.total.tolist() for i in self.spool.source_range(place)})

    def split(self, chosen: np.ndarray) -> tuple["Rows", "Rows"]:
        """(those not chosen, those chosen); what was dropped before stays with the first.

        Args:
            chosen: (len(self),) bool.
        """
        taken = self.indices[chosen]
        return Rows(self.spool, self.indices[~chosen], np.setdiff1d(self.total, taken)), Rows(self.spool, taken)

    def keep(self, kept: np.ndarray, reason: str) -> "Rows":
        """The rows marked in `kept`, (len(self),) bool; the others are dropped for a reason."""
        return self.order(np.flatnonzero(kept), reason)

    def order(self, positions: np.ndarray, reason: str) -> "Rows":
        """The rows at these positions, in this order; those that are nowhere in it are dropped for a reason."""
        taken = self.indices[positions]
        self.drop(np.setdiff1d(self.indices, taken), reason)
        return Rows(self.spool, taken, self.total)

    def drop(self, places: Iterable[int], reason: str) -> None:
        """Note that the rows at these places of the spool are dropped."""
        for place in places:
            self.spool.fates[place] = self.spool.reason(reason)

    def settle(self, ledger: Ledger) -> Ledger:
        """Count in their ledger what became of the rows of the files behind these, and close it.

        A row that went into several records counts as used if any of them is, else under what befell the first.
        """
        fates = {}
        for place in self.total.tolist():
            fate = self.spool.fates[place]
            for position in self.spool.source_range(place):
                source = self.spool.sources[position]
                fates[source] = USED if USED in (fate, fates.get(source, fate)) else fates.get(source, fate)
        counts = Counter(fates.values())
        ledger.used += counts.pop(USED, 0)
        for fate, count in counts.items():
            ledger.drop(self.spool.reasons[fate - 1], count)
        return ledger.close()


HASHES = ("prompts", "groups")
