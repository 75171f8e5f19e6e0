"""From the command to the tables on the embedded pair: runs, skips, resumes and failures."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import harness
from harness.api import plan_run
from harness.data.source import LocalOrHubData
from harness.errors import CellFailed
from harness.planning.config import build_config
from harness.records.store import CellBusy, Store, read_records
from harness.registry import Registry
from harness.reporting import report
from harness.running import runner, student
from harness.running.failure import failure_of
from harness.running.loaded import LoadedJob
from methods import METHODS

SMALL = {"budget": 2_000, "rows": 40, "limit": 40, "grid": "16x1x4", "rounds": 1, "noise": 4}
SMALL_OPTIONS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
UNTIMED = ["--grid", "none"]
_FIRST_FILE = '```python title="extras/shortest.py"\n'  # of docs/add-a-method.md


def command(*arguments, environment=None, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "harness.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a small run of a trained row, controls and a teacher's copy, and its folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    run = harness.run("cot,identity", "math", out=folder / "runs", cache=folder / "cache", **SMALL)
    return run, folder


def test_every_cell_succeeds_and_the_controls_are_there(finished):
    run, _ = finished
    assert run.succeeded, [record.reason for record in run.records]
    assert {record.label for record in run.records} == {
        "teacher",
        "cot",
        "identity",
        "answer-only",
        "untouched",
    }


def test_identity_keeps_everything_and_flips_nothing(finished):
    run, _ = finished
    scores = {record.label: record.scores[0] for record in run.records}
    assert scores["identity"].outcomes == scores["teacher"].outcomes
    assert scores["identity"].answers_digest == scores["teacher"].answers_digest
    line = next(line for line in run.markdown().splitlines() if line.startswith("| identity"))
    # with an interval: 40 items without a flip leave room for a few among all
    assert "100.0 % [" in line and "0/0" in line


def test_records_say_everything_about_a_cell(finished):
    run, _ = finished
    for record in run.records:
        assert record.environment is not None and record.environment.versions["torch"]
        assert (
            record.scores[0].n == len(record.scores[0].outcomes["strict-match"]) == SMALL["limit"]
        )
        names = {measurement.name for measurement in record.measurements}
        assert {
            "decode_tokens_per_second",
            "prefill_tokens_per_second",
            "weight_bytes_disk",
            "weight_bytes_resident",
            "peak_process_bytes",
            "kv_bytes",
            "decode_speedup",
        } <= names
        assert not any(
            measurement.remark
            for measurement in record.measurements
            if measurement.name in ("weight_bytes_resident", "kv_bytes")
        )
        assert record.student is not None and record.student.digest
        if record.trains:
            assert (
                record.cost.seen_tokens
                and record.cost.flops
                and record.cost.seconds
                and record.data_digest
            )
    cot = next(record for record in run.records if record.label == "cot")
    assert cot.cost.notes["traces_written"] == 40 and cot.cost.shared[0].tokens > 0


def test_students_are_compared_with_what_their_teacher_read_and_did_not_read_again(finished):
    run, folder = finished
    teacher = next(record for record in run.records if record.label == "teacher")
    assert (Store(folder / "runs").cell(teacher.key) / "teacher-reads.safetensors").exists()
    distances = {record.label: record.fidelity[0] for record in run.records if record.fidelity}
    assert (
        distances["identity"].kl == pytest.approx(0, abs=1e-5)
        and distances["identity"].agreement == 1
        and distances["untouched"].kl > 0.5
    )


@pytest.mark.slow
def test_without_a_grid_nothing_is_timed_and_the_row_stands(tmp_path):
    few = {**SMALL, "grid": "none", "limit": {"gsm8k-mini": 7}}
    run = harness.run("identity", "math", out=tmp_path / "runs", cache=tmp_path / "cache", **few)
    assert run.succeeded
    for record in run.records:
        assert record.limited and [score.n for score in record.scores] == [7]
        assert (
            record.measurement("decode_speedup") is None
            and record.measurement("seconds_per_problem:gsm8k-mini") is not None
        )
    assert "not timed" in run.markdown()


def test_items_are_stored_with_what_was_written(finished):
    run, folder = finished
    store = Store(folder / "runs")
    rows = [
        json.loads(line)
        for line in (store.cell(run.records[0].key) / "samples.jsonl").read_text().splitlines()
    ]
    assert len(rows) == SMALL["limit"]
    assert set(rows[0]["correct"]) == {"strict-match", "flexible-extract", "numeric"}
    assert all(
        row["prompt_hash"] and row["stop"] in {"eos", "stop", "length"} and row["tokens"] > 0
        for row in rows
    )
    marks = run.records[0].scores[0].outcomes["strict-match"]
    assert "".join("1" if row["correct"]["strict-match"] else "0" for row in rows) == marks


def test_a_second_run_reads_everything_and_starts_no_process(finished, monkeypatch):
    run, folder = finished
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    again = harness.run(
        "cot,identity", "math", out=folder / "runs", cache=folder / "cache", **SMALL
    )
    assert all(result.cached for result in again.cells)
    assert again.markdown() == run.markdown()


def test_report_makes_the_same_bytes_from_the_records_alone(finished, tmp_path):
    run, _ = finished
    tables = report.write_tables(list(run.records), tmp_path / "before")
    assert command("report", run.path, "--out", tmp_path / "after").returncode == 0
    for path in tables:
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()


def test_records_are_a_frame_with_one_row_a_cell_and_metric(finished):
    run, folder = finished
    frame = harness.load_records(folder / "runs")
    assert len(frame.groupby(["key", "metric", "task"], dropna=False)) == len(frame)
    score = frame[(frame.row == "teacher") & (frame.metric == "strict-match")].iloc[0]
    assert score.value == run.records[0].scores[0].value and score.n == SMALL["limit"]
    assert set(run.frame().row) == set(frame.row)


def test_force_computes_again_and_gives_the_same_answers(finished):
    run, folder = finished
    again = harness.run(
        "untouched",
        "math",
        out=folder / "runs",
        cache=folder / "cache",
        force=True,
        controls=False,
        **SMALL,
    )
    assert not any(result.cached for result in again.cells)
    for label in ("teacher", "untouched"):
        before, after = (
            next(record for record in run.records if record.label == label) for run in (run, again)
        )
        assert before.scores[0].answers_digest == after.scores[0].answers_digest
        assert before.student.digest == after.student.digest


PLUGIN = '''
"""A method from another package."""
from typing import ClassVar
from harness.contract import Checkpoint, Job
from methods.training.base import Trained, full_solution_pairs
from methods.base import settings


@settings
class Shouting(Trained):
    """Fails, dies or goes on, as its setting says."""

    controls: ClassVar[tuple[str, ...]] = ()
    how: str = "train"

    def compress(self, job: Job) -> Checkpoint:
        from harness.data.examples import training_examples
        from methods.training.terms import Term, hard_labels

        terms = [hard_labels()]
        if self.how == "raise":
            raise RuntimeError("it broke")
        if self.how == "die":
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "nan":
            terms = [Term("ce", 1.0, lambda at: at.student_NV.sum(-1) * float("nan"))]
        if self.how == "full":
            raise OSError(28, "No space left on device", str(job.workdir))
        if self.how == "nothing":
            from harness.models.language_model import open_model, stored_dtype
            from harness.models.shaping import save_student
            same, dtype = open_model(job.teacher), stored_dtype(job.teacher)
            return save_student(same, job.workdir / "student", name="same", dtype=dtype, parents=())
        examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
        return self.train(job, full_solution_pairs(examples), terms=terms)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Install a method in a folder by entry point; return the environment that sees it."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "shouting.py").write_text(textwrap.dedent(PLUGIN))
    info = folder / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    guide = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    (folder / "first_words.py").write_text(guide.partition(_FIRST_FILE)[2].partition("```")[0])
    (info / "entry_points.txt").write_text(
        "[harness.methods]\nshouting = shouting:Shouting\nshortest = first_words:ShortestAnswers\n"
    )
    return {"PYTHONPATH": str(folder)}


def test_what_a_library_raises_fails_its_own_row_alone(finished, tmp_path):
    """The stand-ins break while they are imported, while they pack, and by ending the process."""
    _, folder = finished
    texts = {
        "optimum": "",
        "optimum/quanto": "def __getattr__(name): return name\ndef quantize(*_, **__): raise "
        "SystemExit('no kernel')\n",
        "torchao": "",
        "torchao/quantization": "raise AssertionError('torch is too new\\nfor this torchao')\n",
    }
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    # a newer torchao is imported by transformers itself
    for name, version in (("torchao", "0.1.0"), ("optimum_quanto", "0.2.7")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    result = command(
        "run",
        "--methods",
        "quanto,torchao,int8",
        "--out",
        folder / "runs",
        "--cache",
        folder / "cache",
        *SMALL_OPTIONS,
        *UNTIMED,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 1
    assert (
        "quanto: failed: quanto[bits=4]: optimum-quanto 0.2.7 failed on tiny (SystemExit: no "
        "kernel); use int8 or int4" in result.stderr
    )
    assert (
        "torchao 0.1.0 failed on tiny (AssertionError: torch is too new for this torchao); use "
        "int8 or int4" in result.stderr
    )
    records, problems = read_records(max((folder / "runs" / "runs").glob("*.json")))
    status = {record.label: record.status for record in records}
    assert (
        not problems
        and status["int8"] == status["teacher"] == "success"
        and status["quanto"] == status["torchao"] == "failed"
    )
    assert all("\n" not in record.reason for record in records)


def test_a_method_from_another_package_runs_and_failures_leave_the_others_alone(finished, plugin):
    _, folder = finished
    assert "shouting" in command("list", "methods", environment=plugin).stdout
    rows = ",".join(
        [
            "shouting",
            "shortest",
            *(f"shouting[how={how}]" for how in ("raise", "die", "nan", "full", "nothing")),
        ]
    )
    result = command(
        "run",
        "--methods",
        rows,
        "--out",
        folder / "runs",
        "--cache",
        folder / "cache",
        *SMALL_OPTIONS,
        *UNTIMED,
        environment=plugin,
    )
    assert result.returncode == 1
    assert "shouting[how=raise] (seed 1): failed: RuntimeError: it broke" in result.stderr
    assert "shouting[how=die] (seed 1): failed: killed (SIGKILL" in result.stderr
    assert "shouting[how=nan] (seed 1): failed: the term ce became nan at step 1" in result.stderr
    assert "shouting[how=full] (seed 1): failed: no space left on the device" in result.stderr
    assert (
        "shouting[how=nothing] (seed 1): failed" in result.stderr
        and "changed no weight" in result.stderr
    )
    records, problems = read_records(max((folder / "runs" / "runs").glob("*.json")))
    status = {record.label: record.status for record in records}
    assert (
        not problems and status["shouting"] == status["shortest"] == status["teacher"] == "success"
    )
    assert [
        status[f"shouting[how={how}]"] for how in ("raise", "die", "nan", "full", "nothing")
    ] == ["failed"] * 5
    trace = next(record for record in records if record.label == "shouting[how=raise]").trace
    assert "RuntimeError" in trace and "shouting.py" in trace


def test_a_killed_run_goes_on_to_the_same_student(finished, tmp_path):
    """A command killed by SIGKILL while training ends, when repeated, in the same bytes."""
    _, folder = finished
    options = [
        "run",
        "--methods",
        "sft",
        "--no-controls",
        *UNTIMED,
        "--noise",
        "0",
        "--set",
        "sft.validation_rows=16",
        "--cache",
        folder / "cache",
        "--budget",
        "20000",
        "--rows",
        "100",
        "--limit",
        "20",
    ]
    environment = {**os.environ, "HARNESS_STATE_SECONDS": "0"}
    line = [
        sys.executable,
        "-P",
        "-m",
        "harness.cli",
        *map(str, options),
        "--out",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed" / "students").glob("*/state/step-*/loop.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    # the cell's process, where the training is
    for path in _processes_that_name(tmp_path / "killed"):
        os.kill(int(path.parent.name), signal.SIGKILL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [log] = (tmp_path / "killed" / "students").glob("*/training.jsonl")
    first, *others = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first.replace("{", '{"before the kill": true, ', 1), *others]))
    for _ in range(100):  # the cell's process notices that its parent is gone
        if not _processes_that_name(tmp_path / "killed"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the cell's process outlived its parent")
    for name in ("killed", "whole"):
        assert command(*options, "--out", tmp_path / name).returncode == 0
    digests = [
        {r.label: r.student.digest for r in read_records(tmp_path / name)[0]}
        for name in ("killed", "whole")
    ]
    assert digests[0] == digests[1]
    # it went on: a run that begins again writes a log of its own
    assert "before the kill" in log.read_text().splitlines()[0]


def cell_job(folder, methods, label, **settings):
    """Return what the process of a cell would be told."""
    plan = plan_run(
        build_config(
            {"methods": methods, "out": folder / "runs", "cache": folder / "cache", **settings}
        )
    )
    return runner._cell_job(
        plan, next(cell for cell in plan.cells if cell.label == label), Store(folder / "runs")
    )


def test_training_that_cannot_fit_fails_before_the_teacher_is_asked(tmp_path, monkeypatch):
    need = 16 * 918_656

    def refuse(method, memory, *, recipe="depth:0.5", **start):
        monkeypatch.setattr(student, "device_bytes", lambda device: memory)
        job = cell_job(tmp_path, [method], method)
        built = Registry("method", METHODS).build(method, {})
        student._refuse_too_large(
            job, job.cell.stages[0], built, replace(job.student_base.checkpoint(), **start), recipe
        )

    refuse("cot", need)
    refuse("response", need)  # a cache can stand for its teacher
    with pytest.raises(CellFailed, match="x 918,656 parameters, and the teacher beside it are"):
        refuse("feature", need)
    with pytest.raises(
        CellFailed,
        match=r"x 1,706,112 parameters are .*; give a student that an earlier stage cuts further",
    ):
        refuse("sft", need, recipe="", digest="of the stage before")
    monkeypatch.setattr(student, "device_bytes", lambda device: need - 1)
    job = cell_job(tmp_path, ["cot"], "cot")
    with pytest.raises(
        CellFailed,
        match=r"cot cannot be trained here: 16 bytes x 918,656 parameters are .*; give a smaller "
        r"--student, or type --set cot\.recipe=lora$",
    ):
        student.student_of_cell(LoadedJob(job, {}, {}, LocalOrHubData(), lambda _: None))
    assert not (tmp_path / "cache").exists()


def test_out_of_memory_says_what_makes_that_work_smaller(tmp_path):
    problem = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    job = cell_job(tmp_path, ["prune-depth+response+int8"], "prune-depth+response+int8")

    def said():
        return failure_of(job, problem).reason

    assert said().startswith("out of memory in prune-depth; give a smaller model")
    for folder, expected in zip(
        job.stage_folders,
        (
            "in training; type --set response.micro_batch_size=1 and --set "
            "response.gradient_checkpointing=true, or give a smaller --student (",
            "in int8; give a smaller model",
            "in scoring; type a smaller --batch-size (CUDA out",
        ),
        strict=True,
    ):
        folder.mkdir(parents=True)
        (folder / "done.json").write_text("{}")
        assert (
            said().startswith(f"out of memory {expected}")
            and "--batch-size" not in said().partition("in scoring")[0]
        )


def _processes_that_name(folder):
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            processes += [path] if str(folder).encode() in path.read_bytes() else []
        except OSError:  # it ended while we looked
            continue
    return processes


def test_a_cell_that_another_run_computes_is_left_or_waited_for(tmp_path):
    store = Store(tmp_path)
    store.prepare()
    messages = []
    with store.locked("k" * 64, wait=True, on_wait=messages.append):
        with (
            pytest.raises(CellBusy) as busy,
            Store(tmp_path).locked("k" * 64, wait=False, on_wait=messages.append),
        ):
            pytest.fail("two holders")
        assert str(os.getpid()) in str(busy.value) and "since" in str(busy.value)
        waited = threading.Thread(target=lambda: _hold(tmp_path, messages))
        waited.start()
        for _ in range(100):
            if messages:
                break
            time.sleep(0.05)
        assert "waiting for a cell" in messages[0] and "--no-wait" in messages[0]
    waited.join(10)
    assert messages[-1] == "held"


def _hold(folder, messages):
    with Store(folder).locked("k" * 64, wait=True, on_wait=messages.append):
        messages.append("held")


def test_no_wait_leaves_a_busy_cell_and_says_who_has_it(finished):
    run, folder = finished
    key = next(record for record in run.records if record.label == "untouched").key
    store = Store(folder / "runs")
    (store.record_path(key)).rename(store.cell(key) / "aside.json")
    try:
        with store.locked(key, wait=True, on_wait=print):
            result = command(
                "run",
                "--methods",
                "untouched",
                "--no-wait",
                "--out",
                folder / "runs",
                "--cache",
                folder / "cache",
                *SMALL_OPTIONS,
            )
    finally:
        (store.cell(key) / "aside.json").rename(store.record_path(key))
    assert result.returncode == 1
    assert f"untouched: not waited for, computed by process {os.getpid()}" in result.stderr


def test_readers_of_a_store_survive_a_damaged_student(finished):
    run, folder = finished
    store = Store(folder / "runs")
    folders = [
        path for path in (folder / "runs" / "students").iterdir() if (path / "student").exists()
    ]
    records = [
        path
        for path in folders
        if json.loads((path / "student" / "config.json").read_text())["num_hidden_layers"] == 8
    ]
    for victim in records:  # identity's student has all blocks
        weights = victim / "student" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    key = next(record for record in run.records if record.label == "identity").key
    store.record_path(key).unlink()
    first = harness.run("identity", "math", out=folder / "runs", cache=folder / "cache", **SMALL)
    assert (
        "damaged" in next(record for record in first.records if record.label == "identity").reason
    )
    second = harness.run("identity", "math", out=folder / "runs", cache=folder / "cache", **SMALL)
    assert second.succeeded


@pytest.mark.slow
def test_scoring_and_training_open_no_socket(no_network, tmp_path):
    """One whole cell in this process with sockets and name resolution blocked."""
    from harness.api import plan_run
    from harness.planning.config import build_config
    from harness.running.cell import _compute
    from harness.running.runner import _cell_job

    # timing is done by other processes, whose sockets are their own
    few = {**SMALL, "grid": "none"}
    plan = plan_run(
        build_config(
            {
                "methods": ["cot"],
                "suite": ["math", "knowledge"],
                "out": tmp_path,
                "cache": tmp_path / "cache",
                **few,
            }
        )
    )
    store = Store(tmp_path)
    store.prepare()
    cell = plan.cells[1]
    store.cell(cell.key).mkdir(parents=True)
    record = _compute(_cell_job(plan, cell, store), lambda message: None, time.monotonic())
    assert record.status == "success" and [score.task for score in record.scores] == [
        "gsm8k-mini",
        "mmlu-mini",
    ]
    assert not no_network


def test_no_path_of_this_machine_stands_in_a_record(finished):
    run, folder = finished
    store = Store(folder / "runs")
    for record in run.records:
        text = store.record_path(record.key).read_text()
        assert str(folder) not in text and str(Path(harness.__file__).parent.parent) not in text
