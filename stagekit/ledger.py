"""What became of every row: read, used, dropped and why; and of samples, turns, pairs and tokens."""

import json
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stagekit.records import DROP_REASONS

UNREADABLE = "unreadable"
NOT_DRAWN = "not drawn (--max_…_samples)"
NOT_MIXED = "not drawn (--mixing_weights)"
DUPLICATES = {"exact": "exact duplicate (--dedup)", "near": "near duplicate (--dedup)"}
NO_ROOM = "does not fit the length limit"
ANSWER_TOO_LONG = "answer does not fit the length limit"
PROMPT_TOO_LONG = "prompt longer than --max_prompt_length"
IDENTICAL = "identical answers"
REFUSED = "refused by the chat template"
REASONS = (  # all there are
    *(UNREADABLE, NOT_DRAWN, NOT_MIXED, *DUPLICATES.values()),
    *(NO_ROOM, ANSWER_TOO_LONG, PROMPT_TOO_LONG, IDENTICAL, REFUSED),
    *DROP_REASONS,
)


@dataclass
class Ledger:
    """What became of every row: read == used + dropped, always.

    Rows are what files hold. Several can become one record (the messages of a tree) and one can become several; a row
    is used when any record it went into is.
    """

    read: int = 0
    used: int = 0
    dropped: Counter = field(default_factory=Counter)  # by reason, in rows
    repaired: Counter = field(default_factory=Counter)  # by kind
    # Of a mixture, by the name of its part: rows there are, rows taken, share of all that were taken.
    shares: dict[str, dict] = field(default_factory=dict)
    truncated: int = 0  # samples that lost their end, and with it the end-of-turn token
    samples: int = 0  # a long conversation becomes several
    packed_rows: int = 0
    turns: Counter = field(default_factory=Counter)  # assistant turns: trained, truncated, dropped
    pairs: Counter = field(default_factory=Counter)  # of preferences: where they come from, what they lost
    tokens: Counter = field(default_factory=Counter)  # used, trained
    files: list[str] = field(default_factory=list)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rows as dropped for one of REASONS."""
        assert reason in REASONS, f"{reason!r} is none of ledger.REASONS"
        if count:
            self.dropped[reason] += count

    def add(self, part: "Ledger") -> None:
        """Add what was counted in a part of the rows."""
        for name, value in vars(part).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)

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
        rows += [
            (f"of the mixture from {name} ({part['share']:.1%})", part["taken"]) for name, part in self.shares.items()
        ]
        width = max(len(name) for name, _ in rows)
        files = ", ".join(self.files[:3]) + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")
        return [f"{title} data: {files}", *(f"  {name:<{width}}  {count:>12,}" for name, count in rows)]

    def to_dict(self) -> dict:
        """The ledger as stage.json stores it."""
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, stored: dict) -> "Ledger":
        """Inverse of to_dict."""
        counters = {"dropped", "repaired", "turns", "pairs", "tokens"}
        return cls(**{key: Counter(value) if key in counters else value for key, value in stored.items()})


class Rejected:
    """Rows that are left out for what is in them: on disk, the first of those that stop the run at hand.

    Attributes:
        skip: go on without rows that cannot be read or encoded (--on_bad_row skip).
        count: how many there are; num_stopping of them cannot be read or encoded.
        first: (origin, reason) of the first of those.
        reasons: why they cannot, numbers aside, with how often.
    """

    NUM_SHOWN = 10

    def __init__(self, skip: bool):
        self.skip, self.count, self.num_stopping = skip, 0, 0
        self.first: list[tuple[str, str]] = []
        self.reasons: Counter = Counter()
        # half of a surrogate pair is no UTF-8, but as \\udxxx it is JSON
        self.file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace")

    def add(self, origin: str, reason: str, row: object = None, stops: bool = True) -> None:
        """Note a row; `row` is what the file holds, None where that is not even JSON."""
        self.count += 1
        if stops:
            self.num_stopping += 1
            self.reasons[re.sub(r"\d+", "N", reason)] += 1
            self.first += [(origin, reason)] if len(self.first) < self.NUM_SHOWN else []
        line = json.dumps({"origin": origin, "reason": reason, "row": row}, ensure_ascii=False, default=str)
        self.file.write(line + "\n")

    def take(self, other: "Rejected") -> None:
        """Add what another read found."""
        self.count += other.count
        self.num_stopping += other.num_stopping
        self.reasons.update(other.reasons)
        self.first = (self.first + other.first)[: self.NUM_SHOWN]
        other.file.seek(0)
        shutil.copyfileobj(other.file, self.file)

    def check(self) -> None:
        """Stop at such rows, unless they are to be skipped.

        Raises:
            ValueError: there are some; the first are named.
        """
        if self.num_stopping and not self.skip:
            others = self.num_stopping - len(self.first)
            rest = f"\n… and {others:,} more" if others else ""
            remedy = "(mend the data, or go on without such rows: --on_bad_row skip)"
            named = [f"{origin}: {reason}" for origin, reason in self.first]
            raise ValueError("\n".join(named) + rest + ("\n" if self.num_stopping > 1 else " ") + remedy)

    def save(self, path: str | Path) -> None:
        """Write them to a file, one JSON object {"origin", "reason", "row"} a line; no file where there are none."""
        if self.count:
            self.file.seek(0)
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as target:
                shutil.copyfileobj(self.file, target)
