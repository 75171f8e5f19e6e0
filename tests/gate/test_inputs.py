"""Margins, weights of tasks and ways to decide, as users type them."""

import pytest
from claim_rows import NEAR, TWO
from typer.testing import CliRunner

from harness.cli.app import app
from harness.errors import HarnessError
from harness.gate.inputs import parse_bytes, parse_decide, parse_margin, parse_task_weights
from harness.records.record import (
    write_record,
)


@pytest.mark.parametrize(
    "text",
    [
        "95",
        "0",
        "0%",
        "-0.1",
        "-5%",
        "1.2",
        "120%",
        "0.95%",
        "",
        "nan",
        "inf",
        "1e-1",
        "0,95",
        "0points",
        "100points",
        "150pp",
        "95 %%",
        "9",
        "2",
    ],
)
def test_a_margin_that_is_none_is_one_line(text):
    with pytest.raises(HarnessError) as refused:
        parse_margin(text)
    assert str(refused.value).startswith(
        f"--margin {text}: give the share that must be kept, between 0 and 1"
    ) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "meant"), [("98", "98%"), ("2", "2%"), ("0.95%", "0.95")])
def test_a_margin_without_its_unit_or_with_one_too_many_is_said_at_the_end(text, meant):
    with pytest.raises(HarnessError, match=rf"\(2points\); did you mean {meant}\?$"):
        parse_margin(text)


@pytest.mark.parametrize("text", ["1", "1.0", "100%", "1."])
def test_no_number_of_items_shows_that_all_of_it_is_kept(text):
    with pytest.raises(
        HarnessError,
        match="no number of items can show that a student keeps all of it, unless it is better",
    ):
        parse_margin(text)


def test_margins_that_mean_something_are_read():
    assert [parse_margin(text) for text in (None, ".95", "95%", "2points", "1.5 pp", "0.5")] == [
        (None, False),
        (0.95, False),
        (0.95, False),
        (0.02, True),
        (0.015, True),
        (0.5, False),
    ]


def test_weights_and_ways_to_decide_are_read_or_refused():
    assert (
        parse_task_weights(None) == "items" == parse_task_weights("items")
        and parse_task_weights("tasks") == "tasks"
    )
    assert parse_task_weights("mmlu=2, gsm8k=1") == (("mmlu", 2.0), ("gsm8k", 1.0))
    for text in (
        "",
        "mmlu",
        "mmlu=",
        "mmlu=0,gsm8k=1",
        "mmlu=-1",
        "mmlu=x",
        "=2",
        "mmlu=inf",
        "mmlu=nan",
        "a=1,a=2",
        "a=1,,b=2",
    ):
        with pytest.raises(HarnessError, match="--task-weights"):
            parse_task_weights(text)
    assert parse_decide("pooled") == "pooled"
    with pytest.raises(HarnessError, match="--decide both: give tasks, or pooled"):
        parse_decide("both")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task-weights", "gsm8k-mini=1,mmul-mini=2"],
            "unknown task in --task-weights 'mmul-mini'; did you mean 'mmlu-mini'?",
        ),
        (["--task-weights", "gsm8k-mini=1"], "one task is no pool"),
        (["--task-weights", "twice"], "give items, tasks, or a weight"),
        (["--decide", "all"], "--decide all"),
        (["--margin", "100%"], "no number of items"),
        (["--margin", "1.01"], "--margin 1.01: give the share"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path, options, message):
    for record in (TWO, NEAR):
        write_record(tmp_path / f"{record.label}.json", record)
    done = CliRunner().invoke(app, ["check", str(tmp_path), *options], standalone_mode=False)
    assert message in str(done.exception) and "\n" not in str(done.exception)


def test_bytes_have_a_unit_or_are_refused():
    texts = ("8GiB", "8 GB", "1.5MiB", "500", "2KiB")
    assert [parse_bytes(text) for text in texts] == [2**33, 8e9, 1.5 * 2**20, 500, 2048]
    for text in ("8 apples", "-1GiB", "0MiB", "GiB", "8gib"):
        with pytest.raises(HarnessError, match="give bytes with their unit"):
            parse_bytes(text)
