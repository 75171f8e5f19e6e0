r"""One sanitiser of text that others wrote, and one escaper for each output form. No torch.

A reason, a name or a remark may come from a model folder, a library's error or a record that
somebody sent. `clean` removes what is no text: control characters, terminal escape sequences with
what they carry (colours, window titles, links), and marks that turn the direction of writing. It
cuts what is longer than anybody reads. The result is one line; a clean text is returned unchanged.
The forms are Markdown, LaTeX, CSV and HTML.
"""

import re
from collections.abc import Mapping
from typing import Any

LONGEST = 2_000  # characters: a reason has 300 at most
# Patterns are strings, so that a command which shows nothing dirty compiles none of them.
# Escape sequences: operating-system commands and other strings up to their end, control sequences,
# and single ones.
_SEQUENCES = (
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d\x9e\x9f])[^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x1b\\|\x9c)?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?"
)
_BREAKS = r"[ \t]*[\t\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+[ \t]*"
_HALVES = r"[\ud800-\udfff]"  # of surrogate pairs, which no encoding takes
_UNSHOWN = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
_DIRTY = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
_TAG = r"<(?=[A-Za-z/!?])"
_BAR = r"(\\*)\|"
_FORMULA = r"[=+\-@]"
_NUMBER = r"[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?\b|-$"


def clean(text: str, longest: int = LONGEST) -> str:
    """Return a text as one line that any terminal and file may show.

    A text that is clean already is returned as the same object.
    """
    if not re.search(_DIRTY, text) and len(text) <= longest:
        return text
    cut = text[: 8 * longest]  # a bound before the work
    cleaned = re.sub(
        _UNSHOWN, "\ufffd", re.sub(_HALVES, "?", re.sub(_BREAKS, " ", re.sub(_SEQUENCES, "", cut)))
    ).strip()
    return (
        cleaned
        if len(cleaned) <= longest and len(cut) == len(text)
        else f"{cleaned[:longest]} ... (cut; {len(text):,} characters)"
    )


def clean_all(value: Any) -> Any:
    """Return JSON-like data with every text and every name in it clean."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {
            clean(name) if isinstance(name, str) else name: clean_all(part)
            for name, part in value.items()
        }
    return [clean_all(part) for part in value] if isinstance(value, (list, tuple)) else value


def markdown_text(text: str) -> str:
    """Return a text that may stand in a line of Markdown: it opens no tag and makes no link."""
    return re.sub(_TAG, "&lt;", clean(text)).replace("](", r"]\(")


def markdown_cell(text: str) -> str:
    """Return a text that may stand in a cell of a Markdown table.

    It is one line, opens no tag, makes no link, and has no bar that would end the cell.
    """
    return re.sub(_BAR, lambda bar: f"{2 * bar[1]}\\|", markdown_text(text))


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def latex_text(text: str) -> str:
    """Return a text for a cell or a heading of LaTeX."""
    return "".join(_TEX.get(letter, letter) for letter in clean(text))


def latex_comment(text: str) -> str:
    """Return a text that may stand behind a percent sign: one line, so the comment ends with it."""
    return clean(text)


def csv_cell(value: object) -> object:
    """Return a cell of a CSV file; numbers stay numbers.

    A text that a spreadsheet would compute (`=`, `+`, `-`, `@`) begins with an apostrophe.
    """
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if re.match(_FORMULA, text) and not re.fullmatch(_NUMBER, text) else text


def html_text(text: str) -> str:
    """Return a text for a page."""
    import html  # its table of entities would be loaded by every command

    return html.escape(clean(text))
