"""The words of a check: its verdicts, its rules and its findings. No torch."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Literal, NamedTuple

from harness.analysis.items_needed import ItemsNeeded as ItemsNeeded
from harness.analysis.items_needed import items_needed as items_needed
from harness.analysis.items_needed import items_needed_among as items_needed_among
from harness.analysis.items_needed import task_items as task_items
from harness.records.baseline import Baseline
from harness.records.record import TEACHER, RunRecord


class Verdict(StrEnum):
    """The verdicts of a check.

    `cannot tell`: there are too few items. `not comparable`: the check would compare unlike things.
    A claim that was shown not to hold is `regressed` where the baseline has the row, else `missed`.
    """

    passed = "passed"
    cannot_tell = "cannot tell"
    not_comparable = "not comparable"
    missed = "missed"
    regressed = "regressed"


EXIT_CODES = {
    Verdict.passed: 0,
    Verdict.regressed: 1,
    Verdict.missed: 1,
    Verdict.cannot_tell: 3,
    Verdict.not_comparable: 4,
}
GRAVEST_FIRST = (
    Verdict.regressed,
    Verdict.missed,
    Verdict.not_comparable,
    Verdict.cannot_tell,
    Verdict.passed,
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What every row must show. Shares are between 0 and 1; points are shares of the items."""

    # share of the teacher's score to keep; with `points`, the share that may be lost; None: no
    # claim is tested
    margin: float | None = None
    points: bool = False
    alpha: float = 0.05  # one-sided, of the claim layer
    frozen_alpha: float = 0.01  # one-sided, of the frozen layer
    # a smaller drop against the frozen outcomes is reported, but is no regression
    tolerance: float = 0.02
    # the drop that the frozen layer must be able to detect (power 0.8), else it cannot tell
    detect: float = 0.05
    # from this rise of the share of unreadable answers on, scores are not comparable
    invalid: float = 0.02
    # allowed tokens per answer, relative to the frozen answers: MLPerf's band
    length: tuple[float, float] = (0.9, 1.1)
    perplexity: float = 0.02  # tolerated rise of a perplexity over the frozen one
    # lowest decode speed to accept, relative to the teacher timed alternately with it
    faster: float | None = None
    # from this slowdown on, against a model timed beside it (`--measured`), it is a regression
    slower: float = 1.05
    # any flipped item is a regression, if machine and versions are the frozen ones
    exact: bool = False
    rows: tuple[str, ...] = ()  # judge only these rows; empty: every row that is no control
    # in the pooled decision: `items` weighs all items alike, `tasks` all tasks; else by task
    task_weights: str | tuple[tuple[str, float], ...] = "items"
    # pooled: a row's passed pool settles the single tasks that cannot tell
    decide: Literal["tasks", "pooled"] = "tasks"

    def claim(self, chance: float = 0.0) -> str:
        """Return the margin in words; `chance` is the score of guessing."""
        if self.margin is None:
            return "no margin"
        if self.points:
            return f"loses less than {100 * self.margin:g} points"
        return f"keeps {100 * self.margin:g} %" + (
            f" of what the teacher has above chance ({100 * chance:.4g} %)" if chance else ""
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked, with its verdict. `harness check --json` writes these fields."""

    layer: str  # row, claim, frozen, pooled (claim over tasks), pooled frozen, bytes, speed
    row: str
    task: str = ""
    verdict: Verdict
    told: str  # the explanation, one line for people
    differs: str = ""  # of a verdict `not comparable`: the condition that differs
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    warning: bool = False  # it passed, and people should read the explanation
    items: tuple[int, ...] = ()  # positions of the lost items
    counts: bool = True  # False: for information only, the check's verdict ignores it
    # of a pool: the tasks whose items it holds, and those on which the teacher is at chance
    speaks_for: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The title of a test case or an annotation: `ROW TASK [LAYER]`."""
        return f"{self.row}{f' {self.task}' if self.task else ''} [{self.layer}]"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The findings of a check and its verdict."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    rules: Rules
    passed_means: str = ""  # what a pass of this check shows and how often it errs, in one line

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict of the findings that count, `cannot tell` if there are none."""
        verdicts = {finding.verdict for finding in self.findings if finding.counts}
        return next(
            (verdict for verdict in GRAVEST_FIRST if verdict in verdicts), Verdict.cannot_tell
        )

    @property
    def exit_code(self) -> int:
        """0 passed, 1 regressed or missed, 3 cannot tell, 4 not comparable."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON-serialisable values."""
        return {
            "schema": 2,
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "passed_means": self.passed_means,
            "rules": asdict(self.rules),
            "notes": self.notes,
            "findings": [
                {**asdict(finding), "verdict": finding.verdict.value} for finding in self.findings
            ],
        }


def is_judged(record: RunRecord, rules: Rules) -> bool:
    """Tell whether the check judges a record's row.

    These are the rows that the rules name, or else all but controls and the teacher.
    """
    if rules.rows:
        return record.label in rules.rows
    return record.method != TEACHER and not record.is_control


class Difference(NamedTuple):
    """A reason why two things cannot be compared."""

    condition: str  # what differs: "items", "task version", "device"
    text: str  # how, with both values, for people


def not_comparable(layer: str, row: str, task: str, difference: Difference) -> Finding:
    """Return the finding that a comparison would be one of unlike things."""
    return Finding(
        layer=layer,
        row=row,
        task=task,
        verdict=Verdict.not_comparable,
        differs=difference.condition,
        told=difference.text,
    )


def unmet_verdict(label: str, frozen_labels: Collection[str]) -> Verdict:
    """Return the verdict on a claim that was shown not to hold.

    It is a regression if the row is one of the baseline's (`frozen_labels`).
    """
    return Verdict.regressed if label in frozen_labels else Verdict.missed


def abbreviated(value: object) -> str:
    """Return a condition's value in at most 48 characters: of a digest both ends."""
    text = str(value) if value not in (None, "") else "none"
    if len(text) <= 48:
        return text
    return f"{text[:45]}..." if " " in text else f"{text[:12]}..{text[-12:]}"


DEFAULT_MARGIN = 0.95  # of the teacher's score, if neither the user nor a baseline gives a margin


def rules_with_margin(baseline: Baseline | None, rules: Rules) -> Rules:
    """Return the rules with the user's margin, else the baseline's, else the default one.

    A row with a margin of its own is held to that: `frozen_items.rules_for_row`.
    """
    if rules.margin is not None:
        return rules
    if baseline is None:
        return replace(rules, margin=DEFAULT_MARGIN)
    return replace(rules, margin=baseline.margin, points=baseline.points)
