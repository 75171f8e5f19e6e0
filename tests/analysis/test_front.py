"""Who is on the front: sizes, speeds and paired items worked out by hand."""

import pytest
from gate_rows import flipped, marks, row

from harness.analysis.comparison import group_records
from harness.analysis.front import Standpoint, front_places
from harness.records.record import Measurement

BASE = marks(800)
SAME = flipped(BASE, lose=5, win=5)
WORSE = flipped(BASE, lose=60)


def made(label, run, *, size, speed=1.0, spread=0.02, **changes):
    measurements = (
        Measurement(
            name="decode_speedup",
            value=speed,
            low=speed - spread,
            high=speed + spread,
            unit="ratio",
            higher_is_better=True,
        ),
        Measurement(name="weight_bytes_disk", value=size, unit="bytes", higher_is_better=False),
    )
    return row(label, run, measurements=measurements, **changes)


def places(*rows):
    [group] = group_records([made("teacher", BASE, size=8), *rows])
    return {label: place.text for label, place in front_places(group).items()}


def test_a_smaller_row_that_keeps_as_much_dominates():
    assert places(made("int8", SAME, size=4), made("fp8", BASE, size=5)) == {
        "int8": "yes",
        "fp8": "no: int8",
    }


def test_a_larger_row_that_keeps_more_is_on_the_front():
    found = places(made("int4", WORSE, size=2), made("int8", SAME, size=4))
    assert found == {"int4": "yes", "int8": "yes"}


def test_of_equal_bytes_the_better_one_dominates():
    found = places(made("rtn", WORSE, size=2), made("gptq", SAME, size=2))
    assert found == {"rtn": "no: gptq", "gptq": "yes"}


def test_a_faster_row_is_not_dominated_by_a_smaller_one():
    found = places(made("int8", SAME, size=4), made("fp8", SAME, size=5, speed=1.5))
    assert found == {"int8": "yes", "fp8": "yes"}


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_speeds_that_are_not_known_well_show_no_domination(spread):
    found = places(made("int8", SAME, size=4, spread=spread), made("fp8", BASE, size=5))
    assert found["fp8"] == ("no: int8" if spread < 0.1 else "cannot tell: int8")


def test_few_items_cannot_tell():
    records = [
        made(label, run, size=size)
        for label, run, size in (
            ("teacher", "1" * 20, 8),
            ("int8", "1" * 20, 4),
            ("fp8", "1" * 20, 5),
        )
    ]
    [group] = group_records(records)
    assert front_places(group)["fp8"].place is Standpoint.unknown


def test_controls_and_unweighed_rows_have_no_place():
    assert places(made("int8", SAME, size=4)) == {}
    control = made("random", WORSE, size=1, is_control=True)
    assert "random" not in places(made("int8", SAME, size=4), made("fp8", BASE, size=5), control)
    unweighed = row("fake", SAME, measurements=())
    assert "fake" not in places(made("int8", SAME, size=4), made("fp8", BASE, size=5), unweighed)
