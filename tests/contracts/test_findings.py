"""Prose says what records say.

Each interval in README, findings and docs stands in a committed table or benchmark, with its
verdict.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
FINDINGS = sorted(RESULTS.glob("*/findings.md"))
PAGES = [
    ROOT / "README.md",
    RESULTS / "README.md",
    *FINDINGS,
    *sorted((ROOT / "docs").glob("*.md")),
]
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
INTERVAL = re.compile(
    rf"(?:x?(?P<value>{NUMBER})(?: ?%| points?)? )?\[(?P<low>{NUMBER}), (?P<high>{NUMBER})\]"
)
# a sentence with a figure that has no verdict must hold one of these
UNDECIDED = ("not shown", "cannot tell", "not judged")
ABOVE = ("above", "better than")
EXCEPTIONS = {
    "results/embedded/findings.md: 3.2 [0.3, 6.1]": "as first published, by another method; the "
    "page says so",
}


class Figure(NamedTuple):
    """A value, None where prose gives the ends alone, with the ends of its interval."""

    value: float | None
    low: float
    high: float

    def flipped(self) -> "Figure":
        """Return the same with the rows exchanged: what is 3 below is -3 above."""
        return Figure(None if self.value is None else -self.value, -self.high, -self.low)


class Line(NamedTuple):
    """A line of a table of rows against rows."""

    row: str
    against: str
    figure: Figure
    verdict: str


class Quoted(NamedTuple):
    """An interval as prose prints it: its figure, and half a unit of each number's last digit."""

    text: str
    figure: Figure
    places: tuple[float, float, float]

    def is_of(self, recorded: Figure) -> bool:
        """Tell whether it is a printed or an exact figure, to the digits that prose gives."""
        if self.figure.value is None:
            recorded = recorded._replace(value=None)
        return any(
            all(
                a == b if a is None or b is None else abs(a - b) <= place + 1e-9
                for a, b, place in zip(self.figure, flipped, self.places, strict=True)
            )
            for flipped in (recorded, recorded.flipped())
        )


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _place(text: str) -> float:
    """Return half a unit of the last digit."""
    mantissa, _, exponent = text.partition("e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def intervals(text: str) -> Iterator[Quoted]:
    """Yield every bracketed interval of a text; code is left out."""
    for match in INTERVAL.finditer(text):
        parts = (match["value"] or "", match["low"], match["high"])
        figure = Figure(
            _number(parts[0]) if parts[0] else None, _number(parts[1]), _number(parts[2])
        )
        yield Quoted(
            match[0],
            figure,
            (_place(parts[0]) if parts[0] else 0.0, _place(parts[1]), _place(parts[2])),
        )


def prose(page: str) -> str:
    """Return a page without its code."""
    return re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)


def sentences(page: str) -> list[str]:
    """Return a page's sentences, each on one line; a line of a table is one."""
    paragraphs = re.split(r"\n\s*\n|\n(?=\||- |\d+\. )", prose(page))
    return [
        " ".join(part.split())
        for paragraph in paragraphs
        for part in re.split(r"(?<=[.!?])\*{0,2}\s+(?=[A-Z`*(])", paragraph)
    ]


@cache
def printed(study: Path) -> tuple[Figure, ...]:
    """Return every figure with an interval that a study's tables print."""
    return tuple(
        quoted.figure
        for quoted in intervals((study / "tables" / "table.md").read_text(encoding="utf-8"))
    )


@cache
def measured() -> tuple[Figure, ...]:
    """Return every figure of the benchmark programs."""
    files = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((RESULTS / "benchmarks").glob("*.json"))
    ]
    figures = [figure for file in files for figure in (file if isinstance(file, list) else [file])]
    return tuple(Figure(figure["value"], figure["low"], figure["high"]) for figure in figures)


def known_to(page: Path) -> tuple[Figure, ...]:
    """Return the figures that a page may quote: findings those of their own study."""
    studies = [page.parent] if page in FINDINGS else [path.parent for path in FINDINGS]
    return tuple(figure for study in studies for figure in printed(study)) + measured()


@cache
def judged(study: Path) -> tuple[Line, ...]:
    """Return the lines of a study's tables of rows against rows."""
    groups = json.loads((study / "tables" / "tables.json").read_text(encoding="utf-8"))["groups"]
    tables = [
        table
        for group in groups
        for table in group["tables"]
        if "verdict" in table["columns"] and "against" in table["columns"]
    ]
    cells = [
        dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["rows"]
    ]
    return tuple(
        Line(cell["row"], cell["against"], quoted.figure, cell["verdict"])
        for cell in cells
        for quoted in intervals(cell["difference (points)"])
    )


def unknown(text: str, recorded: tuple[Figure, ...]) -> list[str]:
    """Return the intervals of a text that stand in no record."""
    flat = " ".join(prose(text).split())  # a value and its interval may stand on two lines
    return [
        quoted.text
        for quoted in intervals(flat)
        if not any(quoted.is_of(figure) for figure in recorded)
    ]


def unsaid(text: str, lines: tuple[Line, ...]) -> list[str]:
    """Return the sentences that quote a difference without a verdict and do not say so."""
    return [
        sentence
        for sentence in sentences(text)
        if any(
            line.verdict not in ("better", "worse")
            for quoted in intervals(sentence)
            for line in lines
            if quoted.is_of(line.figure)
        )
        and not any(word in sentence for word in UNDECIDED)
    ]


DIRECTION = re.compile(
    rf"`([^`]+)` (?:is|stands) ((?:{NUMBER} )?\[[^\]]+\])(?: points)? (above|below|better "
    r"than|worse than) `([^`]+)`"
)
PLAIN = re.compile(r"`([^`]+)` is (?:shown to be )?(better|worse) than `([^`]+)`")


def seen_from(row: str, other: str, lines: tuple[Line, ...]) -> list[Line]:
    """Return the lines of two rows, each as it reads from the first one."""
    flipped = {"better": "worse", "worse": "better"}
    forward = [line for line in lines if (line.row, line.against) == (row, other)]
    back = [line for line in lines if (line.row, line.against) == (other, row)]
    return forward + [
        Line(row, other, line.figure.flipped(), flipped.get(line.verdict, line.verdict))
        for line in back
    ]


def contradicted(text: str, lines: tuple[Line, ...]) -> list[str]:
    """Return what a text claims of two rows and no line supports.

    Claims look like "`a` is 3 [1, 5] above `b`" and "`a` is better than `b`".
    """
    wrong = []
    for sentence in sentences(text):
        for row, text_of, word, other in DIRECTION.findall(sentence):
            quoted = next(intervals(text_of)).figure
            figures = [
                line.figure if word in ABOVE else line.figure.flipped()
                for line in seen_from(row, other, lines)
            ]
            if not any(
                (quoted.low, quoted.high) == (figure.low, figure.high) for figure in figures
            ):
                wrong.append(f"`{row}` {text_of} {word} `{other}`")
        for row, word, other in PLAIN.findall(sentence):
            if word not in {line.verdict for line in seen_from(row, other, lines)}:
                wrong.append(f"`{row}` {word} `{other}`")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_interval_stands_in_a_record(page):
    name = str(page.relative_to(ROOT))
    assert [
        text
        for text in unknown(page.read_text(encoding="utf-8"), known_to(page))
        if f"{name}: {text}" not in EXCEPTIONS
    ] == []


@pytest.mark.parametrize("page", FINDINGS, ids=lambda path: path.parent.name)
def test_a_difference_without_a_verdict_is_called_so(page):
    assert unsaid(page.read_text(encoding="utf-8"), judged(page.parent)) == []


@pytest.mark.parametrize("page", FINDINGS, ids=lambda path: path.parent.name)
def test_above_and_below_have_the_signs_of_the_table(page):
    assert contradicted(page.read_text(encoding="utf-8"), judged(page.parent)) == []


def test_no_exception_is_out_of_date():
    """An exception that no page needs any more would hide the next wrong figure."""
    needed = {
        f"{page.relative_to(ROOT)}: {text}"
        for page in PAGES
        for text in unknown(page.read_text(encoding="utf-8"), known_to(page))
    }
    assert set(EXCEPTIONS) <= needed


STUDY = RESULTS / "embedded"
WRONG = [
    "45.2 points [38.5, 51.8]",
    "45.3 points [38.5, 51.9]",
    "[38.4, 51.9]",
    "x1.93 [1.85, 2.08]",
    "62.5 % [57.0, 68.2]",
    "-45.2 [38.5, 51.9]",
]
RIGHT = [
    "45.2 points [38.5, 51.9]",
    "-45.2 [-51.9, -38.5]",
    "[38.5, 51.9]",
    "1.93 [1.85, 2.07]",
    "62.5 % [57.0, 68.1]",
    "+45.2 [+38.5, +51.9]",
]


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_figure_is_found(text):
    assert unknown(f"`cot` gains {text} points.", printed(STUDY)) == [text]


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_figure_is_not(text):
    assert unknown(f"`cot` gains {text} points.", printed(STUDY)) == []


def test_a_figure_of_a_program_is_known_to_its_digits():
    assert unknown("1.43 [1.05, 1.59] times as fast, 1.4296 [1.0547, 1.5856]", measured()) == []
    assert unknown("1.43 [1.05, 1.60] times as fast", measured()) == ["1.43 [1.05, 1.60]"]


def test_a_difference_without_a_verdict_is_found():
    bare = "`response` is 3.2 [-1.3, 7.6] above `sft`."
    assert unsaid(f"Good. {bare} Fine: not shown.", judged(STUDY)) == [bare]
    assert (
        unsaid(
            "`response` is 3.2 [-1.3, 7.6] above `sft`: not shown. `cot` is 45.2 [38.5, 51.9] "
            "above `answer-only`.",
            judged(STUDY),
        )
        == []
    )


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`cot` is 45.2 [38.5, 51.9] above `answer-only`", False),
        ("`answer-only` is 45.2 [38.5, 51.9] points below `cot`", False),
        ("`answer-only` is 45.2 [38.5, 51.9] above `cot`", True),
        ("`cot` is 45.2 [38.5, 51.9] points worse than `answer-only`", True),
        ("`sft` is 45.2 [38.5, 51.9] above `answer-only`", True),
        ("`cot` is better than `untouched`", False),
        ("`untouched` is shown to be worse than `cot`", False),
        ("`untouched` is better than `cot`", True),
        ("`response` is better than `sft`", True),
    ],
)
def test_what_the_table_does_not_say_is_found(text, wrong):
    assert bool(contradicted(text, judged(STUDY))) is wrong
