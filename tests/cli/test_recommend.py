"""The command `harness recommend`: exit codes, JSON, and mistakes in one line."""

import json

import pytest
from gate_rows import SAME, TEACHES, flipped, harness, marks, row

import harness as package
from harness.records.record import write_record


def test_a_row_is_named_and_written(place, tmp_path):
    out = tmp_path / "decision.json"
    done = harness("recommend", place, "--keep", "0.95", "--json", out)
    assert done.return_value == 0
    assert "take int8" in done.output
    assert json.loads(out.read_text(encoding="utf-8"))["row"] == "int8"


def test_the_other_exit_codes(tmp_path):
    for name, lose in (("undecided", 45), ("lossy", 300)):
        folder = tmp_path / name
        for record in (TEACHES, row("int4", flipped(marks(800), lose=lose, win=10))):
            write_record(folder / f"{record.label}.json", record)
    assert harness("recommend", tmp_path / "undecided").return_value == 3
    assert harness("recommend", tmp_path / "lossy").return_value == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", "1.2"), "--keep 1.2: give the share"),
        (("--keep", "1"), "--keep 1: no number of items"),
        (("--memory", "8"), None),
        (("--memory", "8 apples"), "--memory 8 apples: give bytes with their unit"),
        (("--memory", "0GiB"), "--memory 0GiB"),
        (("--on", "gsm8k"), "gsm8k"),
        (("--on", "a,a"), "named twice"),
        (("--rows", "int9"), "int9"),
        (("--faster", "0"), "--faster 0"),
        (("--alpha", "0.9"), "--alpha 0.9"),
    ],
)
def test_mistakes_are_one_line(place, options, message):
    done = harness("recommend", place, *options)
    if message is None:
        assert done.exception is None
    else:
        assert message in str(done.exception)
        assert "\n" not in str(done.exception)


def test_python_gives_the_same_decision(place):
    decision = package.recommend(place, keep=0.95)
    assert decision == package.recommend([TEACHES, SAME], keep="95%")
    assert decision.row.label == "int8"
    assert package.recommend(place, memory="1KiB").candidates[0].reasons
