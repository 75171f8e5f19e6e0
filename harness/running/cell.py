"""The process of one cell: `python -m harness.running.cell JOB.json`. Makes the student, scores it, measures it, records it.

It is the third composition root beside the command line and the Python door: names arrive, so the tables are read
here. Signs of life go to the original standard output, one JSON object a line; everything else a library prints
goes to the cell's log.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import BaseModel, ConfigDict

from harness.contract import Budget, Checkpoint, Example, Job, Progress, Task
from harness.data.examples import examples_digest, untrained
from harness.data.source import DataSource
from harness.errors import CellFailed, HarnessError, Skipped, says_no_memory
from harness.files.places import no_space
from harness.files.untrusted import read_as
from harness.machine.load import waiting_of
from harness.machine.memory import at_rest, device_bytes, process_bytes, reset_peak
from harness.machine.process import end_with_parent
from harness.machine.processor import threads_asked
from harness.measuring.measure import measurement_of
from harness.planning.cells import PlannedStage
from harness.planning.spec import limit_for
from harness.records import columns
from harness.records.conditions import ModelReference
from harness.records.environment import environment
from harness.records.record import Cost, Fidelity, Measurement, RunRecord, StageRecord, TaskScore, write
from harness.running.job import CellJob

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from harness.scoring.backend import Backend
    from harness.scoring.items import ItemRow


def main(argv: list[str]) -> int:
    """Run one cell; 0 when its record says success, 1 when it says failed."""
    speak = _own_standard_output()
    end_with_parent(int(argv[2]))
    faulthandler.enable(file=sys.stderr)  # where native code crashes, the log says in which of our lines
    job = read_as(Path(argv[1]), CellJob)
    began = time.monotonic()

    def progress(one: Progress) -> None:
        speak(asdict(one))

    try:
        record = _compute(job, progress, began)
    except Exception as problem:  # noqa: BLE001  a method may raise anything; the other cells must go on
        reason, trace = _reason(job, problem)
        record = _record(job, began, status="skipped" if isinstance(problem, Skipped) else "failed", reason=reason, trace=trace)
    _leave_card(job, record)  # first: nobody comes back to a cell that has its record
    write(job.cell_folder / "record.json", record)
    return 0 if record.status == "success" else 1


def _leave_card(job: CellJob, record: RunRecord) -> None:
    """Put a card beside the student's weights; a row that was scored is not lost for want of it."""
    from harness.records.model_card import write_card

    folder = job.stage_folders[-1] / "student" if job.stage_folders else None
    if record.status == "success" and folder is not None and folder.is_dir():
        try:
            write_card(folder, record)
        except OSError as problem:
            print(f"no model card: {problem}", file=sys.stderr)


def _reason(job: CellJob, problem: Exception) -> tuple[str, str]:
    """Return one line for the table and the traceback for the record."""
    if isinstance(problem, (CellFailed, HarnessError)):
        return str(problem), ""
    if full := no_space(problem, _places(job)):
        return f"{full}; free some and run again", ""
    if isinstance(problem, MemoryError) or says_no_memory(str(problem)):
        return f"out of memory {_at_what(job)} ({' '.join(str(problem).split())[:300]})", traceback.format_exc()
    return (
        f"{type(problem).__name__}: {str(problem).strip().splitlines()[0] if str(problem).strip() else 'no message'}",
        traceback.format_exc(),
    )


def _places(job: CellJob) -> dict[str, Path]:
    """Return the folders that a cell writes to, by what the user calls them."""
    return {"--out": job.cell_folder, "--cache": job.cache}


def _at_what(job: CellJob) -> str:
    """Say what a cell that ran out of memory was at, and what makes that smaller: the first stage without a student, else scoring."""
    unmade = (stage for stage, folder in zip(job.cell.stages, job.stage_folders, strict=True) if not (folder / "done.json").exists())
    stage = next(unmade, None)
    if stage is None:
        return "in scoring; type a smaller --batch-size"
    if not stage.trains:
        return f"in {stage.method}; give a smaller model, or a larger device"
    name = stage.method
    return f"in training; type --set {name}.micro_batch_size=1 and --set {name}.gradient_checkpointing=true, or give a smaller --student"


def _own_standard_output() -> Callable[[dict[str, Any]], None]:
    """Keep the real standard output for our lines; send everybody else's to the log (standard error)."""
    stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    last = 0.0

    def speak(message: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 0.1 and message.get("done") != message.get("total"):
            return
        last = now
        stream.write(json.dumps(message) + "\n")

    return speak


def _compute(job: CellJob, progress: Callable[[Progress], None], began: float) -> RunRecord:
    import torch

    from harness.machine.memory import release_memory
    from harness.measuring.measure import per_problem
    from harness.models.language_model import open_model
    from harness.scoring.items import write_rows

    progress(Progress(stage="start", done=0, total=1))
    torch.set_num_threads(job.threads)
    tasks = _tasks(job.conditions.task_names, job.include_path)
    render, show = _renderer(job)
    source = DataSource(folder=job.data_dir, render=render, show=show)
    student, cost, stages = _student(job, tasks, source, progress)
    release_memory(job.conditions.device)  # what training left with the allocator would be missing for the answers' keys and values
    if job.cell.trains and (without := untrained(tasks, source)):
        cost = cost.model_copy(update={"notes": {**cost.notes, "tasks_without_split": without}})
    with _backend(job, student, job.conditions.dtype) as backend:
        scores, rows = _scored(job, backend, tasks, source, progress)
    opened = (
        backend.opened
        if job.work.backend == "transformers"
        else open_model(student, device=job.conditions.device, dtype=job.conditions.dtype)
    )
    write_rows(job.cell_folder / "samples.jsonl", rows)
    peak = process_bytes("VmHWM")  # of training and scoring together: before the base is opened beside the student
    parameters = _parameters(job, opened)
    measurements = tuple(per_problem(scores))
    fidelity, remarks = _compared(job, tasks, opened, rows, progress)
    measurements += remarks
    if job.cell.is_teacher:
        _remember(job, tasks, opened, rows)
    path = backend.path
    del opened, backend
    release_memory(job.conditions.device)
    if job.cell.is_teacher and job.work.noise:
        measurements += _noise_floor(job, tasks, source, rows, progress)
    if job.measure:
        measurements += _measured(job, student, threads_asked(), progress)  # timing keeps its own rule
    if peak is not None:
        measurements += (measurement_of(columns.PROCESS_PEAK, peak),)
    return _record(
        job,
        began,
        status="success",
        path=path,
        student=_reference(student, parameters=parameters),
        scores=tuple(scores),
        fidelity=fidelity,
        measurements=measurements,
        cost=cost,
        stages=_with_last_scores(stages, scores) if len(stages) > 1 else (),
        data_digest=_data_digest(job, tasks, source) if job.cell.trains else "",
        environment=environment(
            device=job.conditions.device,
            dtype=job.conditions.dtype,
            threads=job.threads,
            waiting=waiting_of(os.environ),
            cores_in_use=job.cores_in_use,
        ),
    )


def score_again(job: CellJob) -> "list[TaskScore]":
    """Score a finished cell's model once more, from nothing: no answer is read from the journal, nothing is written."""
    from harness.models.checkpoint import describe

    tasks = _tasks(job.conditions.task_names, job.include_path)
    render, show = _renderer(job)
    source = DataSource(folder=job.data_dir, render=render, show=show)
    folder = job.stage_folders[-1] / "student" if job.stage_folders else None
    student = describe(folder, name=job.cell.label) if folder is not None else job.teachers[job.cell.teacher].checkpoint()
    anew = job.model_copy(update={"force": True})
    with _backend(anew, student, anew.conditions.dtype) as backend:
        scores, _ = _scored(anew, backend, tasks, source, lambda progress: None)
    return scores


@contextmanager
def _backend(job: CellJob, checkpoint: Checkpoint, dtype: str, *, few: int | None = None) -> "Iterator[Backend]":
    """Open what scores a model, `few` rows at once where that is given; vLLM's engine gives its memory back at the end."""
    from harness.models.language_model import open_model
    from harness.scoring.transformers_backend import Transformers

    if job.work.backend == "transformers":
        pack = few * _TOKENS_OF_FEW if few else None
        yield Transformers(open_model(checkpoint, device=job.conditions.device, dtype=dtype), few or job.work.batch_size, pack=pack)
        return
    from harness.scoring.vllm_backend import Vllm

    engine = Vllm(checkpoint, dtype=dtype, device=job.conditions.device)
    try:
        yield engine
    finally:
        engine.close()


def _scored(
    job: CellJob, backend: "Backend", tasks: dict[str, Task], source: DataSource, progress: Callable[[Progress], None]
) -> "tuple[list[TaskScore], list[ItemRow]]":
    from harness.scoring.score import score_task

    # A student with the teacher's own bytes is asked all the same: its row shows that scoring twice changes nothing.
    copy = bool(job.cell.student_key) and backend.opened.checkpoint.digest in {one.digest for one in job.teachers}
    cache = None if job.work.force else job.cell_folder if copy else job.cache  # --force asks everything anew
    scores: list[TaskScore] = []
    rows: list[ItemRow] = []
    for task in tasks.values():
        score, items = score_task(
            backend.opened, task, source, backend=backend, limit=limit_for(job.conditions.limit, task.name), progress=progress, cache=cache,
            prompting=job.conditions.prompting,
        )  # fmt: skip
        scores.append(score)
        rows += items
    return scores, rows


def _measured(job: CellJob, student: Checkpoint, threads: int, progress: Callable[[Progress], None]) -> tuple[Measurement, ...]:
    """Time and weigh the student beside its teacher, in processes of their own; this one holds no model any more."""
    from harness.files.writing import write_whole
    from harness.machine.memory import release_memory
    from harness.measuring.measure import Settings, Subject, measure
    from harness.measuring.scenario import parse_grid

    release_memory(job.conditions.device)
    settings = Settings(
        grid=parse_grid(job.work.grid or ""),
        rounds=job.work.rounds,
        device=job.conditions.device,
        dtype=job.conditions.dtype,
        threads=threads,
    )
    try:
        found = measure(Subject(student), Subject(job.teachers[0].checkpoint()), settings, folder=job.cell_folder, progress=progress)
    except (CellFailed, HarnessError) as problem:  # a scored row is not thrown away for want of its timing
        return (_untimed(str(problem)),)
    write_whole(job.cell_folder / "timings.json", json.dumps({**found.raw, "skipped": found.skipped}))
    skipped = tuple(_untimed(reason) for reason in found.skipped)
    return found.measurements + skipped


def _untimed(reason: str) -> Measurement:
    return Measurement(name="skipped_scenario", value=0, unit="", higher_is_better=False, remark=f"not timed: {reason}")


NO_ANSWERS = "the teacher's row had none to compare with"
_TEACHER_READS = "teacher-reads.safetensors"  # in the teacher's cell, beside its samples


def _remember(job: CellJob, tasks: dict[str, Task], teacher: "LanguageModel", rows: "list[ItemRow]") -> None:
    """Keep what the teacher reads for its students; a student whose teacher could not keep it opens the teacher itself."""
    from harness.scoring.fidelity import remember

    written = [name for name, task in tasks.items() if task.kind == "generate"]
    try:
        remember(job.cell_folder / _TEACHER_READS, teacher, rows, written)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        print(f"what the teacher reads is not kept: {_reason(job, problem)[0]}", file=sys.stderr)


def _compared(
    job: CellJob, tasks: dict[str, Task], student: "LanguageModel", rows: "list[ItemRow]", progress: Callable[[Progress], None]
) -> tuple[tuple[Fidelity, ...], tuple[Measurement, ...]]:
    """Return the distances to the teacher, or a remark why there are none: a row that is scored stands without them.

    Numbers that are none are another thing: they fail the row.
    """
    if job.teacher_samples is not None and not job.teacher_samples.exists():
        return (), (_undistanced(NO_ANSWERS),)
    try:
        return _fidelity(job, tasks, student, rows, progress), ()
    except (CellFailed, HarnessError):
        raise
    except Exception as problem:  # noqa: BLE001  out of memory beside the teacher, most likely
        traceback.print_exc()
        return (), (_undistanced(_reason(job, problem)[0]),)


def _undistanced(reason: str) -> Measurement:
    """Return what stands in a record in place of the distances to the teacher."""
    remark = f"its distance to the teacher was not measured: {reason}"
    return Measurement(name="skipped_fidelity", value=0, unit="", higher_is_better=False, remark=remark)


def _fidelity(
    job: CellJob, tasks: dict[str, Task], student: "LanguageModel", rows: "list[ItemRow]", progress: Callable[[Progress], None]
) -> tuple[Fidelity, ...]:
    """Compare distributions with the teacher's on every task, where both speak the same vocabulary."""
    from harness.files.untrusted import Unreadable
    from harness.models.language_model import open_model, student_tokenizer
    from harness.scoring.fidelity import choice_fidelity, reader, reads, recall, texts_to_read, token_fidelity
    from harness.scoring.items import read_rows

    checkpoint = job.teachers[0].checkpoint()
    if job.teacher_samples is None:
        return ()
    if student.tokenizer.get_vocab() != student_tokenizer(checkpoint).get_vocab():
        return ()
    try:
        theirs = read_rows(job.teacher_samples)
    except Unreadable as problem:
        raise CellFailed(f"the teacher's answers are damaged ({problem}); run again and its row is made anew") from problem
    teacher: LanguageModel | None = None  # opened only where its own cell could not keep what it read
    found: list[Fidelity | None] = []
    for name, task in tasks.items():
        progress(Progress(stage="compare", done=len(found), total=len(tasks), unit="tasks", detail=name))
        before = [row for row in theirs if row.task == name]
        if task.kind == "choose":
            found.append(choice_fidelity(name, before, [row for row in rows if row.task == name]))
        elif task.kind == "generate":
            kept, width = job.teacher_samples.with_name(_TEACHER_READS), student.vocabulary
            known = recall(kept, checkpoint, name, device=job.conditions.device, width=width)
            if known is None:
                teacher = teacher or open_model(checkpoint, device=job.conditions.device, dtype=job.conditions.dtype)
                known = reads(reader(teacher), texts_to_read(teacher, name, before), width=width)
            found.append(token_fidelity(name, known, reader(student)))
    return tuple(one for one in found if one is not None)


def _noise_floor(
    job: CellJob, tasks: dict[str, Task], source: DataSource, rows: "list[ItemRow]", progress: Callable[[Progress], None]
) -> tuple[Measurement, ...]:
    """Score the teacher against itself on a sample: flips by rounding, that no student can be blamed for.

    It never takes more memory than the score did: a float32 teacher is asked in bfloat16, any other at its own dtype a few rows at
    once, which sums in another order. It is no part of the score: whatever stops it is a remark beside a row that stands.
    """
    from harness.machine.memory import release_memory

    measured: list[Measurement] = []
    asked = [name for name, task in tasks.items() if task.kind != "perplexity"]
    try:
        for measurement in _flips(job, {name: tasks[name] for name in asked}, source, rows, progress):
            measured.append(measurement)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        reason, _ = _reason(job, problem)
        for name in asked[len(measured) :]:
            measured.append(measurement_of(columns.FLIPS, 0, name, remark=f"not measured: {reason}"))
    release_memory(job.conditions.device)
    return tuple(measured)


FEW_ROWS = 8  # scored at once for the noise floor: few enough that a GPU takes other kernels than for a full batch
_TOKENS_OF_FEW = 64  # of a packed forward, for each of these rows


def _flips(
    job: CellJob, tasks: dict[str, Task], source: DataSource, rows: "list[ItemRow]", progress: Callable[[Progress], None]
) -> Iterator[Measurement]:
    from harness.scoring.outcomes import changed
    from harness.scoring.score import score_task

    noise, halved = job.work.noise, job.conditions.dtype == "float32"
    dtype = "bfloat16" if halved or job.work.backend == "transformers" else "float32"
    few = None if halved or job.work.backend != "transformers" else 1 if job.work.batch_size == FEW_ROWS else FEW_ROWS
    condition = f"{dtype}, {few} rows at once" if few else f"{dtype} against {job.conditions.dtype}"
    with _backend(job, job.teachers[0].checkpoint(), dtype, few=few) as backend:
        for name, task in tasks.items():
            figure, again = score_task(
                backend.opened, task, source, backend=backend, limit=min(noise, limit_for(job.conditions.limit, name) or noise),
                progress=progress, prompting=job.conditions.prompting,
            )  # fmt: skip
            flips = changed([row for row in rows if row.task == name], again, figure.primary)
            share = sum(flips) / len(flips)
            yield measurement_of(columns.FLIPS, share, name, values=(float(len(flips)),), condition=condition)


def _renderer(job: CellJob) -> tuple[Callable[[Example], Example], Callable[[Any, str], str]]:
    """Return how training items are shown to the student, and prompts to a model by its tokenizer: as the scorer shows them."""
    from harness.models.rendering import renderer

    return renderer(job.conditions.prompting, job.student_base.checkpoint())


def _tasks(names: tuple[str, ...], include_path: Path | None) -> dict[str, Task]:
    from harness import catalog

    return {name: catalog.load_task(name, include_path=include_path) for name in names}


def _data_digest(job: CellJob, tasks: dict[str, Task], source: DataSource) -> str:
    from harness.data.examples import examples_of

    return examples_digest(examples_of(tasks, "train", source, rows=job.conditions.budget_rows))


def _parameters(job: CellJob, opened: "LanguageModel") -> int:
    """Count a student's parameters; one that was packed has as many as what was packed."""
    from harness.models.shape import parameters_on_disk

    if job.cell.stages and job.cell.stages[-1].family == "quantization":
        before = job.stage_folders[-2] / "student" if len(job.stage_folders) > 1 else job.teachers[0].path
        return parameters_on_disk(before)
    return sum(p.numel() for p in opened.model.parameters())


def _student(
    job: CellJob, tasks: dict[str, Task], source: DataSource, progress: Callable[[Progress], None]
) -> tuple[Checkpoint, Cost, tuple[StageRecord, ...]]:
    """Return the cell's student: the teacher itself, or what the stages of its chain make of it, each made once under its key."""
    if not job.cell.stages:
        return job.teachers[job.cell.teacher].checkpoint(), Cost(), ()
    told: list[StageRecord] = []
    student, total = None, Cost()
    for at, (stage, folder) in enumerate(zip(job.cell.stages, job.stage_folders, strict=True)):
        student = _staged(job, stage, folder, student, tasks, source, progress)
        written = folder / "cost.json"
        cost = read_as(written, Cost) if written.exists() else Cost()
        total = cost if at == 0 else total + cost
        told.append(
            StageRecord(
                label=stage.label, method=stage.method, key=stage.key, digest=student.digest, weight_bytes=student.bytes_on_disk, cost=cost,
                simulated=stage.simulated, scores=scores_of(job.stage_records[at]),
            )
        )  # fmt: skip
    assert student is not None
    return student, total, tuple(told)


def _with_last_scores(stages: tuple[StageRecord, ...], scores: "list[TaskScore]") -> tuple[StageRecord, ...]:
    """Fill in what the last stage scored: the row's own scores."""
    return (*stages[:-1], stages[-1].model_copy(update={"scores": {score.task: score.value for score in scores}}))


def scores_of(path: Path | None) -> dict[str, float]:
    """Return what a stage's own row scored, task by task; nothing where it was not scored."""
    from harness.records.record import BadRecord, read

    try:
        return {score.task: score.value for score in read(path).scores} if path is not None and path.exists() else {}
    except BadRecord:
        return {}


class _Done(BaseModel):
    """What `done.json` says of a student that was made: where it lies, of what, its digest, and that of what it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    parents: tuple[str, ...]
    digest: str
    cost: str  # digest of cost.json; "" where there was none


def _made_before(folder: Path, progress: Callable[[Progress], None]) -> _Done | None:
    """Return what stands of a student that was made before; None where there is none, or its files are not as they were written: said."""
    from harness.files.digests import file_digest
    from harness.files.untrusted import Unreadable, checked
    from harness.files.writing import read_signed

    done, cost = folder / "done.json", folder / "cost.json"
    if not done.exists():
        return None
    try:
        told = checked(read_signed(done), _Done, str(done))
        if (file_digest(cost) if cost.exists() else "") != told.cost:
            raise Unreadable(f"{cost}: its digest does not match")
        if not (folder / told.path).is_dir() or Path(told.path).name != told.path:
            raise Unreadable(f"{folder / told.path}: no such folder")
    except Unreadable as problem:
        progress(Progress(stage="make", done=0, total=1, detail=f"{problem}; the student is made again"))
        return None
    return told


def _staged(
    job: CellJob, stage: PlannedStage, folder: Path, parent: Checkpoint | None, tasks: dict[str, Task], source: DataSource,
    progress: Callable[[Progress], None],
) -> Checkpoint:  # fmt: skip
    """Return what one stage makes of its parent (of the student's recipe or the teacher, for the first), made before or now."""
    from harness import catalog
    from harness.files.digests import file_digest
    from harness.files.writing import write_signed
    from harness.models.checkpoint import describe

    teachers = tuple(one.checkpoint() for one in job.teachers)
    if parent is None and stage.starts_from == "teacher":
        parent = teachers[0]
    start = parent or job.student_base.checkpoint()
    done = folder / "done.json"
    told = _made_before(folder, progress)
    if told is not None and parent is not None and parent.digest not in told.parents:
        told = None  # the stage before was made anew, in other bytes
    if told is None:
        done.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        _forget_peak(job.conditions.device)  # each stage says its own
        registry = catalog.methods()
        method = registry.build(stage.method, stage.settings)
        if stage.trains:
            _refuse_what_cannot_fit(job, stage, method, start, job.conditions.student_recipe if parent is None else "")
        made = method.compress(
            Job(
                teachers=teachers,
                student=job.conditions.student_recipe if parent is None else str(parent.path),
                student_base=start,
                tasks=tasks,
                source=source,
                budget=Budget(seen_tokens=job.conditions.budget_tokens, rows=job.conditions.budget_rows),
                seed=job.cell.seed or 0,
                workdir=folder,
                cache=job.cache,
                device=job.conditions.device,
                dtype=job.conditions.dtype,
                teacher_weights=job.conditions.teacher_weights,
                tune=job.conditions.tuned,
                track=job.work.track,
                progress=progress,
            )
        )
        _refuse_no_student(stage.method, made, folder)
        cost = folder / "cost.json"
        told = _Done(path=made.path.name, parents=made.parents, digest=made.digest, cost=file_digest(cost) if cost.exists() else "")
        write_signed(done, told.model_dump())
    if stage.trains:
        _forget_state(folder)  # once the student has its mark: without either, training would begin anew
    student = describe(folder / told.path, name=stage.label, parents=told.parents)
    if student.digest != told.digest:
        done.unlink()
        raise CellFailed(f"the student in {folder} is damaged (its digest changed); run again and it is made anew")
    _changed_something(stage, student, (start, *teachers))
    return student


def _forget_state(folder: Path) -> None:
    """Remove what only a resumed training needs, also where a process was killed before it could."""
    from harness import catalog

    catalog.forget_training(folder)


def _refuse_no_student(method: str, made: object, folder: Path) -> None:
    """Refuse what a method returned where it is no student that it saved in its own folder."""
    way_out = "save it in job.workdir / 'student' and return harness.models.checkpoint.describe(folder, name=...)"
    if not isinstance(made, Checkpoint):
        shown = " ".join(repr(made).split())[:60]
        raise CellFailed(f"{method}.compress returned {_a(type(made).__name__)} ({shown}), and must return a Checkpoint: {way_out}")
    if made.path.resolve().parent != folder.resolve() or not (made.path / "config.json").is_file():
        raise CellFailed(f"{method}.compress returned a Checkpoint whose path, {made.path}, is no model folder in job.workdir: {way_out}")


def _a(name: str) -> str:
    """Return a type's name behind its article; None stands alone."""
    return "None" if name == "NoneType" else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _refuse_what_cannot_fit(job: CellJob, stage: PlannedStage, method: Any, start: Checkpoint, recipe: str) -> None:
    """Fail before a teacher is asked anything where what training holds whatever its batches is more than the device has."""
    from harness.estimating.hardware import GIB
    from harness.estimating.workload import cut_parameters, training_bytes, work_of
    from harness.models.shape import STATE_BYTES, Shape, parameters_on_disk
    from harness.models.shaping import parse_recipe

    work, folders, memory = work_of(method), [one.path for one in job.teachers], device_bytes(job.conditions.device)
    if training_bytes(work, parameters_on_disk(start.path), folders, job.conditions.dtype) <= memory:
        return  # before any cut
    cut, whole = parse_recipe(recipe), Shape.of_folder(start.path)
    parameters = cut_parameters(start.path, cut.shape_of(whole) if cut else whole)
    need = training_bytes(work, parameters, folders, job.conditions.dtype)
    if need > memory:
        beside = ", and the teacher beside it" if need > STATE_BYTES * parameters else ""
        smaller = "a smaller --student" if start.digest == job.student_base.digest else "a student that was cut further before"
        raise CellFailed(
            f"{stage.method} cannot be trained here: {STATE_BYTES} bytes x {parameters:,.0f} parameters{beside} are {need / GIB:,.1f} GiB, "
            f"and this {job.conditions.device} has {memory / GIB:,.1f} GiB; give {smaller}"
        )


def _forget_peak(device: str) -> None:
    at_rest(device)
    if not device.startswith("cuda"):
        reset_peak()


def _changed_something(stage: PlannedStage, student: Checkpoint, others: tuple[Checkpoint, ...]) -> None:
    """Refuse a method that trained, cut or packed nothing: it would return the teacher and look brilliant."""
    from harness.models.checkpoint import same_weights

    works = stage.trains or stage.family != "control"
    if works and any(same_weights(student.path, path) for path in {one.path for one in others}):
        raise CellFailed(f"{stage.label} changed no weight: its student is, number by number, a model that it started from")


def _reference(checkpoint: Checkpoint, parameters: int | None = None) -> ModelReference:
    return ModelReference(
        name=checkpoint.name, digest=checkpoint.digest, parameters=parameters, weight_bytes=checkpoint.bytes_on_disk or None,
        note=checkpoint.note, parents=checkpoint.parents,
    )  # fmt: skip


def _record(job: CellJob, began: float, *, path: str = "", **fields: Any) -> RunRecord:
    cell = job.cell
    return RunRecord(
        key=cell.key,
        label=cell.label,
        method=cell.method,
        family=cell.family,
        is_control=cell.is_control,
        controls=cell.controls,
        handed_on=cell.handed_on,
        trains=cell.trains,
        starts_from=cell.stages[0].starts_from if cell.stages else "",
        settings=cell.settings,
        conditions=job.conditions,
        seed=cell.seed,
        path=path,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=round(time.monotonic() - began, 3),
        **fields,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
