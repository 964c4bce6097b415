"""Texts that repeat earlier ones, exactly or nearly. No files, no tokens.

Exactly: the same characters, but for white space.

Nearly: at least NEAR of the 5-grams of two texts taken together stand in both (their Jaccard similarity). A 5-gram is
five units in a row, and a unit is a word or number, or a single character where a script puts no blanks between words:
Chinese, Japanese, Thai. Width, case and punctuation do not count. One unit changed inside a text takes five 5-grams
with it, so with NEAR = 0.8 a text is a near duplicate as long as about one word (or Chinese character) in 45 was
changed: a greeting put in front, a typing error mended. Other numbers in a short template mostly make another text, as
they should. Below five units a text is one gram, and must be the same. 5-grams and 0.8 stand between what is usual:
5-grams with 0.75 (FineWeb, arXiv:2406.17557), 0.8 of the edit similarity (Lee et al., arXiv:2107.06499).

How: MinHash (Broder 1997) of the package datasketch gives every text NUM_HASHES numbers, each of which two texts share
with the probability of their similarity. Bands of these numbers are looked up in tables, so that a text is compared
only with the few that share a band (locality-sensitive hashing; Leskovec, Rajaraman and Ullman, Mining of Massive
Datasets, chapter 3). Whether they are similar enough is then counted: over all 5-grams of texts that have up to SAMPLE
of them, else over the same random part of both, with a standard error of 0.02. (The MinHash numbers alone would
estimate it with 0.035, and among hundreds of rows of one template some would pass by chance.)

Memory: for near duplicates 1.8 KB a text of 40 words and never more than 5 KB, for exact ones 150 bytes. The tables
are our own dictionaries: those of datasketch.MinHashLSH, which hold a set for every entry, take 4 KB a text more.
"""

import functools
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from stagekit.parallel import map_in_order

NEAR = 0.8
GRAM = 5
NUM_HASHES = 128
RECALL = 0.95  # share of the pairs exactly at the threshold that the tables must find; above it they find more
SAMPLE = 512  # 5-grams by which two texts are compared
CROWD = 16  # texts remembered under one band: rows of one template share bands, and comparing all would never end
PART_CHARS = 200_000  # of texts that a process looks at, at a time
BLOCK = 4096  # grams hashed at a time: 2 MB of numbers, however long the text
# Scripts without blanks between words: Thai to Burmese, Khmer, kana, Han, and Han beyond the basic plane.
_SOLID = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U000323af"
_UNITS = re.compile(rf"[{_SOLID}]|[^\W_{_SOLID}]+")


def units(text: str) -> list[str]:
    """Cut a text into words and numbers, or characters where a script has no blanks; width and case are folded."""
    return _UNITS.findall(unicodedata.normalize("NFKC", text).lower())


def grams(text: str, size: int) -> Iterator[str]:
    """Yield the runs of `size` units of a text, joined by blanks; the text as a whole where it has fewer."""
    found = units(text)
    if len(found) < size:
        yield " ".join(found) or text.strip()
        return
    for start in range(len(found) - size + 1):
        yield " ".join(found[start : start + size])


def readable(gram: str) -> str:
    """A gram without the blanks that scripts do not put between characters."""
    return re.sub(rf"(?<=[{_SOLID}]) (?=[{_SOLID}])", "", gram)


def digest(text: str) -> bytes:
    """16 bytes that stand for a text, blind to white space at its ends and to how much there is inside."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


# -- near ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signature:
    """What stands for a text when near duplicates are looked for; the same on every machine.

    Attributes:
        hashes: MinHash of its 5-grams, (NUM_HASHES,) uint32.
        sample: the SAMPLE smallest of the hashes of its 5-grams, ascending; all of them where it has fewer.
    """

    hashes: np.ndarray
    sample: np.ndarray


@functools.cache
def _empty():
    from datasketch import MinHash

    return MinHash(num_perm=NUM_HASHES, seed=1, hashfunc=int)


def sign(text: str) -> Signature:
    """Make the signature of a text."""
    sketch, sample, found = _empty().copy(), np.empty(0, np.uint32), grams(text, GRAM)
    while block := [zlib.crc32(gram.encode()) for gram in islice(found, BLOCK)]:
        sketch.update_batch(block)
        sample = np.union1d(sample, np.array(block, np.uint32))[:SAMPLE]
    return Signature(sketch.hashvalues.astype(np.uint32), sample)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """The Jaccard similarity of two texts by their samples: exact where both hold all grams."""
    ends = [sample[-1] for sample in (first, second) if len(sample) == SAMPLE]  # beyond it a full one knows nothing
    if ends:
        first, second = (sample[: np.searchsorted(sample, min(ends), side="right")] for sample in (first, second))
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def choose_bands(threshold: float) -> tuple[int, int]:
    """(bands, numbers in a band): as many numbers, and so as few false candidates, as RECALL allows.

    A band of r numbers agrees with probability s^r at similarity s, one of b bands with 1 - (1 - s^r)^b.
    """
    for rows in range(NUM_HASHES, 1, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return NUM_HASHES, 1


class Repeats:
    """What was seen so far. Texts are numbered from 0 in the order in which they are looked up."""

    def __init__(self, threshold: float | None = NEAR):
        """Begin with nothing; a threshold of None finds exact repeats only.

        Raises:
            ValueError: the threshold is not above 0 and at most 1.
        """
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"a similarity is above 0 and at most 1, got {threshold}")
        self.threshold, self.count = threshold, 0
        self.same: dict[bytes, int] = {}
        self.samples: dict[int, bytes] = {}
        self.bands, self.rows = choose_bands(threshold) if threshold else (0, 0)
        self.tables: list[dict[int, int | tuple[int, ...]]] = [{} for _ in range(self.bands)]

    def find(self, key: bytes, signature: Signature | None = None) -> tuple[int, bool] | None:
        """Look the next text up, and remember it where it is new.

        Args:
            key: its digest.
            signature: where near repeats are looked for.

        Returns:
            (index of the earlier text, whether it is exactly the same), or None. The earlier text is never itself a
            repeat: those that are left stand for all.
        """
        index, self.count = self.count, self.count + 1
        if key in self.same:
            return self.same[key], True
        near = None if self.threshold is None else self._find_near(index, signature)
        self.same[key] = index if near is None else near
        return None if near is None else (near, False)

    def _find_near(self, index, signature):
        hashes, rows = signature.hashes, self.rows
        keys = [hash(hashes[band * rows : (band + 1) * rows].tobytes()) for band in range(self.bands)]
        candidates = set()
        for table, key in zip(self.tables, keys, strict=True):
            found = table.get(key, ())
            candidates.update((found,) if isinstance(found, int) else found)
        for candidate in sorted(candidates):
            sample = np.frombuffer(self.samples[candidate], np.uint32)
            if similarity(sample, signature.sample) >= self.threshold:
                return candidate
        self.samples[index] = signature.sample.tobytes()
        for table, key in zip(self.tables, keys, strict=True):
            found = table.get(key)  # nearly always there is none, and an int takes less room than a tuple
            several = (found,) if isinstance(found, int) else found or ()
            if len(several) < CROWD:
                table[key] = (*several, index) if several else index
        return None


def find_repeats(
    texts: Iterable[str],
    mode: str,
    threshold: float = NEAR,
    total: int | None = None,
    num_workers: int | None = None,
    description: str = "looking for duplicates",
) -> Iterator[int | None]:
    """Yield for every text the index of the earlier one that it repeats, or None; with a progress bar.

    A repeat of a repeat counts as one of the first, and a text that is only like a repeat counts as new: what is left
    without the repeats has no two texts that repeat each other.

    Args:
        texts: read once, in order; none is kept.
        mode: "exact" or "near" (which includes exact).
        threshold: least similarity of near duplicates.
        total: number of texts, for the progress bar.
        num_workers: processes that look at the texts; None or 1: this one does.
        description: for the progress bar.

    Raises:
        ValueError: an unknown mode, or a threshold that is no similarity.
    """
    if mode not in ("exact", "near"):
        raise ValueError(f"duplicates are looked for as exact or near, not as {mode!r}")
    return _find_repeats(texts, Repeats(threshold if mode == "near" else None), total, num_workers, description)


def _find_repeats(texts, repeats, total, num_workers, description):
    from tqdm import tqdm

    look = digest_and_sign if repeats.threshold else _digest_alone
    if not num_workers or num_workers < 2:
        found = map(look, texts)
    else:
        parts = map_in_order(lambda part: [look(text) for text in part], _parts(texts), num_workers)
        found = (item for _, part in parts for item in part)
    for item in tqdm(found, total=total, desc=description, unit="row", mininterval=0.5):
        earlier = repeats.find(*item)
        yield None if earlier is None else earlier[0]


def _parts(texts):
    """Lists of texts, of about PART_CHARS each."""
    part, size = [], 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= PART_CHARS:
            yield part
            part, size = [], 0
    yield part


def digest_and_sign(text: str) -> tuple[bytes, Signature]:
    """What Repeats.find takes of a text."""
    return digest(text), sign(text)


def _digest_alone(text):
    return digest(text), None
