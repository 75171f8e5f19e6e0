"""The distance to the teacher on the documents of a task that measures perplexity.

The teacher's own cell saves what it reads; its students' cells compare. Nothing here may fail a row
that was scored.
"""

import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from harness.contract import Task
from harness.data.contamination import documents_of
from harness.measuring.measure import measurement_of
from harness.records import columns
from harness.records.record import Measurement
from harness.running.failure import failure_of
from harness.running.loaded import LoadedJob
from harness.statistics.intervals import Interval

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from harness.scoring.fidelity import PromptedAnswer, TeacherReading
    from harness.scoring.items import ItemRow
    from harness.scoring.text_divergence import TextDivergence

_READS_FILE = "text_reads.safetensors"


def save_text_reads(loaded: LoadedJob, teacher: "LanguageModel", rows: "list[ItemRow]") -> None:
    """Save what the teacher reads in the documents that were scored, for its students' cells.

    If that fails, each of these cells opens the teacher.
    """
    from harness.scoring.fidelity import save_hidden_states

    try:
        windows_of = {
            name: list(chain.from_iterable(_windows(loaded, task, teacher, rows)))
            for name, task in _text_tasks(loaded)
        }
        path = loaded.job.cell_folder / _READS_FILE
        save_hidden_states(path, teacher, windows_of, rows_at_once=1)
    except Exception as problem:  # noqa: BLE001  nothing optional may fail a scored row
        traceback.print_exc()
        print(
            "the teacher's distributions on texts could not be saved: "
            f"{failure_of(loaded.job, problem).reason}",
            file=sys.stderr,
        )


def text_measurements(
    loaded: LoadedJob, student: "LanguageModel", rows: "list[ItemRow]"
) -> tuple[Measurement, ...]:
    """Return a student's distances to its teacher on texts; a remark where there are none.

    Raises `NotANumber` where the student's own logits are none.
    """
    from harness.models.language_model import student_tokenizer
    from harness.scoring.text_divergence import NotANumber

    if loaded.job.teacher_samples is None or not _text_tasks(loaded):
        return ()
    measured: list[Measurement] = []
    try:
        if student.tokenizer.get_vocab() != student_tokenizer(loaded.teachers[0]).get_vocab():
            is_outside = loaded.job.cell.checkpoint is not None
            return (_skipped("its vocabulary is another one"),) if is_outside else ()
        for name, task in _text_tasks(loaded):
            divergence = _compare(loaded, name, task, student, rows)
            if divergence is None:
                measured.append(_skipped(f"teacher and student read {name} in other windows"))
            else:
                measured += _measurements_of(divergence, name)
                measured += _measurements_by_length(loaded, name, task, student, rows)
    except NotANumber:  # the row itself is wrong
        raise
    except Exception as problem:  # noqa: BLE001  nothing else may fail a row that was scored
        traceback.print_exc()
        measured.append(_skipped(failure_of(loaded.job, problem).reason))
    return tuple(measured)


def _skipped(reason: str) -> Measurement:
    """Return the remark of a row whose distance to its teacher was not measured."""
    return Measurement(
        name="skipped_text_distance",
        value=0,
        unit="",
        higher_is_better=False,
        remark=f"its distance to the teacher on texts was not measured: {reason}",
    )


def _text_tasks(loaded: LoadedJob) -> list[tuple[str, Task]]:
    return [(name, task) for name, task in loaded.tasks.items() if task.kind == "perplexity"]


def _windows(
    loaded: LoadedJob, task: Task, opened: "LanguageModel", rows: "Sequence[ItemRow]"
) -> "list[list[PromptedAnswer]]":
    """Return the windows of a task's documents that were scored."""
    from harness.scoring.text_divergence import windows_to_compare

    return windows_to_compare(opened, _scored_documents(loaded, task, rows))


def _scored_documents(loaded: LoadedJob, task: Task, rows: "Sequence[ItemRow]") -> list[str]:
    scored = {row.item for row in rows if row.task == task.name}
    return [
        text for number, text in enumerate(documents_of(task, loaded.source)) if number in scored
    ]


def _compare(
    loaded: LoadedJob, name: str, task: Task, student: "LanguageModel", rows: "list[ItemRow]"
) -> "TextDivergence | None":
    from harness.scoring.fidelity import distribution_reader
    from harness.scoring.text_divergence import compare_texts

    windows = _windows(loaded, task, student, rows)
    texts = list(chain.from_iterable(windows))
    readings = _teacher_readings(loaded, name, texts, width=student.vocabulary)
    return compare_texts(readings, distribution_reader(student, 1), windows)


def _measurements_by_length(
    loaded: LoadedJob, name: str, task: Task, student: "LanguageModel", rows: "list[ItemRow]"
) -> Iterator[Measurement]:
    """Yield the distances by how many tokens stand before, of a student with a quantized cache.

    For other students nothing is yielded: the texts are read once more for it, by the teacher too.
    """
    from harness.models.cache_format import cache_format_of
    from harness.models.language_model import open_model
    from harness.scoring.fidelity import distribution_reader, read_answers
    from harness.scoring.prompt_lengths import band_windows, compare_bands

    if cache_format_of(student.model.config) is None:
        return
    windows = band_windows(student, _scored_documents(loaded, task, rows))
    conditions = loaded.job.conditions
    teacher = open_model(loaded.teachers[0], device=conditions.device, dtype=conditions.dtype)
    readings = read_answers(
        distribution_reader(teacher, 1),
        [window.window for window in windows],
        width=student.vocabulary,
    )
    for band in compare_bands(readings, distribution_reader(student, 1), windows):
        condition = f"{band.tokens:,} tokens of {band.texts} texts"
        for quantity, interval in (
            (columns.KL_AT_LENGTH, band.divergence),
            (columns.PERPLEXITY_AT_LENGTH, band.perplexity_ratio),
        ):
            yield measurement_of(
                quantity,
                interval.value or 0.0,
                f"{name}:{band.label}",
                low=interval.low,
                high=interval.high,
                condition=condition,
            )


def _teacher_readings(
    loaded: LoadedJob, name: str, texts: "list[PromptedAnswer]", *, width: int
) -> "Iterator[TeacherReading]":
    """Yield what the teacher reads: what its own cell saved, or else it is opened."""
    from harness.models.language_model import open_model
    from harness.scoring.fidelity import distribution_reader, load_teacher_readings, read_answers

    job, checkpoint = loaded.job, loaded.teachers[0]
    device, dtype = job.conditions.device, job.conditions.dtype
    assert job.teacher_samples is not None
    saved = load_teacher_readings(
        job.teacher_samples.with_name(_READS_FILE), checkpoint, name, device=device, width=width
    )
    if saved is not None:
        return saved
    teacher = open_model(checkpoint, device=device, dtype=dtype)
    return read_answers(distribution_reader(teacher, 1), texts, width=width)


def _measurements_of(divergence: "TextDivergence", task: str) -> Iterator[Measurement]:
    """Yield the figures of a task as measurements, each with its interval over the texts."""
    intervals = {
        columns.TEXT_KL: divergence.mean,
        columns.TEXT_KL_MEDIAN: divergence.quantiles["median"],
        columns.TEXT_KL_90: divergence.quantiles["p90"],
        columns.TEXT_KL_99: divergence.quantiles["p99"],
        columns.TEXT_KL_999: divergence.quantiles["p99.9"],
        columns.TEXT_KL_MAX: Interval(divergence.maximum),
        columns.PROBABILITY_CHANGE: divergence.probability_change,
        columns.SAME_TOP: divergence.same_top,
    }
    condition = f"{divergence.tokens:,} tokens of {divergence.texts} texts"
    for quantity, interval in intervals.items():
        yield measurement_of(
            quantity,
            interval.value or 0.0,
            task,
            low=interval.low,
            high=interval.high,
            condition=condition,
        )
