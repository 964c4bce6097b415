"""Answers copied from a page become the text they were written as; the text is written out by hand."""

import pytest

from stagekit.html_answers import HTML_MARK, html_to_text
from stagekit.records import RowError

PAGES = {
    "paragraphs": ("<p>One</p><p>Two\n  words</p>", "One\n\nTwo words"),
    "blocks inside blocks": ("<div><div><p>One</p></div></div>\n<div>Two</div>", "One\n\nTwo"),
    "line breaks": ("<p>One<br>Two<br/>Three</p>", "One\nTwo\nThree"),
    "entities": ("<p>1 &lt; 2 &amp;&amp; caf&eacute; &#20320;</p>", "1 < 2 && café 你"),
    "emphasis and code": ("<p>a <em>b</em>, <b>c</b> and <code>d &gt; e</code>.</p>", "a *b*, **c** and `d > e`."),
    "headings": ("<h1>One</h1><p>a</p><h3>Two</h3><p>b</p>", "# One\n\na\n\n### Two\n\nb"),
    "bullets": ("<p>As:</p><ul><li>one</li><li>two</li></ul><p>end</p>", "As:\n\n- one\n- two\n\nend"),
    "loose items": ("<ol>\n<li>\n<p>one.</p>\n</li>\n<li>\n<p>two</p>\n</li>\n</ol>", "1. one.\n2. two"),
    "nested lists": (
        "<ul><li>one<ol><li>a</li><li>b</li></ol></li><li><strong>two</strong></li></ul>",
        "- one\n  1. a\n  2. b\n- **two**",
    ),
    "a sentence before a block": ("<div>It ends. <p>Next</p></div>", "It ends.\n\nNext"),
    "code keeps its white space": (
        "<p>So:</p><pre><code>def f():\n\n    return  1\n</code></pre><p>Done.</p>",
        "So:\n\n```\ndef f():\n\n    return  1\n```\n\nDone.",
    ),
    "code with its language and button": (
        '<pre><div>python<button>Copy code</button></div><code>print("&lt;*&gt;")</code></pre>',
        '```python\nprint("<*>")\n```',
    ),
    "code of an older page": (
        "<pre><div>css</div><div>Copy code</div><code>a {}<br>b {}</code></pre>",
        "```css\na {}\nb {}\n```",
    ),
    "code without its own tag": ("<pre>ls -l\n</pre>", "```\nls -l\n```"),
    "tags inside code are text where they were written so": (
        "<pre><code><span>&lt;p&gt;</span>x&lt;/p&gt;</code></pre>",
        "```\n<p>x</p>\n```",
    ),
    "table": (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><b>2</b></td></tr></tbody></table>",
        "| a | b |\n| --- | --- |\n| 1 | **2** |",
    ),
    "scripts, drawings and buttons": (
        "<p>a</p><script>if (1 < 2) {}</script><svg><title>t</title></svg><button>Copy</button><p>b</p>",
        "a\n\nb",
    ),
    "the page's counters": ("<p>2 / 3</p><p>half is 1 / 2</p><p>Copy12 chars / 3 words</p>", "half is 1 / 2"),
    "a counter within": ("<p>a</p><p>1 / 2</p><p>b</p>", "a\n\n1 / 2\n\nb"),
    "nothing": (f'{HTML_MARK} prose"><p> </p></div>', ""),
    "no tags": ("plain & simple\n\n  text", "plain & simple\n\n  text"),
    "tags that do not close": ("<p>one<p>two<ul><li>three", "one\n\ntwo\n\n- three"),
    "closing tags of nothing": ("</ul></pre></table></li>text", "text"),
}


@pytest.mark.parametrize("name", PAGES)
def test_html_becomes_the_text_it_was_written_as(name):
    html, text = PAGES[name]
    assert html_to_text(html) == text


def test_a_declaration_that_no_parser_reads_is_a_row_error_or_text():
    for html in ("<![x", "<!DOCTYPE [<!", "<!-- open", "<![if !IE]>a", "<?php a", "<a b='", "&#xffffffff;<b>"):
        try:
            assert isinstance(html_to_text(html), str)
        except RowError:
            pass
