"""Runs a plan: one process per cell, with locks and progress.

Every cell gets a record, also if its process crashes.
"""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from harness.contract import Progress
from harness.data.typed_sets import parse_training_sets
from harness.errors import CRASHES, HarnessError, how_it_ended
from harness.files.lines import read_signed_lines
from harness.files.places import make_folder
from harness.files.problems import describe_os_error
from harness.files.writing import write_atomically
from harness.machine.load import UNKNOWN_LOAD, MachineLoad, measure_load, waiting_variables
from harness.machine.process import ProcessEnd, watch_process
from harness.models.artefacts import remove_unfinished
from harness.models.resolve import is_embedded
from harness.planning.cells import Plan, PlannedCell
from harness.planning.config import RunConfig
from harness.records.record import BadRecord, RunRecord, read_record, write_record
from harness.records.store import CellBusy, Store
from harness.renames.modules import by_old_name
from harness.running.evaluation import NO_TEACHER_ANSWERS
from harness.running.job import CellJob
from harness.running.recomputation import recomputation_lines, save_key_parts
from harness.running.student import recorded_scores


@dataclass(frozen=True)
class CellResult:
    """How one cell ended."""

    cell: PlannedCell
    record: RunRecord | None  # None: another run is computing the cell, and `wait` is off
    cached: bool  # the record was in the store already
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RunCallbacks:
    """Functions that a run calls: when a cell starts, progresses and ends, and with messages."""

    on_start: Callable[[PlannedCell, int, int], None] = lambda cell, number, total: None
    on_progress: Callable[[PlannedCell, Progress], None] = lambda cell, progress: None
    on_end: Callable[[CellResult], None] = lambda result: None
    on_message: Callable[[str], None] = lambda line: None


def callbacks_by_old_names(
    *,
    begin: Callable[[PlannedCell, int, int], None] = RunCallbacks.on_start,
    alive: Callable[[PlannedCell, Progress], None] = RunCallbacks.on_progress,
    end: Callable[[CellResult], None] = RunCallbacks.on_end,
    say: Callable[[str], None] = RunCallbacks.on_message,
) -> RunCallbacks:
    """Return the callbacks of a program that was written for `Watcher`, their former class."""
    return RunCallbacks(on_start=begin, on_progress=alive, on_end=end, on_message=say)


def run_plan(plan: Plan, *, callbacks: RunCallbacks) -> tuple[list[CellResult], Path]:
    """Compute every cell that has no record yet; return their results and the file of the run."""
    store = Store(plan.config.out)
    store.prepare()
    make_folder(plan.config.cache_folder, "--cache")
    remove_unfinished(plan.config.cache_folder)
    run_file = store.write_run(
        plan.config.model_dump(mode="json"), [cell.key for cell in plan.cells]
    )
    for line in () if plan.config.force else recomputation_lines(plan, store):
        callbacks.on_message(line)
    results: list[CellResult] = []
    for number, cell in enumerate(plan.cells, 1):
        callbacks.on_start(cell, number, len(plan.cells))
        results.append(_run_cell(plan, cell, store, callbacks))
        callbacks.on_end(results[-1])
    return results, run_file


def _run_cell(plan: Plan, cell: PlannedCell, store: Store, callbacks: RunCallbacks) -> CellResult:
    """Return the record of a cell from the store, or compute it under its locks."""
    if result := _stored_result(plan, cell, store, callbacks.on_message):
        return result
    lock = partial(store.locked, wait=plan.config.wait, on_wait=callbacks.on_message)
    try:
        with ExitStack() as locks:
            locks.enter_context(lock(cell.key))
            # another run may have computed the cell while this one waited for the lock
            if result := _stored_result(plan, cell, store, lambda line: None):
                return result
            # two cells may share a student (two suites, two chains with a common beginning)
            for stage in cell.stages:
                locks.enter_context(lock(stage.key))
                _delete_partial_files(store.student(stage.key))
            return CellResult(cell, _compute_cell(plan, cell, store, callbacks), cached=False)
    except CellBusy as busy:
        return CellResult(cell, None, cached=False, note=str(busy))


def _stored_result(
    plan: Plan, cell: PlannedCell, store: Store, on_message: Callable[[str], None]
) -> CellResult | None:
    """Return the result of a cell from the store; None if it has none, or is computed again."""
    record = None if plan.config.force else store.finished(cell.key)
    if record is None:
        return None
    if reason := _reason_to_recompute(plan, cell, store, record):
        on_message(f"{cell.label}: {reason}; the row is computed again")
        return None
    return CellResult(cell, _with_stages(plan, record, store), cached=True)


def _with_stages(plan: Plan, record: RunRecord, store: Store) -> RunRecord:
    """Return a chain's record with the scores of its stages, as far as their rows have them now.

    A stage's row may be computed after the chain, if it failed or was killed before.
    """
    paths = {
        stage.key: _stage_record_path(plan, stage.key, store)
        for stage in record.stages
        if not stage.scores
    }
    scores = {key: recorded_scores(path) for key, path in paths.items()}
    if not any(scores.values()):
        return record
    stages = tuple(
        stage.model_copy(update={"scores": scores.get(stage.key) or stage.scores})
        for stage in record.stages
    )
    completed = record.model_copy(update={"stages": stages})
    write_record(store.record_path(record.key), completed)
    return completed


def _reason_to_recompute(plan: Plan, cell: PlannedCell, store: Store, record: RunRecord) -> str:
    """Return why a finished row is computed again; "" if its record is used."""
    return _answers_defect(cell, store, record) or _reason_to_compare(plan, store, record)


def _reason_to_compare(plan: Plan, store: Store, record: RunRecord) -> str:
    """Return that a row was not compared with its teacher but can be now; "" otherwise.

    A row is scored without a comparison if the teacher's row failed before it.
    """
    skipped = record.measurement("skipped_fidelity")
    if (
        skipped is None
        or not skipped.remark.endswith(NO_TEACHER_ANSWERS)
        or store.finished(plan.cells[0].key) is None
    ):
        return ""
    return "it can be compared with the teacher's answers now"


def _answers_defect(cell: PlannedCell, store: Store, record: RunRecord) -> str:
    """Return what is wrong with the stored answers of a finished teacher's row.

    "" if nothing is wrong, or if the row is not the teacher's: nothing is compared with it.
    """
    samples = store.cell(cell.key) / "samples.jsonl"
    if not cell.is_teacher or not samples.exists():
        return ""
    values, defects = read_signed_lines(samples, complete=True)
    counts = Counter(value.get("task") for value in values if isinstance(value, dict))
    incomplete = [
        score.task
        for score in record.scores
        if counts[score.task] < max(map(len, score.outcomes.values()), default=0)
    ]
    if incomplete:
        defects.append(f"answers of {', '.join(incomplete)} are missing")
    return f"{samples}: {defects[0]}" if defects else ""


def _compute_cell(
    plan: Plan, cell: PlannedCell, store: Store, callbacks: RunCallbacks
) -> RunRecord:
    """Run a cell's process and return its record; if the process wrote none, write one for it."""
    folder = store.cell(cell.key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_partial_files(folder)
        record_path = folder / "record.json"
        previous = _previous_failure(record_path)
        record_path.unlink(missing_ok=True)
        if plan.config.force:
            _delete_students(plan, cell, store)
        save_key_parts(plan, cell, store)
        load = measure_load()
        if load.busy:
            callbacks.on_message(
                f"{cell.label}: the machine is busy ({load}), so idle threads of this cell sleep"
            )
        job = _cell_job(plan, cell, store, load)
        write_atomically(folder / "job.json", job.model_dump_json(indent=1))
        timeout = plan.config.cell_timeout
        ended = _run_process(
            folder,
            lambda progress: callbacks.on_progress(cell, progress),
            environment=_environment(plan, load),
            timeout=timeout,
        )
        if record_path.exists():
            return read_record(record_path)
        reason = _process_failure(ended, previous, timeout, folder / "log.txt")
        record = _failed_record(plan, cell, reason)
        write_record(record_path, record)
    except BadRecord as problem:
        return _failed_record(plan, cell, str(problem))
    except OSError as problem:
        raise HarnessError(
            f"{describe_os_error(problem)}; finished cells are kept: solve this and run again"
        ) from problem
    return record


def _delete_students(plan: Plan, cell: PlannedCell, store: Store) -> None:
    """Delete the students of a cell for `--force`, except those that have rows of their own."""
    for stage in cell.stages:
        if stage.key == cell.student_key or _stage_record_path(plan, stage.key, store) is None:
            shutil.rmtree(store.student(stage.key), ignore_errors=True)


def _previous_failure(record_path: Path) -> str:
    """Return why a cell failed in an earlier run; "" if it did not, or its record is unreadable."""
    try:
        return read_record(record_path).reason
    except BadRecord:
        return ""


def _process_failure(ended: ProcessEnd, previous: str, timeout: float | None, log: Path) -> str:
    """Return why a process left no record, and what to do about it.

    `previous` is the reason of the last failure: a crash that repeats will not go away by itself.
    """
    if ended.late:
        return (
            f"stopped after {timeout:g} s (--cell-timeout); give a longer time and run again, to "
            "continue from the last saved state"
        )
    reason = how_it_ended(ended.code, ended.log)
    if -ended.code in CRASHES and previous.startswith(reason):
        return (
            f"{reason}, as in the run before: running again will not help; read {log}, and leave "
            "the row out or change its settings"
        )
    if -ended.code in CRASHES:
        return f"{reason}: a defect of a library or of this machine, see {log}; run again once"
    if ended.code < 0:
        return f"{reason}; run again to continue from the last saved state"
    return reason


def _delete_partial_files(folder: Path) -> None:
    """Delete what a killed run saved in part in a cell's or student's folder.

    The caller must hold the folder's lock.
    """
    for path in folder.rglob(".*.part"):
        shutil.rmtree(path, ignore_errors=True)
        if path.is_file():
            path.unlink(missing_ok=True)


def _cell_job(
    plan: Plan, cell: PlannedCell, store: Store, load: MachineLoad = UNKNOWN_LOAD
) -> CellJob:
    """Return the job of a cell: its process gets absolute paths, and the load of the machine."""
    config = plan.config
    suites_have_timing = any(suite.measure for suite in plan.suites.values())
    teacher_samples = store.cell(plan.cells[0].key).resolve() / "samples.jsonl"
    return CellJob(
        cell=cell,
        conditions=plan.conditions_of(cell),
        teachers=plan.teachers,
        student_base=plan.student_base,
        work=config.work.model_copy(update={"grid": plan.grid, "rounds": plan.rounds}),
        measure=bool(plan.grid) and suites_have_timing and not cell.simulated,
        include_path=config.include_path.resolve() if config.include_path else None,
        num_fewshot=config.num_fewshot,
        teacher_samples=None if cell.is_teacher else teacher_samples,
        cell_folder=store.cell(cell.key).resolve(),
        stage_folders=tuple(store.student(stage.key).resolve() for stage in cell.stages),
        stage_records=tuple(_stage_record_path(plan, stage.key, store) for stage in cell.stages),
        threads=plan.threads,
        cores_in_use=None if load.used is None else round(load.used, 2),
        cache=config.cache_folder.resolve(),
        data_dir=config.data_dir.resolve() if config.data_dir else None,
        train_data_locations=tuple(
            data.location for data in parse_training_sets(config.train_data)
        ),
        calibration_location="".join(
            data.location for data in parse_training_sets(_calibration_texts(config))
        ),
        scored_subset=plan.subset,
        overlap=config.overlap,
    )


def _stage_record_path(plan: Plan, student_key: str, store: Store) -> Path | None:
    """Return the path of the record of a stage's own row; None if this run has no such row."""
    for cell in plan.cells:
        if cell.student_key == student_key:
            return store.record_path(cell.key).resolve()
    return None


def _environment(plan: Plan, load: MachineLoad = UNKNOWN_LOAD) -> dict[str, str]:
    """Return the environment of a cell's process: offline if all models and items are local."""
    variables = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    names = [
        *plan.config.teacher_names,
        plan.config.student,
        *plan.config.checkpoint_models.values(),
    ]
    if not plan.hub_data and all(
        is_embedded(name) or ":" in name or Path(name).exists() for name in names
    ):
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **variables, **waiting_variables(load, os.environ)}


def _run_process(
    folder: Path,
    on_progress: Callable[[Progress], None],
    *,
    environment: dict[str, str],
    timeout: float | None = None,
) -> ProcessEnd:
    """Start `python -m harness.running.cell`, report its progress, and return how it ended."""
    job = (folder / "job.json").resolve()
    command = [sys.executable, "-P", "-m", "harness.running.cell", str(job), str(os.getpid())]
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    # opened to append: `attend` cuts a long log at its beginning while the process writes to it
    with log.open("ab") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    return watch_process(
        process, log, lambda message: on_progress(Progress(**message)), seconds=timeout
    )


def _calibration_texts(config: RunConfig) -> list[str]:
    return [str(config.calibration)] if config.calibration else []


def _failed_record(plan: Plan, cell: PlannedCell, reason: str) -> RunRecord:
    """Return the record of a cell whose process left none."""
    return RunRecord(
        **cell.record_fields,
        status="failed",
        reason=reason,
        conditions=plan.conditions_of(cell),
        path="",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def failure_lines(results: Sequence[CellResult]) -> list[str]:
    """Return one line for each cell that did not succeed."""
    lines = []
    for result in results:
        cell, record = result.cell, result.record
        row = cell.label if cell.seed is None else f"{cell.label} (seed {cell.seed})"
        if record is None:
            lines.append(f"{row}: not waited for, {result.note}")
        elif record.status != "success":
            lines.append(f"{row}: {record.status}: {record.reason}")
    return lines


__getattr__ = by_old_name(__name__)
