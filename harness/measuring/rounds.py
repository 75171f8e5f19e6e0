"""How many rounds a timing takes: a fixed number, or as many as its intervals need. No torch.

A rule looks at the intervals after a few fixed numbers of rounds and stops at the first look at
which they are narrow enough. Stopping at a lucky moment makes plain 95 % intervals hold the truth
less often, so each look spends an equal part of the 5 % (`ratio_after_looks`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from harness.errors import HarnessError
from harness.statistics.intervals import Interval, ratio_after_looks, ratio_of_rounds

AUTO = "auto"
DEFAULT_ROUNDS: dict[str, int | str] = {"cpu": 6, "cuda": AUTO}  # of a run, by device
# What a fixed number of rounds can be relied on to show; by the spread of starts alone an interval
# is 3 % wide on either side.
HALF_WIDTH = 0.02
LEAST, MOST = 4, 12  # rounds
_LOOKS = 4
_SPELLED = "write a number of rounds, or auto, auto:0.01, auto:0.01:4-12"


@dataclass(frozen=True, kw_only=True)
class RoundsRule:
    """After which numbers of rounds to look at the intervals, and how narrow is enough."""

    looks: tuple[int, ...]  # ascending; the last is the most rounds
    half_width: float | None = None  # of the logarithm of a ratio; None: one look, whatever it says

    @classmethod
    def parse(cls, spelled: int | str) -> Self:
        """Read `6`, or `auto[:HALF_WIDTH[:LEAST-MOST]]`.

        Raises `HarnessError` for anything else.
        """
        text = str(spelled).strip().lower()
        if re.fullmatch(r"-?\d{1,6}", text):
            if int(text) < 1:
                raise HarnessError(
                    f"--rounds {text}: at least one round is needed; 10 give an interval"
                )
            return cls(looks=(int(text),))
        form = re.fullmatch(rf"{AUTO}(?::(\d?\.\d+)(?::(\d{{1,4}})-(\d{{1,4}}))?)?", text)
        if form is None:
            raise HarnessError(f"--rounds {spelled!r} is no number of rounds: {_SPELLED}")
        half_width = float(form[1] or HALF_WIDTH)
        least, most = int(form[2] or LEAST), int(form[3] or MOST)
        if half_width <= 0 or not 3 <= least <= most:
            raise HarnessError(
                f"--rounds {spelled}: the half-width is above 0, and the least number of rounds is "
                f"3 and no more than the most; {_SPELLED}"
            )
        return cls(looks=_looks(least, most), half_width=half_width)

    @property
    def is_fixed(self) -> bool:
        """Tell whether the number of rounds is known beforehand."""
        return self.half_width is None

    @property
    def most(self) -> int:
        """The number of rounds after which it stops in any case."""
        return self.looks[-1]

    @property
    def expected(self) -> int:
        """The number of rounds that a plan counts with: one look more than the first."""
        return self.looks[min(1, len(self.looks) - 1)]

    def is_enough(self, rounds: int, ratios: Sequence[Sequence[float]]) -> bool:
        """Tell whether to stop after so many rounds.

        `ratios` holds the ratios of each quantity, one a round; without any (no base to compare
        with) the first look is the last.
        """
        if rounds not in self.looks:
            return rounds >= self.most
        if rounds == self.most or not ratios:
            return True
        return all(self._is_narrow(values) for values in ratios)

    def interval(self, ratios: Sequence[float], *, spread: float) -> Interval:
        """Return the mean ratio of the rounds with the 95 % interval that this rule allows.

        `spread` is as in `ratio_of_rounds`.
        """
        if self.is_fixed:
            return ratio_of_rounds(ratios, spread=spread)
        return ratio_after_looks(ratios, looks=len(self.looks), spread=spread)

    def _is_narrow(self, ratios: Sequence[float]) -> bool:
        interval = ratio_after_looks(ratios, looks=len(self.looks))
        assert interval.value is not None
        if interval.high is None:
            return False
        return interval.high / interval.value <= 1 + (self.half_width or 0.0)


def rounds_on(device: str, spelled: int | str | None) -> int | str:
    """Return the rounds of a run: those that were asked for, else the default of its device.

    Raises `HarnessError` for what `RoundsRule.parse` cannot read.
    """
    rounds = DEFAULT_ROUNDS[device.partition(":")[0]] if spelled is None else spelled
    rule = RoundsRule.parse(rounds)
    return rule.most if rule.is_fixed else str(rounds)


def _looks(least: int, most: int) -> tuple[int, ...]:
    """Return up to four numbers of rounds from `least` to `most`, with like factors between."""
    steps = _LOOKS - 1
    return tuple(
        dict.fromkeys(round(least * (most / least) ** (step / steps)) for step in range(_LOOKS))
    )
