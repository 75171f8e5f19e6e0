"""What a cell finds out about its student: scores, distance to the teacher, the noise floor of
both, speed and memory. No torch at import.

Scores must stand; everything else is optional: what stops it is a remark beside a row that is
scored.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.contract import Checkpoint, Progress, Task
from harness.errors import CellFailed, HarnessError
from harness.files.untrusted import Unreadable
from harness.files.writing import write_atomically
from harness.machine.memory import process_bytes, release_memory
from harness.machine.processor import thread_count
from harness.measuring.measure import (
    TimedModel,
    TimingSettings,
    measure,
    measurement_of,
    seconds_per_problem,
)
from harness.measuring.scenario import parse_grid
from harness.models.checkpoint import describe
from harness.models.shape import parameters_on_disk
from harness.planning.spec import limit_for
from harness.records import columns
from harness.records.record import Fidelity, Measurement, TaskScore
from harness.running.failure import failure_of
from harness.running.job import CellJob
from harness.running.loaded import LoadedJob

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from harness.scoring.backend import Backend
    from harness.scoring.fidelity import Read
    from harness.scoring.items import ItemRow

NO_TEACHER_ANSWERS = "the teacher's row had none to compare with"
# scored at once for the noise floor: few enough that a GPU takes other kernels than for a full
# batch
NOISE_BATCH_SIZE = 8
_NOISE_TOKENS_PER_ROW = 64  # of a packed forward, for each of these rows
_TEACHER_READS_FILE = "teacher-reads.safetensors"  # in the teacher's cell, beside its samples


@dataclass(frozen=True)
class Evaluation:
    """What a record says of its student's behaviour."""

    path: str  # which code computed the answers
    parameters: int
    scores: "tuple[TaskScore, ...]"
    rows: "tuple[ItemRow, ...]"
    fidelity: tuple[Fidelity, ...]
    measurements: tuple[Measurement, ...]


def evaluate(loaded: LoadedJob, student: Checkpoint) -> Evaluation:
    """Score a student, compare it with the teacher, and time it; answers and raw timings are
    written to the cell's folder.
    """
    job = loaded.job
    answered, peak = _evaluate_open_model(loaded, student)
    release_memory(job.conditions.device)
    measurements = answered.measurements
    if job.cell.is_teacher and job.work.noise:
        measurements += _noise_floor(loaded, answered.rows)
    if job.measure:
        measurements += _measure_student(
            loaded, student, thread_count()
        )  # timing keeps its own rule
    if peak is not None:
        measurements += (measurement_of(columns.PROCESS_PEAK, peak),)
    return Evaluation(
        answered.path,
        answered.parameters,
        answered.scores,
        answered.rows,
        answered.fidelity,
        measurements,
    )


def _evaluate_open_model(loaded: LoadedJob, student: Checkpoint) -> tuple[Evaluation, float | None]:
    """Return everything that the open student is needed for, and the peak of the process's memory;
    it is open in here alone.
    """
    from harness.models.language_model import open_model
    from harness.scoring.items import write_rows

    job, conditions = loaded.job, loaded.job.conditions
    with _open_backend(job, student, conditions.dtype) as backend:
        scores, rows = _score_tasks(loaded, backend)
    ours = job.work.backend == "transformers"
    opened = (
        backend.opened
        if ours
        else open_model(student, device=conditions.device, dtype=conditions.dtype)
    )
    write_rows(job.cell_folder / "samples.jsonl", rows)
    # of training and scoring together: before the base is opened beside the student
    peak = process_bytes("VmHWM")
    parameters = _count_parameters(job, opened)
    fidelity, remarks = _compare_with_teacher(loaded, opened, rows)
    if job.cell.is_teacher:
        _save_teacher_reads(loaded, opened, rows)
    return Evaluation(
        backend.path,
        parameters,
        tuple(scores),
        tuple(rows),
        fidelity,
        (*seconds_per_problem(scores), *remarks),
    ), peak


def score_again(job: CellJob) -> "list[TaskScore]":
    """Score a finished cell's model once more, from nothing: no answer is read from the journal,
    nothing is written.
    """
    loaded = LoadedJob.of(job.model_copy(update={"force": True}), lambda progress: None)
    folder = job.stage_folders[-1] / "student" if job.stage_folders else None
    student = (
        describe(folder, name=job.cell.label)
        if folder is not None
        else loaded.teachers[job.cell.teacher]
    )
    with _open_backend(loaded.job, student, job.conditions.dtype) as backend:
        return _score_tasks(loaded, backend)[0]


@contextmanager
def _open_backend(
    job: CellJob, checkpoint: Checkpoint, dtype: str, *, few: int | None = None
) -> "Iterator[Backend]":
    """Open what scores a model, `few` rows at once where that is given; vLLM's engine gives its
    memory back at the end.
    """
    from harness.models.language_model import open_model
    from harness.scoring.transformers_backend import Transformers

    if job.work.backend == "transformers":
        pack = few * _NOISE_TOKENS_PER_ROW if few else None
        yield Transformers(
            open_model(checkpoint, device=job.conditions.device, dtype=dtype),
            few or job.work.batch_size,
            pack=pack,
        )
        return
    from harness.scoring.vllm_backend import Vllm

    engine = Vllm(checkpoint, dtype=dtype, device=job.conditions.device)
    try:
        yield engine
    finally:
        engine.close()


def _score_tasks(loaded: LoadedJob, backend: "Backend") -> "tuple[list[TaskScore], list[ItemRow]]":
    from harness.scoring.score import score_task

    job = loaded.job
    # A student with the teacher's own bytes is asked all the same: its row shows that scoring twice
    # changes nothing.
    copy = bool(job.cell.student_key) and backend.opened.checkpoint.digest in {
        teacher.digest for teacher in job.teachers
    }
    # --force asks everything anew
    cache = None if job.work.force else job.cell_folder if copy else job.cache
    scores: list[TaskScore] = []
    rows: list[ItemRow] = []
    for task in loaded.tasks.values():
        score, items = score_task(
            backend.opened,
            task,
            loaded.source,
            backend=backend,
            limit=limit_for(job.conditions.limit, task.name),
            progress=loaded.progress,
            cache=cache,
            prompting=job.conditions.prompting,
        )
        scores.append(score)
        rows += items
    return scores, rows


def _measure_student(
    loaded: LoadedJob, student: Checkpoint, threads: int
) -> tuple[Measurement, ...]:
    """Time and weigh the student beside its teacher, in processes of their own; this one holds no
    model any more.
    """
    job, conditions = loaded.job, loaded.job.conditions
    release_memory(conditions.device)
    settings = TimingSettings(
        grid=parse_grid(job.work.grid or ""),
        rounds=job.work.rounds,
        device=conditions.device,
        dtype=conditions.dtype,
        threads=threads,
    )
    try:
        result = measure(
            TimedModel(student),
            TimedModel(loaded.teachers[0]),
            settings,
            folder=job.cell_folder,
            progress=loaded.progress,
        )
    # a scored row is not thrown away for want of its timing
    except (CellFailed, HarnessError) as problem:
        return (_skipped_timing(str(problem)),)
    write_atomically(
        job.cell_folder / "timings.json", json.dumps({**result.raw, "skipped": result.skipped})
    )
    skipped = tuple(_skipped_timing(reason) for reason in result.skipped)
    return result.measurements + skipped


def _skipped_timing(reason: str) -> Measurement:
    return Measurement(
        name="skipped_scenario",
        value=0,
        unit="",
        higher_is_better=False,
        remark=f"not timed: {reason}",
    )


def _save_teacher_reads(loaded: LoadedJob, teacher: "LanguageModel", rows: "list[ItemRow]") -> None:
    """Keep what the teacher reads for its students; a student whose teacher could not keep it opens
    the teacher itself.
    """
    from harness.scoring.fidelity import remember

    written = [name for name, task in loaded.tasks.items() if task.kind == "generate"]
    try:
        remember(loaded.job.cell_folder / _TEACHER_READS_FILE, teacher, rows, written)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        print(
            f"what the teacher reads is not kept: {failure_of(loaded.job, problem).reason}",
            file=sys.stderr,
        )


def _compare_with_teacher(
    loaded: LoadedJob, student: "LanguageModel", rows: "list[ItemRow]"
) -> tuple[tuple[Fidelity, ...], tuple[Measurement, ...]]:
    """Return the distances to the teacher, or a remark why there are none: a row that is scored
    stands without them.

    Numbers that are none are another thing: they fail the row.
    """
    job = loaded.job
    if job.teacher_samples is not None and not job.teacher_samples.exists():
        return (), (_skipped_fidelity(NO_TEACHER_ANSWERS),)
    try:
        return _distances_to_teacher(loaded, student, rows), ()
    except (CellFailed, HarnessError):
        raise
    except Exception as problem:  # noqa: BLE001  out of memory beside the teacher, most likely
        traceback.print_exc()
        return (), (_skipped_fidelity(failure_of(job, problem).reason),)


def _skipped_fidelity(reason: str) -> Measurement:
    """Return what stands in a record in place of the distances to the teacher."""
    remark = f"its distance to the teacher was not measured: {reason}"
    return Measurement(
        name="skipped_fidelity", value=0, unit="", higher_is_better=False, remark=remark
    )


def _distances_to_teacher(
    loaded: LoadedJob, student: "LanguageModel", rows: "list[ItemRow]"
) -> tuple[Fidelity, ...]:
    """Compare distributions with the teacher's on every task, where both speak the same
    vocabulary.
    """
    from harness.models.language_model import student_tokenizer
    from harness.scoring.fidelity import choice_fidelity, reader, token_fidelity

    if loaded.job.teacher_samples is None:
        return ()
    if student.tokenizer.get_vocab() != student_tokenizer(loaded.teachers[0]).get_vocab():
        return ()
    teacher = _TeacherReader(loaded)
    theirs = _teacher_rows(loaded.job)
    distances: list[Fidelity | None] = []
    for name, task in loaded.tasks.items():
        loaded.progress(
            Progress(
                stage="compare",
                done=len(distances),
                total=len(loaded.tasks),
                unit="tasks",
                detail=name,
            )
        )
        before = [row for row in theirs if row.task == name]
        if task.kind == "choose":
            distances.append(
                choice_fidelity(name, before, [row for row in rows if row.task == name])
            )
        elif task.kind == "generate":
            distances.append(
                token_fidelity(
                    name, teacher.reads(name, before, width=student.vocabulary), reader(student)
                )
            )
    return tuple(distance for distance in distances if distance is not None)


def _teacher_rows(job: CellJob) -> "list[ItemRow]":
    from harness.scoring.items import read_rows

    assert job.teacher_samples is not None
    try:
        return read_rows(job.teacher_samples)
    except Unreadable as problem:
        raise CellFailed(
            f"the teacher's answers are damaged ({problem}); run again and its row is made anew"
        ) from problem


@dataclass
class _TeacherReader:
    """The teacher's view of its own answers: as its cell kept it, else from the teacher, which is
    opened once for all tasks.
    """

    loaded: LoadedJob
    opened: "LanguageModel | None" = None

    def reads(self, task: str, rows: "list[ItemRow]", *, width: int) -> "Iterator[Read]":
        """Return what the teacher reads at every token of its answers to a task: of `width` tokens
        of the vocabulary.
        """
        from harness.models.language_model import open_model
        from harness.scoring.fidelity import reader, reads, recall, texts_to_read

        job, conditions, checkpoint = (
            self.loaded.job,
            self.loaded.job.conditions,
            self.loaded.teachers[0],
        )
        assert job.teacher_samples is not None
        kept = recall(
            job.teacher_samples.with_name(_TEACHER_READS_FILE),
            checkpoint,
            task,
            device=conditions.device,
            width=width,
        )
        if kept is not None:
            return kept
        self.opened = self.opened or open_model(
            checkpoint, device=conditions.device, dtype=conditions.dtype
        )
        return reads(reader(self.opened), texts_to_read(self.opened, task, rows), width=width)


def _noise_floor(loaded: LoadedJob, rows: "tuple[ItemRow, ...]") -> tuple[Measurement, ...]:
    """Score the teacher against itself on a sample: flips by rounding, that no student can be
    blamed for.

    It never takes more memory than the score did: a float32 teacher is asked in bfloat16, any other
    at its own dtype a few rows at once, which sums in another order. It is no part of the score:
    whatever stops it is a remark beside a row that stands.
    """
    job = loaded.job
    measured: list[Measurement] = []
    tasks = {name: task for name, task in loaded.tasks.items() if task.kind != "perplexity"}
    try:
        for measurement in _flip_measurements(loaded, tasks, rows):
            measured.append(measurement)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        reason = failure_of(job, problem).reason
        for name in [*tasks][len(measured) :]:
            measured.append(
                measurement_of(columns.FLIPS, 0, name, remark=f"not measured: {reason}")
            )
    release_memory(job.conditions.device)
    return tuple(measured)


def _flip_measurements(
    loaded: LoadedJob, tasks: dict[str, Task], rows: "tuple[ItemRow, ...]"
) -> Iterator[Measurement]:
    from harness.scoring.outcomes import changed
    from harness.scoring.score import score_task

    job = loaded.job
    noise, halved = job.work.noise, job.conditions.dtype == "float32"
    dtype = "bfloat16" if halved or job.work.backend == "transformers" else "float32"
    few = (
        None
        if halved or job.work.backend != "transformers"
        else 1
        if job.work.batch_size == NOISE_BATCH_SIZE
        else NOISE_BATCH_SIZE
    )
    condition = f"{dtype}, {few} rows at once" if few else f"{dtype} against {job.conditions.dtype}"
    with _open_backend(job, loaded.teachers[0], dtype, few=few) as backend:
        for name, task in tasks.items():
            figure, again = score_task(
                backend.opened,
                task,
                loaded.source,
                backend=backend,
                limit=min(noise, limit_for(job.conditions.limit, name) or noise),
                progress=loaded.progress,
                prompting=job.conditions.prompting,
            )
            flips = changed([row for row in rows if row.task == name], again, figure.primary)
            share = sum(flips) / len(flips)
            yield measurement_of(
                columns.FLIPS, share, name, values=(float(len(flips)),), condition=condition
            )


def _count_parameters(job: CellJob, opened: "LanguageModel") -> int:
    """Count a student's parameters; one that was packed has as many as what was packed."""
    if job.cell.stages and job.cell.stages[-1].family == "quantization":
        before = (
            job.stage_folders[-2] / "student"
            if len(job.stage_folders) > 1
            else job.teachers[0].path
        )
        return parameters_on_disk(before)
    return sum(p.numel() for p in opened.model.parameters())
