"""Documents of a folder: which of them may be read, and how their text is cut into passages.

What stands in a document is data from strangers: sizes are bounded, links are not followed, and a file that cannot be
read is named and left out. stagekit/extraction.py knows the formats.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

SUFFIXES = {
    ".pdf": "pdf",
    ".docx": "docx",
    ".md": "md",
    ".markdown": "md",
    ".txt": "txt",
    ".html": "html",
    ".htm": "html",
}
FILE_TYPES = tuple(dict.fromkeys(SUFFIXES.values()))
VERSION = 2  # of extraction and splitting; raise it when other text comes out, so that indexed files are read again


class Unreadable(ValueError):
    """A document that cannot be read; the message is the reason, without the file's name."""


def check_docs(docs: str) -> None:
    """Raise FileNotFoundError where --docs names nothing; to be called before anything slow."""
    if not Path(docs).exists():
        raise FileNotFoundError(f"--docs {docs}: no such file or directory (looked from {Path.cwd()})")


@dataclass(frozen=True)
class Limits:
    """Which files are read, and how their text is cut.

    Attributes:
        max_file_mb: larger files are left out, in 2**20 bytes.
        max_pages: PDFs with more pages are left out.
        file_types: of FILE_TYPES.
        chunk_chars: longest passage, in characters.
        overlap_chars: sentences that end a passage are repeated at the start of the next one of the same page and
            section, as many as fit into this number of characters.
    """

    max_file_mb: float = 50
    max_pages: int = 2000
    file_types: tuple[str, ...] = FILE_TYPES
    chunk_chars: int = 500
    overlap_chars: int = 100

    def settings(self) -> str:
        """What decides the passages of a file, as text; with other settings it must be read again."""
        values = {"version": VERSION, **asdict(self)}
        return " ".join(f"{name}={value}" for name, value in values.items() if name != "file_types")


@dataclass(frozen=True)
class Block:
    """A paragraph, a table or, from split(), a passage.

    Attributes:
        text: without control characters.
        page: counted from 1; None where the format has no pages.
        heading: the headings above it, "Treatment > Doses"; "" where there is none.
        table: each line is a row, the first one the header.
    """

    text: str
    page: int | None = None
    heading: str = ""
    table: bool = False


# -- files -----------------------------------------------------------------------------------------------------------


def find_documents(root: str | Path, limits: Limits) -> tuple[dict[str, Path], dict[str, str], Counter]:
    """List the documents under a folder, in sorted order; hidden files and Office's lock files are passed over.

    A symbolic link is never followed, wherever it leads: nothing outside of the folder can be read through it.

    Args:
        root: a folder, or one document.
        limits: which types are read.

    Returns:
        ({name relative to the folder: path}, {name: why it is refused}, {suffix of other types: files}).

    Raises:
        FileNotFoundError: there is no such folder.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or directory (looked from {Path.cwd()})")
    root = root.resolve()
    found, refused, others = {}, {}, Counter()
    if root.is_file():
        walk = [(str(root.parent), [], [root.name])]
    else:
        walk = os.walk(root, onerror=lambda error: refused.update({_name(error.filename, root): error.strerror}))
    for directory, subdirectories, names in walk:
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in [*subdirectories, *sorted(names)]:
            path = Path(directory, name)
            shown = path.name if root.is_file() else _name(path, root)
            suffix = path.suffix.lower()
            if name.startswith((".", "~$")):
                continue
            if path.is_symlink():
                refused[shown] = "a symbolic link: links are not followed, copy what it leads to"
            elif name in subdirectories:
                continue
            elif SUFFIXES.get(suffix) in limits.file_types:
                found[shown] = path
            else:
                others[Path(shown).suffix.lower() or shown] += 1
    return dict(sorted(found.items())), refused, others


def _name(path, root):
    """A path below root as text that can be stored, shown and quoted: no broken encoding, no control characters."""
    text = os.fsencode(os.path.relpath(path, root)).decode("utf-8", "replace").replace(os.sep, "/")
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def read_bytes(path: Path, limits: Limits) -> bytes:
    """Read a file whole.

    Raises:
        Unreadable: too large, not a regular file, or the system refuses it.
    """
    try:  # a link that took the file's place meanwhile is refused, and a pipe does not block
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("not a regular file")
            if status.st_size > limits.max_file_mb * 2**20:
                size = status.st_size / 2**20
                raise Unreadable(f"{size:.1f} MB are more than --max_file_mb {limits.max_file_mb:g}")
            return file.read(status.st_size)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


# -- passages --------------------------------------------------------------------------------------------------------

# The blanks behind a sentence belong to it. A full stop ends one before a blank and no small letter: not in "e.g. 5".
_SENTENCE = re.compile(
    r".*?(?:[。！？…；]+[\"'”’」』）)\]】]*\s*|(?:(?<!\.)\.|(?<![!?])[!?]+)[\"')\]]*\s+(?![a-z])|\n+|$)",
    re.DOTALL,
)
# A short line that ends no sentence: it belongs to what follows.
_TITLE = re.compile(r"[^\n|*•-][^\n|]{0,38}[^\n|。！？.!?,，;；]\n")


def split_sentences(text: str) -> list[str]:
    """Cut a text behind the ends of Chinese and English sentences and of lines; joined they are the text again."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]


def split(blocks: list[Block], limits: Limits) -> list[Block]:
    """Cut blocks into passages of at most limits.chunk_chars characters.

    A passage never crosses a page or a heading. A paragraph that fits whole into the next passage is not begun in the
    last half of this one; a longer one is cut between sentences, and a sentence that is too long behind a comma or a
    blank. A line that looks like a title begins a passage rather than ending one. A table is cut between rows, and its
    header is repeated.
    """
    passages = []
    for (page, heading), group in groupby(blocks, key=lambda block: (block.page, block.heading)):
        passages += [Block(text, page, heading) for text in _pack(group, limits.chunk_chars, limits.overlap_chars)]
    return passages


def _pack(blocks, chunk_chars, overlap_chars):
    """Yield the passages of one section."""
    units, repeated = [], 0  # sentences of the passage that grows; how many of them are repeated
    for block in blocks:
        sentences = [piece for part in split_sentences(block.text + "\n") for piece in _cut(part, chunk_chars)]
        for place, sentence in enumerate(sentences):
            while len(units) > repeated and _is_full(units, sentence, block.text * (place == 0), chunk_chars):
                title = units[-1] if len(units) - repeated > 1 and _TITLE.fullmatch(units[-1]) else None
                yield "".join(units[:-1] if title else units).strip()
                if title:
                    units, repeated = [title], 0
                    continue
                units = (sentences[:1] if place else []) if block.table else _tail(units, overlap_chars)
                repeated = len(units)
            if _is_full(units, sentence, "", chunk_chars):
                units, repeated = [], 0  # no room for what is repeated
            units.append(sentence)
    if units:
        yield "".join(units).strip()


def _is_full(units, sentence, paragraph, chunk_chars):
    """True when a sentence, or the whole paragraph that it begins, is for the next passage."""
    size = sum(map(len, units))
    whole = size > chunk_chars / 2 and len(paragraph) <= chunk_chars
    return size + max(len(sentence.rstrip()), len(paragraph) if whole else 0) > chunk_chars


def _tail(units, overlap_chars):
    """The last sentences that fit into the overlap."""
    start = len(units)
    while start and sum(map(len, units[start - 1 :])) <= overlap_chars:
        start -= 1
    return units[start:]


def _cut(sentence, chunk_chars) -> Iterator[str]:
    """Cut a sentence that is longer than a passage."""
    start, size = 0, len(sentence.rstrip())
    while size - start > chunk_chars:
        part = sentence[start : start + chunk_chars]
        places = [place.end() for place in re.finditer(r"[，,、;；：:|]\s*|\s+", part)]
        end = places[-1] if places and places[-1] > chunk_chars // 2 else chunk_chars
        yield part[:end]
        start += end
    yield sentence[start:]
