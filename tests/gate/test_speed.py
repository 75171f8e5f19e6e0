"""Speed, claimed by the interval of its ratio."""

import pytest
from gate_rows import SAME, TEACHES

from harness.gate.check import check
from harness.gate.rules import Rules, Verdict
from harness.records.record import Measurement


def test_every_scenario_must_be_fast():
    slow = Measurement(
        name="decode_speedup",
        value=0.5,
        low=0.4,
        high=0.6,
        unit="ratio",
        higher_is_better=True,
        condition="batch 64",
    )
    both = SAME.model_copy(update={"measurements": (*SAME.measurements, slow)})
    assert check([TEACHES, both], Rules(faster=1.5)).verdict is Verdict.missed
    assert (
        check([TEACHES, SAME], Rules(margin=0.5), measured=[("new", [])]).verdict
        is Verdict.not_comparable
    )


@pytest.mark.parametrize(
    ("least", "expected"),
    [(1.5, Verdict.passed), (1.9, Verdict.cannot_tell), (2.5, Verdict.missed)],
)
def test_speed_is_claimed_by_the_interval_of_its_ratio(least, expected):
    checked = check([TEACHES, SAME], Rules(faster=least))
    assert [finding.verdict for finding in checked.findings] == [expected]


def test_a_row_that_was_not_timed_has_no_speed():
    [finding] = check(
        [TEACHES, SAME.model_copy(update={"measurements": ()})], Rules(faster=1.0)
    ).findings
    assert finding.verdict is Verdict.not_comparable and finding.differs == "timing"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.97, 1.02, Verdict.passed), (0.90, 1.01, Verdict.cannot_tell), (0.80, 0.90, Verdict.missed)],
)
def test_two_models_timed_by_turns_in_one_job(low, high, expected):
    speedup = Measurement(
        name="decode_speedup",
        value=(low + high) / 2,
        low=low,
        high=high,
        unit="ratio",
        higher_is_better=True,
    )
    assert (
        check([TEACHES, SAME], Rules(margin=0.9), measured=[("new", [speedup])]).verdict is expected
    )
