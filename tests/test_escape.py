"""Text of others reaches no terminal, Markdown, LaTeX, CSV or page as anything but text."""

import pytest

from harness.errors import CellFailed, HarnessError, how_it_ended
from harness.escape import (
    clean,
    csv_cell,
    html_text,
    latex_comment,
    latex_text,
    markdown_cell,
    markdown_text,
)
from harness.records.record import BadRecord

HOSTILE = {
    "colours": ("\x1b[31;1mred\x1b[0m", "red"),
    "a window title": ("a\x1b]0;owned\x07b", "ab"),
    "a link": ("\x1b]8;;http://x\x1b\\text\x1b]8;;\x1b\\", "text"),
    "an answer from the terminal": ("\x1b[6n\x1bcx", "x"),
    "a device string": ("\x1bPq#0\x1b\\x", "x"),
    "single bytes of C1": ("\x9b31mx\x9d0;t\x9cy", "xy"),
    "a line break": ("a\n\n  b\r\nc", "a b c"),
    "rare line breaks": ("a\u2028b\u2029c\x85d\x0be\x0cf", "a b c d e f"),
    "flipped writing": ("a\u202eb\u2066c\u200f", "a\ufffdb\ufffdc\ufffd"),
    "half a pair": ("a\ud800b", "a?b"),
    "a bell and a backspace": ("a\x07b\x08c\x00d\x7fe", "a\ufffdb\ufffdc\ufffdd\ufffde"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_text_is_taken_out(name):
    text, expected = HOSTILE[name]
    assert clean(text) == expected
    assert clean(clean(text)) == clean(text) and clean(text).encode()


@pytest.mark.parametrize(
    "text", ["response[temperature=4]", "±0.5 µs, 中文, émigré, 😀", "", " two  spaces ", "a|b & c"]
)
def test_clean_text_stays_the_same_object(text):
    assert clean(text) is text


@pytest.mark.parametrize("letter", ["x", "\x1b[31m", "\x1b]0;", "\n", "\x00"])
def test_long_texts_are_cut_with_a_word(letter):
    cleaned = clean(letter * 200_000 + "end")
    assert len(cleaned) < 2_100 and "\x1b" not in cleaned and "\n" not in cleaned
    assert len(letter) > 1 or "cut" in cleaned


@pytest.mark.parametrize("given", [text for text, _ in HOSTILE.values()])
def test_every_form_cleans_what_it_escapes(given):
    for form in (markdown_cell, markdown_text, latex_text, latex_comment, csv_cell, html_text):
        assert clean(form(given)) == form(given)


def test_markdown_has_no_bar_tag_or_link():
    assert markdown_cell("a|b") == r"a\|b" and markdown_cell("a\\|b") == r"a\\\|b"
    assert (
        markdown_cell("<script>x</script>") == "&lt;script>x&lt;/script>"
        and markdown_cell("p < 0.05") == "p < 0.05"
    )
    assert markdown_text("[x](http://y)") == r"[x]\(http://y)"


def test_tex_has_no_command_and_its_comments_no_second_line():
    assert latex_text(r"\input{x}%&") == r"\textbackslash{}input\{x\}\%\&"
    assert "\n" not in latex_comment("a\n\\input{x}") and "\r" not in latex_comment("a\r\\input{x}")


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|'/c calc'!A0", "-2+3", "@SUM(A1)", '=HYPERLINK("x")', "\t=1", "\r=1"]
)
def test_a_cell_that_a_spreadsheet_would_compute_is_text(text):
    assert csv_cell(text)[0] == "'"


@pytest.mark.parametrize(
    "value", ["-1.5", "+2", "-", "1e-5", "-1e-5", "-1,000", -1.5, 3, None, True, "text"]
)
def test_numbers_and_plain_texts_stay_as_they_are(value):
    assert csv_cell(value) == value


def test_errors_are_one_clean_line():
    for kind in (HarnessError, CellFailed, BadRecord):
        assert str(kind("a\x1b[31mb\nc")) == "ab c"
        assert len(str(kind("x" * 100_000))) < 2_100
    assert how_it_ended(1, "\x1b]0;t\x07last\n") == "ended with status 1: last"
