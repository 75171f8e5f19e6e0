"""The speed layer of `harness check`: ratios of two models timed by turns in one job, never stored
seconds. No torch.
"""

from collections.abc import Collection, Sequence

from harness.analysis.comparison import Group
from harness.gate.rules import Finding, Rules, Verdict, is_judged, not_comparable, unmet
from harness.records.columns import DECODE_X
from harness.records.record import Measurement
from harness.statistics import stats


def speed_findings(
    found: Group, rules: Rules, least: float, held: Collection[str] = ()
) -> list[Finding]:
    """Judge decode speed over the teacher's, timed by turns with it in one job, in every scenario;
    `held` are the baseline's rows.
    """
    told = []
    for row in found.rows:
        if not is_judged(row.first, rules) or not row.succeeded:
            continue
        every = [
            one
            for record in row.succeeded
            for one in record.measurements
            if one.name == DECODE_X.key
        ]
        if not every:
            told.append(
                not_comparable(
                    "speed",
                    row.label,
                    "",
                    "timing",
                    "was not timed beside its teacher (--grid none?)",
                )
            )
        for condition in dict.fromkeys(one.condition for one in every):
            ratios = [one for one in every if one.condition == condition]
            value = stats.Interval(ratios[0].value, ratios[0].low, ratios[0].high)
            if len(ratios) > 1:
                value = stats.ratio_of_rounds([one.value for one in ratios])
            told.append(_ratio_finding(row.label, condition, value, least, held))
    return told


def _ratio_finding(
    label: str, condition: str, value: stats.Interval, least: float, held: Collection[str]
) -> Finding:
    assert value.value is not None
    low, high = value.low, value.high
    numbers: dict[str, float | int | None] = {"value": value.value, "low": low, "high": high}
    if low is None or high is None:
        verdict, ends = Verdict.cannot_tell, "no interval (three rounds are the fewest)"
    else:
        verdict = (
            Verdict.passed
            if low >= least
            else unmet(label, held)
            if high < least
            else Verdict.cannot_tell
        )
        ends = f"[{low:.2f}, {high:.2f}]"
    told = (
        f"decodes {value.value:.2f} times as fast {ends}{f' ({condition})' if condition else ''}; "
        f"at least {least:g} by turns in one job"
    )
    return Finding(layer="speed", row=label, verdict=verdict, told=told, numbers=numbers)


def measured_findings(
    name: str, measurements: Sequence[Measurement], rules: Rules, held: Collection[str] = ()
) -> list[Finding]:
    """Judge a model of `harness measure BASE NEW`: missed where the lower end of the slowdown
    exceeds what is tolerated.
    """
    found = []
    for one in [one for one in measurements if one.name == DECODE_X.key]:
        low, high = one.low, one.high
        if low is None or high is None or low <= 0:
            verdict, ends = Verdict.cannot_tell, "no interval"
        else:
            slow, fast = 1 / high, 1 / low
            verdict = (
                unmet(name, held)
                if slow > rules.slower
                else Verdict.passed
                if fast <= rules.slower
                else Verdict.cannot_tell
            )
            ends = f"[{slow:.3f}, {fast:.3f}]"
        told = (
            f"slowdown {1 / one.value:.3f} {ends} beside the first model ({one.condition}); at "
            f"most {rules.slower:g}"
        )
        numbers: dict[str, float | int | None] = {"value": one.value, "low": low, "high": high}
        found.append(Finding(layer="speed", row=name, verdict=verdict, told=told, numbers=numbers))
    return found or [
        not_comparable("speed", name, "", "timing", "was not timed beside the first model")
    ]
