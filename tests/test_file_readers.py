"""Every form of records is read as it stands, by blocks of any size, and damage costs a row, never a traceback."""

import contextlib
import datetime
import decimal
import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagekit import file_readers, files
from stagekit.files import read_records
from stagekit.records import RowError

TWO = [{"text": "first"}, {"text": "second"}]
ALWAYS = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=40
)


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path, **options):
    return list(read_records(path, **options))


def rows(path, **options):
    """What a file yields, with the text of every RowError in its place."""
    return [(str(row) if isinstance(row, RowError) else row, line) for row, line in read_records(path, **options)]


@contextlib.contextmanager
def sizes(block=2**20, head=2**24, longest=2**27):
    """Other sizes of what is held in memory; a context for tests that hypothesis calls many times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        for name, value in (("BLOCK_BYTES", block), ("HEAD_BYTES", head), ("MAX_RECORD_BYTES", longest)):
            patch.setattr(file_readers, name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


# -- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"text": "first"}\n{"text": "second"}\n', [1, 2]),
        ('\n{"text": "first"}\r\n\r\n  {"text": "second"}', [2, 4]),
        ('[{"text": "first"}, {"text": "second"}]', [1, 1]),
        ('[\n  {\n    "text": "first"\n  },\n  {\n    "text": "second"\n  }\n]\n', [2, 5]),
        ('\n\n[{"text": "first"},\n\n{"text": "second"}]', [3, 5]),
        ('{"a": {"text": "first"}, "b": {"text": "second"}}', [1, 1]),
        ('{\n "a": {"text": "first"},\n "b":\n {"text": "second"}\n}\n', [2, 3]),
        ('{\n "text": "first"\n}\n\n{\n "text":\n "second"}', [1, 5]),
    ],
    ids=[
        *("lines", "lines with gaps", "array on a line", "indented array", "late array", "dict by id"),
        *("indented dict", "indented objects"),
    ],
)
def test_json_is_recognised_by_its_content(tmp_path, name, content, lines):
    assert read(write(tmp_path / name, content)) == list(zip(TWO, lines, strict=True))


def test_one_indented_record_is_one_record(tmp_path):
    path = write(tmp_path / "a.json", '\n{\n  "text": "first",\n  "about": {"url": "u"}\n}\n')
    assert read(path) == [({"text": "first", "about": {"url": "u"}}, 2)]
    assert read(write(tmp_path / "b.json", "{}")) == [({}, 1)]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "second"}\n')
    assert read(path) == [({"text": text}, 1), (TWO[1], 2)]
    assert read(write(tmp_path / "a.txt", "one\u2028two"), txt_documents="line") == [("one\u2028two", 1)]
    assert read(write(tmp_path / "a.csv", "text\none\u2028two\x0b\n")) == [({"text": "one\u2028two\x0b"}, 2)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "first"}\n{"text": \n{"text": "second"}\n', [TWO[0], (2, "broken JSON at column 10 ("), TWO[1]]),
        ('{"text": \n{"text": "first"}\n', [(1, "broken JSON at column 10 ("), TWO[0]]),
        ('[{"text": "first"},\n{"text" 1}, {"text": "x"}]', [TWO[0], (2, "broken JSON at column 9 (")]),
        ('[{"text": "first"},\n{"text": "second"}', [*TWO, (2, "the array does not end; the file is cut off")]),
        ('[{"text": "first"}]\n[{"text": "second"}]', [TWO[0], (2, "something follows the end of the array")]),
        ('{"a": {"text": "first"},\n "b": {"text": "second"},\n', [*TWO, (3, "the object does not end; the file is")]),
        ('{\n"text": "first",\n"url": 1 2}', [(3, "broken JSON at column 10 (Expecting property name")]),
        ('{"a": {"text": "first"},\n"b" {"text": 1}}', [TWO[0], (2, "broken JSON at column 5 (Expecting ':' del")]),
        ('{"text": "first"}\n{"text": "second"}}\n', [TWO[0], (2, "broken JSON at column 19 (Extra data)")]),
        ('{\n"text": "first"}\n{\n"text": oops}', [TWO[0], (4, "broken JSON at column 9 (Expecting value)")]),
    ],
    ids=[
        *("line", "first line", "item of an array", "array cut off", "two arrays", "dict cut off", "indented object"),
        *("dict", "line with a brace too many", "second object"),
    ],
)
def test_broken_json_is_one_bad_row_with_its_line(tmp_path, content, expected):
    found = read(write(tmp_path / "a.json", content))
    assert len(found) == len(expected)
    for (record, line), wanted in zip(found, expected, strict=True):
        if isinstance(wanted, dict):
            assert record == wanted
        else:
            assert isinstance(record, RowError) and (line, str(record)[: len(wanted[1])]) == wanted


def test_the_column_is_counted_from_the_beginning_of_the_line_however_far_that_is(tmp_path):
    items = ",".join(json.dumps({"text": "发烧" * 50}, ensure_ascii=False) for _ in range(3000))
    path = write(tmp_path / "a.json", f"\n[{items},{{oops}}]")
    with sizes(block=1000):
        *_, (error, line) = rows(path)
    assert line == 2
    column = len(items) + 4  # behind "[", the items, "," and "{", counted from 1
    assert error.startswith(f"broken JSON at column {column} (Expecting property name") and "array is lost" in error


def test_of_a_file_called_jsonl_a_broken_line_costs_that_line_even_if_it_looks_like_an_array(tmp_path):
    good = '{"text": "second"}'
    for broken in ('["text": "x"}', '["a"', "[", "{", '{"text":', '{"a": {"text": "x"},', '["text", "x" ', "[1, 2] 3"):
        (_, one), second, third = rows(write(tmp_path / "a.jsonl", f"{broken}\n{good}\n{good}"))
        assert (one, second, third) == (1, (TWO[1], 2), (TWO[1], 3)), broken


def test_lists_that_stand_in_lines_are_lines_in_a_file_called_jsonl(tmp_path):
    assert rows(write(tmp_path / "a.jsonl", '["a", "b"]\n["c"]')) == [(["a", "b"], 1), (["c"], 2)]


def test_what_only_python_takes_for_json_is_left_to_the_reader_of_the_record(tmp_path):
    for name in ("a.jsonl", "a.json"):
        (record, _), (last, _) = read(write(tmp_path / name, '{"a": NaN, "b": -Infinity, "b": 1}\n{"a": 1e999}'))
        assert record["a"] != record["a"] and record["b"] == 1 and last == {"a": float("inf")}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "brackets are nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "brackets are nested too deeply"),
        ("9" * 5000, "a number has more digits than Python reads"),
        ("-" + "9" * 5000, "a number has more digits than Python reads"),
    ],
    ids=["lists", "objects", "digits", "negative"],
)
def test_what_python_cannot_hold_is_a_bad_row(tmp_path, name, value, reason):
    lines = f'{{"text": "first"}}\n{{"n": {value}}}\n{{"text": "second"}}\n'
    assert rows(write(tmp_path / name, lines)) == [(TWO[0], 1), (reason, 2), (TWO[1], 3)]
    array = "[\n" + lines.rstrip().replace("\n", ",\n") + "]"
    with sizes(block=512):
        found = rows(write(tmp_path / "b.json", array))
    if "digits" in reason:
        assert found == [(TWO[0], 2), (reason, 3), (TWO[1], 4)]
    else:
        assert found == [(TWO[0], 2), (f"{reason}; the rest of the array is lost", 3)]
    assert [text for text, _ in rows(write(tmp_path / "c.json", f'{{\n"n": {value}\n}}'))] in (
        [reason],
        [f"{reason}; the rest of the object is lost"],
    )


def test_a_record_longer_than_may_be_held_costs_its_line(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("first", "x" * 5000, "second")]
    too_long = "a record of more than 0.000953674 MiB"
    with sizes(block=100, head=300, longest=1000):
        assert rows(write(tmp_path / "a.jsonl", "\n".join(lines))) == [(TWO[0], 1), (too_long, 2), (TWO[1], 3)]
        assert rows(write(tmp_path / "b.jsonl", "\n".join(lines[:2]))) == [(TWO[0], 1), (too_long, 2)]
        found = rows(write(tmp_path / "a.json", "[" + ",\n".join(lines) + "]"))
        assert found == [(TWO[0], 1), (f"{too_long}; the rest of the array is lost", 2)]
        assert [
            str(record)[: len(too_long)] for record, _ in rows(write(tmp_path / "b.json", f"{{\n{lines[1][1:]}"))
        ] == [too_long]
        many = "{\n" + ",\n".join(f'"{number}": "{number:090}"' for number in range(30)) + "\n}"
        assert rows(write(tmp_path / "c.json", many)) == [(f"{too_long}; the rest of the file is lost", 1)]
        for name, options in (("a.txt", {}), ("b.txt", {"txt_documents": "file"}), ("a.csv", {})):
            with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: .*0.000953674 MiB"):
                read(write(tmp_path / name, "x" * 5000), **options)
        with pytest.raises(ValueError, match="from line 2 on; is every line one. --txt_documents line"):
            read(write(tmp_path / "c.txt", "\n" + "word\n" * 1000))


def test_records_by_id_are_handed_on_once_they_are_too_many_for_one_record(tmp_path):
    members = [f'"{number}": {{"text": "{number}"}}' for number in range(100)]
    members[90:90] = ['"note": "not like the others"']
    path = write(tmp_path / "a.json", "{\n" + ",\n".join(members) + "\n}\n")
    with sizes(block=64, head=500):
        found = rows(path)
    assert found[90] == ("'note' is no object, as those before it are", 92)
    assert found[:90] + found[91:] == [({"text": str(n)}, n + 2 + (n >= 90)) for n in range(100)]
    assert len(rows(path)) == 1, "with the whole file in view it is one record"


def test_a_number_that_a_block_ends_in_is_read_whole(tmp_path):
    numbers = [12345678, -9, 1.5e-7, 0, 31415926]
    path = write(tmp_path / "a.json", json.dumps(numbers, separators=(",", ":")))
    for block in range(2, 20):
        with sizes(block=block):
            assert [record for record, _ in read(path)] == numbers


def test_an_object_of_objects_is_one_record_where_others_follow_it(tmp_path):
    record = {"prompt": {"text": "first"}, "answer": {"text": "second"}}
    path = write(tmp_path / "a.json", json.dumps(record, indent=1) + "\n" + json.dumps(record, indent=1))
    assert read(path) == [(record, 1), (record, 9)]


def test_half_of_a_character_behind_the_end_is_not_passed_over(tmp_path):
    for name in ("a.json", "b.json"):
        path = write(tmp_path / name, (b"[1]\n" if name == "a.json" else b'{"a": {}}\n') + "烧".encode()[:2])
        (_, one), (error, two) = rows(path)
        assert (one, two) == (1, 2) and ("something follows" in error or "cut off" in error)


def test_only_the_beginning_of_a_file_called_jsonl_has_to_prove_that_it_is_an_array(tmp_path):
    items = [{"text": str(number)} for number in range(100)]
    text = "[\n" + ",\n".join(map(json.dumps, items)) + ",\n{oops}]"
    with sizes(block=64, head=500):
        *found, (error, line) = rows(write(tmp_path / "a.jsonl", text))
    assert found == [(item, number) for number, item in enumerate(items, 2)]
    assert line == 102 and "array is lost" in error


def test_a_mark_in_the_middle_of_joined_files_is_skipped(tmp_path):
    assert read(write(tmp_path / "a.jsonl", b'{"text": "first"}\n\xef\xbb\xbf{"text": "second"}\n')) == [
        (TWO[0], 1),
        (TWO[1], 2),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "c.json", "d.jsonl"])
def test_a_long_string_is_looked_at_a_few_times_only(tmp_path, monkeypatch, name):
    """Blocks grow with what is held: n characters take work below 4 n, where blocks of one size take n² / 2."""
    long = {"text": "发烧了" * 1_000_000}
    text, decode, work = json.dumps(long, ensure_ascii=False), json.JSONDecoder().raw_decode, []

    class Counting:
        @staticmethod
        def raw_decode(text, start=0):
            work.append(len(text) - start)
            return decode(text, start)

    content = {
        "a.json": f"[{text}, {text}]",
        "b.json": f'{{"1": {text},\n"2": {text}}}',
        "d.jsonl": f"[\n{text},{text}]",
    }
    path = write(tmp_path / name, content.get(name, f"{text}\n{text}"))
    monkeypatch.setattr(file_readers, "_DECODER", Counting)
    with sizes(block=2**14):
        assert [record for record, _ in read(path)] == [long, long]
    looks = 2 if name in ("b.json", "d.jsonl") else 1  # the form of the file is told first
    assert sum(work) < looks * 4 * 2 * len(text)


# -- properties ------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
GAPS = st.sampled_from(["", " ", "\n", "\r\n", "\n\n\t", "  \n "])
BLOCKS = st.integers(2, 40)


@ALWAYS
@given(st.lists(st.tuples(VALUES, GAPS, st.sampled_from([None, 0, 2]), st.booleans()), max_size=6), BLOCKS)
def test_an_array_is_what_json_says_by_blocks_of_any_size(folder, items, block):
    text, wanted = "[", []
    for number, (value, gap, indent, ascii_only) in enumerate(items):
        text += ("," if number else "") + gap
        wanted.append((value, text.count("\n") + 1))
        text += json.dumps(value, indent=indent, ensure_ascii=ascii_only) + gap
    path = write(folder / "array.json", text + "]\n")
    assert [record for record, _ in wanted] == json.loads(path.read_bytes())
    with sizes(block=block):
        assert read(path) == wanted


@ALWAYS
@given(
    st.lists(st.tuples(OBJECTS.filter(bool), GAPS, st.sampled_from([None, 1])), min_size=1, max_size=6),
    BLOCKS,
    st.sampled_from([3, 50, 2**24]),
)
def test_records_by_id_are_what_json_says_by_blocks_of_any_size(folder, items, block, head):
    text, wanted = "{\n", []
    for number, (value, gap, indent) in enumerate(items):
        text += ("," if number else "") + gap
        wanted.append((value, text.count("\n") + 1))
        text += f'"{number}"{gap}:{gap}{json.dumps(value, indent=indent, ensure_ascii=False)}{gap}'
    path = write(folder / "by_id.json", text + "}\n")
    with sizes(block=block, head=head):
        assert read(path) == wanted


@ALWAYS
@given(st.lists(st.tuples(OBJECTS, st.sampled_from([None, 1])), min_size=2, max_size=5), BLOCKS, st.booleans())
def test_objects_over_several_lines_are_what_json_says(folder, items, block, named_lines):
    first = {"a": 1, "b": "two"}
    text = json.dumps(first, indent=1) + "\n"
    wanted = [(first, 1)]
    for value, indent in items:
        wanted.append((value, text.count("\n") + 1))
        text += json.dumps(value, indent=indent) + "\n"
    path = write(folder / ("objects.jsonl" if named_lines else "objects.json"), text)
    with sizes(block=block):
        assert read(path) == wanted


@ALWAYS
@given(st.lists(OBJECTS, min_size=1, max_size=8), BLOCKS, st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_lines_are_what_json_says(folder, items, block, end, ascii_only):
    text = end.join(json.dumps(item, ensure_ascii=ascii_only) for item in items)
    wanted = [(item, 1 + number * end.count("\n")) for number, item in enumerate(items)]
    with sizes(block=block):
        if len(items) > 1:  # one object alone may be a dict by id
            assert read(write(folder / "lines.json", text)) == wanted
            assert read(write(folder / "lines.jsonl", text)) == wanted


@ALWAYS
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_characters="\r\0", codec="utf-8")), min_size=2, max_size=2), max_size=6
    ),
    st.sampled_from([",", "\t"]),
    BLOCKS,
)
def test_a_table_written_by_the_csv_module_is_read_back(folder, cells, delimiter, block):
    import csv

    path = folder / ("table.csv" if delimiter == "," else "table.tsv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["one", "two"])
        starts = []
        for row in cells:
            file.flush()
            starts.append(path.read_bytes().count(b"\n") + 1)
            writer.writerow(row)
    wanted = [(dict(zip(("one", "two"), row, strict=True)), line) for row, line in zip(cells, starts, strict=True)]
    with sizes(block=block):
        assert read(path) == [(record, line) for record, line in wanted if any(map(str.strip, record.values()))]


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "flip", "shuffle", "null", "double"]),
        st.floats(0, 1),
        st.sampled_from([*b'[]{}",:\\ \n\r\0\xff\xe5\x80019-eE.u', *range(256)]),
    ),
    min_size=1,
    max_size=5,
)


def damage(content, plan):
    """Cut a file off, overwrite bytes, swap lines, write nulls over a stretch, repeat a stretch."""
    for kind, where, byte in plan:
        place = int(where * len(content))
        if kind == "cut" and place:
            content = content[:place]
        elif kind == "flip":
            content = content[:place] + bytes([byte]) + content[place + 1 :]
        elif kind == "null":
            content = content[:place] + b"\0" * (byte % 16) + content[place + byte % 16 :]
        elif kind == "double":
            content = content[:place] + content[max(0, place - byte) :]
        elif kind == "shuffle":
            lines = content.split(b"\n")
            cut = int(where * len(lines))
            content = b"\n".join(lines[cut:] + lines[:cut])
    return content


def accounted(path, **options):
    """The rows of a damaged file and the line with which it was refused, if it was; anything else is a failure."""
    found = []
    try:
        for record, line in read_records(path, **options):
            assert isinstance(line, int) and line > 0
            assert not isinstance(record, RowError) or str(record) and "\n" not in str(record)
            found.append(record)
    except (ValueError, OSError) as error:
        assert not isinstance(error, (UnicodeError, RowError)) and str(path) in str(error)
        assert "\n" not in str(error)
        return found, str(error)
    return found, None


ROWS = (
    *({}, {"text": "发烧"}, {"text": "first"}, {"": 0}, {"a": None, "b": [1.5e-9, True, []]}, {"a": {"b": {"c": {}}}}),
    *(
        {"text": 'a "quoted" \\ word\n\u2028 😷 \ud83d'},
        {"n": -12},
        {"conversations": [{"from": "human", "value": ""}]},
    ),
)
SMALL = st.lists(st.sampled_from(ROWS), min_size=3, max_size=8)


@settings(ALWAYS, max_examples=150)
@given(SMALL, DAMAGE, BLOCKS, st.booleans())
def test_every_line_of_a_damaged_file_of_lines_is_a_record_or_a_bad_row(folder, items, plan, block, ascii_only):
    text = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items)
    content = damage(text.encode(errors="replace"), plan)
    path = write(folder / "damaged.jsonl", content)
    with sizes(block=block):
        found, refused = accounted(path)
    if refused is None:
        filled = sum(bool(line.decode(errors="replace").strip()) for line in content.split(b"\n"))
        whole = whole_of(content)
        if isinstance(whole, list):
            assert found == whole
        elif whole is not None:
            assert len(found) in (1, len(whole))
        else:
            assert len(found) == filled


def whole_of(content):
    """What the file is where the damage left, or made, one value out of it that is not a line."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").strip()
    try:
        whole = json.loads(text)
    except ValueError:
        return None
    return whole if isinstance(whole, (list, dict)) else None


@settings(ALWAYS, max_examples=100)
@given(SMALL, DAMAGE, BLOCKS, st.sampled_from(["array", "indented", "by id", "text", "table"]), st.booleans())
def test_no_damage_costs_a_traceback(folder, items, plan, block, form, packed):
    if form in ("array", "indented"):
        content, name = json.dumps(items, indent=1 if form == "indented" else None, ensure_ascii=False), "damaged.json"
    elif form == "by id":
        content, name = json.dumps(dict(enumerate(items)), indent=1, ensure_ascii=False), "damaged.json"
    elif form == "text":
        content, name = "\n\n".join(map(str, items)), "damaged.txt"
    else:
        content, name = "a,b\n" + "\n".join(f'"{len(item)}\n",x' for item in items), "damaged.csv"
    content = content.encode(errors="replace")
    content = damage(gzip.compress(content, mtime=0), plan) if packed else damage(content, plan)
    with sizes(block=block, head=200):
        accounted(write(folder / name, content))


@settings(ALWAYS, max_examples=60)
@given(DAMAGE, st.sampled_from(["zstd", "snappy", "none"]))
def test_no_damage_of_a_parquet_file_costs_a_traceback(folder, plan, codec):
    table = {"text": [f"发烧 {number}" for number in range(50)], "n": list(range(50)), "l": [["a", None]] * 50}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "whole.parquet", compression=codec, row_group_size=20)
    accounted(write(folder / "damaged.parquet", damage((folder / "whole.parquet").read_bytes(), plan)))


@ALWAYS
@given(DAMAGE)
def test_no_damage_of_a_zstd_file_costs_a_traceback(folder, plan):
    content = pyarrow.compress(b'{"text": "first"}\n' * 30, codec="zstd", asbytes=True)
    accounted(write(folder / "damaged.jsonl.zst", damage(content, plan)))


# -- plain text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("blank_line", [("one\ntwo", 2), ("three", 5)]),
        ("line", [("one", 2), ("two", 3), ("three", 5)]),
        ("file", [("one\r\ntwo\r\n \r\nthree", 1)]),
    ],
)
def test_the_documents_of_a_txt_file_end_where_the_user_says(tmp_path, separator, expected):
    path = write(tmp_path / "a.txt", "\r\none\r\ntwo\r\n \r\nthree\r\n")
    assert read(path, txt_documents=separator) == expected


# -- tables ----------------------------------------------------------------------------------------------------------


def test_the_cells_of_a_table_are_text_and_its_rows_may_take_several_lines(tmp_path):
    path = write(tmp_path / "a.csv", '\r\nid, text \r\n1,"two\r\nlines, ""quoted"""\r\n\r\n , \r\n2,\r\n')
    assert read(path) == [({"id": "1", "text": 'two\r\nlines, "quoted"'}, 3), ({"id": "2", "text": ""}, 7)]
    path = write(tmp_path / "a.tsv", "id\ttext\n007\ta, b\nNaN\t1.50\n")
    assert read(path) == [({"id": "007", "text": "a, b"}, 2), ({"id": "NaN", "text": "1.50"}, 3)]


def test_numbers_that_pandas_writes_before_the_rows_are_left_out(tmp_path):
    assert read(write(tmp_path / "a.csv", ",text,n\n0,first,\n1,second,3\n")) == [
        ({"text": "first", "n": ""}, 2),
        ({"text": "second", "n": "3"}, 3),
    ]


def test_a_row_that_is_none_costs_itself_and_the_next_line_begins_a_new_one(tmp_path):
    content = 'a,b\n1,2\n1,2,3\n"x"y,2\n"two\nlines",4\n5,"open\n6,7\n8,9"\n10,"11\n12,13\n'
    assert rows(write(tmp_path / "a.csv", content)) == [
        ({"a": "1", "b": "2"}, 2),
        ("3 cells in a table of 2 columns", 3),
        ('text follows the quote that closes a cell; write quotes inside a cell twice ("")', 4),
        ({"a": "two\nlines", "b": "4"}, 5),
        ({"a": "5", "b": "open\n6,7\n8,9"}, 7),
        ("the quote that opens a cell in line 10 is never closed", 10),
        ({"a": "12", "b": "13"}, 11),
    ]


def test_of_a_quote_that_is_never_closed_the_line_where_it_opens_is_named(tmp_path):
    found = rows(write(tmp_path / "a.csv", 'a,b\n"one\ntwo","open\n\n3,4\n5,6'))
    assert found[0] == ("the quote that opens a cell in line 3 is never closed", 2)
    assert found[1] == ("the quote that opens a cell in line 3 is never closed", 3)
    assert found[2:] == [({"a": "3", "b": "4"}, 5), ({"a": "5", "b": "6"}, 6)]


def test_a_quote_that_opens_early_in_a_large_table_is_named_without_reading_all_of_it(tmp_path, monkeypatch):
    lines, taken = file_readers._text_lines, []
    monkeypatch.setattr(
        file_readers, "_text_lines", lambda stream: (taken.append(line) or line for line in lines(stream))
    )
    path = write(tmp_path / "a.csv", 'a,b\n"1,2\n' + "3,4\n" * 5000)
    with sizes(block=100, longest=1000):
        records = read_records(path)
        error, line = next(records)
        assert (str(error), line) == ("the quote that opens a cell in line 2 is never closed", 2)
        assert len(taken) < 300
        assert list(records) == [({"a": "3", "b": "4"}, number) for number in range(3, 5003)]


@pytest.mark.parametrize(
    ("name", "header", "reason"),
    [
        ("a.csv", "a,b,a", "1: two columns are called 'a'; rename one"),
        ("a.csv", "\na,b,,", "2: column 3 has no name; name it in the first row, or remove it"),
        ("a.csv", "question;answer", "1: one column only, 'question;answer'; is ';' between the cells? Separate them"),
        ("a.csv", "question\tanswer", "1: one column only, 'question\\tanswer'; is '\\t' between the cells?"),
        ("a.tsv", "question,answer", "1: one column only, 'question,answer'; is ',' between the cells? Separate them"),
        ("a.csv", 'a,"b', "1: the quote that opens a cell in line 1 is never closed"),
    ],
)
def test_columns_without_usable_names_are_refused(tmp_path, name, header, reason):
    path = write(tmp_path / name, f"{header}\n1,2,3\n")
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:{reason}")


def test_a_table_of_one_column_is_one(tmp_path):
    assert read(write(tmp_path / "a.csv", "text\nfirst\n\nsecond\n")) == [(TWO[0], 2), (TWO[1], 4)]
    assert read(write(tmp_path / "b.csv", "text,n\n")) == []


def test_a_carriage_return_in_the_middle_of_a_row_is_named(tmp_path):
    found = rows(write(tmp_path / "a.csv", "a,b\n1,2\r3,4\n5,6\n"))
    assert found[0][0].startswith("a carriage return stands in a row") and found[0][1] == 2
    assert found[1:] == [({"a": "5", "b": "6"}, 3)]


def test_the_caller_may_name_the_columns_of_a_table_that_has_no_names(tmp_path):
    path = write(tmp_path / "a.csv", "x,1\ny,2\n")
    assert read(path, columns=lambda cells: ["letter", "digit"] if cells == ["x", "1"] else None) == [
        ({"letter": "x", "digit": "1"}, 1),
        ({"letter": "y", "digit": "2"}, 2),
    ]
    assert read(path, columns=lambda cells: None) == [({"x": "y", "1": "2"}, 2)]

    def refuse(cells):
        raise RowError("no names")

    with pytest.raises(ValueError, match="a.csv:1: no names$"):
        read(path, columns=refuse)


# -- parquet ---------------------------------------------------------------------------------------------------------


def write_table(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_the_rows_of_a_parquet_file_are_numbered_through_its_groups(tmp_path):
    wanted = [{"text": f"发烧 {number}", "n": number, "parts": [{"a": None}] * (number % 3)} for number in range(5000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), tmp_path / "a.parquet", row_group_size=700)
    assert read(tmp_path / "a.parquet") == [(row, number) for number, row in enumerate(wanted, 1)]
    assert read(write(tmp_path / "a.json", (tmp_path / "a.parquet").read_bytes())) == read(tmp_path / "a.parquet")


def test_what_json_has_no_form_for_becomes_text_or_null(tmp_path):
    day = datetime.datetime(2024, 5, 6, 7, 8, 9)
    columns = {
        "when": pyarrow.array([day, None]),
        "date": pyarrow.array([day.date(), None]),
        "price": pyarrow.array([decimal.Decimal("1.50"), None]),
        "bytes": pyarrow.array(["发烧".encode(), b"\xff\xd8\xff"]),
        "inner": pyarrow.array([{"at": [day]}, None]),
        "kind": pyarrow.array(["a", "b"]).dictionary_encode(),
        "real": pyarrow.array([1.5, None], pyarrow.float32()),
    }
    assert read(write_table(tmp_path / "a.parquet", columns)) == [
        (
            {
                **{"when": "2024-05-06 07:08:09", "date": "2024-05-06", "price": "1.50", "bytes": "发烧"},
                **{"inner": {"at": ["2024-05-06 07:08:09"]}, "kind": "a", "real": 1.5},
            },
            1,
        ),
        ({"kind": "b", **dict.fromkeys(("when", "date", "price", "bytes", "inner", "real"))}, 2),
    ]
    assert list(read(tmp_path / "a.parquet")[0][0]) == list(columns)


def test_of_text_that_is_none_in_a_parquet_file_only_the_row_is_lost(tmp_path):
    cells = [b"one", b"\xff\xfe", b"three"]
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 5, 10)))
    column = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"".join(cells)))
    found = rows(write_table(tmp_path / "a.parquet", {"text": column}))
    assert found == [
        ({"text": "one"}, 1),
        ("a cell cannot be decoded; the file is damaged", 2),
        ({"text": "three"}, 3),
    ]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: two columns are called 'a'; rename one"):
        read(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_named(tmp_path):
    whole = write_table(tmp_path / "a.parquet", {"text": [f"row {number}" for number in range(9999)]}).read_bytes()
    torn = whole[:2000] + b"\xff" * 500 + whole[2500:]
    for content in (whole[:-5], whole[: len(whole) // 2], torn):
        with pytest.raises(ValueError, match=r"a.parquet: damaged parquet file \(.*\); download it again$"):
            read(write(tmp_path / "a.parquet", content))


# -- memory ----------------------------------------------------------------------------------------------------------

CONTENT = {
    "a.jsonl": lambda row: (row + "\n") * 20_000,
    "a.json": lambda row: "[" + ",".join([row] * 20_000) + "]",
    "b.json": lambda row: "{" + ",\n".join(f'"{number}": {row}' for number in range(20_000)) + "}",
    "c.jsonl": lambda row: "[" + ",\n".join([row] * 20_000) + "]",
    "a.csv": lambda row: "text,n\n" + ("x" * len(row) + ",1\n") * 20_000,
    "a.txt": lambda row: (row + "\n\n") * 20_000,
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", CONTENT)
def test_only_a_part_of_a_file_is_held_in_memory(tmp_path, name, pack):
    path = write(tmp_path / name, pack(CONTENT[name](json.dumps({"text": "x" * 200})).encode()))
    with sizes(block=2**14, head=2**16):
        tracemalloc.start()
        count = sum(1 for _ in read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 20_000 and peak < 2**20, "of more than 4 MB"
