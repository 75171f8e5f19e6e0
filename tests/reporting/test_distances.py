"""The table of distances on texts: a line a row, its intervals, seeds; none without a distance."""

from made_records import RECORDS, make, rows_of

from harness.analysis.comparison import group_records
from harness.measuring.measure import measurement_of
from harness.records import columns
from harness.reporting import report
from harness.reporting.distances import text_distance_table

TASK = "gsm8k-mini"


def with_distance(record, kl, low, high, same_top=0.9):
    condition = "9,000 tokens of 12 texts"
    measured = (
        measurement_of(columns.TEXT_KL, kl, TASK, low=low, high=high, condition=condition),
        measurement_of(columns.TEXT_KL_MAX, 7 * kl, TASK, condition=condition),
        measurement_of(columns.SAME_TOP, same_top, TASK, condition=condition),
    )
    return record.model_copy(update={"measurements": (*record.measurements, *measured)})


def test_a_row_has_its_figures_with_their_intervals():
    records = [RECORDS[0], with_distance(make("int8"), 0.01, 0.008, 0.012)]
    rows = rows_of(report.markdown(records), "Distance to the teacher on texts")
    assert set(rows) - {"row"} == {"int8"}
    assert rows["int8"]["KL a token"] == "0.0100 [0.0080, 0.0120]"
    assert rows["int8"]["maximum KL"] == "0.0700" and rows["int8"]["same token first"] == "90.0 %"
    assert rows["int8"]["median KL"] == "-"


def test_seeds_are_joined_from_the_lowest_to_the_highest_end():
    records = [
        RECORDS[0],
        with_distance(make("cot", seed=1), 0.2, 0.1, 0.3),
        with_distance(make("cot", seed=2), 0.4, 0.35, 0.5),
    ]
    [group] = group_records(records)
    [exact] = text_distance_table(group).exact
    assert (exact["KL a token"], exact["KL a token low"], exact["KL a token high"]) == (
        (0.2 + 0.4) / 2,
        0.1,
        0.5,
    )


def test_without_a_distance_there_is_no_table():
    [group] = group_records(RECORDS)
    assert text_distance_table(group) is None
