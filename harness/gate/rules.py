"""What a check can say and is asked: verdicts, rules, findings. No torch."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

from harness.data.sizes import ITEMS_BY_TASK
from harness.records.baseline import Baseline
from harness.records.record import TEACHER, RunRecord


class Verdict(StrEnum):
    """What a check can say. `cannot tell`: these items are too few; `not comparable`: it would
    compare unlike things.

    A claim that was shown not to hold is `missed` where no baseline holds the row, and `regressed`
    where one does.
    """

    passed = "passed"
    cannot_tell = "cannot tell"
    not_comparable = "not comparable"
    missed = "missed"
    regressed = "regressed"


EXIT = {
    Verdict.passed: 0,
    Verdict.regressed: 1,
    Verdict.missed: 1,
    Verdict.cannot_tell: 3,
    Verdict.not_comparable: 4,
}
GRAVEST = (
    Verdict.regressed,
    Verdict.missed,
    Verdict.not_comparable,
    Verdict.cannot_tell,
    Verdict.passed,
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is asked of every row. Shares are of 1; points are shares of the items."""

    # of the teacher's score that must be kept; with `points`: what may be lost; None: no claim
    margin: float | None = None
    points: bool = False
    alpha: float = 0.05  # of the claim layer, one-sided
    frozen_alpha: float = 0.01  # of the frozen layer, one-sided
    # a smaller drop against the frozen outcomes is said, but is no regression
    tolerance: float = 0.02
    # a drop that the frozen layer must be able to see (power .8), else it cannot tell
    detect: float = 0.05
    # rise of the share of unreadable answers from which scores are not comparable
    invalid: float = 0.02
    # tokens of an answer over the frozen ones: MLPerf's band
    length: tuple[float, float] = (0.9, 1.1)
    perplexity: float = 0.02  # rise of a perplexity over the frozen one that is tolerated
    # decode speed over the teacher's, timed by turns, that must be reached
    faster: float | None = None
    # slowdown against a model timed beside it (`--measured`) from which it is a regression
    slower: float = 1.05
    # any flipped item is a regression, where machine and versions are the frozen ones
    exact: bool = False
    rows: tuple[str, ...] = ()  # judge these rows alone; empty: every row that is no control
    # of the pooled decision: every item alike, every `tasks` alike, or by task
    task_weights: str | tuple[tuple[str, float], ...] = "items"
    # pooled: what a row's pooled finding shows settles what single tasks cannot tell
    decide: Literal["tasks", "pooled"] = "tasks"

    def claim(self, chance: float = 0.0) -> str:
        """Say the margin in words; `chance` is the share that guessing scores."""
        if self.margin is None:
            return "no margin"
        if self.points:
            return f"loses less than {100 * self.margin:g} points"
        return f"keeps {100 * self.margin:g} %" + (
            f" of what the teacher has above chance ({100 * chance:.4g} %)" if chance else ""
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked, and what came of it."""

    layer: str  # row, claim, frozen, pooled (claim over tasks), pooled frozen, bytes, speed
    row: str
    task: str = ""
    verdict: Verdict
    told: str  # one line for people
    differs: str = ""  # not comparable: which condition
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    warning: bool = False  # passed, with something to be known
    items: tuple[int, ...] = ()  # that were lost, counted in item order
    counts: bool = True  # towards the check's verdict; what does not is information
    # pooled: the tasks whose items it holds, and those on which the teacher is at chance
    speaks_for: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name the thing checked: what a test or an annotation is called."""
        return f"{self.row}{f' {self.task}' if self.task else ''} [{self.layer}]"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Everything that a check found."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    rules: Rules
    passed_means: str = ""  # what a pass of this very check shows, and how often it errs; one line

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict of the findings that count; without any nothing was shown, so it
        cannot tell.
        """
        verdicts = {finding.verdict for finding in self.findings if finding.counts}
        return next((verdict for verdict in GRAVEST if verdict in verdicts), Verdict.cannot_tell)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 regressed or missed, 3 cannot tell, 4 not comparable."""
        return EXIT[self.verdict]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON-serialisable values."""
        return {
            "schema": 2,
            "verdict": self.verdict.value,
            "exit_code": self.exit_code,
            "passed_means": self.passed_means,
            "rules": asdict(self.rules),
            "notes": self.notes,
            "findings": [{**asdict(one), "verdict": one.verdict.value} for one in self.findings],
        }


def is_judged(record: RunRecord, rules: Rules) -> bool:
    """Tell whether a record's row is one that the check judges: the rows named, else every row that
    is no control and no teacher.
    """
    return (
        record.label in rules.rows
        if rules.rows
        else record.method != TEACHER and not record.is_control
    )


def not_comparable(layer: str, row: str, task: str, what: str, told: str) -> Finding:
    """Return the finding that unlike things would be compared; `what` names the condition in which
    they differ.
    """
    return Finding(
        layer=layer, row=row, task=task, verdict=Verdict.not_comparable, differs=what, told=told
    )


def unmet(row: str, held: Collection[str]) -> Verdict:
    """Return what a claim that was shown not to hold is called; `held` are the rows of the
    baseline.
    """
    return Verdict.regressed if row in held else Verdict.missed


class _Counted(Protocol):
    """A score of a record or of a baseline."""

    @property
    def task(self) -> str: ...
    @property
    def n(self) -> int: ...


class Decides(NamedTuple):
    """How many items would decide, where the task has so many."""

    needed: int | None
    task_items: int | None
    told: str


def task_items(score: _Counted, *, limited: bool) -> int | None:
    """Return how many items a task has: all that were scored, of a sample (`--limit`) what is known
    of the task; None where nothing is.
    """
    return (
        score.n
        if not limited
        else max(score.n, ITEMS_BY_TASK[score.task])
        if score.task in ITEMS_BY_TASK
        else None
    )


def decides(needed: int | None, score: _Counted, limited: bool, *, what: str = "items") -> Decides:
    """Say how many items would decide, but never more than the task has: then this task cannot
    decide it, and `needed` is None.
    """
    return decides_among(needed, task_items(score, limited=limited), score.task, what=what)


def decides_among(
    needed: int | None, there: int | None, name: str, *, what: str = "items"
) -> Decides:
    """Say the same where `there` items are what `name` (a task, or several: "a and b") has."""
    if needed is None:
        return Decides(None, there, "")
    if there is not None and needed > there:
        has, which = ("have", "these tasks") if " and " in name else ("has", "this task")
        return Decides(
            None,
            there,
            f"it would take more than {name} {has} ({there:,}): {which} cannot decide it",
        )
    return Decides(needed, there, f"about {needed:,} {what} would decide")


def short(value: object) -> str:
    """Return a condition's value as a line has room for it: digests by both ends."""
    text = str(value) if value not in (None, "") else "none"
    return (
        text
        if len(text) <= 48
        else f"{text[:12]}..{text[-12:]}"
        if " " not in text
        else f"{text[:45]}..."
    )


CLAIM = 0.95  # of the teacher's score: what is asked where neither a margin nor a baseline says


def rules_of(baseline: Baseline | None, rules: Rules) -> Rules:
    """Take the margin of the baseline where the rules have none, the usual claim where there is no
    baseline either.

    A row that keeps a margin of its own is held to that: `gate_frozen.margin_of`.
    """
    if rules.margin is not None:
        return rules
    return (
        replace(rules, margin=CLAIM)
        if baseline is None
        else replace(rules, margin=baseline.margin, points=baseline.points)
    )
