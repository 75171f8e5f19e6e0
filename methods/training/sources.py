"""Which teachers a loss reads, and how: run beside the student, or from a cache of each.

No torch at import.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from harness.contract import Checkpoint, Job
from harness.renames.arguments import accept_old_arguments
from harness.renames.modules import by_old_name
from methods.training.cache_dtype import CacheDtype

if TYPE_CHECKING:
    from methods.training.rows import TokenRow
    from methods.training.teacher_cache import CachedTeacher
    from methods.training.teachers import TeacherSource


@accept_old_arguments
@dataclass(frozen=True, kw_only=True)
class Teachers:
    """The teachers whose distributions the loss reads, and how it reads them."""

    models: tuple[Checkpoint, ...]
    vocabulary: int | None  # leading logit columns that mean the same token in all models
    k: int = 64  # tokens that a cache keeps of each distribution, where it cannot keep all
    # auto: where the budget reads every row at least once
    cache: Literal["auto", "on", "off"] = "auto"
    cache_dtype: CacheDtype = "float16"  # of the log-probabilities that it keeps
    needs_all_probabilities: bool = False  # of the vocabulary, not the k likeliest
    needs_inner_states: bool = False  # no cache of distributions holds them
    own_tokenizer: bool = False  # the teachers read the text in tokens of their own
    temperature: float = 1.0  # of the loss
    # rows of the cache in place of the trained ones, so that methods with fewer rows share a cache
    over: Any = None


class TeacherSources(NamedTuple):
    """Where the loss gets the teachers' distributions from."""

    makers: "Sequence[Callable[[], TeacherSource]]"  # one per teacher; called for each training
    caches: "list[CachedTeacher]"  # those among them; empty where the teachers are live


def sources_of(
    teachers: Teachers, job: Job, rows: "Sequence[TokenRow]", *, budget: int
) -> TeacherSources:
    """Open the teachers, or their caches over these rows.

    `budget` is the number of tokens that training sees. Raises `CellFailed` for a cache that cannot
    serve the loss.
    """
    from harness.models.language_model import open_model
    from harness.models.shape import Shape
    from methods.training.teacher_cache import teacher_cache
    from methods.training.teachers import CrossTokenizerTeacher, LiveTeacher

    width = teachers.vocabulary or Shape.of_folder(teachers.models[0].path).vocabulary
    _refuse_useless_cache(teachers, width)
    tokens = sum(len(row.ids) for row in rows)
    if _runs_live(teachers, width, reads_every_row=budget >= tokens):
        opened = [
            open_model(model, device=job.device, dtype=job.dtype) for model in teachers.models
        ]
        kind = CrossTokenizerTeacher if teachers.own_tokenizer else LiveTeacher
        return TeacherSources([partial(kind, model) for model in opened], [])
    cached_rows = teachers.over or rows
    caches = [  # one teacher in memory at a time
        teacher_cache(
            job, model, cached_rows, k=teachers.k, width=width, dtype=teachers.cache_dtype
        )
        for model in teachers.models
    ]
    return TeacherSources([partial(_same, cache) for cache in caches], caches)


def _same(cache: "CachedTeacher") -> "TeacherSource":
    """Return the cache: several trainings can read one."""
    return cache


def _refuse_useless_cache(teachers: Teachers, width: int) -> None:
    """Refuse a cache that keeps fewer tokens than the loss needs, or more than there are."""
    from harness.errors import CellFailed

    if teachers.cache == "on" and teachers.needs_all_probabilities and not _keeps_all_tokens(width):
        raise CellFailed(
            f"this loss needs all {width:,} probabilities and a cache keeps {teachers.k}; type "
            "--set METHOD.cache=off"
        )
    if teachers.cache != "off" and teachers.k > width:
        raise CellFailed(
            f"top_k={teachers.k} is above the vocabulary of {width:,}; give a smaller one, or "
            "cache=off"
        )


def _runs_live(teachers: Teachers, width: int, *, reads_every_row: bool) -> bool:
    """Tell whether the teachers run beside the student, and no cache is used."""
    if teachers.needs_inner_states or teachers.own_tokenizer or teachers.cache == "off":
        return True
    if teachers.cache == "on":
        return False
    costs_more_than_live = not reads_every_row and len(teachers.models) == 1
    return costs_more_than_live or (
        teachers.needs_all_probabilities and not _keeps_all_tokens(width)
    )


def _keeps_all_tokens(width: int) -> bool:
    """Tell whether a cache keeps all tokens of a vocabulary, not only the likeliest ones."""
    from harness.models import shape

    return width <= shape.MAX_DENSE_VOCABULARY


def common_context(teachers: Teachers | None) -> int:
    """Return the longest row, in the student's tokens, that all these teachers can read.

    Teachers with another tokenizer do not count: their rows have other lengths.
    """
    from harness.models.shape import Shape

    models = teachers.models if teachers and not teachers.own_tokenizer else ()
    return min((Shape.of_folder(model.path).context for model in models), default=2**31)


def shared_vocabulary(job: Job, teachers: Sequence[Checkpoint]) -> int:
    """Return how many logit columns the student and all these teachers share.

    Raises `HarnessError` where a teacher's tokens have other ids than the student's.
    """
    from harness.models.language_model import student_tokenizer
    from harness.models.vocabulary import common_vocabulary

    student_vocabulary = student_tokenizer(job.student_base).get_vocab()
    return min(
        common_vocabulary(
            student_vocabulary,
            student_tokenizer(teacher).get_vocab(),
            names=(f"student {job.student_base.name}", f"teacher {teacher.name}"),
        )
        for teacher in teachers
    )


if not TYPE_CHECKING:  # a checker refuses old names; programs that use them go on working
    __getattr__ = by_old_name(__name__)
