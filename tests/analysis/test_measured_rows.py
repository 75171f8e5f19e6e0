"""Means and ratios of what was measured of a row."""

import pytest
from gate_rows import row

from harness.analysis.comparison import ResultRow
from harness.analysis.measured_rows import mean_measurement, scenario_ratios, speed_ratio
from harness.records.record import Measurement


def timed(value, condition="", seed=None):
    part = Measurement(
        name="decode_speedup",
        value=value,
        low=value - 0.1,
        high=value + 0.1,
        unit="ratio",
        higher_is_better=True,
        condition=condition,
    )
    return row("int8", "1", seed=seed, measurements=(part,))


def test_one_record_has_the_interval_of_its_rounds():
    ratios = scenario_ratios(ResultRow("int8", (timed(2.0, "a"),)), "decode_speedup")
    assert list(ratios) == ["a"]
    assert (ratios["a"].low, ratios["a"].high) == (1.9, 2.1)


def test_several_records_have_one_over_seeds():
    records = tuple(timed(value, seed=seed) for seed, value in enumerate((1.9, 2.0, 2.1)))
    subject = ResultRow("int8", records)
    assert scenario_ratios(subject, "decode_speedup")[""] == speed_ratio(subject, "decode_speedup")
    assert mean_measurement(subject, "decode_speedup") == pytest.approx(2.0)


def test_what_was_not_measured_is_none():
    subject = ResultRow("int8", (row("int8", "1", measurements=()),))
    assert mean_measurement(subject, "decode_speedup") is None
    assert speed_ratio(subject, "decode_speedup").reason == "not measured"
    assert scenario_ratios(subject, "decode_speedup") == {}
