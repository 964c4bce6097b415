"""The text of pdf, docx, md, txt and html as paragraphs and tables that know their page or their headings.

Not read: scans without a text layer, pictures, and the comments, footnotes and deleted text of docx.
"""

import io
import logging
import re
import unicodedata
import zipfile
from html.parser import HTMLParser
from pathlib import Path

from stagekit.documents import SUFFIXES, Block, Limits, Unreadable

# A docx is a zip: its parts together may unpack to this many times --max_file_mb. XML takes some ten times its size
# once it is parsed, and honest text shrinks to a tenth in a zip.
MAX_INFLATION = 4
MIN_WIDTH = 32  # nobody wraps text into narrower columns: what is narrower are lines of their own


def extract(name: str, data: bytes, limits: Limits) -> tuple[list[Block], list[str]]:
    """Read the text of a document.

    Args:
        name: of the file; its suffix says of which type it is.
        data: its content.
        limits: how large it may be.

    Returns:
        (paragraphs and tables in their order, notes for the user).

    Raises:
        Unreadable: encrypted, damaged, too large, or without any text.
    """
    file_type = SUFFIXES[Path(name).suffix.lower()]
    notes = []
    try:
        if file_type in READERS:
            blocks, notes = READERS[file_type](data, limits)
        else:
            text, notes = decode(data, html=file_type == "html")
            blocks = TEXT_READERS[file_type](clean(text))
    except Unreadable:
        raise
    except Exception as error:  # damaged files make pypdf, zipfile, lxml and python-docx raise errors of all kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise Unreadable(f"damaged: {reason}") from error
    if not blocks:
        raise Unreadable("empty: there is no text in it")
    return blocks, notes


# -- text ------------------------------------------------------------------------------------------------------------

_CHARSETS = rb"(?:gb|big5|shift_jis|euc-|windows-|iso-8859-|koi8-)[\w-]*"
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*(" + _CHARSETS + rb")", re.IGNORECASE)
# Control characters, and invisible ones that split words or turn the direction of writing (Unicode's Cc and Cf).
_INVISIBLE = [(0, 0x9), (0xB, 0x20), (0x7F, 0xA0), (0xAD, 0xAE), (0x200B, 0x2010), (0x202A, 0x202F), (0x2060, 0x2070)]
_INVISIBLE += [(0xFEFF, 0xFF00), (0xFFF9, 0xFFFC), (0xE0000, 0xE0080)]
_CLEANED = {code: None for first, end in _INVISIBLE for code in range(first, end)}
_CLEANED |= {0x9: " ", 0xA0: " ", 0x2028: "\n", 0x2029: "\n"}
# Ligatures and second code points of Chinese characters, which PDFs are full of and nobody types.
_COMPATIBLE = [*range(0x2E80, 0x2FE0), *range(0xF900, 0xFB07)]
_COMPATIBLE = {code: unicodedata.normalize("NFKC", chr(code)) for code in _COMPATIBLE}
_CJK = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
_ENDS_SENTENCE = re.compile(r"[。！？!?.:：;；…][\"'”’」』）)\]】]*$")
_BEGINS_ITEM = re.compile(
    r"([-*+•·●○■◆▪–]|\(?\d{1,3}[.)、．）]|[(（]?[一二三四五六七八九十]{1,3}[)）、．.]|[①-⑳])\s*\S"
)
_PAGE_NUMBER = re.compile(r"[-–—\s]*(第\s*)?(page\s*)?\d+(\s*(/|of)\s*\d+)?(\s*页)?[-–—\s]*", re.IGNORECASE)


def decode(data: bytes, html: bool = False) -> tuple[str, list[str]]:
    """Decode a text file: by its byte-order mark, as UTF-8, as an HTML page declares itself, else as GB 18030.

    Returns:
        (text, notes: the encoding, where it was not UTF-8).

    Raises:
        Unreadable: it is none of them, or no text.
    """
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    declared = _CHARSET.search(data[:4096]) if html else None
    tried = [encoding, *([declared[1].decode()] if declared else []), "gb18030"]
    for encoding in tried:
        try:
            text = data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
        if "\0" in text:
            break
        return text, [] if encoding.startswith("utf-8") else [f"read as {encoding}"]
    raise Unreadable("no text in UTF-8, UTF-16 with a byte-order mark, or GB 18030")


def clean(text: str) -> str:
    """Remove control characters and invisible ones; line ends become \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n").translate(_CLEANED)


def join_lines(lines: list[str]) -> list[str]:
    """Join the lines of a page into paragraphs.

    A line goes on in the next one when the next one's first word would not have fitted into it, unless an empty line
    lies between or a list item begins. The widest line counts as a full one; a Chinese character is 2 wide. A word
    hyphenated at a line end is joined.
    """
    lines = [line.strip() for line in lines]
    widest = max([MIN_WIDTH, *map(_width, lines)])
    paragraphs, before = [], ""
    for line in lines:
        chinese = re.match(f"[{_CJK}]", line)
        first = line[:1] if chinese else line.partition(" ")[0]
        # Letters of print are not equally wide; behind the end of a sentence less is left to chance.
        full = (0.95 if _ENDS_SENTENCE.search(before) else 0.8) * widest
        if line and before and _width(before) + 1 + _width(first) > full and not _BEGINS_ITEM.match(line):
            _glue(paragraphs[-1], line)
        elif line:
            paragraphs.append([line])
        before = line
    return ["".join(pieces) for pieces in paragraphs]


def _glue(pieces, line):
    """Add a line to the pieces of a paragraph."""
    end = pieces[-1][-2:]
    if re.search(r"[^\W\d_]-$", end) and line[0].islower():
        pieces[-1] = pieces[-1][:-1]
    elif not (re.search(f"[{_CJK}]$", end) and re.match(f"[{_CJK}]", line)):
        pieces.append(" ")
    pieces.append(line)


def _width(line):
    return len(line) + len(re.findall(f"[{_CJK}]", line))


class _Outline:
    """Blocks that know the headings above them."""

    def __init__(self):
        self.blocks, self.path, self.bare = [], {}, False

    def heading(self, level, text):
        text = " ".join(text.split())
        if not text:
            return
        if self.bare and level <= max(self.path):
            self.close()
        self.path = {number: title for number, title in self.path.items() if number < level} | {level: text}
        self.bare = True

    def add(self, text, table=False):
        if text.strip():
            self.blocks.append(Block(text.strip(), None, " > ".join(self.path.values()), table))
            self.bare = False

    def close(self):
        """Keep a heading with nothing below it as text; return all blocks."""
        if self.bare:
            self.add(list(self.path.values())[-1])
        return self.blocks


# -- formats ---------------------------------------------------------------------------------------------------------


def _read_pdf(data, limits):
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it repairs in silence is nothing a user can act on
    blocks, empty, broken = [], 0, 0
    reader = PdfReader(io.BytesIO(data))
    try:
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("encrypted: it asks for a password")
        count = len(reader.pages)
    except DependencyError:
        raise Unreadable("encrypted; if it opens without a password, pip install cryptography reads it") from None
    if not count:
        raise Unreadable("damaged: it has no pages")
    if count > limits.max_pages:
        raise Unreadable(f"{count:,} pages are more than --max_pages {limits.max_pages}")
    for number in range(1, count + 1):
        try:
            text = reader.pages[number - 1].extract_text()
        except Exception:  # of any kind; the other pages may be sound
            broken += 1
            continue
        lines = clean(text.translate(_COMPATIBLE)).strip().split("\n")
        for end in (0, -1):
            if _PAGE_NUMBER.fullmatch(lines[end]):
                lines[end] = ""
        found = [Block(line, number) for line in join_lines(lines)]
        empty += not found
        blocks += found
    if broken == count:
        raise Unreadable("damaged: none of its pages can be read")
    if not blocks:
        raise Unreadable(f"no text on its {count} pages: a scan? OCR makes it readable")
    notes = [f"{empty} of {count} pages hold no text"] if empty else []
    return blocks, notes + ([f"{broken} of {count} pages cannot be read"] if broken else [])


def _read_docx(data, limits):
    import docx

    if data.startswith(b"\xd0\xcf\x11\xe0"):  # an OLE file
        raise Unreadable("encrypted, or in Word's old format")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())  # zipfile unpacks no more than it says here
    if unpacked > MAX_INFLATION * limits.max_file_mb * 2**20:
        raise Unreadable(
            f"unpacks to {unpacked / 2**20:,.0f} MB, more than {MAX_INFLATION} times --max_file_mb "
            f"{limits.max_file_mb:g}"
        )
    document = docx.Document(io.BytesIO(data))
    names = {style.style_id: style.name or "" for style in document.styles}
    outline = _Outline()
    for item in _docx_items(document.element.body):
        if item.tag.endswith("}tbl"):
            rows = [[_docx_text(cell) for cell in row.iterchildren("{*}tc")] for row in item.iterchildren("{*}tr")]
            outline.add(_table(rows), table=True)
            continue
        style = names.get(item.style, "")
        level = re.fullmatch(r"(?:heading|标题)\s*(\d)", style, re.IGNORECASE)
        if level or style == "Title":
            outline.heading(int(level[1]) if level else 0, clean(_docx_text(item)))
        else:
            outline.add(clean(_docx_text(item)))
    return outline.close(), []


def _docx_items(element):
    """Yield paragraphs and tables in their order, also those in content controls, such as a cover page."""
    for child in element.iterchildren():
        if child.tag.endswith(("}p", "}tbl")):
            yield child
        elif child.tag.endswith(("}sdt", "}sdtContent")):
            yield from _docx_items(child)


def _docx_text(element):
    """Text of a paragraph or a cell: tracked insertions are in it, deletions are not."""
    parts = []
    for node in element.iter("{*}t", "{*}tab", "{*}br", "{*}cr", "{*}p"):
        kind = node.tag.rpartition("}")[2]
        if kind == "t" and not any(parent.tag.endswith("}Fallback") for parent in node.iterancestors()):
            parts.append(node.text or "")
        elif kind in ("br", "cr", "p") and parts:
            parts.append("\n")
        elif kind == "tab" and not node.getparent().tag.endswith("}tabs"):
            parts.append("\t")
    return "".join(parts).strip()


def _table(rows):
    """Rows as lines, cells between bars."""
    lines = [" | ".join(" ".join(clean(cell).split()) for cell in row) for row in rows]
    return "\n".join(line for line in lines if line.strip(" |"))


def _read_plain(text):
    return [Block(paragraph) for paragraph in join_lines(text.split("\n"))]


def _read_markdown(text):
    outline, paragraph, fence = _Outline(), [], None

    def flush():
        lines = [line for line in paragraph if not ("-" in line and re.fullmatch(r"[\s:|-]+", line))]
        if lines and all(line.startswith("|") for line in lines):
            outline.add(_table([line.strip("|").split("|") for line in lines]), table=True)
        else:
            joined = []
            for line in lines:  # list items and quotes stay lines of their own
                if joined and not _BEGINS_ITEM.match(line) and not line.startswith(">"):
                    _glue(joined[-1], line)
                else:
                    joined.append([line])
            for pieces in joined:
                outline.add("".join(pieces))
        paragraph.clear()

    for line in re.sub(r"<!--.*?(?:-->|\Z)", "", text, flags=re.DOTALL).split("\n"):
        stripped = line.strip()
        if fence or re.match(r"(```|~~~)", stripped):
            if not fence:
                flush()
                fence = stripped[:3]
            elif stripped.startswith(fence):
                outline.add("\n".join(paragraph))
                paragraph.clear()
                fence = None
            else:
                paragraph.append(line)
        elif title := re.match(r"(#{1,6})\s+(.*)", stripped):
            flush()
            outline.heading(len(title[1]), title[2].rstrip("#"))
        elif paragraph and re.fullmatch(r"=+|-+", stripped) and len(paragraph) == 1:
            title = paragraph.pop()
            outline.heading(1 if stripped.startswith("=") else 2, title)
        elif stripped:
            paragraph.append(stripped)
        else:
            flush()
    flush()
    return outline.close()


def _read_html(text):
    page = _Page()
    page.feed(text)
    page.close()
    page.end_block()
    return page.outline.close()


class _Page(HTMLParser):
    """Collects what a browser would show: no scripts, styles, templates or comments."""

    DROPPED = frozenset(("script", "style", "template", "noscript", "svg", "title"))
    INLINE = frozenset(
        "a abbr b bdi bdo cite code data dfn em font i kbd mark q s samp small span strong sub sup".split()
    )
    INLINE |= frozenset(("time", "u", "var", "ins", "label", "wbr", "img", "input"))

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.outline, self.text, self.dropped, self.level = _Outline(), [], [], None
        self.rows, self.depth = [], 0

    def handle_starttag(self, tag, attributes):
        if tag in self.DROPPED and tag not in self.dropped:
            self.dropped.append(tag)
        if self.dropped or tag in self.INLINE:
            return
        if tag in ("table", "tr", "td", "th"):
            self._table_tag(tag)
        elif tag == "br":
            self.text.append("\n")
        else:
            self.end_block()
            if tag != "div":
                self.level = int(tag[1]) if re.fullmatch("h[1-6]", tag) else None
            if tag == "li" and not self.depth:
                self.text.append("- ")

    def _table_tag(self, tag):
        if tag == "table":
            self.end_block()
            self.depth += 1
        elif self.depth and tag == "tr":
            self.end_block()
            self.rows.append([])
        elif self.depth:
            self.end_block()
            self.rows = self.rows or [[]]
            self.rows[-1].append([])

    def handle_endtag(self, tag):
        if self.dropped:
            if tag in self.dropped:
                del self.dropped[self.dropped.index(tag) :]
        elif tag == "table" and self.depth:
            self.end_block()
            self.depth -= 1
            if not self.depth:
                self.outline.add(_table([[" ".join(cell) for cell in row] for row in self.rows]), table=True)
                self.rows = []
        elif tag not in self.INLINE:
            self.end_block()
            if re.fullmatch("h[1-6]", tag):
                self.level = None

    def handle_data(self, data):
        if not self.dropped:
            self.text.append(re.sub(r"\s+", " ", data))

    def end_block(self):
        """Close a paragraph, a heading or a table cell."""
        lines = [" ".join(line.split()) for line in "".join(self.text).split("\n")]
        text = "\n".join(filter(None, lines))
        self.text = []
        if self.depth and self.rows and self.rows[-1]:
            self.rows[-1][-1].append(text)
        elif self.level and text:
            self.outline.heading(self.level, text)
            self.level = None
        elif text != "-":
            self.outline.add(text)


READERS = {"pdf": _read_pdf, "docx": _read_docx}
TEXT_READERS = {"md": _read_markdown, "txt": _read_plain, "html": _read_html}
