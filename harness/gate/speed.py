"""The speed layer of `harness check`: ratios of two models timed alternately in one job. No torch.

Stored seconds are never compared.
"""

from collections.abc import Collection, Sequence

from harness.analysis.comparison import Group
from harness.analysis.measured_rows import scenario_ratios
from harness.gate.rules import (
    Difference,
    Finding,
    Rules,
    Verdict,
    is_judged,
    not_comparable,
    unmet_verdict,
)
from harness.records.columns import DECODE_X
from harness.records.record import Measurement
from harness.statistics import stats


def speed_findings(
    group: Group, rules: Rules, least: float, frozen_labels: Collection[str] = ()
) -> list[Finding]:
    """Judge decode speed relative to the teacher, in every scenario: it must reach `least`.

    `frozen_labels` are the rows of the baseline.
    """
    findings = []
    for row in group.rows:
        if not is_judged(row.first, rules) or not row.succeeded:
            continue
        ratios = scenario_ratios(row, DECODE_X.key)
        if not ratios:
            difference = Difference("timing", "was not timed beside its teacher (--grid none?)")
            findings.append(not_comparable("speed", row.label, "", difference))
        for condition, ratio in ratios.items():
            findings.append(_speedup_finding(row.label, condition, ratio, least, frozen_labels))
    return findings


def _speedup_finding(
    label: str, condition: str, ratio: stats.Interval, least: float, frozen_labels: Collection[str]
) -> Finding:
    """Judge one ratio of decode speeds by its interval."""
    assert ratio.value is not None
    verdict, interval = Verdict.cannot_tell, "no interval (three rounds are the fewest)"
    if ratio.low is not None and ratio.high is not None:
        interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
        if ratio.low >= least:
            verdict = Verdict.passed
        elif ratio.high < least:
            verdict = unmet_verdict(label, frozen_labels)
    scenario = f" ({condition})" if condition else ""
    return Finding(
        layer="speed",
        row=label,
        verdict=verdict,
        told=(
            f"decodes {ratio.value:.2f} times as fast {interval}{scenario}; at least {least:g}, "
            "timed alternately in one job"
        ),
        numbers={"value": ratio.value, "low": ratio.low, "high": ratio.high},
    )


def measured_findings(
    name: str,
    measurements: Sequence[Measurement],
    rules: Rules,
    frozen_labels: Collection[str] = (),
) -> list[Finding]:
    """Judge a model of `harness measure BASE NEW` by its slowdown against the first model.

    The claim is missed where the lower end of the slowdown's interval exceeds `rules.slower`.
    """
    findings = []
    for speedup in measurements:
        if speedup.name != DECODE_X.key:
            continue
        low, high = speedup.low, speedup.high
        verdict, interval = Verdict.cannot_tell, "no interval"
        if low is not None and high is not None and low > 0:
            least_slowdown, most_slowdown = 1 / high, 1 / low
            interval = f"[{least_slowdown:.3f}, {most_slowdown:.3f}]"
            if least_slowdown > rules.slower:
                verdict = unmet_verdict(name, frozen_labels)
            elif most_slowdown <= rules.slower:
                verdict = Verdict.passed
        line = (
            f"slowdown {1 / speedup.value:.3f} {interval} beside the first model "
            f"({speedup.condition}); at most {rules.slower:g}"
        )
        numbers: dict[str, float | int | None] = {"value": speedup.value, "low": low, "high": high}
        findings.append(
            Finding(layer="speed", row=name, verdict=verdict, told=line, numbers=numbers)
        )
    if findings:
        return findings
    difference = Difference("timing", "was not timed beside the first model")
    return [not_comparable("speed", name, "", difference)]
