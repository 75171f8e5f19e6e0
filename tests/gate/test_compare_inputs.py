"""What `harness compare` takes: logs of lm-eval, rows, cells and items of ours; nothing else."""

import json

import pytest
from gate_rows import row
from lm_eval_logs import lines_of, write_log

from harness.errors import HarnessError
from harness.files.lines import signed_line
from harness.gate.compare_inputs import read_logged_model
from harness.records.record import write_record


@pytest.fixture
def study(tmp_path):
    for label in ("teacher", "int8"):
        write_record(tmp_path / "study" / "records" / f"{label}.json", row(label, "1100"))
    return tmp_path / "study"


def test_logs_of_lm_eval(tmp_path):
    path = write_log(tmp_path / "org__model", lines_of("10"))
    assert read_logged_model(str(path)).name == "org__model"
    assert read_logged_model(str(tmp_path)).tasks == ["letters"]


def test_a_row_of_a_study(study):
    assert read_logged_model(f"{study}#int8").name == "int8"
    with pytest.raises(HarnessError, match=r"has 2 rows \(int8, teacher\); name one: .*study#int8"):
        read_logged_model(str(study))
    with pytest.raises(HarnessError, match="int4"):
        read_logged_model(f"{study}#int4")


def test_a_cell_its_record_and_its_items(tmp_path):
    cell = tmp_path / "cells" / "abc"
    write_record(cell / "record.json", row("int8", "1"))
    names = {read_logged_model(str(place)).name for place in (cell, cell / "record.json")}
    assert names == {"int8"}
    item = {
        "task": "gsm8k-mini",
        "item": 0,
        "correct": {"strict-match": True},
        "doc_hash": "d",
        "target_hash": "t",
        "prompt_hash": "p",
    }
    samples = cell / "samples.jsonl"
    samples.write_text(signed_line(item), encoding="utf-8")
    model = read_logged_model(str(samples))
    assert model.name == "int8"
    assert model.runs[None]["gsm8k-mini"].items[0].document == "d"
    (cell / "record.json").unlink()
    assert read_logged_model(str(samples)).name == "abc"


def test_what_is_nothing_of_these_is_refused(tmp_path):
    with pytest.raises(HarnessError, match=r"no such file or folder; give a samples_\*.jsonl"):
        read_logged_model(str(tmp_path / "nothing"))
    with pytest.raises(HarnessError, match="no records in"):
        read_logged_model(str(tmp_path))
    cell = tmp_path / "cells" / "abc"
    failed = row("int8", "1", status="failed", reason="out of memory", scores=())
    write_record(cell / "record.json", failed)
    with pytest.raises(HarnessError, match="int8 failed: out of memory"):
        read_logged_model(str(cell))
    foreign = tmp_path / "notes.jsonl"
    foreign.write_text(json.dumps({"a": 1}) + "\n", encoding="utf-8")
    with pytest.raises(HarnessError, match=r"no samples.jsonl of ours"):
        read_logged_model(str(foreign))
