"""Records from the bytes of a file, one after another: JSON in all its forms, plain text, tables and parquet.

A record that cannot be read is yielded as a RowError in its place. Held in memory are a block of the file, one record
and, while it is not clear how JSON stands in the file, its first HEAD_BYTES.
"""

import codecs
import csv
import json
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from stagekit.records import RowError

BLOCK_BYTES = 2**20
HEAD_BYTES = 2**24  # how much of a file may be read to tell JSON lines from one array or object
MAX_RECORD_BYTES = 2**26  # to tokenise more at once would take gigabytes; mostly the file is damaged and has no lines

Records = Iterator[tuple[object, int]]

_DECODER = json.JSONDecoder()
_LENIENT = json.JSONDecoder(parse_int=str)  # finds the end of what holds a number too long for Python
_BLANKS = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_LINE_ENDS = frozenset(("\n", "\r\n", ""))
_CUT_OFF = "the file ends in the middle of a character; it is cut off"
_TOO_DEEP = "brackets are nested too deeply"
_TOO_MANY_DIGITS = "a number has more digits than Python reads"


def _too_long():
    return f"a record of more than {MAX_RECORD_BYTES / 2**20:g} MiB"


# -- JSON ------------------------------------------------------------------------------------------------------------


def read_json(stream: BinaryIO, reopen: Callable[[], AbstractContextManager[BinaryIO]], named_lines: bool) -> Records:
    """Yield (record, line) of JSON lines, of an array, or of a file that begins with an object.

    Args:
        stream: the file, at its beginning.
        reopen: opens the file once more, to look at its beginning.
        named_lines: its name promises lines (.jsonl); then it is one array or object only if its beginning proves it.
    """
    form = _json_form(reopen, named_lines)
    if form == "lines":
        return _json_lines(stream)
    return _array(_Window(stream)) if form == "array" else _objects(_Window(stream))


def _json_form(reopen, named_lines):
    """Tell "lines", "array" or "object" by the first line that is not blank, and by HEAD_BYTES where that is open."""
    limit = MAX_RECORD_BYTES if named_lines else HEAD_BYTES
    with reopen() as stream:
        first, second = _filled_line(stream, limit), _filled_line(stream, limit)
    opening = first.lstrip()[:1]
    if opening not in (b"[", b"{"):
        return "lines"
    form = "array" if opening == b"[" else "object"
    if form == "array" and not named_lines:
        return form
    state = "open" if len(first) == limit else _state(first.decode(errors="replace").strip())
    if state == "whole" and not second:
        return form
    if state != "open":
        return "lines"
    if _is_sound(reopen, form):
        return form
    return "lines" if named_lines or _is_object(second) else form


def _filled_line(stream, limit):
    """The next line that is not blank, at most `limit` bytes of it; nothing at the end."""
    return next((line for line in iter(partial(stream.readline, limit), b"") if line.strip()), b"")


def _state(text):
    """Whether a line is JSON as it is ("whole"), could go on in the next line ("open"), or neither ("broken")."""
    try:
        return "whole" if _DECODER.raw_decode(text)[1] == len(text) else "broken"
    except json.JSONDecodeError as error:
        return "open" if error.pos >= len(text) and not error.msg.startswith("Unterminated") else "broken"
    except (ValueError, RecursionError):
        return "whole"


def _is_sound(reopen, form):
    """True when the first HEAD_BYTES hold what an array or an object may hold."""
    with reopen() as stream:
        window = _Window(stream)
        for record, _ in _array(window) if form == "array" else _objects(window):
            if isinstance(record, RowError):
                return False
            if window.consumed > HEAD_BYTES:
                break
    return True


def _is_object(line):
    record = _parse(line.decode(errors="replace"))
    return isinstance(record, dict) and bool(record)


def _json_lines(stream):
    decode, limit = _DECODER.raw_decode, MAX_RECORD_BYTES
    for number, line in enumerate(iter(partial(stream.readline, limit), b""), 1):
        if len(line) == limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
            yield RowError(_too_long()), number
            continue
        try:
            text = line.decode()
            record, end = decode(text)
            if text[end:] not in _LINE_ENDS:
                record = _parse(text)
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # which only the last line can have
                raise
            record = RowError(_CUT_OFF)
        except (ValueError, RecursionError):
            if not text.strip():
                continue
            record = _parse(text)
        yield record, number


def _parse(text):
    """The record of a line, or the RowError that says what is wrong with it."""
    try:
        return json.loads(text.lstrip("\ufeff").rstrip("\r\n"))  # files joined with `cat` have marks in the middle
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON at column {error.colno} ({error.msg})")
    except RecursionError:
        return RowError(_TOO_DEEP)
    except ValueError:
        return RowError(_TOO_MANY_DIGITS)


class _Lost(Exception):
    """Behind a fault nothing tells where the next item starts: (what is wrong, line)."""


class _Window:
    """The text of a stream, of which only what is not read yet is held.

    Twice as many bytes as that are fetched at once, so that the work for a long value is in proportion to its length.
    """

    def __init__(self, stream):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")()
        self._gone = self._gone_of_line = 0  # characters no longer held; those of the line that `text` begins in
        self._ended = self._full = False
        self.text, self.position, self.line = "", 0, 1

    @property
    def consumed(self):
        """Characters read so far."""
        return self._gone + self.position

    def advance(self, position):
        """Go to a place of the text."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def fetch(self):
        """Fetch more of the text; False when there is none, or when one record takes all the room."""
        held = len(self.text) - self.position
        self._full = held > MAX_RECORD_BYTES
        if self._ended or self._full:
            return False
        block = self._stream.read(max(BLOCK_BYTES, min(2 * held, MAX_RECORD_BYTES - held)))
        self._ended = not block
        if self._ended and not self._decoder.getstate()[0]:
            return False
        more = self._decoder.decode(block) if block else "\ufffd"  # half of a character, which no JSON ends with
        start = self.text.rfind("\n", 0, self.position)
        self._gone_of_line = self.position - start - 1 + (self._gone_of_line if start < 0 else 0)
        self._gone += self.position
        self.text, self.position = self.text[self.position :] + more, 0
        return True

    def skip(self, blanks=_BLANKS):
        """Go to the next character that is not blank and return it; nothing at the end."""
        while True:
            self.advance(blanks.match(self.text, self.position).end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.fetch():
                return ""

    def value(self):
        """Read a JSON value; a RowError stands for one that no Python value can be made of.

        Raises:
            _Lost: it is broken, or too long.
        """
        decode, fault = _DECODER.raw_decode, None
        while True:
            try:
                value, end = decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # A value that goes on behind the text fails at its end, or at the quote that opens its last string.
                at_end = error.pos > len(self.text) - 32 or error.msg.startswith("Unterminated")
                if not (at_end and self.fetch()):
                    self.fail(error.msg, error.pos)
            except RecursionError:
                raise _Lost(_TOO_DEEP, self.line) from None
            except ValueError:
                decode, fault = _LENIENT.raw_decode, RowError(_TOO_MANY_DIGITS)
            else:
                if end > len(self.text) - 3 and self.fetch():  # 1.5 may go on: 1.5e-7
                    continue
                self.advance(end)
                return fault or value

    def fail(self, message, position):
        """Raise _Lost for a fault at a place of the text."""
        if self._full:
            raise _Lost(_too_long(), self.line)
        start = self.text.rfind("\n", 0, position)
        column = position - start if start >= 0 else self._gone_of_line + position + 1
        line = self.line + self.text.count("\n", self.position, position)
        raise _Lost(f"broken JSON at column {column} ({message})", line)


def _members(window, kind):
    """Yield (key, value, line) of the array (keys are None) or object that begins here; return whether it ends."""
    closing = "]" if kind == "array" else "}"
    window.advance(window.position + 1)
    while (char := window.skip(_BETWEEN)) != closing:
        line, key = window.line, None
        if not char:
            yield None, RowError(f"the {kind} does not end; the file is cut off"), line
            return False
        try:
            if kind == "object":
                if char != '"':
                    window.fail("Expecting property name enclosed in double quotes", window.position)
                key = window.value()
                if window.skip() != ":":
                    window.fail("Expecting ':' delimiter", window.position)
                window.advance(window.position + 1)
                window.skip()
            value = window.value()
        except _Lost as lost:
            reason, line = lost.args
            yield None, RowError(f"{reason}; the rest of the {kind} is lost"), line
            return False
        yield key, value, line
    window.advance(window.position + 1)
    return True


def _array(window):
    window.skip()
    members = _members(window, "array")
    while True:
        try:
            _, record, line = next(members)
        except StopIteration as end:
            if end.value and window.skip():
                yield RowError("something follows the end of the array, and would be lost"), window.line
            return
        yield record, line


def _objects(window):
    """Yield an object, or its values where all of them are objects: records by id. More objects may follow one."""
    window.skip()
    first, held, by_id, ended = window.line, [], True, None
    members = _members(window, "object")
    while ended is None:
        try:
            key, value, line = next(members)
        except StopIteration as end:
            ended = end.value
            continue
        is_record = isinstance(value, (dict, RowError))
        if held is None:
            yield value if is_record else RowError(f"{key!r} is no object, as those before it are"), line
            continue
        held.append((key, value, line))
        by_id = by_id and is_record
        if by_id and window.consumed > HEAD_BYTES:  # too many to be one record
            yield from ((value, line) for _, value, line in held)
            held = None
        elif window.consumed > MAX_RECORD_BYTES:
            yield RowError(f"{_too_long()}; the rest of the file is lost"), first
            return
    char = window.skip() if ended else ""
    if held is not None and by_id and held and not char:
        yield from ((value, line) for _, value, line in held)
    elif held is not None:
        faults = [(value, line) for _, value, line in held if isinstance(value, RowError)]
        yield faults[-1] if faults else ({key: value for key, value, _ in held}, first)
    while char:
        line = window.line
        try:
            record = window.value()
        except _Lost as lost:
            reason, line = lost.args
            yield RowError(f"{reason}; the rest of the file is lost"), line
            return
        yield record, line
        char = window.skip()


# -- plain text ------------------------------------------------------------------------------------------------------


def read_documents(stream: BinaryIO, separator: str) -> Records:
    """Yield (document, line where it starts) of plain text.

    Args:
        stream: the file.
        separator: what stands between documents: "blank_line", "line" (each is one), or "file" (it is one).

    Raises:
        RowError: a document is too long to be one.
    """
    if separator == "file":
        raw = stream.read(MAX_RECORD_BYTES + 1)
        if len(raw) > MAX_RECORD_BYTES:
            raise RowError(f"{_too_long()}; give another --txt_documents")
        text = raw.decode().strip()
        if text:
            yield text, 1
        return
    lines, size, start = [], 0, 1
    for number, line in enumerate(_text_lines(stream), 1):
        if line.strip():
            start = start if lines else number
            lines.append(line.rstrip("\r\n"))
            size += len(line)
            if size > MAX_RECORD_BYTES:
                raise RowError(f"{_too_long()} from line {start} on; is every line one? --txt_documents line")
            if separator == "blank_line":
                continue
        if lines:
            yield "\n".join(lines), start
            lines, size = [], 0
    if lines:
        yield "\n".join(lines), start


def _text_lines(stream):
    for number, line in enumerate(iter(partial(stream.readline, MAX_RECORD_BYTES), b""), 1):
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            raise RowError(f"line {number} is longer than {MAX_RECORD_BYTES / 2**20:g} MiB")
        yield line.decode()


# -- tables ----------------------------------------------------------------------------------------------------------


def read_table(
    stream: BinaryIO, delimiter: str, columns: Callable[[list[str]], list[str] | None] | None = None
) -> Records:
    """Yield (record, line where its row starts) of a table in text; all cells are strings.

    A first column without a name, as pandas writes it, numbers the rows and is left out.

    Args:
        stream: the file.
        delimiter: between the cells.
        columns: takes the cells of the first row and returns names for them if they are none; without it they are.

    Raises:
        RowError: the columns have no usable names; its second argument is their line.
    """
    names = None
    for cells, line in _rows(stream, delimiter):
        if names is None:
            if isinstance(cells, RowError):
                raise RowError(str(cells), line)
            try:
                names = columns(cells) if columns else None
            except RowError as error:
                raise RowError(str(error), line) from None
            if names is None:
                names = _column_names(cells, delimiter, line)
                continue
        if isinstance(cells, RowError):
            yield cells, line
        elif len(cells) != len(names):
            yield RowError(f"{len(cells)} cells in a table of {len(names)} columns"), line
        else:
            record = dict(zip(names, cells, strict=True))
            record.pop("", None)
            yield record, line


def _column_names(cells, delimiter, line):
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and (other := next((char for char in "\t;," if char != delimiter and char in names[0]), None)):
        wanted = "commas (.csv) or tabs (.tsv)"
        raise RowError(
            f"one column only, {names[0]!r}; is {other!r} between the cells? Separate them by {wanted}", line
        )
    nameless = [number for number, name in enumerate(names, 1) if not name and number > 1]
    if nameless:
        raise RowError(f"column {nameless[0]} has no name; name it in the first row, or remove it", line)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RowError(f"two columns are called {twice!r}; rename one", line)
    return names


def _rows(stream, delimiter):
    """Yield (cells, line where the row starts); behind a row that cannot be read, the next line begins a new one."""
    csv.field_size_limit(2**31 - 1)
    lines, again, taken, size, number = _text_lines(stream), deque(), [], 0, 1

    def feed():
        nonlocal size
        while size <= MAX_RECORD_BYTES:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            taken.append(line)
            size += len(line)
            yield line

    while True:
        try:
            for cells in csv.reader(feed(), delimiter=delimiter, strict=True):
                if any(map(str.strip, cells)):
                    yield cells, number
                number += len(taken)
                taken.clear()
                size = 0
            return
        except csv.Error as error:
            yield RowError(_fault_of_row(error, taken, delimiter, number)), number
            number += 1
            again.extendleft(reversed(taken[1:]))
            taken.clear()
            size = 0


def _fault_of_row(error, lines, delimiter, number):
    """Say what is wrong with the row that these lines begin."""
    message = str(error)
    if "unexpected end" in message:
        last = next(csv.reader(lines, delimiter=delimiter))[-1]
        opened = number + sum(line.count("\n") for line in lines) - last.count("\n")
        return f"the quote that opens a cell in line {opened} is never closed"
    if "expected after" in message:
        return 'text follows the quote that closes a cell; write quotes inside a cell twice ("")'
    if "new-line" in message:
        return "a carriage return stands in a row, outside of quotes; lines must end with a line feed"
    return f"no row of a table ({message})"


# -- parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, stream: BinaryIO, packed: bool) -> Records:
    """Yield (record, row number) of a parquet file; what JSON has no form for becomes text.

    Args:
        path: of the file.
        stream: its content.
        packed: it is unpacked on the way, so that a temporary file has to hold it.

    Raises:
        ValueError: the file is damaged, or two of its columns have one name.
    """
    import pyarrow
    from pyarrow import parquet

    def damaged(error):
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return ValueError(f"{path}: damaged parquet file ({reason}); download it again")

    with tempfile.TemporaryFile() if packed else open(path, "rb") as file:
        if packed:
            shutil.copyfileobj(stream, file, BLOCK_BYTES)
        try:
            table = parquet.ParquetFile(file, buffer_size=BLOCK_BYTES, pre_buffer=False)
            schema, meta = table.schema_arrow, table.metadata
            size = sum(meta.row_group(index).total_byte_size for index in range(meta.num_row_groups))
            rows = max(1, min(1024, HEAD_BYTES * meta.num_rows // max(1, size)))
            batches = table.iter_batches(rows, use_threads=False)
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise damaged(error) from None
        twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: two columns are called {twice!r}; rename one")
        is_plain, number = all(_is_plain(field.type) for field in schema), 0
        while True:
            try:
                batch = next(batches, None)
            except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                raise damaged(error) from None
            if batch is None:
                return
            for record in _records_of(batch):
                number += 1
                yield record if is_plain or isinstance(record, RowError) else _plain(record), number


def _records_of(batch):
    """The rows of a batch; of those that cannot be decoded, a RowError each."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        if batch.num_rows > 1:
            return [record for index in range(batch.num_rows) for record in _records_of(batch.slice(index, 1))]
        return [RowError("a cell cannot be decoded; the file is damaged")]


def _is_plain(kind):
    """True when all values of a column are what JSON could hold."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return types.is_null(kind) or any(test(kind) for test in tests)


def _plain(value):
    """A value as JSON could hold it: dates and decimals as text, bytes as the text they are, or null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
