"""The student of a cell: each stage of its chain is made once under its key, and found again by
whoever needs it. No torch at import.

A student that was made lies in its stage's folder beside `done.json`, which says of what it was
made and what its digests are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from harness import catalog
from harness.contract import Budget, Checkpoint, Job, Progress
from harness.data.examples import untrained_tasks
from harness.errors import CellFailed
from harness.files.digests import file_digest
from harness.files.untrusted import Unreadable, read_as, validate_as
from harness.files.writing import read_signed, write_signed
from harness.machine.memory import baseline_bytes, device_bytes, reset_peak
from harness.models.checkpoint import describe, same_weights
from harness.planning.cells import PlannedStage
from harness.records.record import BadRecord, Cost, StageRecord, read_record
from harness.running.job import CellJob
from harness.running.loaded import LoadedJob


class Student(NamedTuple):
    """What is scored in a cell, what it cost to make, and what each stage of it was."""

    checkpoint: Checkpoint
    cost: Cost
    stages: tuple[StageRecord, ...]  # none in a teacher's row


def student_of_cell(loaded: LoadedJob) -> Student:
    """Return the cell's student: the teacher itself, or what the stages of its chain make of it."""
    job = loaded.job
    if not job.cell.stages:
        return Student(loaded.teachers[job.cell.teacher], Cost(), ())
    checkpoint: Checkpoint | None = None
    records: list[StageRecord] = []
    total = Cost()
    for at, (stage, folder) in enumerate(zip(job.cell.stages, job.stage_folders, strict=True)):
        checkpoint = _StageBuilder.of(loaded, stage, folder, checkpoint).student()
        cost = _read_cost(folder)
        total = cost if at == 0 else total + cost
        records.append(_stage_record(stage, checkpoint, cost, job.stage_records[at]))
    assert checkpoint is not None
    return Student(checkpoint, total, tuple(records))


def with_untrained_tasks(loaded: LoadedJob, cost: Cost) -> Cost:
    """Note beside the cost of training which tasks gave no item to train on."""
    if loaded.job.cell.trains and (names := untrained_tasks(loaded.tasks, loaded.source)):
        return cost.model_copy(update={"notes": {**cost.notes, "tasks_without_split": names}})
    return cost


def _read_cost(folder: Path) -> Cost:
    path = folder / "cost.json"
    return read_as(path, Cost) if path.exists() else Cost()


def _stage_record(
    stage: PlannedStage, checkpoint: Checkpoint, cost: Cost, own_row: Path | None
) -> StageRecord:
    return StageRecord(
        label=stage.label,
        method=stage.method,
        key=stage.key,
        digest=checkpoint.digest,
        weight_bytes=checkpoint.bytes_on_disk,
        cost=cost,
        simulated=stage.simulated,
        scores=recorded_scores(own_row),
    )


def recorded_scores(path: Path | None) -> dict[str, float]:
    """Return what a stage's own row scored, task by task; nothing where it was not scored."""
    try:
        return (
            {score.task: score.value for score in read_record(path).scores}
            if path is not None and path.exists()
            else {}
        )
    except BadRecord:
        return {}


class _DoneMark(BaseModel):
    """What `done.json` says of a student that was made: where it lies, of what, its digest, and
    that of what it took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    parents: tuple[str, ...]
    digest: str
    cost: str  # digest of cost.json; "" where there was none


@dataclass(frozen=True)
class _StageBuilder:
    """One stage of a chain: what it starts from, and the folder where its student is looked for or
    made.
    """

    loaded: LoadedJob
    stage: PlannedStage
    folder: Path
    parent: Checkpoint | None  # the stage before, or the teacher; None: the student's recipe

    @classmethod
    def of(
        cls, loaded: LoadedJob, stage: PlannedStage, folder: Path, before: Checkpoint | None
    ) -> "_StageBuilder":
        """Return the work of a stage behind the student of the stage before; a chain's first stage
        has none before it.
        """
        from_teacher = before is None and stage.starts_from == "teacher"
        return cls(loaded, stage, folder, loaded.teachers[0] if from_teacher else before)

    @property
    def start(self) -> Checkpoint:
        """The model whose weights the student's are made of."""
        return self.parent or self.loaded.job.student_base.checkpoint()

    @property
    def recipe(self) -> str:
        """What the student is cut by; "" where it is its parent's shape."""
        return self.loaded.job.conditions.student_recipe if self.parent is None else ""

    def student(self) -> Checkpoint:
        """Return the stage's student, made before or now. Raises `CellFailed` where its files are
        not as they were written.
        """
        done = self._made_before() or self._make()
        if self.stage.trains:
            # once the student has its mark: without either, training would begin anew
            catalog.forget_training(self.folder)
        student = describe(self.folder / done.path, name=self.stage.label, parents=done.parents)
        if student.digest != done.digest:
            (self.folder / "done.json").unlink()
            raise CellFailed(
                f"the student in {self.folder} is damaged (its digest changed); run again and it "
                "is made anew"
            )
        _refuse_unchanged(self.stage, student, (self.start, *self.loaded.teachers))
        return student

    def _made_before(self) -> _DoneMark | None:
        """Return what stands of a student that was made before; None where its parent was made anew
        since, in other bytes.
        """
        done = _valid_mark(self.folder, self.loaded.progress)
        stale = (
            done is not None and self.parent is not None and self.parent.digest not in done.parents
        )
        return None if stale else done

    def _make(self) -> _DoneMark:
        """Let the method make the student, and mark it as done."""
        done = self.folder / "done.json"
        done.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        _reset_peak_memory(self.loaded.job.conditions.device)  # each stage says its own
        method = catalog.methods().build(self.stage.method, self.stage.settings)
        if self.stage.trains:
            _refuse_too_large(self.loaded.job, self.stage, method, self.start, self.recipe)
        student = method.compress(self._method_job())
        _refuse_invalid_student(self.stage.method, student, self.folder)
        cost = self.folder / "cost.json"
        digest = file_digest(cost) if cost.exists() else ""
        mark = _DoneMark(
            path=student.path.name, parents=student.parents, digest=student.digest, cost=digest
        )
        write_signed(done, mark.model_dump())
        return mark

    def _method_job(self) -> Job:
        """Return what the method is given."""
        loaded, job, conditions = self.loaded, self.loaded.job, self.loaded.job.conditions
        return Job(
            teachers=loaded.teachers,
            student=self.recipe if self.parent is None else str(self.parent.path),
            student_base=self.start,
            tasks=loaded.tasks,
            source=loaded.source,
            budget=Budget(seen_tokens=conditions.budget_tokens, rows=conditions.budget_rows),
            seed=job.cell.seed or 0,
            workdir=self.folder,
            cache=job.cache,
            device=conditions.device,
            dtype=conditions.dtype,
            teacher_weights=conditions.teacher_weights,
            tune=conditions.tuned,
            track=job.work.track,
            progress=loaded.progress,
        )


def _valid_mark(folder: Path, progress: Callable[[Progress], None]) -> _DoneMark | None:
    """Return what stands of a student that was made before; None where there is none, or its files
    are not as they were written: said.
    """
    if not (folder / "done.json").exists():
        return None
    try:
        return _read_mark(folder)
    except Unreadable as problem:
        progress(
            Progress(stage="make", done=0, total=1, detail=f"{problem}; the student is made again")
        )
        return None


def _read_mark(folder: Path) -> _DoneMark:
    """Read a student's mark. Raises `Unreadable` where it, its cost or its folder is not as it was
    written.
    """
    path, cost = folder / "done.json", folder / "cost.json"
    done = validate_as(read_signed(path), _DoneMark, str(path))
    if (file_digest(cost) if cost.exists() else "") != done.cost:
        raise Unreadable(f"{cost}: its digest does not match")
    if not (folder / done.path).is_dir() or Path(done.path).name != done.path:
        raise Unreadable(f"{folder / done.path}: no such folder")
    return done


def _refuse_invalid_student(method: str, made: object, folder: Path) -> None:
    """Refuse what a method returned where it is no student that it saved in its own folder."""
    way_out = (
        "save it in job.workdir / 'student' and return harness.models.checkpoint.describe(folder, "
        "name=...)"
    )
    if not isinstance(made, Checkpoint):
        shown = " ".join(repr(made).split())[:60]
        raise CellFailed(
            f"{method}.compress returned {_with_article(type(made).__name__)} ({shown}), and must "
            f"return a Checkpoint: {way_out}"
        )
    if made.path.resolve().parent != folder.resolve() or not (made.path / "config.json").is_file():
        raise CellFailed(
            f"{method}.compress returned a Checkpoint whose path, {made.path}, is no model folder "
            f"in job.workdir: {way_out}"
        )


def _with_article(name: str) -> str:
    """Return a type's name behind its article; None stands alone."""
    return "None" if name == "NoneType" else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _refuse_too_large(
    job: CellJob, stage: PlannedStage, method: Any, start: Checkpoint, recipe: str
) -> None:
    """Fail before a teacher is asked anything where what training holds whatever its batches is
    more than the device has.
    """
    from harness.estimating.hardware import GIB
    from harness.estimating.workload import cut_parameters, training_bytes, workload_of
    from harness.models.shape import TRAINING_BYTES_PER_WEIGHT, Shape, parameters_on_disk
    from harness.models.shaping import parse_student_cut

    work, folders, memory = (
        workload_of(method),
        [one.path for one in job.teachers],
        device_bytes(job.conditions.device),
    )
    if (
        training_bytes(work, parameters_on_disk(start.path), folders, job.conditions.dtype)
        <= memory
    ):
        return  # before any cut
    cut, whole = parse_student_cut(recipe), Shape.of_folder(start.path)
    parameters = cut_parameters(start.path, cut.shape_of(whole) if cut else whole)
    need = training_bytes(work, parameters, folders, job.conditions.dtype)
    if need > memory:
        beside = (
            ", and the teacher beside it" if need > TRAINING_BYTES_PER_WEIGHT * parameters else ""
        )
        smaller = (
            "a smaller --student"
            if start.digest == job.student_base.digest
            else "a student that was cut further before"
        )
        raise CellFailed(
            f"{stage.method} cannot be trained here: {TRAINING_BYTES_PER_WEIGHT} bytes x "
            f"{parameters:,.0f} parameters{beside} are {need / GIB:,.1f} GiB, "
            f"and this {job.conditions.device} has {memory / GIB:,.1f} GiB; give {smaller}"
        )


def _reset_peak_memory(device: str) -> None:
    baseline_bytes(device)
    if not device.startswith("cuda"):
        reset_peak()


def _refuse_unchanged(
    stage: PlannedStage, student: Checkpoint, others: tuple[Checkpoint, ...]
) -> None:
    """Refuse a method that trained, cut or packed nothing: it would return the teacher and look
    brilliant.
    """
    works = stage.trains or stage.family != "control"
    if works and any(same_weights(student.path, path) for path in {one.path for one in others}):
        raise CellFailed(
            f"{stage.label} changed no weight: its student is, number by number, a model that it "
            "started from"
        )
