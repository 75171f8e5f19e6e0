"""Runs a plan: one spawned process per cell, locks, progress, and a record whatever happens to the
process.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.contract import Progress
from harness.errors import CRASHES, HarnessError, how_it_ended
from harness.files.lines import read_signed_lines
from harness.files.places import make_folder
from harness.files.problems import describe_os_error
from harness.files.writing import write_atomically
from harness.machine.load import UNSEEN, Load, look, settings_of
from harness.machine.process import Ended, attend
from harness.models.artefacts import sweep
from harness.models.resolve import is_embedded
from harness.planning.cells import Plan, PlannedCell
from harness.records.record import BadRecord, RunRecord, read_record, write_record
from harness.records.store import CellBusy, Store
from harness.running.evaluation import NO_TEACHER_ANSWERS
from harness.running.job import CellJob
from harness.running.recomputation import recomputation_lines, save_key_parts
from harness.running.student import recorded_scores


@dataclass(frozen=True)
class CellResult:
    """How one cell ended."""

    cell: PlannedCell
    record: RunRecord | None  # None: another run is computing it and we were told not to wait
    cached: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RunCallbacks:
    """What the runner tells: a cell begins, lives, ends; a line worth reading."""

    on_start: Callable[[PlannedCell, int, int], None] = lambda cell, number, total: None
    on_progress: Callable[[PlannedCell, Progress], None] = lambda cell, progress: None
    on_end: Callable[[CellResult], None] = lambda finished: None
    on_message: Callable[[str], None] = lambda line: None


def run_plan(plan: Plan, *, callbacks: RunCallbacks) -> tuple[list[CellResult], Path]:
    """Compute every cell that has no record yet; return how each ended and the run's own file."""
    store = Store(plan.config.out)
    store.prepare()
    make_folder(plan.config.cache_folder, "--cache")
    sweep(plan.config.cache_folder)
    listing = store.write_run(
        plan.config.model_dump(mode="json"), [cell.key for cell in plan.cells]
    )
    for line in () if plan.config.force else recomputation_lines(plan, store):
        callbacks.on_message(line)
    ended: list[CellResult] = []
    for number, cell in enumerate(plan.cells, 1):
        callbacks.on_start(cell, number, len(plan.cells))
        ended.append(_run_cell(plan, cell, store, callbacks))
        callbacks.on_end(ended[-1])
    return ended, listing


def _run_cell(plan: Plan, cell: PlannedCell, store: Store, callbacks: RunCallbacks) -> CellResult:
    held = None if plan.config.force else store.finished(cell.key)
    if held is not None and (wrong := _reason_to_recompute(plan, cell, store, held)):
        callbacks.on_message(f"{cell.label}: {wrong}; the row is made again")
        held = None
    if held is not None:
        return CellResult(cell, _with_stages(plan, held, store), cached=True)
    try:
        with store.locked(cell.key, wait=plan.config.wait, on_wait=callbacks.on_message):
            held = None if plan.config.force else store.finished(cell.key)
            # the other run made it while we waited
            if held is not None and not _reason_to_recompute(plan, cell, store, held):
                return CellResult(cell, _with_stages(plan, held, store), cached=True)
            if not cell.student_key:
                return CellResult(cell, _compute_cell(plan, cell, store, callbacks), cached=False)
            # Two cells of one student (two suites, two chains that begin alike) must not make it at
            # once.
            with ExitStack() as locks:
                for stage in cell.stages:
                    locks.enter_context(
                        store.locked(stage.key, wait=plan.config.wait, on_wait=callbacks.on_message)
                    )
                    _delete_partial_files(store.student(stage.key))
                return CellResult(cell, _compute_cell(plan, cell, store, callbacks), cached=False)
    except CellBusy as busy:
        return CellResult(cell, None, cached=False, note=str(busy))


def _with_stages(plan: Plan, record: RunRecord, store: Store) -> RunRecord:
    """Fill in what a chain's stages scored where their own rows came after it: one that was killed
    or failed is computed again later.
    """
    rows = {
        stage.key: _stage_record_path(plan, stage.key, store)
        for stage in record.stages
        if not stage.scores
    }
    scores = {key: recorded_scores(path) for key, path in rows.items()}
    if not any(scores.values()):
        return record
    stages = tuple(
        stage.model_copy(update={"scores": scores.get(stage.key) or stage.scores})
        for stage in record.stages
    )
    filled = record.model_copy(update={"stages": stages})
    write_record(store.record_path(record.key), filled)
    return filled


def _reason_to_recompute(plan: Plan, cell: PlannedCell, store: Store, record: RunRecord) -> str:
    """Say why a finished row is made again all the same, "" where it stands."""
    return _answers_defect(cell, store, record) or _reason_to_compare(plan, store, record)


def _reason_to_compare(plan: Plan, store: Store, record: RunRecord) -> str:
    """Say that a row was scored while its teacher's had failed and can be compared with it now, ""
    where there is nothing to add.
    """
    skipped = record.measured("skipped_fidelity")
    if (
        skipped is None
        or not skipped.remark.endswith(NO_TEACHER_ANSWERS)
        or store.finished(plan.cells[0].key) is None
    ):
        return ""
    return "its teacher's answers are there now"


def _answers_defect(cell: PlannedCell, store: Store, record: RunRecord) -> str:
    """Say why the answers of a finished teacher's row cannot be compared with, "" where they can,
    or the row is no teacher's.
    """
    samples = store.cell(cell.key) / "samples.jsonl"
    if not cell.is_teacher or not samples.exists():
        return ""
    values, wrong = read_signed_lines(samples, complete=True)
    rows = Counter(value.get("task") for value in values if isinstance(value, dict))
    lacking = [
        score.task
        for score in record.scores
        if rows[score.task] < max(map(len, score.outcomes.values()), default=0)
    ]
    wrong += [f"answers of {', '.join(lacking)} are missing"] if lacking else []
    return f"{samples}: {wrong[0]}" if wrong else ""


def _compute_cell(
    plan: Plan, cell: PlannedCell, store: Store, callbacks: RunCallbacks
) -> RunRecord:
    """Run a cell's process to its end and return its record; write one for a process that died
    without.
    """
    folder = store.cell(cell.key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_partial_files(folder)
        record_path = folder / "record.json"
        before = _previous_failure(record_path)
        record_path.unlink(missing_ok=True)
        for stage in cell.stages if plan.config.force else ():
            # other stages are made anew by their own rows
            if stage.key == cell.student_key or _stage_record_path(plan, stage.key, store) is None:
                _delete_student(store.student(stage.key))
        save_key_parts(plan, cell, store)
        load = look()
        if load.busy:
            callbacks.on_message(
                f"{cell.label}: the machine is busy ({load}): threads wait passively"
            )
        job = _cell_job(plan, cell, store, load)
        write_atomically(folder / "job.json", job.model_dump_json(indent=1))
        ended = _run_process(
            folder,
            lambda one: callbacks.on_progress(cell, one),
            environment=_environment(plan, load),
            seconds=plan.config.cell_timeout,
        )
        if record_path.exists():
            return read_record(record_path)
        record = _failed_record(
            plan,
            cell,
            _process_failure(ended, before, plan.config.cell_timeout, folder / "log.txt"),
        )
        write_record(record_path, record)
    except BadRecord as problem:
        return _failed_record(plan, cell, str(problem))
    except OSError as problem:
        raise HarnessError(
            f"{describe_os_error(problem)}; what was finished is kept: mend that and run again"
        ) from problem
    return record


def _previous_failure(record: Path) -> str:
    """Return why a cell failed when it was tried before; "" where it was not, or where its record
    cannot be read.
    """
    try:
        return read_record(record).reason
    except BadRecord:
        return ""


def _process_failure(ended: Ended, before: str, seconds: float | None, log: Path) -> str:
    """Say why a process left no record, and what to do: the same crash twice is no accident."""
    if ended.late:
        return (
            f"stopped after {seconds:g} s (--cell-timeout); give a longer one: run again to go on "
            "from its last saved state"
        )
    how = how_it_ended(ended.code, ended.log)
    if -ended.code in CRASHES:
        if before.startswith(how):
            return (
                f"{how}, as the time before: running it again will not help; read {log}, and leave "
                "the row out or change its settings"
            )
        return f"{how}; a defect of a library or of this machine, see {log}; run again once"
    return f"{how}; run again to go on from its last saved state" if ended.code < 0 else how


def _delete_partial_files(folder: Path) -> None:
    """Delete what a killed run left half saved in a cell's or a student's folder; its lock
    is ours.
    """
    import shutil

    for torn in folder.rglob(".*.part"):
        shutil.rmtree(torn, ignore_errors=True)
        if torn.is_file():
            torn.unlink(missing_ok=True)


def _delete_student(folder: Path) -> None:
    """Make `--force` train anew: without its mark and state a student is made again."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _cell_job(plan: Plan, cell: PlannedCell, store: Store, load: Load = UNSEEN) -> CellJob:
    return CellJob(
        cell=cell,
        conditions=plan.conditions_of(cell),
        teachers=plan.teachers,
        student_base=plan.student_base,
        work=plan.config.work.model_copy(update={"grid": plan.grid}),
        measure=bool(plan.grid)
        and any(suite.measure for suite in plan.suites.values())
        and not cell.simulated,
        include_path=plan.config.include_path.resolve() if plan.config.include_path else None,
        teacher_samples=None
        if cell.is_teacher
        else store.cell(plan.cells[0].key).resolve() / "samples.jsonl",
        cell_folder=store.cell(cell.key).resolve(),
        stage_folders=tuple(store.student(stage.key).resolve() for stage in cell.stages),
        stage_records=tuple(_stage_record_path(plan, stage.key, store) for stage in cell.stages),
        threads=plan.threads,
        cores_in_use=None if load.used is None else round(load.used, 2),
        cache=plan.config.cache_folder.resolve(),
        data_dir=plan.config.data_dir.resolve() if plan.config.data_dir else None,
    )


def _stage_record_path(plan: Plan, student_key: str, store: Store) -> Path | None:
    """Return where the record of a stage's own row stands, None where this run has no such row."""
    return next(
        (
            store.record_path(cell.key).resolve()
            for cell in plan.cells
            if cell.student_key == student_key
        ),
        None,
    )


def _environment(plan: Plan, load: Load = UNSEEN) -> dict[str, str]:
    """Return the child's environment; the Hub is not asked for anything where models and items are
    here.
    """
    settings = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    names = [*plan.config.teacher_names, plan.config.student]
    if not plan.hub_data and all(
        is_embedded(name) or ":" in name or Path(name).exists() for name in names
    ):
        settings |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **settings, **settings_of(load, os.environ)}


def _run_process(
    folder: Path,
    alive: Callable[[Progress], None],
    *,
    environment: dict[str, str],
    seconds: float | None = None,
) -> Ended:
    """Start `python -m harness.running.cell`, pass its signs of life on, return how it ended."""
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    with log.open("ab") as errors:  # appended to: what is cut off at its beginning stays cut off
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "harness.running.cell",
                str((folder / "job.json").resolve()),
                str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    return attend(process, log, lambda said: alive(Progress(**said)), seconds=seconds)


def _failed_record(plan: Plan, cell: PlannedCell, reason: str) -> RunRecord:
    return RunRecord(
        key=cell.key,
        status="failed",
        reason=reason,
        label=cell.label,
        method=cell.method,
        family=cell.family,
        is_control=cell.is_control,
        controls=cell.controls,
        handed_on=cell.handed_on,
        trains=cell.trains,
        settings=cell.settings,
        seed=cell.seed,
        starts_from=cell.stages[0].starts_from if cell.stages else "",
        conditions=plan.conditions_of(cell),
        path="",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def failure_lines(ended: Sequence[CellResult]) -> list[str]:
    """Return one line for each cell that did not succeed."""
    lines = []
    for one in ended:
        seed = f" (seed {one.cell.seed})" if one.cell.seed is not None else ""
        if one.record is None:
            lines.append(f"{one.cell.label}{seed}: left, {one.note}")
        elif one.record.status != "success":
            lines.append(f"{one.cell.label}{seed}: {one.record.status}: {one.record.reason}")
    return lines
