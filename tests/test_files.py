"""Files are found whatever lies around them, unpacked, and told by their first bytes; what is no data is named."""

import gzip
import json
import logging
import os

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_jsonl

from stagekit import file_readers, files
from stagekit.files import file_name, file_type, find_files, read_records, read_text
from stagekit.records import RowError

TWO = [{"text": "first"}, {"text": "second"}]
LINES = b'{"text": "first"}\n{"text": "second"}\n'


def write(path, content):
    """Write a file, and the folders above it, from text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, **options):
    return list(read_records(path, **options))


def refusal(path, **options):
    """The one line with which a file is refused."""
    with pytest.raises((ValueError, OSError)) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def zstd_frame(data):
    """A zstd frame by hand (RFC 8878): one segment, its size in four bytes, and raw blocks of at most 128 KiB."""
    assert data
    blocks = [data[start : start + 2**17] for start in range(0, len(data), 2**17)]
    frame = b"\x28\xb5\x2f\xfd" + b"\xa0" + len(data).to_bytes(4, "little")
    for number, block in enumerate(blocks, 1):
        frame += (len(block) << 3 | (number == len(blocks))).to_bytes(3, "little") + block
    return frame


SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"\xff\xfe\xfd\xfc"  # a frame that is to be passed over


# -- finding ---------------------------------------------------------------------------------------------------------


def test_a_directory_is_searched_recursively_in_sorted_order_without_what_is_hidden(tmp_path):
    names = ("b.jsonl", "a/z.json", "a/y.txt.gz", ".hidden.jsonl", ".cache/x.jsonl", "notes.md", "a/c.csv", "a/B.TSV")
    for name in (*names, "e.parquet", "a/d.csv.zst", "a/.x/y.json", "f.ndjson"):
        write(tmp_path / name, "x")
    wanted = ("a/B.TSV", "a/c.csv", "a/d.csv.zst", "a/y.txt.gz", "a/z.json", "b.jsonl", "e.parquet", "f.ndjson")
    assert find_files(str(tmp_path)) == [tmp_path / name for name in wanted]


def test_files_and_directories_are_listed_with_commas_and_each_file_once(tmp_path):
    one, two = write(tmp_path / "d/one.txt", "x"), write(tmp_path / "two.data", "x")
    assert find_files(f"{two}, {one},{tmp_path / 'd'},") == [two, one]
    assert find_files(f"{tmp_path}/d/../two.data,{two},{tmp_path}/d/,{tmp_path}") == [tmp_path / "d/../two.data", one]


def test_links_are_followed_and_loops_of_them_end(tmp_path):
    root = tmp_path / "root"
    one, far = write(root / "a/one.json", "x"), write(tmp_path / "far/two.json", "x")
    (root / "b").symlink_to(tmp_path / "far")  # a folder elsewhere
    (root / "a/up").symlink_to(root)  # back to the beginning
    (root / "c").symlink_to(root / "a")  # a second way to the same file
    (root / "self").symlink_to(root / "self")  # nowhere, and no name of data
    (root / "same.json").symlink_to(far)
    assert find_files(str(root)) == [one, root / "b/two.json"]


def test_a_link_to_data_that_is_gone_is_named(tmp_path):
    write(tmp_path / "d/a.json", "x")
    (tmp_path / "d/b.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match=r"d/b.json: this link leads to .*/gone.json, which does not exist"):
        find_files(str(tmp_path / "d"))


def test_a_directory_that_may_not_be_read_is_an_error_and_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a.json", "x")
    write(tmp_path / "closed/b.json", "x")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        find_files(str(tmp_path))


def test_a_hidden_directory_named_by_the_user_is_read(tmp_path):
    path = write(tmp_path / ".cache/a.txt", "x")
    assert find_files(str(tmp_path / ".cache")) == [path]


def test_a_directory_without_data_and_a_missing_path_are_errors(tmp_path):
    write(tmp_path / "d/readme.md", "x")
    with pytest.raises(FileNotFoundError, match="d: no data in this directory; expected files ending in .jsonl, .js"):
        find_files(str(tmp_path / "d"))
    with pytest.raises(FileNotFoundError, match="missing: no such file or directory"):
        find_files(f"{tmp_path / 'd'}/../missing")


def test_files_that_may_be_meant_as_data_and_are_not_read_are_named_once(tmp_path, caplog):
    for name in ("a.json", "b/x.zip", "b/y.ZIP", "c.xlsx", "d.tar.gz", "e.pdf", "f.png", "README.md", ".g.zip"):
        write(tmp_path / name, "x")
    with caplog.at_level(logging.WARNING, "stagekit.files"):
        for _ in range(3):
            assert find_files(str(tmp_path)) == [tmp_path / "a.json"]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"{tmp_path}: not read: 1 .pdf, 1 .tar, 1 .xlsx, 2 .zip, e.g. {tmp_path}/b/x.zip"
    )


def test_what_a_dataset_repository_says_about_its_data_is_not_taken_for_data(tmp_path):
    for name in ("a.json", "dataset_infos.json", "sub/dataset_info.json", "state.json", "config.json"):
        write(tmp_path / name, "{}")
    assert find_files(str(tmp_path)) == [tmp_path / "a.json"]
    assert find_files(str(tmp_path / "state.json")) == [tmp_path / "state.json"]


def test_the_name_of_a_file_says_what_is_in_it_packed_or_not(tmp_path):
    names = {"a.csv": ".csv", "a.CSV.GZ": ".csv", "b.x.jsonl.zst": ".jsonl", "c.gz": "", "d": "", "e.tar.gz": ".tar"}
    assert {name: file_type(tmp_path / name) for name in names} == names
    assert [file_name(tmp_path / name) for name in ("a.csv.gz", "a.zst", "a.b")] == ["a.csv", "a", "a.b"]


# -- packed files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl", "a.data"])
@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(LINES),
        gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
        gzip.compress(LINES) + b"\0" * 7,
        zstd_frame(LINES),
        zstd_frame(LINES[:20]) + zstd_frame(LINES[20:]),
        SKIPPED + zstd_frame(LINES[:20]) + SKIPPED + zstd_frame(LINES[20:]) + SKIPPED,
        pyarrow.compress(LINES, codec="zstd", asbytes=True),
    ],
    ids=["gzip", "two gzips", "padded gzip", "zstd", "two zstds", "frames between", "compressed zstd"],
)
def test_a_packed_file_is_read_whatever_its_name(tmp_path, name, packed):
    assert read(write(tmp_path / name, packed)) == [(TWO[0], 1), (TWO[1], 2)]


@pytest.mark.parametrize("pack", [gzip.compress, zstd_frame], ids=["gzip", "zstd"])
def test_every_form_is_read_from_packed_files(tmp_path, pack):
    assert read(write(tmp_path / "a.txt.gz", pack(b"one\n\ntwo"))) == [("one", 1), ("two", 3)]
    assert read(write(tmp_path / "a.tsv.gz", pack(b"text\tn\nfirst\t1\n"))) == [({"text": "first", "n": "1"}, 2)]
    assert read(write(tmp_path / "a.json.gz", pack(b'\n[{"text": "first"}]'))) == [(TWO[0], 2)]
    assert read(write(tmp_path / "b.json.gz", pack(b'{\n"x":{"text": "first"}}'))) == [(TWO[0], 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TWO), tmp_path / "c.parquet")
    packed = write(tmp_path / "d.parquet.gz", pack((tmp_path / "c.parquet").read_bytes()))
    assert read(packed) == read(tmp_path / "c.parquet") == [(TWO[0], 1), (TWO[1], 2)]
    assert read_text(write(tmp_path / "e.txt.zst", pack("发烧\r\n".encode()))) == "发烧\r\n"


@pytest.mark.parametrize("pack", [gzip.compress, zstd_frame], ids=["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "one byte short", "noise behind"])
def test_a_packed_file_that_is_damaged_late_is_named(tmp_path, pack, damage):
    rows = [{"text": f"{number} {os.urandom(40).hex()}"} for number in range(30000)]
    content = pack("".join(json.dumps(row) + "\n" for row in rows).encode())
    broken = {"cut": content[: len(content) // 2], "one byte short": content[:-1], "noise behind": content + b"noise"}
    path, seen = write(tmp_path / "a.jsonl.x", broken[damage]), []
    with pytest.raises(ValueError, match=r"a.jsonl.x: damaged (gzip|zstd) file \(.+\); download it again$") as error:
        for record, _ in read_records(path):
            seen.append(record)
    assert "\n" not in str(error.value)
    assert rows[: len(seen)] == seen and len(seen) > 1000, "what stands before the damage was not read"


def test_damage_in_a_packed_file_is_named_even_where_it_looks_like_another_encoding(tmp_path, monkeypatch):
    for module in (files, file_readers):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    content = bytearray(gzip.compress("\n".join(["发烧 " + os.urandom(30).hex()] * 2000).encode(), compresslevel=0))
    content[3000:3010] = b"\xff" * 10
    assert "damaged gzip file (" in refusal(write(tmp_path / "a.txt.gz", bytes(content)))


# -- what is no data -------------------------------------------------------------------------------------------------

EMPTY = "the file is empty; remove it or fill it"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NO_DATA = {
    "empty": ("", EMPTY),
    "blank": (" \n\n", EMPTY),
    "only a mark": (b"\xef\xbb\xbf\n", EMPTY),
    "empty gzip": (gzip.compress(b""), EMPTY),
    "blank gzip": (gzip.compress(b"\n \r\n"), EMPTY),
    "pointer": (POINTER, "this is a Git-LFS pointer, not the data; run `git lfs pull` where it came from"),
    "packed pointer": (gzip.compress(POINTER.encode()), "this is a Git-LFS pointer, not the data"),
    "web page": ("\n<!DOCTYPE html>\n<html lang=en>", "this is a web page, not the data; download it again"),
    "web page without a type": ("<HTML><head><title>404", "this is a web page, not the data; download it again"),
    "error of a store": ('<?xml version="1.0"?><Error><Code>AccessDenied', "this is a web page, not the data"),
    "zip": (b"PK\x03\x04\x14\0\0\0", "this is a zip archive or an Office file (.xlsx, .docx); unpack it, or save it"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "this is an old Office file (.xls, .doc); save it as .csv"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "this is a PDF; take its text out: pdftotext a.jsonl new.txt"),
    "arrow file": (b"ARROW1\0\0", "this is an Arrow file; write it as parquet"),
    "arrow stream": (b"\xff\xff\xff\xff\x10\1\0\0", "this is an Arrow file as the datasets library keeps it; write"),
    "bzip2": (b"BZh91AY&SY\1\2", "this is packed with bzip2; unpack it: bunzip2 a.jsonl"),
    "xz": (b"\xfd7zXZ\x00\0\4", "this is packed with xz; unpack it: unxz a.jsonl"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "this is a 7z archive; unpack it: 7z x a.jsonl"),
    "tar": (b"a.json".ljust(257, b"\0") + b"ustar\0" + b"00", "this is a tar archive; unpack it: tar -xf a.jsonl"),
    "packed twice": (gzip.compress(gzip.compress(LINES)), "this is packed twice; unpack it once"),
    "UTF-16": (
        LINES.decode().encode("utf-16"),
        "this is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 a.jsonl > new.jsonl",
    ),
    "UTF-16 without a mark": (LINES.decode().encode("utf-16-le"), "this is UTF-16LE, not UTF-8; convert it: iconv -f"),
    "UTF-16, big end first": (LINES.decode().encode("utf-16-be"), "this is UTF-16BE, not UTF-8; convert it: iconv -f"),
    "UTF-32": (LINES.decode().encode("utf-32"), "this is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8"),
    "cut gzip": (gzip.compress(b"x" * 99)[:-9], "damaged gzip file ("),
    "torn gzip": (gzip.compress(b"x" * 99)[:10] + b"\xff" * 20, "damaged gzip file ("),
    "cut zstd": (zstd_frame(LINES)[:-1], "damaged zstd file ("),
}


@pytest.mark.parametrize("name", NO_DATA)
@pytest.mark.parametrize("file", ["a.jsonl", "a.txt", "a.csv"])
def test_what_is_no_data_is_named_with_what_would_help(tmp_path, name, file):
    content, reason = NO_DATA[name]
    said = refusal(write(tmp_path / file, content))
    wanted = f"{tmp_path}/{file}: " + reason.replace("a.jsonl > new.jsonl", f"{file} > new{file[1:]}")
    assert said.startswith(wanted.replace("a.jsonl", file))


def test_a_text_may_begin_like_something_else(tmp_path):
    for text in ("PKU 的研究", "BZh is no header alone", "<html-like> marks", "%PDF is a format", "Rar!", "ustar"):
        assert read(write(tmp_path / "a.txt", text)) == [(text, 1)]


def test_a_pointer_a_page_and_an_archive_are_no_text_either(tmp_path):
    for name in ("pointer", "web page", "zip", "empty", "blank", "cut gzip", "UTF-16"):
        content, reason = NO_DATA[name]
        path = write(tmp_path / "a.txt", content)
        with pytest.raises(ValueError) as error:
            read_text(path)
        assert str(error.value).startswith(f"{path}: {reason.partition(';')[0]}")


def test_a_table_called_parquet_is_none_without_its_mark(tmp_path):
    assert refusal(write(tmp_path / "a.parquet", "a,b\n1,2\n")) == (
        f"{tmp_path}/a.parquet: not a parquet file, or not all of it; download it again"
    )


# -- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"text": "x"}\n{"text": "发烧"}'.encode("gb18030"),
            "a.jsonl:2: not UTF-8 (byte 0xb7); it reads as GBK: iconv -f GB18030 -t UTF-8 a.jsonl > new.jsonl",
        ),
        (b"\xef\xbb\xbf" + b'{"text":\n"\xb7\xa2"}', "a.jsonl:2: not UTF-8 (byte 0xb7); it reads as GBK"),
        (b'{"text": "\xff\xff"}', "a.jsonl:1: not UTF-8 (byte 0xff)"),
    ],
    ids=["GBK", "GBK after a mark", "neither"],
)
def test_text_in_another_encoding_is_named_with_its_line(tmp_path, content, reason):
    said = refusal(write(tmp_path / "a.jsonl", content))
    assert said.startswith(f"{tmp_path}/{reason}")
    with pytest.raises(ValueError) as error:
        read_text(tmp_path / "a.jsonl")
    assert str(error.value) == said


def test_how_to_convert_a_packed_file_is_said_too(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress("名,值\n发烧,是\n".encode("gb18030")))
    assert refusal(path).endswith("it reads as GBK: gzip -dc a.csv.gz | iconv -f GB18030 -t UTF-8 > new.csv")


FORMS = {
    "a.jsonl": lambda count: "".join(f'{{"text": "发烧 {number}"}}\n' for number in range(count)),
    "a.json": lambda count: (
        "[\n" + ",\n".join(f'{{"text": "发烧 {number}"}}' for number in range(count - 2)) + "\n]\n"
    ),
    "b.json": lambda count: "{\n" + ",\n".join(f'"{n}": {{"text": "发烧 {n}"}}' for n in range(count - 2)) + "\n}\n",
    "a.txt": lambda count: "发烧\n" * count,
    "a.csv": lambda count: "text,n\n" + "发烧,1\n" * (count - 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_bad_byte_late_in_a_large_file_is_found_with_its_line(tmp_path, monkeypatch, name):
    for module in (files, file_readers):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    lines = FORMS[name](5000).encode().split(b"\n")
    lines[4321] = lines[4321].replace("烧".encode(), b"\xe7\x83")
    assert refusal(write(tmp_path / name, b"\n".join(lines))) == f"{tmp_path}/{name}:4322: not UTF-8 (byte 0xe7)"


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_ends_within_a_character_is_cut_off(tmp_path, name):
    content = FORMS[name](9).encode()
    path = write(tmp_path / name, content[: content.rindex("烧".encode()) + 2])
    if name in ("a.txt", "a.csv"):
        assert refusal(path) == f"{path}:9: the file ends in the middle of a character; it is cut off"
        return
    *good, (last, line) = read(path)
    assert good and all(isinstance(record, dict) for record, _ in good) and isinstance(last, RowError)
    assert "cut off" in str(last) or "Unterminated string" in str(last)
    assert line == (9 if name == "a.jsonl" else 8)


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "first"}')) == [(TWO[0], 1)]
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == [("one", 1)]
    assert read(write(tmp_path / "a.csv", b"\xef\xbb\xbftext,n\na,b\n")) == [({"text": "a", "n": "b"}, 2)]
    assert read_text(tmp_path / "a.txt") == "one"
    packed = write(tmp_path / "a.json.gz", gzip.compress(b'\xef\xbb\xbf[{"text": "first"}]'))
    assert read(packed) == [(TWO[0], 1)]


# -- what the system says --------------------------------------------------------------------------------------------


def test_a_file_that_is_gone_or_a_directory_is_the_systems_error(tmp_path):
    assert "No such file" in refusal(tmp_path / "gone.jsonl")
    assert "Is a directory" in refusal(tmp_path)


def test_a_file_is_closed_when_its_reader_stops_early(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TWO * 1000)
    records = read_records(path)
    assert next(records) == (TWO[0], 1)
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert str(path) in opened
    records.close()
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert str(path) not in opened
