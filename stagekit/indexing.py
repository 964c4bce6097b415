"""The index of a folder of documents, opened and brought up to date for a program's user."""

import hashlib
import logging
from pathlib import Path

from tqdm import tqdm

from stagekit.documents import FILE_TYPES, Limits
from stagekit.retrieval import Index, Summary, open_index

logger = logging.getLogger(__name__)


def open_and_update(
    docs: str,
    index_dir: str | None = None,
    embedding_model: str | None = None,
    limits: Limits | None = None,
    device: str | None = None,
) -> Index:
    """Open the index of --docs and bring it up to date; say what is in it and what is not.

    Args:
        docs: folder of documents, or one document.
        index_dir: where the index is; None: default_index_dir(docs).
        embedding_model, device: as for open_index.
        limits: which files are read and how long a passage is; None: Limits().

    Raises:
        ValueError: there is nothing to answer from.
    """
    index = open_index(index_dir or default_index_dir(docs), embedding_model, device)
    try:
        with tqdm(unit="file", leave=False) as bar:

            def show(done, total, name):
                bar.total = total
                bar.set_postfix_str(name[-40:], refresh=False)
                bar.update(done - bar.n)

            summary = index.update(docs, limits, show)
        for line in describe(summary, str(index.path)):
            logger.info(line)
        if not summary.num_passages:
            raise ValueError(f"--docs {docs}: no document here can be read; known types: {', '.join(FILE_TYPES)}")
    except BaseException:
        index.close()
        raise
    return index


def default_index_dir(docs: str) -> Path:
    """outputs/chatpdf/NAME-HASH, the hash of the folder's whole path: one index for each folder."""
    folder = Path(docs).resolve()
    return Path("outputs", "chatpdf", f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}")


def describe(summary: Summary, path: str, most: int = 10) -> list[str]:
    """What update() did, as lines for the user."""
    counts = (
        f"{summary.added} new, {summary.changed} changed, {summary.unchanged} as before, {summary.removed} removed"
    )
    lines = [f"{path}: {counts}; {summary.num_passages:,} passages"]
    for title, found in (("not read", summary.skipped), ("note", summary.notes)):
        lines += [f"{title}: {name}: {reason}" for name, reason in sorted(found.items())[:most]]
        if len(found) > most:
            lines.append(f"{title}: … and {len(found) - most} more files")
    if summary.skipped:
        lines.append(f"{len(summary.skipped)} file(s) could not be read")
    if summary.other_types:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in summary.other_types.most_common(5))
        lines.append(f"{sum(summary.other_types.values())} file(s) of other types: {kinds}")
    return lines
