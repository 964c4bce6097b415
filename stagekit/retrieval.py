"""An index of documents in one SQLite file, and the search in it: BM25 over words, with vectors if there is a model.

    with open_index("outputs/index") as index:
        index.update("my_folder")
        passages = index.search("What is the dose for children?")

Every file is indexed in a transaction of its own: a run that is killed leaves an index that can be searched and that
the next update() completes. One Index may be used by several threads, one file by several processes.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stagekit.documents import Limits, Unreadable, find_documents, read_bytes, split
from stagekit.embedding import PROBE, Embedder, same_vector
from stagekit.extraction import extract
from stagekit.words import cut, with_characters, without_stopwords

logger = logging.getLogger(__name__)

FILE_NAME = "index.sqlite3"
FORMAT = 1
DEPTH = 50  # passages that each way of searching puts in order, before the orders are fused
RRF_K = 60
MAX_WORDS = 256  # of a question; somebody may paste a page


@dataclass(frozen=True)
class Passage:
    """A found piece of a document.

    Attributes:
        file: its name, relative to the folder.
        page: counted from 1; None where the format has no pages.
        heading: the headings above it, "Treatment > Doses"; "" where there is none.
        text: as it stands there, at most Limits.chunk_chars.
        score: share of the question that it covers, from 0 to 1: the sum of the inverse document frequencies of the
            question's words that stand in it, over the sum of all of them. A word that no document holds weighs most,
            so a question about something else scores low. BM25 orders well, but its values depend on the length of
            the question and on the documents; these shares can be compared with a threshold.
        cosine: similarity to the question, from -1 to 1; None without embedding model.
    """

    file: str
    page: int | None
    heading: str
    text: str
    score: float
    cosine: float | None = None


@dataclass
class Summary:
    """What update() did.

    Attributes:
        added, changed, unchanged, removed: files.
        skipped: {file: why it could not be read}.
        notes: {file: what its reader should know}, such as pages without text.
        other_types: {suffix: files of a type that is not read}.
        num_passages: in the whole index now.
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    other_types: Counter = field(default_factory=Counter)
    num_passages: int = 0


def open_index(directory: str | Path, embedding_model: str | None = None, device: str | None = None) -> "Index":
    """Open the index in a directory, or begin one there.

    Args:
        directory: holds the index, and nothing else needs to be there.
        embedding_model: directory or hub name of a sentence-transformers model; None searches by words alone.
        device: for the model, such as "cpu"; None takes a GPU if there is one.

    Raises:
        ValueError: the file there is no index, or its vectors are of another embedding model.
    """
    return Index(directory, embedding_model, device)


class BrokenIndex(ValueError):
    """SQLite cannot use the file of an index; the message names it."""


def _explained(method):
    """Turn SQLite's errors into BrokenIndex."""

    @functools.wraps(method)
    def wrapped(self, *args, **more):
        try:
            return method(self, *args, **more)
        except sqlite3.Error as error:
            hint = "" if isinstance(error, sqlite3.OperationalError) else "; delete it and index anew"
            raise BrokenIndex(f"{self.path}: {error}{hint}") from error

    return wrapped


class Index:
    """Passages of a folder's documents, found by words and by vectors. Made by open_index()."""

    @_explained
    def __init__(self, directory: str | Path, embedding_model: str | None = None, device: str | None = None):
        self.path = Path(directory, FILE_NAME)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock, self._vectors = threading.RLock(), None
        self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the newest files, never the index
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            version = self._one("PRAGMA user_version")
            if version == 0:
                self._create()
            elif version != FORMAT:
                raise ValueError(f"{self.path} is an index of another version of this program; delete it")
        self._embedder = Embedder(embedding_model, device) if embedding_model else None
        if self._embedder:
            self._check_embedder()

    def _create(self):
        if self._one("SELECT count(*) FROM sqlite_master"):
            raise ValueError(f"{self.path} is the database of another program; choose another --index_dir")
        # A word is what stands between blanks: the words are cut and joined by blanks before they come here, so every
        # other kind of character belongs to a word. Porter's stemmer touches English words only.
        tokenize = "porter unicode61 remove_diacritics 0 categories ''L* M* N* P* S* Cn Co''"
        for statement in (
            "CREATE TABLE meta (name TEXT PRIMARY KEY, value)",
            "CREATE TABLE files (id INTEGER PRIMARY KEY, name TEXT UNIQUE, sha256 TEXT, settings TEXT, reason TEXT, "
            "note TEXT)",
            "CREATE TABLE passages (id INTEGER PRIMARY KEY, file INTEGER REFERENCES files ON DELETE CASCADE, "
            "page INTEGER, heading TEXT, text TEXT)",
            "CREATE INDEX passages_of_a_file ON passages (file)",
            "CREATE TABLE vectors (id INTEGER PRIMARY KEY REFERENCES passages ON DELETE CASCADE, vector BLOB)",
            f"CREATE VIRTUAL TABLE words USING fts5(text, tokenize='{tokenize}')",
            f"PRAGMA user_version = {FORMAT}",
        ):
            self._db.execute(statement)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _one(self, query, *values):
        row = self._db.execute(query, values).fetchone()
        return row and row[0]

    # -- indexing ----------------------------------------------------------------------------------------------------

    @_explained
    def update(
        self,
        folder: str | Path,
        limits: Limits | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Summary:
        """Make the index hold what the folder holds now.

        A file whose sha256 and settings are those of the index is not extracted again; a changed one replaces its
        passages, and what is no longer in the folder is removed. What cannot be read is skipped with a reason.

        Args:
            folder: of documents, or one document.
            limits: which files are read and how long a passage is; default: Limits().
            progress: called with (files done, files, name of the next) before every file and at the end.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: the index is of another folder that still exists.
        """
        limits = limits or Limits()
        files, refused, others = find_documents(folder, limits)
        self._claim(Path(folder).resolve())
        summary = Summary(skipped=refused, other_types=others)
        known = {row[0]: row[1:] for row in self._db.execute("SELECT name, sha256, settings, reason, note FROM files")}
        self._remove(known.keys() - files.keys(), summary)
        for done, (name, path) in enumerate(files.items()):
            if progress:
                progress(done, len(files), name)
            try:
                data = read_bytes(path, limits)
            except Unreadable as error:
                summary.skipped[name] = str(error)
                self._remove(known.keys() & {name}, summary)
                continue
            state = (hashlib.sha256(data).hexdigest(), limits.settings())
            if name in known and known[name][:2] == state:
                reason, note = known[name][2:]
                summary.unchanged += reason is None
            else:
                reason, note = self._index_file(name, data, limits, state)
                summary.changed += reason is None and name in known
                summary.added += reason is None and name not in known
            summary.skipped.update({name: reason} if reason else {})
            summary.notes.update({name: note} if note else {})
        if self._embedder:
            self._embed_missing()
        if progress:
            progress(len(files), len(files), "")
        summary.num_passages = self._one("SELECT count(*) FROM passages")
        return summary

    def _claim(self, folder):
        """Note of which folder this is the index: one of another folder would be emptied."""
        with self._transaction():
            owner = self._one("SELECT value FROM meta WHERE name = 'folder'")
            if owner and owner != str(folder) and Path(owner).exists():
                raise ValueError(f"{self.path} is the index of {owner}; choose another --index_dir for {folder}")
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('folder', ?)", (str(folder),))

    def _remove(self, names: Iterable[str], summary):
        for name in names:
            with self._transaction():
                summary.removed += self._one("SELECT reason IS NULL FROM files WHERE name = ?", name) or 0
                self._delete(name)

    def _delete(self, name):
        """Remove a file and all that is of it, inside a transaction."""
        of_file = "SELECT passages.id FROM passages JOIN files ON files.id = file WHERE name = ?"
        self._db.execute(f"DELETE FROM words WHERE rowid IN ({of_file})", (name,))
        self._db.execute("DELETE FROM files WHERE name = ?", (name,))
        self._vectors = None

    def _index_file(self, name, data, limits, state):
        """Replace what the index holds of a file; return (why it cannot be read, a note), mostly (None, None)."""
        passages, reason, note = [], None, None
        try:
            blocks, notes = extract(name, data, limits)
            passages, note = split(blocks, limits), "; ".join(notes) or None
        except Unreadable as error:
            reason = str(error)
        texts = (f"{passage.heading}\n{passage.text}" for passage in passages)
        words = [" ".join(with_characters(cut(text))) for text in texts]
        with self._transaction():
            self._delete(name)
            row = (name, *state, reason, note)
            insert = "INSERT INTO files (name, sha256, settings, reason, note) VALUES (?, ?, ?, ?, ?)"
            file = self._db.execute(insert, row).lastrowid
            for passage, joined in zip(passages, words, strict=True):
                row = (file, passage.page, passage.heading, passage.text)
                insert = "INSERT INTO passages (file, page, heading, text) VALUES (?, ?, ?, ?)"
                number = self._db.execute(insert, row).lastrowid
                self._db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, joined))
        return reason, note

    # -- vectors -----------------------------------------------------------------------------------------------------

    def _check_embedder(self):
        """Compare what the model makes of a probe with what the model of this index made of it.

        Raises:
            ValueError: it is another model.
        """
        probe = self._embedder.encode([PROBE])[0]
        with self._transaction():
            name, stored = (self._one("SELECT value FROM meta WHERE name = ?", key) for key in ("model", "probe"))
            if name is None:
                rows = [("model", self._embedder.name), ("probe", probe.tobytes())]
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            elif not same_vector(np.frombuffer(stored, np.float32), probe):
                raise ValueError(
                    f"{self.path} has vectors of the embedding model {name}, and {self._embedder.name} gives others; "
                    "choose another --index_dir for it"
                )

    def _embed_missing(self):
        """Give a vector to every passage that has none, file by file."""
        lacking = "FROM passages WHERE id NOT IN (SELECT id FROM vectors)"
        for (file,) in self._db.execute(f"SELECT DISTINCT file {lacking}").fetchall():
            rows = self._db.execute(f"SELECT id, heading, text {lacking} AND file = ?", (file,)).fetchall()
            vectors = self._embedder.encode([f"{heading}\n{text}".strip() for _, heading, text in rows])
            with self._transaction():
                pairs = [(row[0], vector.tobytes()) for row, vector in zip(rows, vectors, strict=True)]
                self._db.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", pairs)
                self._vectors = None

    def _cosines(self, text):
        """{passage: cosine} over all passages that have a vector."""
        version = self._one("PRAGMA data_version")  # another process has changed the file
        if self._vectors is None or self._vectors[0] != version:
            rows = self._db.execute("SELECT id, vector FROM vectors ORDER BY id").fetchall()
            matrix = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(max(len(rows), 1), -1)
            self._vectors = version, [row[0] for row in rows], matrix
        _, numbers, matrix = self._vectors
        if not numbers:
            return {}
        values = matrix @ self._embedder.encode([text], question=True)[0]
        return dict(zip(numbers, values.tolist(), strict=True))

    @_explained
    def fingerprint(self) -> str:
        """A sha256 that changes with what a search can find."""
        rows = self._db.execute("SELECT name, sha256, settings FROM files ORDER BY name").fetchall()
        model = self._embedder and self._one("SELECT hex(value) FROM meta WHERE name = 'probe'")
        return hashlib.sha256(json.dumps([rows, model]).encode()).hexdigest()

    # -- search ------------------------------------------------------------------------------------------------------

    @_explained
    def search(self, question: str, top_k: int = 5, history: Iterable[str] = ()) -> list[Passage]:
        """Find the passages that answer a question best.

        BM25 puts passages in order and, where there is an embedding model, so does the cosine; the orders are fused
        by reciprocal rank. With a history the question is searched alone and once more behind the question before it
        ("And for children?" needs it, a new subject does not), and these orders are fused as well.

        Args:
            question: as it was asked.
            top_k: passages wanted.
            history: the questions before it, oldest first.

        Returns:
            At most top_k passages, best first; each has the better of its scores alone and with the history.
        """
        *_, before = ["", *history]
        orders, scores, cosines = [], {}, {}
        with self._lock:
            for text in [question, f"{before}\n{question}"] if before else [question]:
                words = list(dict.fromkeys(without_stopwords(cut(text))))[:MAX_WORDS]
                orders.append(self._order_by_bm25(words))
                if self._embedder:
                    found = self._cosines(text)
                    orders.append(sorted(found, key=lambda number: (-found[number], number))[:DEPTH])
                    cosines = {number: max(value, cosines.get(number, -1)) for number, value in found.items()}
                candidates = {number for order in orders for number in order}
                for number, score in self._cover(words, candidates).items():
                    scores[number] = max(score, scores.get(number, 0.0))
            return [
                Passage(*self._read(number), scores.get(number, 0.0), cosines.get(number))
                for number in fuse(orders)[:top_k]
            ]

    @_explained
    def passages(self) -> list[Passage]:
        """All passages, file by file in the order they stand there; score 0."""
        numbers = self._db.execute("SELECT id FROM passages ORDER BY file, id").fetchall()
        return [Passage(*self._read(number), 0.0) for (number,) in numbers]

    def _read(self, number):
        query = "SELECT name, page, heading, text FROM passages JOIN files ON files.id = file WHERE passages.id = ?"
        return self._db.execute(query, (number,)).fetchone()

    def _weigh(self, words):
        """{word as an FTS5 string: inverse document frequency}, log(1 + (N - n + 0.5) / (n + 0.5)) in n of N passages.

        Other than BM25's own, these are never below 0.
        """
        total, weights = self._one("SELECT count(*) FROM passages"), {}
        for word in words:
            count = self._one("SELECT count(*) FROM words WHERE words MATCH ?", _quote(word))
            weights[_quote(word)] = math.log(1 + (total - count + 0.5) / (count + 0.5))
        return weights

    def _order_by_bm25(self, words):
        if not words:
            return []
        terms = " OR ".join(map(_quote, dict.fromkeys(with_characters(words))))
        query = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid LIMIT ?"
        return [row[0] for row in self._db.execute(query, (terms, DEPTH))]

    def _cover(self, words, numbers):
        """{passage: share of the words' weights that it holds}."""
        weights, covered = self._weigh(words), Counter()
        marks = ",".join(map(str, sorted(numbers)))
        for word, weight in weights.items():
            query = f"SELECT rowid FROM words WHERE words MATCH ? AND rowid IN ({marks})"
            for (number,) in self._db.execute(query, (word,)):
                covered[number] += weight / sum(weights.values())
        return covered


def _quote(word):
    return f'"{word}"'  # the words hold no quotation marks


def fuse(orders: Iterable[list[int]], k: int = RRF_K) -> list[int]:
    """Fuse orders by reciprocal rank: the sum of 1 / (k + rank) over the orders that hold an item, ranks from 1.

    Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009, with their k = 60. Of equal sums the lower number comes first.
    """
    sums = Counter()
    for order in orders:
        for rank, item in enumerate(order, 1):
            sums[item] += 1 / (k + rank)
    return sorted(sums, key=lambda item: (-sums[item], item))
