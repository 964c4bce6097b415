"""What a long job has done so far, kept on disk so that an interruption loses nothing. Standard library only."""

import json
import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write a file in one rename: all of it or nothing."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_lines(path: str | Path, rows: list[dict]) -> None:
    """Write rows as JSON lines, all of them or nothing."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def read_lines(path: Path, start: int = 0) -> tuple[list[dict], int]:
    """Read the lines of a journal from byte `start` on, as far as they are whole.

    Returns:
        (lines, place of the byte behind the last): what an interruption has torn, or is being written, is left out.
    """
    lines, size = [], start
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            try:
                lines.append(json.loads(line) if line.endswith(b"\n") else None)
            except ValueError:
                lines.append(None)
            if lines[-1] is None:
                lines.pop()
                break
            size += len(line)
    return lines, size


def check_header(path: Path, found: dict, header: dict, output_flag: str = "--output_file") -> None:
    """Compare the first line of a journal with what it should be.

    Raises:
        ValueError: it is of a run with another header; what differs is named.
    """
    if found != header:
        changed = [name for name, value in header.items() if found.get(name) != value]
        raise ValueError(
            f"{path} holds answers of a run with other {', '.join(changed)}; repeat that command to "
            f"continue it, or delete the file, or choose another {output_flag}"
        )


class Journal:
    """A file with a line that says of which run it is, then a row for everything that is done, as it gets done.

    A line is handed to the system before the next piece of work begins, so it outlives a killed process.

    Attributes:
        rows: what is done, by each row's "index".
    """

    def __init__(self, path: Path, header: dict, output_flag: str = "--output_file"):
        """Start a journal, or go on with the one that stands there.

        Args:
            path: its place, in an existing directory.
            header: all that decides what the rows hold.
            output_flag: flag that chooses another place, for the message.

        Raises:
            ValueError: it holds rows of a run with another header; what differs is named.
        """
        lines, size = read_lines(path) if path.is_file() else ([], 0)
        if len(lines) > 1:
            check_header(path, lines[0], header, output_flag)
        else:  # a run that failed before its first row: nothing is lost
            lines, size = [], 0
        self.path, self.rows = path, {row["index"]: row for row in lines[1:]}
        self.file = open(path, "ab")
        self.file.truncate(size)
        if not lines:
            self._append(header)

    def add(self, row: dict) -> None:
        self.rows[row["index"]] = row
        self._append(row)

    def _append(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def finish(self, target: str) -> None:
        """Write all rows, in the order of their indices, to the target, and remove the journal."""
        write_lines(target, [self.rows[index] for index in sorted(self.rows)])
        self.remove()

    def remove(self) -> None:
        """Remove the journal, when what its rows say stands elsewhere."""
        self.close()
        self.path.unlink()
