"""Text in Markdown: names stay as they are, and what could be markup does not become any."""

import pytest

from tir_alp.report.document import Code, Document, Findings, Section, Table
from tir_alp.report.markdown import inline, table_text, text_of


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("alp_token, 3.5% (256 tasks)", "alp_token, 3.5% (256 tasks)"),
        ("2026-12-01T04:17:44+00:00", "2026-12-01T04:17:44+00:00"),
        ("a|b `c` *d* _e_ [f](g)", r"a\|b \`c\` \*d\* \_e\_ \[f\](g)"),
        ("<b> &amp; $x$ ~~y~~", r"\<b\> \&amp; \$x\$ \~\~y\~\~"),
        ("# no heading", r"\# no heading"),
        ("- no item", r"\- no item"),
        ("1. no item", r"1\. no item"),
        ("two\n\nlines\u202e", "two lines⟨U+202E⟩"),
    ],
)
def test_inline_text_is_never_markup(text, written):
    assert inline(text) == written


def test_a_row_is_one_line():
    table = Table(("a", "b"), (("x|y", "1\n2"), ("alp_token", "")))
    assert table_text(table).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| x\|y | 1 2 |",
        "| alp_token |  |",
    ]


def test_a_block_cannot_be_ended_by_its_text():
    hostile = "```\n# heading\n`````\n<script>"
    section = Section("s", "S", (Code(hostile),))
    document = Document("t", "", "h", Findings(()), None, (section,))
    lines = text_of(document).splitlines()
    start = lines.index("``````text")
    assert lines[start + 1 : start + 5] == hostile.splitlines()
    assert lines[start + 5] == "``````"
