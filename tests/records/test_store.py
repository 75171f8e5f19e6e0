"""Folders of records: kept as a study, read back, foreign files left as they are."""

import json

import pytest
from made_records import RECORDS, make
from typer.testing import CliRunner

from harness.cli.app import app
from harness.errors import HarnessError
from harness.records import record
from harness.records.store import read_records
from harness.reporting import report


def test_records_are_kept_as_a_study_that_gives_the_same_tables(tmp_path):
    from harness.records.store import copy_to_study

    record.write_record(tmp_path / "records" / "stale.json", make("stale", 0.1, seed=9))
    copy_to_study(RECORDS, tmp_path / "records")
    read, problems = read_records(tmp_path)
    assert not problems and report.markdown(read) == report.markdown(RECORDS)
    assert (tmp_path / "records" / "cot-seed2.json").exists() and not (
        tmp_path / "records" / "stale.json"
    ).exists()


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", '{"kind": "run", "cells": []}', "torn {", '{"name": "my-package", "schema": 3}'],
)
def test_keeping_records_touches_no_file_that_is_none(text, tmp_path):
    from harness.records.store import copy_to_study

    (tmp_path / "records").mkdir()
    foreign = tmp_path / "records" / "package.json"
    foreign.write_text(text)
    copy_to_study(RECORDS, tmp_path / "records")
    copy_to_study(RECORDS[:2], tmp_path / "records")
    assert foreign.read_text() == text and len(list((tmp_path / "records").iterdir())) == 3
    (tmp_path / "records" / "teacher.json").write_text(text)
    with pytest.raises(HarnessError, match=r"teacher\.json is no record"):
        copy_to_study(RECORDS, tmp_path / "records")
    assert (tmp_path / "records" / "teacher.json").read_text() == text


def test_a_folder_that_is_no_study_is_refused_and_left_as_it_is(tmp_path):
    from harness.records.store import copy_to_study

    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(HarnessError, match="not empty, and no study"):
        copy_to_study(RECORDS, tmp_path / "records")
    with pytest.raises(HarnessError, match="is a file"):
        copy_to_study(RECORDS, tmp_path / "thesis.tex" / "records")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_records_survive_a_round_trip(tmp_path):
    for index, one in enumerate(RECORDS):
        record.write_record(tmp_path / f"{index}.json", one)
    read, problems = read_records(tmp_path)
    assert (
        sorted(read, key=lambda r: r.key) == sorted(RECORDS, key=lambda r: r.key) and not problems
    )
    assert report.markdown(read) == report.markdown(RECORDS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": 1, "kind": "cell", "key"', "not a whole JSON file"),
        ('{"some": "json"}', "not a record of this harness"),
        ('{"schema": 99, "kind": "cell"}', "schema 99"),
        ('{"schema": 1, "kind": "cell", "key": "x"}', "field"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_skipped(tmp_path, content, said):
    record.write_record(tmp_path / "good.json", RECORDS[0])
    (tmp_path / "bad.json").write_text(content)
    records, problems = read_records(tmp_path)
    assert len(records) == 1 and len(problems) == 1
    assert "bad.json" in problems[0] and said in problems[0]


@pytest.mark.parametrize("cells", [None, {}, "key", [], [1], ["../../etc"], [[]], [""]])
def test_a_run_file_without_cells_is_one_line(cells, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text(
        json.dumps({"kind": "run", "cells": cells} if cells is not None else {"kind": "run"})
    )
    result = CliRunner().invoke(
        app, ["report", str(tmp_path / "runs" / "a.json")], standalone_mode=False
    )
    assert isinstance(result.exception, HarnessError) and "cells are no list of keys" in str(
        result.exception
    )
