"""Runs on one's own data: what rows train on, what keys and records say, what is refused.

They use the embedded pair and small budgets.
"""

import json
import os
import re
import subprocess
import sys
from itertools import islice

import pytest

import harness
import suites
from harness.api import plan_run
from harness.data.source import LocalOrHubData
from harness.planning.config import build_config

SMALL = {"budget": 1_500, "rows": 24, "limit": 8, "grid": "none", "noise": 0, "controls": False}


def command(*words):
    return subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ,
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count, first=0):
    """Return problems that no task asks."""
    return [
        {
            "prompt": f"Sum: {n} and {n + 1}?\nAnswer:",
            "completion": f" {2 * n + 1}",
            "answer": f" {n}",
        }
        for n in range(first, first + count)
    ]


def scored(task="gsm8k-mini", count=3):
    """Return examples that hold evaluation items."""
    items = suites.load(task).examples("test", LocalOrHubData())
    return [{"prompt": item.prompt, "completion": item.completion} for item in islice(items, count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {
        "sums": write(folder / "sums.jsonl", sums(40) + scored()),
        "texts": write(
            folder / "texts.jsonl", [{"text": f"Line {n}: {n * n}."} for n in range(400)]
        ),
    }


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = "sft,response,answer-only,cot,cot-unfiltered,int8,int4-calibrated"
    return harness.run(
        rows,
        "mini",
        out=folder / "runs",
        cache=folder / "cache",
        train_data=f"{files['sums']}=3,{files['texts']}",
        calibration=files["texts"],
        set={"int4-calibrated": {"num_calibration_samples": 2, "max_seq_length": 64}},
        **SMALL,
    )


@pytest.mark.slow
def test_rows_train_on_the_files_and_say_so(finished):
    records = {record.label.partition("[")[0]: record for record in finished.records}
    for name in ("sft", "response", "cot-unfiltered"):
        record = records[name]
        assert record.status == "success", record.reason
        sums_data, texts = record.conditions.train_data
        assert (sums_data.name, sums_data.examples, sums_data.weight) == ("own:sums.jsonl", 43, 3.0)
        assert (texts.name, texts.examples) == ("own:texts.jsonl", 400)
        counts = record.cost.notes["train_data"]
        assert counts["own:sums.jsonl"]["dropped_for_evaluation_text"] == 3
        assert counts["own:texts.jsonl"]["dropped_for_evaluation_text"] == 0
        assert counts["own:sums.jsonl"]["used"] == 18 and counts["own:texts.jsonl"]["used"] == 6
    assert records["sft"].cost.notes["rows"] == records["response"].cost.notes["rows"] == 24
    assert records["int8"].conditions.calibration_data is None
    assert records["sft"].data_digest


@pytest.mark.slow
def test_rows_that_need_more_than_the_files_say_are_refused_by_name(finished):
    records = {record.label.partition("[")[0]: record for record in finished.records}
    assert records["answer-only"].status == "skipped"
    assert (
        "own:" in records["answer-only"].reason and "field answer" in records["answer-only"].reason
    )
    assert records["cot"].status == "failed" and "cot-unfiltered" in records["cot"].reason


@pytest.mark.slow
def test_calibration_reads_the_file(finished):
    records = {record.label.partition("[")[0]: record for record in finished.records}
    record = records["int4-calibrated"]
    assert record.status == "success", record.reason
    assert record.conditions.calibration_data.name == "own:texts.jsonl"
    [notes] = [
        part
        for part in record.cost.notes.values()
        if isinstance(part, dict) and "layers" in str(part)
    ]
    assert "own:texts.jsonl" in json.dumps(notes)


@pytest.mark.slow
def test_the_table_says_what_was_trained_on_and_left_out(finished):
    text = finished.markdown()
    assert "Trained on own:sums.jsonl (" in text and "and own:texts.jsonl (" in text
    assert "Calibrated on own:texts.jsonl (" in text
    assert "3 examples of own:sums.jsonl hold evaluation items and were left out." in text


def keys(tmp_path, **options):
    config = build_config({"methods": "sft,int8,int4-calibrated", "suite": "mini", **options})
    plan = plan_run(config, say=lambda line: None)
    return {cell.method: cell.student_key or cell.key for cell in plan.cells}


def test_keys_hold_the_data_of_the_rows_that_read_it(tmp_path):
    first, second = (
        write(tmp_path / f"{name}.jsonl", sums(9, at)) for name, at in (("a", 0), ("b", 1))
    )
    plain = keys(tmp_path)
    trained = keys(tmp_path, train_data=(str(first),))
    assert {name for name in plain if plain[name] != trained[name]} >= {"sft"}
    assert plain["int8"] == trained["int8"] and plain["teacher"] == trained["teacher"]
    assert keys(tmp_path, train_data=(str(second),))["sft"] != trained["sft"]
    assert keys(tmp_path, train_data=(f"{first}=2", str(second)))["sft"] != trained["sft"]
    assert keys(tmp_path, train_data=(str(first),)) == trained
    calibrated = keys(tmp_path, calibration=first)
    changed = {name for name in plain if plain[name] != calibrated[name]}
    assert changed == {"int4-calibrated"}


def test_an_example_that_is_scored_stops_a_run_where_that_is_asked_for(files, tmp_path):
    done = command(
        "run",
        "--methods",
        "sft",
        "--suite",
        "mini",
        "--train-data",
        files["sums"],
        "--overlap",
        "refuse",
        "--out",
        tmp_path / "runs",
        "--cache",
        tmp_path / "cache",
        "--dry-run",
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "3 of 43 examples of" in line and "gsm8k-mini" in line and "--overlap drop" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nowhere}", "there is no such file"),
        ("{sums}=x", "'x' is no weight"),
        ("{sums},{sums}", "named twice|twice"),
        ("{bad}", "bad.jsonl, line 2: the field completion is missing"),
    ],
)
def test_bad_data_is_one_line_before_anything_is_computed(files, tmp_path, text, message):
    bad = write(tmp_path / "bad.jsonl", [*sums(1), {"prompt": "Q"}])
    typed = text.format(nowhere=tmp_path / "no.jsonl", sums=files["sums"], bad=bad)
    done = command(
        "run",
        "--methods",
        "sft",
        "--suite",
        "mini",
        "--train-data",
        typed,
        "--out",
        tmp_path / "runs",
    )
    assert done.returncode == 2 and not (tmp_path / "runs" / "cells").exists()
    [line] = done.stderr.splitlines()
    assert re.search(message, line), line


@pytest.fixture(scope="module")
def finished_by_teacher(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    options = {"out": folder / "runs", "cache": folder / "cache", **SMALL}
    typed = f"teacher[longest=80]=2,teacher:free[longest=60,seed=4],{files['texts']}"
    return harness.run("sft,response,feature,answer-only,int8", "mini", train_data=typed, **options)


@pytest.mark.slow
def test_every_row_trains_on_what_the_teacher_wrote_and_says_what_it_was(finished_by_teacher):
    records = {record.label.partition("[")[0]: record for record in finished_by_teacher.records}
    names = ("teacher[longest=80]", "teacher:free[longest=60,seed=4]", "own:texts.jsonl")
    notes = []
    for name in ("sft", "response", "feature"):
        record = records[name]
        assert record.status == "success", record.reason
        assert tuple(data.name for data in record.conditions.train_data) == names
        counts = record.cost.notes["train_data"]
        answered, free, texts = (counts[each] for each in names)
        assert answered["used"] == answered["train"] and 0 < answered["used"] <= 12
        assert free["used"] <= 6 and texts["used"] == 6 and "sha256" not in texts
        assert answered["written"] == record.conditions.train_data[0].examples == 13
        assert answered["tokens"] > 0 and len(answered["sha256"]) == 64
        left_out = sum(answered[each] for each in ("unfinished", "empty", "repeats"))
        held = answered["validation"] + answered["dropped_for_evaluation_text"]
        assert answered["train"] + held + left_out == 13
        notes.append(counts)
        written = {cost.key: cost.tokens for cost in record.cost.shared}
        assert len(written) >= 2 and sum(written.values()) >= answered["tokens"] + free["tokens"]
    assert notes[0] == notes[1] == notes[2]  # written once, for all
    assert records["int8"].status == "success" and not records["int8"].cost.shared
    assert records["answer-only"].status == "skipped"
    assert "field answer" in records["answer-only"].reason


@pytest.mark.slow
def test_the_table_says_what_the_teacher_wrote(finished_by_teacher):
    text = finished_by_teacher.markdown()
    assert "Trained on teacher[longest=80] (" in text
    assert "teacher[longest=80]: the teacher wrote 13 texts (" in text


def test_keys_hold_the_recipe_of_what_a_teacher_will_write(tmp_path):
    plain = keys(tmp_path)
    written = {
        typed: keys(tmp_path, train_data=(typed,))
        for typed in ("teacher", "teacher:free", "teacher:free[seed=1]", "teacher[longest=99]")
    }
    assert len({each["sft"] for each in [plain, *written.values()]}) == 5
    assert all(each["int8"] == plain["int8"] for each in written.values())
    assert keys(tmp_path, train_data=("teacher",)) == written["teacher"]
    assert not any(tmp_path.iterdir())  # nothing was written to know them


def test_other_prompts_are_another_recipe_and_from_nothing_there_are_none():
    def recipes(suite):
        config = build_config(
            {"methods": "sft", "suite": suite, "train_data": ("teacher", "teacher:free")}
        )
        plan = plan_run(config, say=lambda line: None)
        return [data.digest for data in plan.conditions.train_data]

    math, mini = recipes("math"), recipes("mini")
    assert math[0] != mini[0] and math[1] == mini[1]


def test_a_dry_run_says_what_will_be_written_and_how_long_it_takes(tmp_path):
    done = command(
        *("run", "--methods", "sft,response", "--suite", "mini", "--dry-run"),
        *("--train-data", "teacher,teacher:free[longest=128]=3", "--rows", "400"),
        *("--out", tmp_path / "runs", "--cache", tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    [answers, free] = [line for line in done.stdout.splitlines() if "training data" in line]
    assert re.search(r"training data: teacher, 106 texts that tiny writes, about \d+ s", answers)
    assert re.search(r"teacher:free\[longest=128\], 316 texts that tiny writes, about \d+ s", free)
    assert not (tmp_path / "cache" / "traces").exists()


def test_a_teacher_has_nothing_to_answer_where_no_task_has_a_train_split(tmp_path):
    typed = ("run", "--methods", "sft", "--suite", "wikitext", "--dry-run", "--train-data")
    folders = ("--out", tmp_path / "runs", "--cache", tmp_path / "cache")
    done = command(*typed, "teacher", *folders)
    assert done.returncode == 2 and "nothing to train on" in done.stderr
    assert command(*typed, "teacher:free", *folders).returncode == 0
