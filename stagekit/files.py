"""Files as users have them: found in folders, unpacked, recognised by what they begin with, read record by record.

What is no data (a pointer, a web page, an archive, another encoding) is a ValueError of one line with what would help.
stagekit/file_readers.py knows the forms of the records.
"""

import codecs
import functools
import gzip
import io
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stagekit.file_readers import BLOCK_BYTES, read_documents, read_json, read_parquet, read_table
from stagekit.records import RowError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".ndjson")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
# Named when a directory holds them, since they may be meant as data; all others are passed over.
UNREAD = (
    *(".zip", ".7z", ".rar", ".tar", ".tgz", ".bz2", ".xz", ".xlsx", ".xls", ".ods", ".pdf", ".docx", ".doc"),
    *(".arrow", ".feather", ".orc", ".avro", ".xml", ".pkl", ".pickle", ".npy", ".npz", ".db", ".sqlite"),
)
# Beside the data of a dataset repository: about it, and no part of it.
ABOUT_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_PAGE = re.compile(rb"\s*(<!doctype html|<html[\s>]|<\?xml.{0,400}<error>)", re.IGNORECASE | re.DOTALL)
EMPTY = "the file is empty; remove it or fill it"


# -- finding ---------------------------------------------------------------------------------------------------------


def find_files(paths: str) -> list[Path]:
    """List the data files named by a comma-separated list of files and directories, each file once.

    Directories are searched with all below them, in sorted order and behind links; what is hidden is passed over.

    Raises:
        FileNotFoundError: a path does not exist, or a directory holds no data file.
    """
    found: dict[str, Path] = {}  # by what a path leads to
    for name in filter(None, (part.strip() for part in paths.split(","))):
        path = Path(name)
        if not path.is_dir() and not path.is_file():
            raise FileNotFoundError(f"{name}: no such file or directory (looked from {Path.cwd()})")
        for file in _search(path, name) if path.is_dir() else [path]:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _search(root, name):
    """The data files of a directory."""
    files, unread, seen = [], [], set()
    for directory, subdirectories, names in os.walk(root, onerror=_fail, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link leads to where the search has been
            subdirectories.clear()
            continue
        seen.add(real)
        subdirectories[:] = sorted(item for item in subdirectories if not item.startswith("."))
        paths = [Path(directory, item) for item in names if not item.startswith(".")]
        for path in paths:
            if not has_data_suffix(path):
                unread += [path] if file_type(path) in UNREAD else []
            elif path.is_symlink() and not path.exists():
                raise FileNotFoundError(f"{path}: this link leads to {os.readlink(path)}, which does not exist")
            elif path.is_file():
                files.append(path)
    if unread:
        kinds = Counter(file_type(path) for path in unread)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        _warn_once(
            f"{name}: not read: {counts}, e.g. {min(unread)} (unpack archives, save tables as .csv and documents as "
            ".txt)"
        )
    if not files:
        expected = ", ".join(SUFFIXES)
        raise FileNotFoundError(
            f"{name}: no data in this directory; expected files ending in {expected}, packed as .gz or .zst or not"
        )
    return sorted(files)


def _fail(error):
    raise error


@functools.cache
def _warn_once(message):
    logger.warning(message)


def has_data_suffix(path: Path) -> bool:
    """True for the names of data files, packed or not."""
    return file_type(path) in SUFFIXES and file_name(path).lower() not in ABOUT_DATA


def file_name(path: Path) -> str:
    """The name that says what is in a file: without .gz or .zst."""
    return path.stem if path.suffix.lower() in PACKINGS else path.name


def file_type(path: Path) -> str:
    """The suffix that says what is in a file, in small letters: ".csv" of data.CSV.gz."""
    return Path(file_name(path)).suffix.lower()


# -- reading ---------------------------------------------------------------------------------------------------------


def read_records(
    path: Path,
    txt_documents: str = "blank_line",
    columns: Callable[[list[str]], list[str] | None] | None = None,
) -> Iterator[tuple[object, int]]:
    """Yield (record, line number) for every record of a file; a record that cannot be read is yielded as a RowError.

    gzip, zstd and parquet are recognised by their first bytes, text and tables by the file's name (.txt, .csv, .tsv);
    all else is JSON, whose form is told by its content: lines, one array, objects over several lines, or one object
    that holds records by id. Of a parquet file the numbers are those of rows. A key that an object holds twice has its
    last value.

    Args:
        path: of the file.
        txt_documents: what stands between the documents of a .txt file: "blank_line", "line" or "file" (nothing).
        columns: for tables that may lack the names of their columns; see file_readers.read_table.

    Raises:
        ValueError: the file is empty, damaged, not UTF-8 or no data at all.
        OSError: the system cannot read it.
    """
    try:
        with open_unpacked(path) as stream:
            kind, packed = file_type(path), isinstance(stream.raw, _Unpacked)
            if stream.peek(4)[:4] == b"PAR1":
                yield from read_parquet(path, stream, packed)
                return
            if kind == ".parquet":
                raise ValueError(f"{path}: not a parquet file, or not all of it; download it again")
            if kind == ".txt":
                records = read_documents(stream, txt_documents)
            elif kind in (".csv", ".tsv"):
                records = read_table(stream, "\t" if kind == ".tsv" else ",", columns)
            else:
                reopen = functools.partial(open_unpacked, path)
                records = read_json(stream, reopen, named_lines=kind in (".jsonl", ".ndjson"))
            first = next(records, None)
            if first is None and _is_blank(path):
                raise ValueError(f"{path}: {EMPTY}")
            if first is not None:
                yield first
                yield from records
    except UnicodeDecodeError:
        raise explain_encoding(path) from None
    except RowError as error:  # of the file as a whole
        reason, *line = error.args
        raise ValueError(":".join(map(str, [path, *line])) + f": {reason}") from None


def read_text(path: Path) -> str:
    """Read a whole file as UTF-8, unpacking it if needed; a byte-order mark is skipped.

    Raises:
        ValueError: the file is empty, damaged, not UTF-8 or no text.
    """
    try:
        with open_unpacked(path) as stream:
            text = stream.read().decode()
    except UnicodeDecodeError:
        raise explain_encoding(path) from None
    if not text.strip():
        raise ValueError(f"{path}: {EMPTY}")
    return text


# -- what a file is --------------------------------------------------------------------------------------------------


@contextmanager
def open_unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file at its beginning, unpacked, behind its byte-order mark.

    Raises:
        ValueError: it is empty, or what it begins with is no data.
    """
    with open(path, "rb", buffering=BLOCK_BYTES) as file:
        packing = _packing(file.peek(4)[:4])
        stream = io.BufferedReader(_Unpacked(path, file, packing), BLOCK_BYTES) if packing else file
        head = stream.peek(BLOCK_BYTES)[:4096]
        if not head.removeprefix(codecs.BOM_UTF8):
            raise ValueError(f"{path}: {EMPTY}")
        if reason := _no_data(path, head):
            raise ValueError(f"{path}: {reason}")
        if head.startswith(codecs.BOM_UTF8):
            stream.read(3)
        yield stream


def _packing(head):
    """The program that packed a file: gzip, zstd, or none."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # The second is a frame that is skipped; files packed in parallel begin with one.
    return "zstd" if head == b"\x28\xb5\x2f\xfd" or head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5 else None


class _Unpacked(io.RawIOBase):
    """The content of a packed file; damage is a ValueError that names the file."""

    def __init__(self, path, file, packing):
        self._path, self._packing = path, packing
        if packing == "gzip":
            self._stream = gzip.GzipFile(fileobj=file)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(file, "zstd")

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            return self._stream.readinto(buffer)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = str(error).splitlines()[0]
            if "too much memory" in reason:
                raise ValueError(
                    f"{self._path}: packed with a window too large to read here; unpack it: zstd -d --long=31 "
                    f"{self._path.name}"
                ) from None
            raise ValueError(f"{self._path}: damaged {self._packing} file ({reason}); download it again") from None


def _no_data(path, head):
    """What a file is that begins like this and can hold no records, with what would help; None for data."""
    name = path.name
    for magic, reason in (
        (
            b"version https://git-lfs.github.com/spec/",
            "this is a Git-LFS pointer, not the data; run `git lfs pull` where it came from",
        ),
        (
            b"PK\x03\x04",
            "this is a zip archive or an Office file (.xlsx, .docx); unpack it, or save it as .csv or .txt, UTF-8",
        ),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            "this is an old Office file (.xls, .doc); save it as .csv or .txt, UTF-8",
        ),
        (b"%PDF-", f"this is a PDF; take its text out: pdftotext {name} new.txt"),
        (b"ARROW1", "this is an Arrow file; write it as parquet (pyarrow.parquet.write_table)"),
        (
            b"\xff\xff\xff\xff",
            "this is an Arrow file as the datasets library keeps it; write the dataset out: "
            'datasets.load_from_disk("…").to_json("new.jsonl", force_ascii=False)',
        ),
        (b"BZh91AY&SY", f"this is packed with bzip2; unpack it: bunzip2 {name}"),
        (b"\xfd7zXZ\x00", f"this is packed with xz; unpack it: unxz {name}"),
        (b"7z\xbc\xaf\x27\x1c", f"this is a 7z archive; unpack it: 7z x {name}"),
        (b"Rar!\x1a\x07", f"this is a RAR archive; unpack it: unrar x {name}"),
        (b"SQLite format 3\x00", "this is an SQLite database; write its table out as .csv"),
    ):
        if head.startswith(magic):
            return reason
    if head[257:262] == b"ustar":
        return f"this is a tar archive; unpack it: tar -xf {name}"
    if _packing(head[:4]):
        return "this is packed twice; unpack it once"
    if _PAGE.match(head.removeprefix(codecs.BOM_UTF8)):
        return "this is a web page, not the data; download it again (a hub has /resolve/ in the address, not /blob/)"
    encoding = _other_encoding(head)
    return f"this is {encoding}, not UTF-8; convert it: {_iconv(path, encoding)}" if encoding else None


def _other_encoding(head):
    """UTF-16 or UTF-32, told by its mark or by the zero bytes of its first character."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if len(head) > 3 and (head[0] == 0) != (head[1] == 0) and (head[2] == 0) != (head[3] == 0):
        return "UTF-16BE" if head[0] == 0 else "UTF-16LE"
    return None


def _iconv(path, encoding):
    """A command that converts a file to UTF-8."""
    convert, suffix = f"iconv -f {encoding} -t UTF-8", path.suffix.lower()
    if suffix in PACKINGS:
        return f"{PACKINGS[suffix]} -dc {path.name} | {convert} > new{file_type(path)}"
    return f"{convert} {path.name} > new{path.suffix}"


def explain_encoding(path: Path) -> ValueError:
    """Find the first byte of a file that is not UTF-8, and say whether it reads as GBK as a whole."""
    utf8, gbk = (codecs.getincrementaldecoder(name)() for name in ("utf-8", "gb18030"))
    line, fault, is_gbk, left = 1, None, True, 64 * BLOCK_BYTES  # how far behind the fault GBK is tried
    with open_unpacked(path) as stream:
        while block := stream.read(BLOCK_BYTES):
            if fault is None:
                try:
                    utf8.decode(block)
                    line += block.count(b"\n")
                except UnicodeDecodeError as error:
                    fault = error.object[error.start]
                    line += error.object.count(b"\n", 0, error.start)
            else:
                left -= len(block)
            try:
                gbk.decode(block)
            except UnicodeDecodeError:
                is_gbk = False
            # In a packed file the fault may be damage, and that shows at its end.
            if fault is not None and not isinstance(stream.raw, _Unpacked) and (left < 0 or not is_gbk):
                break
    if fault is None:
        return ValueError(f"{path}:{line}: the file ends in the middle of a character; it is cut off")
    hint = f"; it reads as GBK: {_iconv(path, 'GB18030')}" if is_gbk else ""
    return ValueError(f"{path}:{line}: not UTF-8 (byte 0x{fault:02x}){hint}")


def _is_blank(path):
    """True when a file holds nothing but white space."""
    with open_unpacked(path) as stream:
        return not any(block.strip() for block in iter(functools.partial(stream.read, BLOCK_BYTES), b""))
