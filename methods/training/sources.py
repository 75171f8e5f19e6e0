"""Which teachers a loss reads, and how: run beside the student, or from what was kept of each. No
torch at import.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.contract import Checkpoint, Job
from harness.renames.modules import by_old_name

if TYPE_CHECKING:
    from methods.training.rows import TokenRow
    from methods.training.teachers import TeacherSource


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """The teachers whose distributions the loss reads, and how they are to be had."""

    models: tuple[Checkpoint, ...]
    vocabulary: int | None  # leading logit columns that mean the same token in all models
    k: int = 64
    # auto: where the budget reads every row at least once
    cache: Literal["auto", "on", "off"] = "auto"
    whole: bool = False  # the loss needs every token's probability, not the k likeliest
    inside: bool = False  # it looks into the teacher, which no cache of distributions holds
    own_tokens: bool = False  # the teacher reads the text in its own tokenizer
    temperature: float = 1.0  # that the loss reads them at
    # rows that the cache shall hold beside the trained ones, so that methods with fewer rows share
    # one
    over: Any = None


def sources_of(
    teachers: Teachers, job: Job, rows: "Sequence[TokenRow]", *, budget: int
) -> "tuple[Sequence[Callable[[], TeacherSource]], list[Any]]":
    """Return makers of what the loss reads, and the caches among them: live teachers, or what was
    kept of each over these rows.
    """
    from harness.errors import CellFailed
    from harness.models.language_model import open_model
    from harness.models.shape import MAX_DENSE_VOCABULARY, Shape
    from methods.training.teacher_cache import teacher_cache
    from methods.training.teachers import CrossTokenizerTeacher, LiveTeacher

    width = teachers.vocabulary or Shape.of_folder(teachers.models[0].path).vocabulary
    partial = width > MAX_DENSE_VOCABULARY  # only the likeliest tokens would be kept
    if teachers.cache == "on" and partial and teachers.whole:
        raise CellFailed(
            f"this loss needs all {width:,} probabilities and a cache keeps {teachers.k}; type "
            "--set METHOD.cache=off"
        )
    if teachers.cache != "off" and teachers.k > width:
        raise CellFailed(
            f"top_k={teachers.k} is above the vocabulary of {width:,}; give a smaller one, or "
            "cache=off"
        )
    several = len(teachers.models) > 1
    seldom = budget < sum(len(row.ids) for row in rows) and not several
    live = teachers.cache == "off" or (
        teachers.cache == "auto" and (seldom or (partial and teachers.whole))
    )
    if teachers.inside or teachers.own_tokens or live:
        opened = [open_model(one, device=job.device, dtype=job.dtype) for one in teachers.models]
        kind = CrossTokenizerTeacher if teachers.own_tokens else LiveTeacher
        return [lambda one=one: kind(one) for one in opened], []
    rows = teachers.over or rows
    # one in memory at a time
    kept = [teacher_cache(job, one, rows, k=teachers.k, width=width) for one in teachers.models]
    return [lambda one=one: one for one in kept], kept


def common_context(teachers: Teachers | None) -> int:
    """Return the longest row, in the student's tokens, that all these teachers can read; those with
    tokens of their own are not asked.
    """
    from harness.models.shape import Shape

    asked = teachers.models if teachers and not teachers.own_tokens else ()
    return min((Shape.of_folder(one.path).context for one in asked), default=2**31)


def shared_vocabulary(job: Job, teachers: Sequence[Checkpoint]) -> int:
    """Return how many logit columns the student and all these teachers share; refuses other token
    maps.
    """
    from harness.models.language_model import student_tokenizer
    from harness.models.vocabulary import common_vocabulary

    ours = student_tokenizer(job.student_base).get_vocab()
    return min(
        common_vocabulary(
            ours,
            student_tokenizer(one).get_vocab(),
            names=(f"student {job.student_base.name}", f"teacher {one.name}"),
        )
        for one in teachers
    )


if not TYPE_CHECKING:  # a checker refuses old names; programs that use them go on working
    __getattr__ = by_old_name(__name__)
