"""Reading what other programs wrote, for a report that must survive whatever is missing but nothing that is damaged.

Numbers that are no numbers (NaN, which a log holds where nothing could be measured) are read as None.
"""

import json
from pathlib import Path

FORMAT = 1  # of stage.json and of results.json


def read_object(path: Path, versioned: bool = False, marker: str | None = None) -> dict:
    """Read a JSON object; empty where there is no such file.

    Args:
        path: the file.
        versioned: it has a "format", which must be one that is known here.
        marker: a key without which it was written by another program, and is read as empty.

    Raises:
        ValueError: it is damaged or of a later format.
    """
    if not path.is_file():
        return {}
    try:
        found = _parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or run again what wrote it") from None
    if marker and not (isinstance(found, dict) and marker in found):
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (no JSON object); restore it, or run again what wrote it")
    if versioned and found.get("format") != FORMAT:
        raise ValueError(f"{path}: format {found.get('format')!r} is not known here; update this toolkit")
    return found


def read_rows(path: Path) -> list[dict]:
    """Read JSON lines; empty where there is no such file.

    Raises:
        ValueError: a line is no JSON object; it is named.
    """
    rows = []
    for place, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            rows += [_parse(line)] if line.strip() else []
            if rows and not isinstance(rows[-1], dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise ValueError(f"{path}:{place}: damaged ({error}); run again what wrote it") from None
    return rows


def _parse(line):
    return json.loads(line, parse_constant=lambda name: None)


def number(value: object) -> float | None:
    """The value if it is a number, else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def part(whole: dict, name: str) -> dict:
    """An object inside an object, empty where there is none."""
    found = whole.get(name)
    return found if isinstance(found, dict) else {}


def text(value: object) -> str | None:
    """The value if it is a text, else None."""
    return value if isinstance(value, str) else None
