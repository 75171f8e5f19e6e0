"""The table of `harness score`: scores, paired differences, speed and size, of made-up records."""

import pytest
from made_records import make

from harness.measuring.measure import measurement_of
from harness.records import columns
from harness.reporting.scores import scores_table
from harness.statistics import stats


def cells(table, model):
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    row = next(line for line in lines if line.strip("| ").startswith(model))
    return dict(zip(header, (cell.strip() for cell in row.strip("|").split("|")), strict=True))


def timed(record, *, ratio=None):
    """Return a record that was timed, and by turns with another model where there is a ratio."""
    rate = measurement_of(columns.DECODE_RATE, 50.0)
    measurements = [rate]
    if ratio:
        ends = {"low": ratio - 0.1, "high": ratio + 0.1}
        measurements.append(measurement_of(columns.DECODE_X, ratio, **ends))
    return record.model_copy(update={"measurements": tuple(measurements)})


def test_models_stand_beside_the_first_with_paired_differences():
    first, second = make("teacher", 0.6), make("other", 0.5)
    table = scores_table(["./one", "./two"], [first, second])
    [score], [other] = first.scores, second.scores
    counts = stats.count_pairs(other.outcomes[other.primary], score.outcomes[score.primary])
    interval = stats.difference_interval(counts)
    shown = cells(table, "./two")
    value, low, high = (
        f"{100 * end:+.1f}" for end in (interval.value, interval.low, interval.high)
    )
    assert shown["gsm8k-mini against the first"] == f"{value} [{low}, {high}] points"
    assert cells(table, "./one")["gsm8k-mini against the first"] == "first"
    assert shown["gsm8k-mini"].startswith(f"{100 * other.value:.1f} % [")
    assert shown["gsm8k-mini"].endswith("n = 400")


def test_speeds_are_ratios_to_the_first():
    table = scores_table(["one", "two"], [timed(make("teacher")), timed(make("two"), ratio=1.5)])
    header = columns.DECODE_X.header
    assert cells(table, "two")[header] == "1.50 [1.40, 1.60]"
    assert cells(table, "one")[header] == "first"
    assert cells(table, "one")[columns.DECODE_RATE.header] == columns.DECODE_RATE.text(50.0)


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_models_without_scores_have_dashes_and_a_line(names):
    reason = "two needs x; type: pip install x"
    skipped = make("two", status="skipped", reason=reason, scores=(), measurements=())
    first = make("teacher", measurements=())
    table = scores_table(names, [first, skipped][: len(names)])
    assert (f"- two: skipped: {reason}" in table) is (len(names) == 2)
    assert columns.DECODE_RATE.header not in table  # nothing was timed
