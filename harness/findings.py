"""What a check can say and is asked: verdicts, rules, findings. No torch."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum

from harness.groups import TEACHER
from harness.record import RunRecord


class Verdict(StrEnum):
    """What a check can say. `cannot tell`: these items are too few; `not comparable`: it would compare unlike things."""

    passed = "passed"
    cannot_tell = "cannot tell"
    not_comparable = "not comparable"
    regressed = "regressed"


EXIT = {Verdict.passed: 0, Verdict.regressed: 1, Verdict.cannot_tell: 3, Verdict.not_comparable: 4}
_GRAVEST = (Verdict.regressed, Verdict.not_comparable, Verdict.cannot_tell, Verdict.passed)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is asked of every row. Shares are of 1; points are shares of the items."""

    margin: float | None = None  # of the teacher's score that must be kept; with `points`: what may be lost; None: no claim
    points: bool = False
    alpha: float = 0.05  # of the claim layer, one-sided
    frozen_alpha: float = 0.01  # of the frozen layer, one-sided
    tolerance: float = 0.02  # a smaller drop against the frozen outcomes is said, but is no regression
    detect: float = 0.05  # a drop that the frozen layer must be able to see (power .8), else it cannot tell
    invalid: float = 0.02  # rise of the share of unreadable answers from which scores are not comparable
    length: tuple[float, float] = (0.9, 1.1)  # tokens of an answer over the frozen ones: MLPerf's band
    perplexity: float = 0.02  # rise of a perplexity over the frozen one that is tolerated
    faster: float | None = None  # decode speed over the teacher's, timed by turns, that must be reached
    slower: float = 1.05  # slowdown against a model timed beside it (`--measured`) from which it is a regression
    exact: bool = False  # any flipped item is a regression, where machine and versions are the frozen ones
    rows: tuple[str, ...] = ()  # judge these rows alone; empty: every row that is no control

    def claim(self) -> str:
        """Say the margin in words."""
        if self.margin is None:
            return "no margin"
        return f"loses less than {100 * self.margin:g} points" if self.points else f"keeps {100 * self.margin:g} %"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked, and what came of it."""

    layer: str  # row, claim, frozen, bytes, speed
    row: str
    task: str = ""
    verdict: Verdict
    told: str  # one line for people
    differs: str = ""  # not comparable: which condition
    numbers: dict[str, float | int | None] = field(default_factory=dict)
    warning: bool = False  # passed, with something to be known
    items: tuple[int, ...] = ()  # that were lost, counted in item order

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

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict; without any finding nothing was shown, so it cannot tell."""
        found = {one.verdict for one in self.findings}
        return next((one for one in _GRAVEST if one in found), Verdict.cannot_tell)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 regressed, 3 cannot tell, 4 not comparable."""
        return EXIT[self.verdict]

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON-serialisable values."""
        return {
            "schema": 1, "verdict": self.verdict.value, "exit_code": self.exit_code, "rules": asdict(self.rules), "notes": self.notes,
            "findings": [{**asdict(one), "verdict": one.verdict.value} for one in self.findings],
        }  # fmt: skip


def is_judged(record: RunRecord, rules: Rules) -> bool:
    """Tell whether a record's row is one that the check judges: the rows named, else every row that is no control and no teacher."""
    return record.label in rules.rows if rules.rows else record.method != TEACHER and not record.is_control


def not_comparable(layer: str, row: str, task: str, what: str, told: str) -> Finding:
    """Return the finding that unlike things would be compared; `what` names the condition in which they differ."""
    return Finding(layer=layer, row=row, task=task, verdict=Verdict.not_comparable, differs=what, told=told)


def short(value: object) -> str:
    """Return a condition's value as a line has room for it: digests by both ends."""
    text = str(value) if value not in (None, "") else "none"
    return text if len(text) <= 48 else f"{text[:12]}..{text[-12:]}" if " " not in text else f"{text[:45]}..."
