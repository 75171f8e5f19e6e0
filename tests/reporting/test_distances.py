"""The table of distances on texts: a line a row, its intervals, seeds; none without a distance."""

from made_records import RECORDS, make, rows_of

from harness.analysis.comparison import group_records
from harness.measuring.measure import measurement_of
from harness.records import columns
from harness.reporting import report
from harness.reporting.distances import prompt_length_table, text_distance_table

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


def test_a_quantized_cache_has_a_line_for_each_band_and_other_rows_have_none():
    bands = {"0-128": (0.002, 1.001), "128-512": (0.004, 1.002), "1024-1536": (0.008, 1.003)}
    measured = [
        measurement_of(quantity, value, f"{TASK}:{band}", low=0.9 * value, high=1.1 * value)
        for band, values in bands.items()
        for quantity, value in zip(
            (columns.KL_AT_LENGTH, columns.PERPLEXITY_AT_LENGTH), values, strict=True
        )
    ]
    record = make("int8")
    record = record.model_copy(update={"measurements": (*record.measurements, *measured)})
    [group] = group_records([RECORDS[0], record])
    table = prompt_length_table(group)
    shown = [dict(zip(map(str, table.columns), line, strict=True)) for line in table.rows]
    assert [line["tokens before"] for line in shown] == list(bands)
    assert {line["task"] for line in shown} == {TASK}
    assert shown[1]["KL at length"] == "0.0040 [0.0036, 0.0044]"
    assert shown[2]["perplexity at length"] == "x1.003 [0.903, 1.103]"
    [without] = group_records([RECORDS[0], make("int8")])
    assert prompt_length_table(without) is None
