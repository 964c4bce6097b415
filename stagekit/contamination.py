"""Evaluation data that training data holds already: the same prompt, or thirteen units in a row.

Thirteen words in a row are what GPT-3 took for contamination (arXiv:2005.14165, appendix C), and much of the field
after it; where a script has no blanks, thirteen characters (duplicates.units). One such run may be a phrase that many
write ("answer with the letter of the correct option"), so a row counts as seen when half of the runs of one of its
texts, of the question or of the answer, stand in one row of the training data; the share is told with the row. A text
below thirteen units has no run; only its prompt as a whole can be found.
"""

from collections import Counter
from dataclasses import dataclass, field

from stagekit.benchmarks import Item, read_item, recognise
from stagekit.choices import first_option
from stagekit.duplicates import units
from stagekit.files import find_files, read_records
from stagekit.records import Choice, RowError
from stagekit.texts import texts_of

RUN = 13
SEEN = 0.5  # share of a text's runs in one training row from which it counts as seen
PHRASE = 10  # a run that stands in more evaluation texts than this is a phrase, and passed over


@dataclass
class Evaluations:
    """Evaluation rows, by their prompts and their runs.

    Attributes:
        origins: "file:line" of each row.
        files: their files.
        prompts: rows by the hash of their prompt (seen_prompts.prompt_hash).
        texts: for each text of a row, (the row, how many runs it has).
        runs: for each run of RUN units, the texts it stands in; PHRASE + 1 of them at most.
        rejected: rows that could not be read: {"origin", "reason"}.
    """

    origins: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    prompts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    texts: list[tuple[int, int]] = field(default_factory=list)
    runs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rejected: list[dict] = field(default_factory=list)

    def add(self, item: Item) -> None:
        """Note one row down."""
        row = len(self.origins)
        self.origins.append(item.origin)
        for key in item.hashes:
            self.prompts[key] = (*self.prompts.get(key, ()), row)
        for text in _texts(item):
            runs, number = runs_of(text), (len(self.texts),)
            self.texts.append((row, len(runs)))
            for run in runs:
                known = self.runs.get(run, ())
                if len(known) <= PHRASE:
                    self.runs[run] = known + number if known else number

    def known_runs(self, texts: list[str]) -> list[str]:
        """The runs of texts that stand in evaluation rows as well, phrases left out."""
        if not self.runs:
            return []
        found = {run: None for text in texts for run in runs_of(text) if run in self.runs}
        return [run for run in found if len(self.runs[run]) <= PHRASE]


def runs_of(text: str) -> list[str]:
    """The different runs of RUN units of a text, in order."""
    words = units(text)
    return list(dict.fromkeys(" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1)))


def _texts(item):
    """What would give an evaluation row away: the question, its options, its answer."""
    record = item.record
    if isinstance(record, Choice):
        return ["\n".join([record.question, *(f"{name}. {text}" for name, text in record.options.items())])]
    return texts_of(record) or [message["content"] for message in item.messages]


def read_evaluations(paths: str) -> Evaluations:
    """Read files of any kind that eval_benchmark.py takes; rows that cannot be read are noted and passed over.

    Args:
        paths: files and directories, separated by commas.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, or cannot be read at all.
    """
    found = Evaluations()
    for path in find_files(paths):
        found.files.append(str(path))
        first = first_option(record for record, _ in read_records(path) if not isinstance(record, RowError))
        for record, line in read_records(path):
            origin = f"{path}:{line}"
            try:
                if isinstance(record, RowError):
                    raise record
                found.add(read_item(record, recognise(record), origin, first, None, None))
            except RowError as error:
                found.rejected.append({"origin": origin, "reason": str(error)})
    return found


@dataclass(frozen=True)
class Shared:
    """The row that holds most of an evaluation text's runs, which share of them, and the first one."""

    index: int
    share: float
    run: str


class Overlap:
    """Collects what rows share with evaluation rows."""

    def __init__(self, evaluations: Evaluations):
        self.evaluations = evaluations
        self.same: list[tuple[int, int]] = []  # (row, evaluation row) with one prompt
        self.shared: dict[int, Shared] = {}  # by evaluation row
        self.rows_sharing = 0

    def add(self, index: int, prompt: int, runs: list[str]) -> None:
        """Note down what a row shares: its prompt's hash, and its known_runs."""
        known = self.evaluations
        self.same += [(index, row) for row in known.prompts.get(prompt, ())]
        self.rows_sharing += bool(runs)
        counts, first = Counter(), {}
        for run in runs:
            for text in known.runs[run]:
                counts[text] += 1
                first.setdefault(text, run)
        for text, count in counts.items():
            row, total = known.texts[text]
            best = self.shared.get(row)
            if best is None or count / total > best.share:
                self.shared[row] = Shared(index, count / total, first[text])

    def seen(self) -> set[int]:
        """The evaluation rows that count as seen."""
        return {row for _, row in self.same} | {row for row, best in self.shared.items() if best.share >= SEEN}
