"""Makes the student of a cell, stage by stage, or finds the students in the store.

Each stage is computed once under its key, and used by every cell that needs it. A finished student
is in its stage's folder beside `done.json`, which contains its parents and digests. No torch at
import.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from harness.models.cache_format import stored_cache_format
from harness.models.checkpoint import describe, same_weights
from harness.planning.cells import PlannedStage
from harness.records.record import BadRecord, Cost, SharedCost, StageRecord, read_record
from harness.running.job import CellJob
from harness.running.loaded import LoadedJob


class Student(NamedTuple):
    """The model that a cell scores, what it cost to make, and a record of each stage."""

    checkpoint: Checkpoint
    cost: Cost
    stages: tuple[StageRecord, ...]  # empty where nothing was made here


def student_of_cell(loaded: LoadedJob) -> Student:
    """Return the student that a cell's stages make.

    For a teacher's row that is the teacher itself, for a row from outside its checkpoint.
    """
    job = loaded.job
    if job.cell.checkpoint is not None:
        return Student(job.cell.checkpoint.checkpoint(), Cost(), ())
    if not job.cell.stages:
        return Student(loaded.teachers[job.cell.teacher], Cost(), ())
    checkpoint: Checkpoint | None = None
    records: list[StageRecord] = []
    total = Cost()
    for stage, folder, record_path in zip(
        job.cell.stages, job.stage_folders, job.stage_records, strict=True
    ):
        checkpoint = _StageBuilder.of(loaded, stage, folder, checkpoint).student()
        cost = _read_cost(folder)
        total = total + cost if records else cost
        records.append(_stage_record(stage, checkpoint, cost, record_path))
    assert checkpoint is not None
    return Student(checkpoint, total, tuple(records))


def with_data_notes(loaded: LoadedJob, cost: Cost) -> Cost:
    """Return the cost with notes on the row's data and recipes.

    They name the user's own data, or tasks without training items, and say why a plan chose
    another recipe than the first.
    """
    if not loaded.job.cell.trains:
        return cost
    if recipes := loaded.job.cell.recipe_notes:
        cost = cost.model_copy(update={"notes": {**cost.notes, "recipe_chosen": dict(recipes)}})
    if own_data := loaded.own_data_notes():
        notes = {**cost.notes, "train_data": own_data}
        writing = (SharedCost(**fields) for fields in loaded.writing_costs())
        return cost.model_copy(update={"notes": notes, "shared": (*cost.shared, *writing)})
    if names := untrained_tasks(loaded.tasks, loaded.source):
        return cost.model_copy(update={"notes": {**cost.notes, "tasks_without_split": names}})
    return cost


def _read_cost(folder: Path) -> Cost:
    path = folder / "cost.json"
    return read_as(path, Cost) if path.exists() else Cost()


def _stage_record(
    stage: PlannedStage, checkpoint: Checkpoint, cost: Cost, record_path: Path | None
) -> StageRecord:
    return StageRecord(
        label=stage.label,
        method=stage.method,
        key=stage.key,
        digest=checkpoint.digest,
        weight_bytes=checkpoint.bytes_on_disk,
        cost=cost,
        simulated=stage.simulated,
        scores=recorded_scores(record_path),
    )


def recorded_scores(path: Path | None) -> dict[str, float]:
    """Return the scores of a stage's own row by task; empty if there is no readable record."""
    if path is None or not path.exists():
        return {}
    try:
        return {score.task: score.value for score in read_record(path).scores}
    except BadRecord:
        return {}


class _DoneMark(BaseModel):
    """The contents of `done.json`: folder, parents and digests of a finished student."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str  # name of the student's folder
    parents: tuple[str, ...]  # digests
    digest: str
    cost: str  # digest of cost.json; "" if there is none


@dataclass(frozen=True)
class _StageBuilder:
    """Finds or makes the student of one stage of a chain."""

    loaded: LoadedJob
    stage: PlannedStage
    folder: Path  # where the student is looked for and saved
    parent: Checkpoint | None  # the stage before, or the teacher; None: it starts from the recipe

    @classmethod
    def of(
        cls, loaded: LoadedJob, stage: PlannedStage, folder: Path, previous: Checkpoint | None
    ) -> "_StageBuilder":
        """Return the builder of a stage; `previous` is the student of the stage before it."""
        from_teacher = previous is None and stage.starts_from == "teacher"
        return cls(loaded, stage, folder, loaded.teachers[0] if from_teacher else previous)

    @property
    def start(self) -> Checkpoint:
        """The model whose weights the student starts from."""
        return self.parent or self.loaded.job.student_base.checkpoint()

    @property
    def recipe(self) -> str:
        """The recipe that the student is cut by; "" if it has the shape of its parent."""
        return self.loaded.job.conditions.student_recipe if self.parent is None else ""

    def student(self) -> Checkpoint:
        """Return the stage's student, from the store or made now.

        Raises `CellFailed` if its weights are damaged.
        """
        done = self._finished() or self._make()
        if self.stage.trains:
            # only after the mark is written: without mark and state, training would start over
            catalog.forget_training(self.folder)
        student = describe(self.folder / done.path, name=self.stage.label, parents=done.parents)
        if student.digest != done.digest:
            (self.folder / "done.json").unlink()
            raise CellFailed(
                f"the student in {self.folder} is damaged (its digest changed); run again to make "
                "it again"
            )
        _refuse_unchanged(self.stage, student, (self.start, *self.loaded.teachers))
        _refuse_lost_cache(self.stage, student, self.start)
        return student

    def _finished(self) -> _DoneMark | None:
        """Return the mark of a finished student; None if there is none, or its parent changed."""
        done = _valid_mark(self.folder, self.loaded.progress)
        if done is None or self.parent is None or self.parent.digest in done.parents:
            return done
        return None

    def _make(self) -> _DoneMark:
        """Let the method make the student, and mark it as finished."""
        mark_path = self.folder / "done.json"
        mark_path.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        _reset_peak_memory(self.loaded.job.conditions.device)  # each stage reports its own peak
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
        write_signed(mark_path, mark.model_dump())
        return mark

    def _method_job(self) -> Job:
        """Return the job that the method's `compress` gets."""
        loaded, job, conditions = self.loaded, self.loaded.job, self.loaded.job.conditions
        return Job(
            teachers=loaded.teachers,
            student=self.recipe if self.parent is None else str(self.parent.path),
            student_base=self.start,
            tasks=loaded.training_tasks,
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
            calibration=loaded.calibration_set(),
            evaluated_tasks=loaded.tasks,
        )


def _valid_mark(folder: Path, progress: Callable[[Progress], None]) -> _DoneMark | None:
    """Return the mark of a student's folder; None if there is none, or if its files are damaged.

    Damage is reported as progress.
    """
    if not (folder / "done.json").exists():
        return None
    try:
        return _read_mark(folder)
    except Unreadable as problem:
        detail = f"{problem}; the student is computed again"
        progress(Progress(stage="make", done=0, total=1, detail=detail))
        return None


def _read_mark(folder: Path) -> _DoneMark:
    """Read a student's mark. Raises `Unreadable` if it, its cost or its folder is damaged."""
    path, cost = folder / "done.json", folder / "cost.json"
    done = validate_as(read_signed(path), _DoneMark, str(path))
    if (file_digest(cost) if cost.exists() else "") != done.cost:
        raise Unreadable(f"{cost}: its digest does not match")
    if not (folder / done.path).is_dir() or Path(done.path).name != done.path:
        raise Unreadable(f"{folder / done.path}: no such folder")
    return done


def _refuse_invalid_student(method: str, result: object, folder: Path) -> None:
    """Refuse a method's result that is no checkpoint, or none in the folder of its job."""
    advice = (
        "save it in job.workdir / 'student' and return harness.models.checkpoint.describe(folder, "
        "name=...)"
    )
    if not isinstance(result, Checkpoint):
        shown = " ".join(repr(result).split())[:60]
        raise CellFailed(
            f"{method}.compress returned {_with_article(type(result).__name__)} ({shown}), and "
            f"must return a Checkpoint: {advice}"
        )
    path = result.path
    if path.resolve().parent != folder.resolve() or not (path / "config.json").is_file():
        raise CellFailed(
            f"{method}.compress returned a Checkpoint whose path, {path}, is no model folder in "
            f"job.workdir: {advice}"
        )


def _with_article(name: str) -> str:
    """Return the name of a type with a or an before it; None has no article."""
    return "None" if name == "NoneType" else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _refuse_too_large(
    job: CellJob, stage: PlannedStage, method: Any, start: Checkpoint, recipe: str
) -> None:
    """Fail before any training if the device's memory cannot hold what every batch size needs."""
    from harness.estimating.hardware import GIB
    from harness.estimating.workload import (
        cut_parameters,
        packed_as,
        training_bytes,
        workload_of,
    )
    from harness.models.shape import Shape, parameters_on_disk, weight_bytes
    from harness.models.shaping import parse_student_cut

    device, dtype = job.conditions.device, job.conditions.dtype
    workload, memory = workload_of(method), device_bytes(device)
    folders = [teacher.path for teacher in job.teachers]
    packed = weight_bytes(start.path, "float32") if packed_as(start.path) is not None else None
    stored = parameters_on_disk(start.path)
    # the uncut model fits: no need to know the shape of the cut one
    if packed is None and training_bytes(workload, stored, folders, dtype) <= memory:
        return
    cut, uncut_shape = parse_student_cut(recipe), Shape.of_folder(start.path)
    shape = cut.shape_of(uncut_shape) if cut else uncut_shape
    parameters = cut_parameters(start.path, shape)
    needed = training_bytes(workload, parameters, folders, dtype, packed=packed)
    if needed > memory:
        alone = replace(workload, reads_teacher_live=False)
        own_bytes = training_bytes(alone, parameters, folders, dtype, packed=packed)
        states = (
            f"packed weights and adapters of {parameters:,.0f} parameters"
            if packed is not None
            else f"{workload.bytes_per_weight:g} bytes x {parameters:,.0f} parameters"
        )
        with_teacher = ", and the teacher beside it" if needed > own_bytes else ""
        advice = (
            "a smaller --student"
            if start.digest == job.student_base.digest
            else "a student that an earlier stage cuts further"
        )
        raise CellFailed(
            f"{stage.method} cannot be trained here: {states}{with_teacher} are "
            f"{needed / GIB:,.1f} GiB, and this {device} has {memory / GIB:,.1f} GiB; give {advice}"
            + _recipe_advice(stage.method, method, needed - memory, parameters)
        )


def _recipe_advice(name: str, method: Any, missing: float, parameters: float) -> str:
    """Name the smallest recipe, where it would need so many bytes less."""
    recipe = getattr(method, "recipe", "")
    smaller = method.recipes[method.recipes.index(recipe) + 1 :] if recipe in method.recipes else ()
    for candidate in reversed(smaller):
        if candidate == "lora" and method.discards_weights:
            continue
        with_candidate = replace(method, recipe=candidate).training_bytes_per_weight
        if (method.training_bytes_per_weight - with_candidate) * parameters >= missing:
            return f", or type --set {name}.recipe={candidate}"
    return ""


def _reset_peak_memory(device: str) -> None:
    baseline_bytes(device)
    if not device.startswith("cuda"):
        reset_peak()


def _refuse_lost_cache(stage: PlannedStage, student: Checkpoint, start: Checkpoint) -> None:
    """Refuse a student whose configuration lost the cache format of the model it started from."""
    before = stored_cache_format(start.model_folder)
    if before is not None and stored_cache_format(student.model_folder) != before:
        raise CellFailed(
            f"{stage.label} lost the quantized cache ({before.label}) of the stage before it; put "
            "kv-int8 or kv-int4 last"
        )


def _refuse_unchanged(
    stage: PlannedStage, student: Checkpoint, others: tuple[Checkpoint, ...]
) -> None:
    """Refuse a student with the weights of the teacher or of the model that it started from.

    Its method changed nothing, and would get the teacher's score for it. Controls may do so.
    """
    if stage.family == "cache" and not stage.trains:  # it leaves weights as they are
        if stored_cache_format(student.path) is None:
            raise CellFailed(f"{stage.label} changed nothing: its student has a cache of floats")
        return
    must_change = stage.trains or stage.family != "control"
    paths = {checkpoint.path for checkpoint in others}
    if must_change and any(same_weights(student.path, path) for path in paths):
        raise CellFailed(
            f"{stage.label} changed no weight: its student has exactly the weights of a model that "
            "it started from"
        )
