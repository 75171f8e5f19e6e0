"""A short form of tests/benchmarks/kills.py, and what each of its finds looks like alone."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _faults
from _faults import Fault

from harness.files import leftovers
from harness.files.lines import read_signed_lines, signed_line
from harness.files.writing import write_signed
from harness.models.checkpoint import remembered_digest
from harness.records.store import Store
from harness.running import cell, evaluation, runner

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "kills.py"
GONE = 2**22 + 7  # no process of Linux has so high a number


@pytest.mark.slow
def test_killed_and_refused_runs_go_on_to_the_same_records_and_many_starts_share_them():
    command = [sys.executable, str(PROGRAM), "--first", "2", "--crowds", "6", "--seed", "1"]
    root = str(PROGRAM.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3_000:]
    came = re.findall(r"^\d+: .* ended with", result.stdout, re.MULTILINE)
    assert len(came) >= 6 and result.stdout.count("6 starts at once") == 2


# The faults themselves: a program that cannot fail shows nothing


WRITER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import _faults
_faults.watch_from_environment()
from harness.files.writing import write_atomically
from pathlib import Path
write_atomically(Path(os.environ["KILLS_ROOT"]) / "store" / "runs" / "a.json", "x" * 100)
"""


def struck(root, **fault):
    """Write a file of 100 bytes in a process with a fault; return exit code, names and events."""
    (root / "store" / "runs").mkdir(parents=True)
    environment = {
        **os.environ,
        _faults.ROOT: str(root),
        _faults.FAULT: Fault(**fault).as_json(),
        "PYTHONPATH": str(PROGRAM.parents[2]),
    }
    result = subprocess.run(
        [sys.executable, "-c", WRITER, str(PROGRAM.parent)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    names = sorted(path.name for path in (root / "store" / "runs").iterdir())
    events = [line.split("\t")[1] for line in _faults.log_of(root).read_text().splitlines()]
    return result, names, events


def test_an_undisturbed_writer_shows_every_boundary_in_its_order(tmp_path):
    result, names, events = struck(tmp_path / "a", operation="nothing")
    assert result.returncode == 0 and names == ["a.json"]
    assert events == ["open", "write", "sync", "rename", "renamed", "folder"]


@pytest.mark.parametrize("operation", ["open", "write", "sync", "rename", "renamed", "folder"])
def test_a_kill_leaves_what_its_boundary_says(tmp_path, operation):
    result, names, events = struck(tmp_path / "a", operation=operation, kind="run list", after=30)
    assert result.returncode == -9 and events[-1] == _faults.STRUCK
    complete = operation in ("renamed", "folder")
    assert [name.endswith(".part") for name in names] == (
        [] if operation == "open" else [not complete]
    )
    sizes = {"open": [], "write": [30]}.get(operation, [100])
    assert [path.stat().st_size for path in (tmp_path / "a" / "store" / "runs").iterdir()] == sizes


@pytest.mark.parametrize("deed", ["ENOSPC", "EIO", "EACCES"])
@pytest.mark.parametrize("operation", ["open", "write", "sync", "rename"])
def test_a_refusal_leaves_nothing(tmp_path, operation, deed):
    result, names, _ = struck(tmp_path / "a", deed=deed, operation=operation, after=30)
    assert (
        result.returncode == 1 and f"[Errno {getattr(__import__('errno'), deed)}]" in result.stderr
    )
    assert names == []


def test_short_writes_are_written_on_and_torn_files_are_cut_to_half(tmp_path):
    result, names, _ = struck(tmp_path / "a", deed="short", operation="write", after=30)
    file = tmp_path / "a" / "store" / "runs" / "a.json"
    assert result.returncode == 0 and names == ["a.json"] and file.stat().st_size == 100
    result, names, _ = struck(tmp_path / "b", deed="torn", operation="renamed")
    file = tmp_path / "b" / "store" / "runs" / "a.json"
    assert result.returncode == -9 and names == ["a.json"] and file.stat().st_size == 50


# What a killed process leaves


@pytest.mark.parametrize("name", [".a.json.{}.part", ".student.{}.part", ".probe-{}"])
def test_what_a_process_left_half_written_goes_once_it_is_gone_and_quiet(tmp_path, name):
    old = time.time() - 2 * leftovers.QUIET_SECONDS

    def lay(number, since):
        path = tmp_path / name.format(number)
        path.mkdir() if "student" in name else path.write_text("{")
        os.utime(path, (since, since))
        return path

    dead, living, fresh = lay(GONE, old), lay(os.getpid(), old), lay(GONE + 1, time.time())
    complete = tmp_path / "a.json"
    complete.write_text("{}")
    os.utime(complete, (old, old))
    assert leftovers.delete_abandoned([tmp_path, tmp_path / "nowhere"]) == [dead]
    assert living.exists() and fresh.exists() and complete.exists()


def test_a_folder_that_is_still_written_into_stays(tmp_path):
    folder = tmp_path / f".student.{GONE}.part"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    old = time.time() - 2 * leftovers.QUIET_SECONDS
    os.utime(folder, (old, old))
    assert leftovers.delete_abandoned([tmp_path]) == [] and folder.exists()


def test_notes_of_holders_that_were_killed_go_and_others_stay(tmp_path):
    store, this_machine = Store(tmp_path), socket.gethostname()
    store.prepare()
    notes = {}
    for name, process, machine in (
        ("killed", GONE, this_machine),
        ("living", os.getpid(), this_machine),
        ("elsewhere", GONE, f"{this_machine}-2"),
    ):
        notes[name] = tmp_path / "locks" / f"{name}.json"
        note = {"process": process, "machine": machine, "since": "2026-01-01 00:00:00 UTC"}
        notes[name].write_text(json.dumps(note))
    notes["torn"] = tmp_path / "locks" / "torn.json"
    notes["torn"].write_text('{"proc')
    store.prepare()
    assert [name for name, path in notes.items() if path.exists()] == [
        "living",
        "elsewhere",
        "torn",
    ]
    old = time.time() - 2 * leftovers.QUIET_SECONDS
    os.utime(notes["torn"], (old, old))
    store.prepare()
    assert not notes["torn"].exists()


def test_a_file_that_is_written_at_once_has_no_torn_last_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text((signed_line({"a": 1}) + signed_line({"a": 2}))[:-5])
    assert read_signed_lines(path) == ([{"a": 1}], [])
    values, wrong = read_signed_lines(path, complete=True)
    assert values == [{"a": 1}] and wrong[0].startswith("line 2: ")


def test_a_torn_memory_of_a_digest_is_not_believed(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    digest = remembered_digest(weights, tmp_path)
    [note] = (tmp_path / "digests").iterdir()
    for text in ("", digest[:30], "nothing", "\udce9"):
        note.write_text(text, errors="surrogateescape")
        assert remembered_digest(weights, tmp_path) == digest and note.read_text() == digest


def test_a_rate_that_a_killed_search_has_tried_is_not_trained_again(tmp_path):
    from methods.training.tuning import _cached_trial

    trained = []

    def train():
        trained.append(1)
        return {"loss": 0.5, "tokens": 7, "flops": 1.0, "seconds": 2.0}

    first = _cached_trial(tmp_path / "rate-1", "key", train)
    assert (
        _cached_trial(tmp_path / "rate-1", "key", train)["loss"] == first["loss"]
        and len(trained) == 1
    )
    _cached_trial(tmp_path / "rate-1", "another", train)
    (tmp_path / "rate-1" / "trial.json").write_text("{")
    _cached_trial(tmp_path / "rate-1", "another", train)
    assert len(trained) == 3


def test_the_card_stands_before_the_record_that_ends_a_cell(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(cell, "_take_standard_output", lambda: lambda message: None)
    monkeypatch.setattr(cell, "end_with_parent", lambda parent: None)
    monkeypatch.setattr(cell.faulthandler, "enable", lambda file: None)
    monkeypatch.setattr(
        cell, "read_as", lambda path, kind: type("Job", (), {"cell_folder": tmp_path})
    )
    monkeypatch.setattr(cell, "_compute", lambda *_: type("Record", (), {"status": "success"}))
    monkeypatch.setattr(cell, "_write_model_card", lambda job, record: order.append("card"))
    monkeypatch.setattr(cell, "write_record", lambda path, record: order.append(path.name))
    assert cell.main(["cell", "job.json", "1"]) == 0 and order == ["card", "record.json"]


def test_what_was_left_below_a_student_goes_too(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / f".README.md.{GONE}.part").write_text("x")
    write_signed(tmp_path / "done.json", {"path": "student"})
    runner._delete_partial_files(tmp_path)
    assert not list((tmp_path / "student").iterdir()) and (tmp_path / "done.json").exists()


def test_a_chain_that_was_finished_before_its_stage_was_scored_is_filled_in(tmp_path):
    from types import SimpleNamespace

    from _records import scored_record

    from harness.records.record import Cost, StageRecord, write_record

    def stage(key, scores):
        return StageRecord(
            label=key,
            method="int8",
            key=key,
            digest="d",
            weight_bytes=1,
            cost=Cost(),
            scores=scores,
        )

    store = Store(tmp_path)
    store.prepare()
    row = scored_record("cot", "10" * 20, 1).model_copy(update={"key": "r" * 24})
    scores = {score.task: score.value for score in row.scores}
    chain = row.model_copy(
        update={"key": "c" * 24, "stages": (stage("cot", {}), stage("int8", {"x": 1.0}))}
    )
    write_record(store.record_path(chain.key), chain)
    plan = SimpleNamespace(cells=[SimpleNamespace(key=row.key, student_key="cot")])
    assert runner._with_stages(plan, chain, store) == chain  # its row is not there yet
    write_record(store.record_path(row.key), row)
    filled = runner._with_stages(plan, chain, store)
    assert [stage.scores for stage in filled.stages] == [scores, {"x": 1.0}]
    assert json.loads(store.record_path(chain.key).read_text())["stages"][0]["scores"] == scores
    assert runner._with_stages(plan, filled, store) is filled


def test_a_row_that_was_scored_without_its_teachers_answers_is_compared_once_they_are_there(
    tmp_path, monkeypatch
):
    from types import SimpleNamespace

    from _records import scored_record

    from harness.records.record import write_record

    store = Store(tmp_path)
    store.prepare()
    teacher = scored_record("teacher", "10" * 20, 1).model_copy(
        update={"key": "t" * 24, "measurements": ()}
    )
    compared = scored_record("int8", "10" * 20, 1)
    alone = compared.model_copy(
        update={
            "key": "a" * 24,
            "measurements": (evaluation._skipped_fidelity(evaluation.NO_TEACHER_ANSWERS),),
        }
    )
    other = compared.model_copy(
        update={
            "measurements": (*compared.measurements, evaluation._skipped_fidelity("out of memory"))
        }
    )
    plan = SimpleNamespace(cells=[SimpleNamespace(key=teacher.key)])
    assert runner._reason_to_compare(plan, store, alone) == ""  # nor are they there now
    write_record(store.record_path(teacher.key), teacher)
    assert "can be compared with" in runner._reason_to_compare(plan, store, alone)
    assert (
        runner._reason_to_compare(plan, store, compared)
        == runner._reason_to_compare(plan, store, other)
        == ""
    )

    write_record(store.record_path(alone.key), alone)
    monkeypatch.setattr(runner, "_compute_cell", lambda *arguments: compared)
    plan.config = SimpleNamespace(force=False, wait=True)
    lines = []
    row = SimpleNamespace(key=alone.key, label="int8", is_teacher=False, student_key="", stages=())
    result = runner._run_cell(plan, row, store, SimpleNamespace(on_message=lines.append))
    assert result.record == compared and not result.cached and "computed again" in lines[0]


def test_what_was_left_among_the_tables_of_a_run_goes_too(tmp_path):
    store = Store(tmp_path)
    store.prepare()
    torn = tmp_path / "runs" / "20260101-000000-1" / f".training.csv.{GONE}.part"
    torn.parent.mkdir()
    torn.write_text("x")
    os.utime(torn, (0, 0))
    store.prepare()
    assert not torn.exists()
