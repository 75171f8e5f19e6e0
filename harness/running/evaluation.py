"""Evaluates a student: scores, distance to the teacher, noise floor, speed and memory.

A cell fails without scores. Everything else is optional: if it fails, the row keeps its scores and
gets a remark. No torch at import.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.contract import Checkpoint, Progress, Task
from harness.errors import CellFailed, HarnessError, Skipped
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
from harness.measuring.rounds import rounds_on
from harness.measuring.scenario import parse_grid
from harness.models.checkpoint import describe
from harness.models.llama_cpp import is_served
from harness.models.shape import parameters_of_architecture, parameters_on_disk
from harness.planning.spec import limit_for
from harness.records import columns
from harness.records.record import TEACHER, Fidelity, Measurement, TaskScore
from harness.running.failure import failure_of
from harness.running.job import CellJob
from harness.running.loaded import LoadedJob
from harness.running.text_distances import save_text_reads, text_measurements

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from harness.scoring.backend import Backend
    from harness.scoring.fidelity import TeacherReading
    from harness.scoring.items import ItemRow

NO_TEACHER_ANSWERS = "the teacher's row had none to compare with"
OTHER_VOCABULARY = "its vocabulary is another one than the teacher's, so no token has its logit"
# rows scored at once for the noise floor: so few that a GPU uses other kernels than for more rows
NOISE_BATCH_SIZE = 8
_NOISE_TOKENS_PER_ROW = 64  # tokens of a packed forward pass for each of these rows
_TEACHER_READS_FILE = "teacher-reads.safetensors"  # in the teacher's cell, beside its samples


@dataclass(frozen=True)
class Evaluation:
    """What a record says about the behaviour of its student."""

    path: str  # of scoring: which backend and code computed the answers
    parameters: int
    scores: "tuple[TaskScore, ...]"
    rows: "tuple[ItemRow, ...]"
    fidelity: tuple[Fidelity, ...]
    measurements: tuple[Measurement, ...]


def evaluate(loaded: LoadedJob, student: Checkpoint) -> Evaluation:
    """Score a student, compare it with the teacher, and time it.

    Answers and raw timings are written to the cell's folder.
    """
    job = loaded.job
    evaluation, peak = _evaluate_open_model(loaded, student)
    release_memory(job.conditions.device)
    measurements = evaluation.measurements
    if job.cell.is_teacher and job.work.noise:
        measurements += _noise_floor(loaded, evaluation.rows)
    if job.measure:
        # timing does not use the number of threads that scoring uses
        measurements += _measure_student(loaded, student, thread_count())
    if peak is not None:
        measurements += (measurement_of(columns.PROCESS_PEAK, peak),)
    return replace(evaluation, measurements=measurements)


def _evaluate_open_model(loaded: LoadedJob, student: Checkpoint) -> tuple[Evaluation, float | None]:
    """Return what needs the open student, and the peak memory of this process in bytes.

    The student is closed at the end: the caller has the memory for other models.
    """
    from harness.scoring.items import write_rows

    job = loaded.job
    with _open_backend(job, student, job.conditions.dtype) as backend:
        scores, rows = _score_tasks(loaded, backend)
    write_rows(job.cell_folder / "samples.jsonl", rows)
    # of training and scoring; read before another model is opened beside the student
    peak = process_bytes("VmHWM")
    is_open = job.work.backend == "transformers" or is_served(student)
    opened = backend.opened if is_open else _opened_again(job, student)
    fidelity: tuple[Fidelity, ...] = ()
    further: tuple[Measurement, ...]
    if isinstance(opened, Measurement):
        parameters, further = parameters_on_disk(student.model_folder), (opened,)
    else:
        parameters = _count_parameters(job, opened)
        fidelity, remarks = _compare_with_teacher(loaded, opened, rows)
        further = (*text_measurements(loaded, opened, rows), *remarks)
        if job.cell.is_teacher:
            _save_teacher_reads(loaded, opened, rows)
            save_text_reads(loaded, opened, rows)
    return Evaluation(
        backend.path,
        parameters,
        tuple(scores),
        tuple(rows),
        fidelity,
        (*seconds_per_problem(scores), *further),
    ), peak


def _opened_again(job: CellJob, student: Checkpoint) -> "LanguageModel | Measurement":
    """Open with transformers what vLLM scored; where that fails, return the remark of it.

    Distances to the teacher and the teacher's own distributions are read so. Neither may fail a
    row that has its scores.
    """
    from harness.models.language_model import open_model

    device, dtype = job.conditions.device, job.conditions.dtype
    try:
        return open_model(student, device=device, dtype=dtype)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        remark = _skipped_fidelity(failure_of(job, problem).reason)
    release_memory(device)
    return remark


def score_again(job: CellJob) -> "list[TaskScore]":
    """Score the model of a finished cell again: no cached answer is used, nothing is written."""
    loaded = LoadedJob.of(job.model_copy(update={"force": True}), lambda progress: None)
    student = _finished_student(loaded)
    with _open_backend(loaded.job, student, job.conditions.dtype) as backend:
        return _score_tasks(loaded, backend)[0]


def score_checkpoint(
    job: CellJob,
    checkpoint: Checkpoint,
    *,
    limit: int | None,
    progress: Callable[[Progress], None],
) -> "list[ItemRow]":
    """Score another model as a finished cell was scored; return its answers, write nothing.

    `limit` is the largest number of items of a task: a sample of those that the cell has. No cached
    answer is used.
    """
    import torch

    torch.set_num_threads(job.threads)
    own_limits = {name: limit_for(job.conditions.limit, name) for name in job.conditions.task_names}
    limits = {
        name: min(filter(None, (limit, own)), default=None) for name, own in own_limits.items()
    }
    conditions = job.conditions.model_copy(
        update={"limit": {name: count for name, count in limits.items() if count} or None}
    )
    work = job.work.model_copy(update={"force": True, "backend": "transformers"})
    changed = job.model_copy(update={"work": work, "conditions": conditions})
    loaded = LoadedJob.of(changed, progress)
    with _open_backend(loaded.job, checkpoint, job.conditions.dtype) as backend:
        return _score_tasks(loaded, backend)[1]


def _finished_student(loaded: LoadedJob) -> Checkpoint:
    """Return the model that a finished cell scored."""
    job = loaded.job
    if job.cell.checkpoint is not None:
        return job.cell.checkpoint.checkpoint()
    if job.stage_folders:
        return describe(job.stage_folders[-1] / "student", name=job.cell.label)
    return loaded.teachers[job.cell.teacher]


@contextmanager
def _open_backend(
    job: CellJob, checkpoint: Checkpoint, dtype: str, *, batch_size: int | None = None
) -> "Iterator[Backend]":
    """Open the backend that scores a model; vLLM's engine frees its memory at the end.

    `batch_size` overrides that of the job.
    """
    from harness.models.language_model import open_model
    from harness.scoring.transformers_backend import TransformersBackend

    if is_served(checkpoint):
        from harness.scoring.llama_cpp_backend import LlamaCppBackend

        yield LlamaCppBackend(open_model(checkpoint, device="cpu", dtype=dtype))
        return
    if job.work.backend == "transformers":
        pack = batch_size * _NOISE_TOKENS_PER_ROW if batch_size else None
        yield TransformersBackend(
            open_model(checkpoint, device=job.conditions.device, dtype=dtype),
            batch_size or job.work.batch_size,
            pack=pack,
        )
        return
    from harness.scoring.vllm_backend import VllmBackend

    if checkpoint.base is not None:
        raise Skipped(
            f"{checkpoint.name} is an adapter, which vllm does not score here; type --backend "
            "transformers"
        )
    engine = VllmBackend(
        checkpoint, dtype=dtype, device=job.conditions.device, rows_at_once=batch_size
    )
    try:
        yield engine
    finally:
        engine.close()


def _score_tasks(loaded: LoadedJob, backend: "Backend") -> "tuple[list[TaskScore], list[ItemRow]]":
    """Return the scores of all tasks, and the answers to all items."""
    from harness.scoring.sampling import ItemChoice
    from harness.scoring.score import score_task

    job = loaded.job
    teacher_digests = {teacher.digest for teacher in job.teachers}
    is_copy = job.cell.method != TEACHER and backend.opened.checkpoint.digest in teacher_digests
    if job.work.force:
        cache = None
    elif is_copy:
        # not the teacher's cached answers: this row shows that scoring twice changes nothing
        cache = job.cell_folder
    else:
        cache = job.cache
    scores: list[TaskScore] = []
    rows: list[ItemRow] = []
    for task in loaded.tasks.values():
        score, items = score_task(
            backend,
            task,
            loaded.source,
            limit=ItemChoice(limit_for(job.conditions.limit, task.name), job.scored_subset),
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
    """Measure speed and size of the student beside its teacher, each in a process of its own.

    This process must have closed its models.
    """
    job, conditions = loaded.job, loaded.job.conditions
    release_memory(conditions.device)
    settings = TimingSettings(
        grid=parse_grid(job.work.grid or ""),
        rounds=rounds_on(conditions.device, job.work.rounds),
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
        write_atomically(
            job.cell_folder / "timings.json", json.dumps({**result.raw, "skipped": result.skipped})
        )
    except (CellFailed, HarnessError) as problem:
        return (_skipped_timing(str(problem)),)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        return (_skipped_timing(failure_of(job, problem).reason),)
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
    """Save the teacher's distributions over its own answers, for its students' cells.

    If that fails, each of these cells opens the teacher.
    """
    from harness.scoring.fidelity import answers_to_compare, save_hidden_states

    written = [name for name, task in loaded.tasks.items() if task.kind == "generate"]
    try:
        texts_of = {
            name: answers_to_compare(teacher, name, [row for row in rows if row.task == name])
            for name in written
        }
        save_hidden_states(loaded.job.cell_folder / _TEACHER_READS_FILE, teacher, texts_of)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        print(
            "the teacher's distributions could not be saved: "
            f"{failure_of(loaded.job, problem).reason}",
            file=sys.stderr,
        )
    release_memory(loaded.job.conditions.device)


def _compare_with_teacher(
    loaded: LoadedJob, student: "LanguageModel", rows: "list[ItemRow]"
) -> tuple[tuple[Fidelity, ...], tuple[Measurement, ...]]:
    """Return the distances to the teacher, or a remark why they could not be measured.

    Distances that are not finite raise `CellFailed`, as everywhere: they fail the row. Whatever
    else goes wrong is the remark.
    """
    job = loaded.job
    if job.teacher_samples is not None and not job.teacher_samples.exists():
        return (), (_skipped_fidelity(NO_TEACHER_ANSWERS),)
    if job.cell.checkpoint is not None and not _shares_vocabulary(loaded, student):
        return (), (_skipped_fidelity(OTHER_VOCABULARY),)
    try:
        return _distances_to_teacher(loaded, student, rows), ()
    except CellFailed:
        raise
    except Exception as problem:  # noqa: BLE001  out of memory beside the teacher, most likely
        traceback.print_exc()
        remark = _skipped_fidelity(failure_of(job, problem).reason)
    release_memory(job.conditions.device)
    return (), (remark,)


def _skipped_fidelity(reason: str) -> Measurement:
    """Return what a record contains in place of the distances to the teacher."""
    remark = f"its distance to the teacher was not measured: {reason}"
    return Measurement(
        name="skipped_fidelity", value=0, unit="", higher_is_better=False, remark=remark
    )


def _distances_to_teacher(
    loaded: LoadedJob, student: "LanguageModel", rows: "list[ItemRow]"
) -> tuple[Fidelity, ...]:
    """Compare the student's distributions with the teacher's on every task.

    Returns nothing for the teacher itself, and for a student with another vocabulary.
    """
    from harness.scoring.fidelity import choice_fidelity, distribution_reader, token_fidelity

    if loaded.job.teacher_samples is None:
        return ()
    if not _shares_vocabulary(loaded, student):
        return ()
    teacher = _TeacherReader(loaded)
    teacher_rows = _teacher_rows(loaded.job)
    distances: list[Fidelity | None] = []
    for name, task in loaded.tasks.items():
        progress = Progress(
            stage="compare",
            done=len(distances),
            total=len(loaded.tasks),
            unit="tasks",
            detail=name,
        )
        loaded.progress(progress)
        task_rows = [row for row in teacher_rows if row.task == name]
        if task.kind == "choose":
            student_rows = [row for row in rows if row.task == name]
            distances.append(choice_fidelity(name, task_rows, student_rows))
        elif task.kind == "generate":
            teacher_reads = teacher.reads(name, task_rows, width=student.vocabulary)
            distances.append(token_fidelity(name, teacher_reads, distribution_reader(student)))
    return tuple(distance for distance in distances if distance is not None)


def _shares_vocabulary(loaded: LoadedJob, student: "LanguageModel") -> bool:
    """Tell whether a student and the teacher have the same tokens by the same ids."""
    from harness.models.language_model import student_tokenizer

    teacher_vocabulary: object = student_tokenizer(loaded.teachers[0]).get_vocab()
    return bool(student.tokenizer.get_vocab() == teacher_vocabulary)


def _teacher_rows(job: CellJob) -> "list[ItemRow]":
    from harness.scoring.items import read_rows

    assert job.teacher_samples is not None
    try:
        return read_rows(job.teacher_samples)
    except Unreadable as problem:
        raise CellFailed(
            f"the teacher's answers are damaged ({problem}); run again to compute its row again"
        ) from problem


@dataclass
class _TeacherReader:
    """Gives the teacher's distributions over its own answers.

    They come from the teacher's cell, which saved them; otherwise from the teacher, which is opened
    once for all tasks.
    """

    loaded: LoadedJob
    opened: "LanguageModel | None" = None

    def reads(self, task: str, rows: "list[ItemRow]", *, width: int) -> "Iterator[TeacherReading]":
        """Yield the teacher's distributions at the tokens of its answers to a task.

        `width` is the size of the vocabulary to which they are cut.
        """
        from harness.models.language_model import open_model
        from harness.scoring.fidelity import (
            answers_to_compare,
            distribution_reader,
            load_teacher_readings,
            read_answers,
        )

        job, checkpoint = self.loaded.job, self.loaded.teachers[0]
        device, dtype = job.conditions.device, job.conditions.dtype
        assert job.teacher_samples is not None
        saved = load_teacher_readings(
            job.teacher_samples.with_name(_TEACHER_READS_FILE),
            checkpoint,
            task,
            device=device,
            width=width,
        )
        if saved is not None:
            return saved
        self.opened = self.opened or open_model(checkpoint, device=device, dtype=dtype)
        return read_answers(
            distribution_reader(self.opened),
            answers_to_compare(self.opened, task, rows),
            width=width,
        )


def _noise_floor(loaded: LoadedJob, rows: "tuple[ItemRow, ...]") -> tuple[Measurement, ...]:
    """Score the teacher twice on a sample: how many answers change by rounding alone.

    The second scoring never takes more memory than the first, with either backend: a float32
    teacher is scored in bfloat16, any other in its own dtype with few rows at once, which sums in
    another order. If it fails, the row keeps its scores and gets a remark.
    """
    job = loaded.job
    measured: list[Measurement] = []
    # a likelihood changes with every rounding: only answers are counted
    tasks = {
        name: task
        for name, task in loaded.tasks.items()
        if "perplexity" not in (task.kind, task.primary)
    }
    try:
        for measurement in _flip_measurements(loaded, tasks, rows):
            measured.append(measurement)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        reason = failure_of(job, problem).reason
        remark = f"not measured: {reason}"
        measured += [
            measurement_of(columns.FLIPS, 0, name, remark=remark)
            for name in [*tasks][len(measured) :]
        ]
    release_memory(job.conditions.device)
    return tuple(measured)


def _flip_measurements(
    loaded: LoadedJob, tasks: dict[str, Task], rows: "tuple[ItemRow, ...]"
) -> Iterator[Measurement]:
    """Yield for each task the share of answers that change when the teacher is scored again."""
    from harness.scoring.outcomes import outcome_changes
    from harness.scoring.sampling import ItemChoice
    from harness.scoring.score import score_task

    job = loaded.job
    noise, dtype, batch_size = job.work.noise, "bfloat16", None
    if job.conditions.dtype == "float32":
        condition = f"{dtype} against float32"
    else:
        dtype = job.conditions.dtype
        batch_size = 1 if job.work.batch_size == NOISE_BATCH_SIZE else NOISE_BATCH_SIZE
        condition = f"{dtype}, {batch_size} rows at once"
    with _open_backend(job, loaded.teachers[0], dtype, batch_size=batch_size) as backend:
        for name, task in tasks.items():
            score, second_rows = score_task(
                backend,
                task,
                loaded.source,
                limit=ItemChoice(
                    min(noise, limit_for(job.conditions.limit, name) or noise), job.scored_subset
                ),
                progress=loaded.progress,
                prompting=job.conditions.prompting,
            )
            first_rows = [row for row in rows if row.task == name]
            flips = outcome_changes(first_rows, second_rows, score.primary)
            share = sum(flips) / len(flips)
            yield measurement_of(
                columns.FLIPS, share, name, values=(float(len(flips)),), condition=condition
            )


def _count_parameters(job: CellJob, opened: "LanguageModel") -> int:
    """Count a student's parameters; a packed student has as many as the model that was packed."""
    if job.cell.checkpoint is not None:
        return parameters_of_architecture(opened.model)
    if job.cell.stages and job.cell.stages[-1].family == "quantization":
        unpacked = (
            job.stage_folders[-2] / "student"
            if len(job.stage_folders) > 1
            else job.teachers[0].path
        )
        return parameters_on_disk(unpacked)
    return sum(parameter.numel() for parameter in opened.model.parameters())
