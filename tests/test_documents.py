"""Documents against texts written down here: formats, pages, headings, limits, links, and where passages are cut."""

import io
import os
import subprocess
import sys
import zipfile

import docx
import pytest
from conftest import ROOT
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from pypdf import PdfReader, PdfWriter

from stagekit.documents import Block, Limits, Unreadable, find_documents, read_bytes, split, split_sentences
from stagekit.extraction import decode, extract, join_lines


def pdf(*pages):
    """A PDF whose pages hold the given lines, in a font that maps codes to any characters (PDF 32000-1, 9.10.3)."""
    characters = sorted(set("".join(line for lines in pages for line in lines))) or ["x"]
    codes = {character: place + 1 for place, character in enumerate(characters)}
    pairs = "\n".join(f"<{code:04x}> <{char.encode('utf-16-be').hex()}>" for char, code in codes.items())
    cmap = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /Own def /CMapType 2 def\n"
        f"1 begincodespacerange <0000> <ffff> endcodespacerange\n{len(codes)} beginbfchar\n{pairs}\nendbfchar\n"
        "endcmap end end"
    )
    objects = {
        1: "<< /Type /Catalog /Pages 2 0 R >>",
        2: f"<< /Type /Pages /Count {len(pages)} /Kids [{' '.join(f'{6 + 2 * n} 0 R' for n in range(len(pages)))}] >>",
        3: "<< /Type /Font /Subtype /Type0 /BaseFont /Own /Encoding /Identity-H /DescendantFonts [4 0 R] "
        "/ToUnicode 5 0 R >>",
        4: "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Own /DW 600 "
        "/CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) /Supplement 0 >> >>",
        5: f"<< /Length {len(cmap)} >>\nstream\n{cmap}\nendstream",
    }
    for number, lines in enumerate(pages):
        shown = "".join(f"<{''.join(f'{codes[char]:04x}' for char in line)}> Tj T*\n" for line in lines)
        content = f"BT /F1 12 Tf 14 TL 50 780 Td\n{shown}ET"
        objects[6 + 2 * number] = (
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {7 + 2 * number} 0 R >>"
        )
        objects[7 + 2 * number] = f"<< /Length {len(content)} >>\nstream\n{content}\nendstream"
    data, places = b"%PDF-1.4\n", []
    for number in sorted(objects):
        places.append(len(data))
        data += f"{number} 0 obj\n{objects[number]}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def encrypted(data, user, owner):
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(data)))
    writer.encrypt(user, owner, algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


def saved(document):
    target = io.BytesIO()
    document.save(target)
    return target.getvalue()


def blocks_of(name, data, **limits):
    return extract(name, data if isinstance(data, bytes) else data.encode(), Limits(**limits))[0]


def reason(name, data, **limits):
    """Why a document is refused."""
    with pytest.raises(Unreadable) as refused:
        extract(name, data, Limits(**limits))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- pdf -------------------------------------------------------------------------------------------------------------


def test_a_pdf_is_read_page_by_page():
    data = pdf(["Fever is a raised temperature."], ["发热是体温升高。"])
    assert blocks_of("a.pdf", data) == [Block("Fever is a raised temperature.", 1), Block("发热是体温升高。", 2)]


def test_wrapped_lines_of_a_page_are_joined_and_hyphens_removed():
    first = ["Drink enough and rest until the tempera-", "ture has been normal for a whole day, also at", "night."]
    second = ["发热三天以上，或者体温超过三十九度，或者呼吸急", "促，应当及时就医。"]
    assert [block.text for block in blocks_of("a.pdf", pdf(first, second))] == [
        "Drink enough and rest until the temperature has been normal for a whole day, also at night.",
        "发热三天以上，或者体温超过三十九度，或者呼吸急促，应当及时就医。",
    ]


def test_ligatures_radicals_and_page_numbers_of_a_pdf_are_tidied():
    data = pdf(["ﬁrst aid", "⾼⾎压", "3 / 7"], ["- 4 -", "text"])  # U+2FBC and U+2F8E are radicals
    assert [block.text for block in blocks_of("a.pdf", data)] == ["first aid", "高血压", "text"]


def test_a_pdf_without_text_is_named_as_a_scan():
    assert reason("a.pdf", pdf([], [])) == "no text on its 2 pages: a scan? OCR makes it readable"


def test_pages_without_text_are_noted():
    assert extract("a.pdf", pdf(["text"], [], []), Limits())[1] == ["2 of 3 pages hold no text"]


def test_a_pdf_with_a_password_is_refused_and_one_for_which_nobody_needs_it_is_read():
    data = pdf(["secret text"])
    assert reason("a.pdf", encrypted(data, "word", "owner")) == "encrypted: it asks for a password"
    assert blocks_of("a.pdf", encrypted(data, "", "owner")) == [Block("secret text", 1)]


@pytest.mark.parametrize("data", [b"", b"%PDF-1.4\n", b"no pdf at all", pdf(["text"])[:200]])
def test_a_damaged_pdf_is_named_as_such(data):
    assert reason("a.pdf", data).startswith("damaged: ")


def test_a_pdf_with_too_many_pages_is_refused():
    assert reason("a.pdf", pdf(["a"], ["b"], ["c"]), max_pages=2) == "3 pages are more than --max_pages 2"


# -- docx ------------------------------------------------------------------------------------------------------------


def test_a_docx_gives_headings_paragraphs_and_tables_in_their_order():
    document = docx.Document()
    document.add_heading("Hypertension", 0)
    document.add_paragraph("Before any heading.")
    document.add_heading("Treatment", 1)
    document.add_heading("Doses", 2)
    document.add_paragraph("See the table.")
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ["drug", "dose", "amlodipine", "5 mg\nonce"], strict=True):
        cell.text = text
    document.add_heading("Follow-up", 1)
    document.add_paragraph("After two weeks.")
    document.add_heading("Left empty", 1)
    assert blocks_of("a.docx", saved(document)) == [
        Block("Before any heading.", None, "Hypertension"),
        Block("See the table.", None, "Hypertension > Treatment > Doses"),
        Block("drug | dose\namlodipine | 5 mg once", None, "Hypertension > Treatment > Doses", table=True),
        Block("After two weeks.", None, "Hypertension > Follow-up"),
        Block("Left empty", None, "Hypertension > Left empty"),
    ]


def test_a_docx_is_read_with_its_insertions_and_content_controls_and_without_its_deletions():
    document = docx.Document()
    run = "<w:r><w:t xml:space='preserve'>{}</w:t></w:r>"
    paragraph = (
        f"<w:p {nsdecls('w')}>{run.format('Take ')}<w:del><w:r><w:delText>ten</w:delText></w:r></w:del>"
        f"<w:ins>{run.format('two')}</w:ins>{run.format(' tablets.')}</w:p>"
    )
    control = f"<w:sdt {nsdecls('w')}><w:sdtContent><w:p>{run.format('A cover page.')}</w:p></w:sdtContent></w:sdt>"
    for xml in (control, paragraph):
        document.element.body.insert(len(document.element.body) - 1, parse_xml(xml))
    assert [block.text for block in blocks_of("a.docx", saved(document))] == ["A cover page.", "Take two tablets."]


def test_a_docx_that_unpacks_to_too_much_is_refused_before_it_is_unpacked():
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(5 * 2**20))
    assert len(target.getvalue()) < 2**20 / 50
    assert reason("a.docx", target.getvalue(), max_file_mb=1).startswith("unpacks to 5 MB, more than 4 times --max_fi")


def test_a_docx_that_lies_about_its_size_unpacks_no_more_than_it_said():
    data = bytearray(saved(docx.Document()))
    place = data.index(b"PK\x01\x02")  # the first entry of the central directory; bytes 24 to 27: size when unpacked
    data[place + 24 : place + 28] = (10).to_bytes(4, "little")
    assert reason("a.docx", bytes(data)).startswith("damaged: ")


def test_an_encrypted_docx_and_a_damaged_one_are_named():
    assert reason("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)).startswith("encrypted, or in Word's old")
    assert reason("a.docx", saved(docx.Document())[:2000]).startswith("damaged: ")
    assert reason("a.docx", saved(docx.Document())) == "empty: there is no text in it"


def test_an_entity_bomb_in_a_docx_stays_small():
    lol = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    xml = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY l0 "ha">{lol}]>'
    body = '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>'
    document, target = saved(docx.Document()), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(document)) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            bomb = f"{xml}{body}text &l9;</w:t></w:r></w:p></w:body></w:document>".encode()
            new.writestr(item, bomb if item.filename == "word/document.xml" else old.read(item))
    try:
        text = "".join(block.text for block in blocks_of("a.docx", target.getvalue()))
    except Unreadable:
        text = ""
    assert len(text) < 100


# -- markdown, text, html --------------------------------------------------------------------------------------------


def test_markdown_gives_headings_paragraphs_lists_tables_and_code():
    text = """\
Before.

# Fever #
A fever is a raised
body temperature.

Doses
-----
- water
- rest
  in bed

| drug | dose |
|------|:----:|
| a    | 1 mg |

```
# no heading
```
<!-- not shown -->
## Alone
# 中文
第一行
第二行
"""
    assert blocks_of("a.md", text) == [
        Block("Before."),
        Block("A fever is a raised body temperature.", None, "Fever"),
        Block("- water", None, "Fever > Doses"),
        Block("- rest in bed", None, "Fever > Doses"),
        Block("drug | dose\na | 1 mg", None, "Fever > Doses", table=True),
        Block("# no heading", None, "Fever > Doses"),
        Block("Alone", None, "Fever > Alone"),
        Block("第一行第二行", None, "中文"),
    ]


def test_a_text_file_gives_paragraphs_and_keeps_lines_that_are_not_wrapped():
    text = (
        "PHONE LIST\n\nThese numbers work from phones inside of the building only; from\noutside ask for help.\n"
        "Fire ........ 2233\nBlood bank .. 5033\n"
    )
    assert [block.text for block in blocks_of("a.txt", text)] == [
        "PHONE LIST",
        "These numbers work from phones inside of the building only; from outside ask for help.",
        "Fire ........ 2233",
        "Blood bank .. 5033",
    ]


def test_html_gives_what_a_browser_shows():
    text = """<!DOCTYPE html><html><head><title>no</title><style>p {color: red}</style>
    <script>var a = "<p>no</p>";</script></head><body><h1>Fever</h1><p>A <b>raised</b>
    temperature &amp; chills.<br>Rest.</p><template><h1>no</h1><li>no</template><h2>Doses<h2><ul><li>water<li>tea</ul>
    <table><tr><th>drug<th>dose</tr><tr><td><p>a</p><td>1&nbsp;mg</tr></table><!-- no --><div>End</div>"""
    assert blocks_of("a.html", text) == [
        Block("A raised temperature & chills.\nRest.", None, "Fever"),
        Block("- water", None, "Fever > Doses"),
        Block("- tea", None, "Fever > Doses"),
        Block("drug | dose\na | 1 mg", None, "Fever > Doses", table=True),
        Block("End", None, "Fever > Doses"),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("发热".encode(), ("发热", [])),
        (b"\xef\xbb\xbf" + "发热".encode(), ("发热", [])),
        ("发热".encode("utf-16"), ("发热", ["read as utf-16"])),
        ("发热".encode("gb18030"), ("发热", ["read as gb18030"])),
        ('<meta charset="big5">發熱'.encode("big5"), ('<meta charset="big5">發熱', ["read as big5"])),
    ],
)
def test_texts_are_read_in_the_encodings_they_come_in(data, expected):
    assert decode(data, html=True) == expected


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"text\0text", bytes(range(256))])
def test_bytes_that_are_no_text_are_refused(data):
    assert reason("a.txt", data).startswith("no text in UTF-8")


def test_control_characters_and_invisible_ones_are_removed():
    assert blocks_of("a.txt", "a\x1b[31mb\u200bc\u202ed\ufeffe\x00"[:-1] + "\ttab")[0].text == "a[31mbcde tab"
    assert blocks_of("a.txt", "one\r\n\r\ntwo\rthree") == [Block("one"), Block("two"), Block("three")]


def test_a_line_is_wrapped_when_the_next_word_would_not_have_fitted():
    full, short = "a line of forty characters, as it happens", "a line with room for more"
    assert join_lines([full, "next"]) == [f"{full} next"]
    assert join_lines([full, short, "next"]) == [f"{full} {short}", "next"]
    assert join_lines([full, "- next"]) == [full, "- next"]
    assert join_lines([full, "", "next"]) == [full, "next"]
    assert join_lines(["short", "lines"]) == ["short", "lines"]


def test_markdown_comments_that_never_end_hide_what_follows():
    assert blocks_of("a.md", "Shown.\n\n<!-- hidden -->\nToo.\n\n<!-- hidden\n\nto the end") == [
        Block("Shown."),
        Block("Too."),
    ]


# Each took minutes or hours where a pattern, or a text that grows, starts over at every character or line.
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "'!' * 10**6 + 'x'"),
        ("a.txt", "'a line of forty characters, as it happens\\n' * 25_000"),
        ("a.txt", "'发热是体温升高要多喝水多休息持续高热要及时就医多喝水\\n' * 40_000"),
        ("a.md", "'<!--' * 250_000 + 'x'"),
        ("a.md", "'text\\n' + '-' * 10**6 + 'x'"),
        ("a.md", "'# a' + ' ' * 10**6 + 'b'"),
        ("a.md", "'# a' + '#' * 10**6 + 'b'"),
        ("a.md", "'a line of forty characters, as it happens\\n' * 25_000"),
        ("a.html", "'<svg>' * 100_000 + '</b>' * 125_000"),
    ],
    ids=["marks", "lines", "Chinese lines", "comments", "rule", "blanks", "hashes", "Markdown lines", "nested tags"],
)
def test_a_megabyte_of_anything_is_read_in_seconds(name, text):
    code = (
        "from stagekit.documents import Limits, Unreadable, split\n"
        "from stagekit.extraction import extract\n"
        f"try: split(extract({name!r}, ('text\\n\\n' + {text}).encode(), Limits())[0], Limits())\n"
        "except Unreadable: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    docs = tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    (docs / ".hidden").mkdir()
    for name in ("b.TXT", "a.md", "sub/c.html", ".secret.md", ".hidden/d.md", "~$a.docx", "e.xlsx", "f.xlsx"):
        (docs / name).write_text("text")
    (tmp_path / "outside.md").write_text("outside")
    return docs


def test_documents_are_found_below_the_folder_hidden_ones_are_not(folder):
    found, refused, others = find_documents(folder, Limits())
    assert list(found) == ["a.md", "b.TXT", "sub/c.html"] and refused == {}
    assert others == {".xlsx": 2}
    assert list(find_documents(folder, Limits(file_types=("md",)))[0]) == ["a.md"]
    assert list(find_documents(folder / "b.TXT", Limits())[0]) == ["b.TXT"]


def test_links_are_refused_wherever_they_lead(folder):
    (folder / "link.md").symlink_to(folder.parent / "outside.md")
    (folder / "up").symlink_to(folder.parent)
    (folder / "again.md").symlink_to(folder / "a.md")
    found, refused, _ = find_documents(folder, Limits())
    assert list(found) == ["a.md", "b.TXT", "sub/c.html"]
    assert set(refused) == {"link.md", "up", "again.md"} and "links are not followed" in refused["up"]


def test_a_link_that_takes_the_place_of_a_file_is_not_followed(folder):
    path = find_documents(folder, Limits())[0]["a.md"]
    path.unlink()
    path.symlink_to(folder.parent / "outside.md")
    with pytest.raises(Unreadable):
        read_bytes(path, Limits())


def test_a_pipe_is_no_document_and_does_not_block(folder):
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(Unreadable, match="not a regular file"):
        read_bytes(folder / "pipe.txt", Limits())


def test_a_file_that_is_too_large_is_refused_unread(folder):
    with open(folder / "large.txt", "wb") as file:
        file.truncate(3 * 2**20)  # a hole: takes no space
    with pytest.raises(Unreadable, match="3.0 MB are more than --max_file_mb 2"):
        read_bytes(folder / "large.txt", Limits(max_file_mb=2))


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        find_documents("nowhere", Limits())


def test_names_are_shown_without_control_characters(tmp_path):
    (tmp_path / "a\n\x1b[31m.md").write_text("text")
    (tmp_path / os.fsdecode(b"b\xff.md")).write_text("text")
    assert list(find_documents(tmp_path, Limits())[0]) == ["a\ufffd\ufffd[31m.md", "b\ufffd.md"]


# -- passages --------------------------------------------------------------------------------------------------------


def test_sentences_end_where_chinese_and_english_ones_do():
    text = "发热了？多喝水！“好。”然后休息；明天 再来。Take 2.5 mg, e.g. at noon. Why? Because.\nNo. 5 .... 2222 end"
    assert split_sentences(text) == [
        *("发热了？", "多喝水！", "“好。”", "然后休息；", "明天 再来。"),
        *("Take 2.5 mg, e.g. at noon. ", "Why? ", "Because.\n", "No. ", "5 .... 2222 end"),
    ]
    assert "".join(split_sentences(text)) == text


def cut(*blocks, chunk_chars, overlap_chars=0):
    return split(list(blocks), Limits(chunk_chars=chunk_chars, overlap_chars=overlap_chars))


def test_passages_never_cross_pages_or_headings():
    blocks = [Block("one", 1), Block("two", 1), Block("three", 2), Block("four", None, "A"), Block("five", None, "B")]
    assert cut(*blocks, chunk_chars=100) == [
        *(Block("one\ntwo", 1), Block("three", 2), Block("four", None, "A"), Block("five", None, "B")),
    ]


def test_a_paragraph_is_not_begun_in_the_last_half_of_a_passage_if_it_fits_into_the_next():
    first, second = "A first paragraph of text.", "Two sentences. Both here."
    assert [block.text for block in cut(Block(first), Block(second), chunk_chars=45)] == [first, second]
    long = "Two sentences. " + "Both here and longer than a passage is. "
    assert [block.text for block in cut(Block(first), Block(long * 2), chunk_chars=45)][
        0
    ] == f"{first}\nTwo sentences."


def test_the_end_of_a_passage_is_repeated_in_whole_sentences():
    text = "一二三四五。六七八。九十一。十二三四。"
    assert [block.text for block in cut(Block(text), chunk_chars=14, overlap_chars=4)] == [
        "一二三四五。六七八。九十一。",
        "九十一。十二三四。",
    ]


def test_a_title_begins_a_passage_rather_than_ending_one():
    blocks = [Block("The first paragraph ends here."), Block("When to call"), Block("Call at once in an emergency.")]
    assert [block.text for block in cut(*blocks, chunk_chars=45)] == [
        "The first paragraph ends here.",
        "When to call\nCall at once in an emergency.",
    ]


def test_a_table_is_cut_between_rows_and_its_header_repeated():
    table = Block("drug | dose\na | 1 mg\nb | 2 mg\nc | 3 mg", table=True)
    assert [block.text for block in cut(table, chunk_chars=30, overlap_chars=10)] == [
        "drug | dose\na | 1 mg\nb | 2 mg",
        "drug | dose\nc | 3 mg",
    ]


@pytest.mark.parametrize("chunk_chars", [10, 40, 137])
@pytest.mark.parametrize("overlap", [0, 0.2, 0.5])
def test_no_passage_is_longer_than_it_may_be_and_no_text_is_lost(chunk_chars, overlap):
    words = [f"w{number}" for number in range(400)]
    text = "".join(
        word + (". " if number % 7 == 0 else "，" if number % 5 == 0 else " ") for number, word in enumerate(words)
    )
    blocks = [Block(text[:900]), Block("a title"), Block("x" * 300), Block(text[900:].replace(". ", "。\n"))]
    passages = cut(*blocks, chunk_chars=chunk_chars, overlap_chars=int(overlap * chunk_chars))
    assert max(len(passage.text) for passage in passages) <= chunk_chars
    if not overlap:
        together, whole = ("".join("".join(block.text for block in part).split()) for part in (passages, blocks))
        assert together == whole
