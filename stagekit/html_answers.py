"""From answers that were copied as HTML out of a chat page (ShareGPT) to the text they were written as. No files.

What a browser shows stays, in Markdown: paragraphs, lists, headings, emphasis, tables, and code as it stands. Buttons
("Copy code"), drawings and the page's own counters go.
"""

import re
from html.parser import HTMLParser

from stagekit.records import RowError

HTML_MARK = '<div class="markdown'  # the chat page's own element around an answer; nobody writes it by hand
COUNTER = re.compile(r"\d{1,3} / \d{1,3}|Copy\d{1,9} chars / \d{1,9} words")  # "1 / 2": this answer of so many


def html_to_text(html: str) -> str:
    """Turn one answer into text; what has no tags comes back as it is.

    Raises:
        RowError: declarations inside it that no parser reads.
    """
    if "<" not in html:
        return html
    page = _Answer()
    try:
        page.feed(html)
        page.close()
    except AssertionError as error:  # of the parser of some Python versions, for "<![" and the like
        raise RowError(f"an answer in HTML cannot be read ({error})") from None
    return page.text()


class _Answer(HTMLParser):
    SKIPPED = frozenset(("button", "svg", "script", "style", "head", "title"))
    BLOCKS = frozenset(("p", "div", "section", "article", "blockquote", "hr", "h1", "h2", "h3", "h4", "h5", "h6"))
    MARKS = {"strong": "**", "b": "**", "em": "*", "i": "*", "code": "`"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []  # code and tables, and the text between them
        self.line: list[str] = []
        self.item_is_new = False  # nothing stands behind the mark of a list item yet
        self.skipped: list[str] = []
        self.lists: list[int | None] = []  # the number of the last item, None for bullets
        self.language: list[str] | None = None  # what stands in <pre> before its <code>
        self.code: list[str] | None = None
        self.rows: list[list[list[str]]] | None = None

    def handle_starttag(self, tag, attributes):
        if tag in self.SKIPPED:
            self.skipped.append(tag)
        if self.skipped:
            return
        if self.language is not None:
            if tag == "code":
                self.code = []
            elif tag == "br" and self.code is not None:
                self.code.append("\n")
        elif tag == "pre":
            self._close_block()
            self.language = []
        elif tag == "table":
            self._close_block()
            self.rows = []
        elif self.rows is not None:
            self._start_cell(tag)
        elif tag in ("ul", "ol"):
            self._break("\n" if self.lists else "\n\n")
            self.lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self._start_item()
        elif tag == "br":
            self.line.append("\n")
        elif tag in self.BLOCKS:
            self._break("\n" if self.lists else "\n\n")
            if tag[0] == "h" and tag != "hr":
                self._add("#" * int(tag[1]) + " ")
        elif tag in self.MARKS:
            self._add(self.MARKS[tag])

    def handle_endtag(self, tag):
        if self.skipped:
            if tag in self.skipped:
                del self.skipped[self.skipped.index(tag) :]
        elif tag == "pre":
            self._close_code()
        elif self.language is not None:
            if tag == "code" and self.code is not None:
                self._close_code()
        elif tag == "table":
            self._close_table()
        elif self.rows is not None:
            if tag in self.MARKS and self.rows and self.rows[-1]:
                self.rows[-1][-1].append(self.MARKS[tag])
        elif tag in ("ul", "ol"):
            if self.lists:
                self.lists.pop()
            self._break("\n" if self.lists else "\n\n")
        elif tag in self.BLOCKS:
            self._break("\n" if self.lists else "\n\n")
        elif tag in self.MARKS:
            self._add(self.MARKS[tag])

    def handle_data(self, data):
        if self.skipped:
            return
        if self.language is not None:
            (self.language if self.code is None else self.code).append(data)
        elif self.rows is None:
            self._add(re.sub(r"\s+", " ", data))
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1].append(re.sub(r"\s+", " ", data))

    def text(self) -> str:
        """What was read, without the page's counters at either end."""
        if self.language is not None:
            self._close_code()
        if self.rows is not None:
            self._close_table()
        self._close_block()
        lines = "\n\n".join(self.blocks).split("\n")
        while lines and (not lines[0].strip() or COUNTER.fullmatch(lines[0].strip())):
            lines.pop(0)
        while lines and (not lines[-1].strip() or COUNTER.fullmatch(lines[-1].strip())):
            lines.pop()
        return "\n".join(lines)

    def _add(self, text):
        if not self.line or self.line[-1].endswith("\n") or self.item_is_new:
            text = text.lstrip()
        if text:
            self.line.append(text)
            self.item_is_new = False

    def _break(self, between):
        """End a line, or a paragraph, unless it has ended already."""
        if self.item_is_new:  # its own <p> is no break
            return
        while self.line and not self.line[-1].strip(" "):
            self.line.pop()
        if self.line:
            ended = len(self.line[-1]) - len(self.line[-1].rstrip("\n"))
            self.line += [between[ended:]] if len(between) > ended else []

    def _start_item(self):
        self._break("\n")
        indent = "  " * (len(self.lists) - 1)
        if self.lists and self.lists[-1] is not None:
            self.lists[-1] += 1
            self.line += [indent, f"{self.lists[-1]}. "]
        else:
            self.line += [indent, "- "]
        self.item_is_new = True

    def _start_cell(self, tag):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows = self.rows or [[]]
            self.rows[-1].append([])
        elif tag in self.MARKS and self.rows and self.rows[-1]:
            self.rows[-1][-1].append(self.MARKS[tag])

    def _close_block(self):
        lines = [line.rstrip() for line in "".join(self.line).split("\n")]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        self.line, self.item_is_new = [], False
        if text:
            self.blocks.append(text)

    def _close_code(self):
        if self.language is None:
            return
        language, code = "".join(self.language), self.code
        if code is None:  # a <pre> without <code>: all of it is the code
            language, code = "", [language]
        language = "".join(language.split()).removesuffix("Copycode")  # an older page has no button
        text = "".join(code).strip("\n")
        if text.strip():
            self.blocks.append(f"```{language}\n{text}\n```")
        self.language = self.code = None

    def _close_table(self):
        rows = [["".join(cell).strip() for cell in row] for row in self.rows or [] if row]
        self.rows = None
        if rows:
            lines = [f"| {' | '.join(row)} |" for row in rows]
            lines.insert(1, "|" + " --- |" * len(rows[0]))
            self.blocks.append("\n".join(lines))
