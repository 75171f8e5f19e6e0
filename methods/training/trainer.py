"""From (prompt, completion) pairs to a saved student: rows, teachers, learning rate, training, and
what it cost.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.contract import Checkpoint, Job
from harness.errors import CellFailed
from harness.files.writing import write_atomically
from harness.models.language_model import LanguageModel, stored_dtype
from harness.models.shape import forward_flops_per_token
from harness.models.shaping import parse_student_cut, random_weights, save_student, student_of
from methods.training.loop import fit
from methods.training.rows import TokenRow, encode
from methods.training.selection import Selection
from methods.training.settings import LoopSettings, Training
from methods.training.sources import Teachers, common_context, sources_of
from methods.training.state import TrainingResult
from methods.training.terms import Objective, Term

if TYPE_CHECKING:
    from methods.training.base import Trained, TrainOptions


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a method trains a student with: its loss, its teachers, and how its text becomes
    rows.
    """

    terms: Sequence[Term]
    teachers: Teachers | None
    selection: Selection | None
    options: "TrainOptions"
    notes: Mapping[str, Any]  # for the record
    # what a teacher did for the method itself: traces, or losses on validation rows
    shared: Sequence[dict[str, Any]]
    held_out: Callable[[], Iterable[tuple[str, str]]]  # the validation split's pairs


class Trainer:
    """Trains one job's student by one method's lesson."""

    def __init__(self, method: "Trained", job: Job, lesson: TrainingInputs) -> None:
        self.method, self.job, self.lesson = method, job, lesson
        self.budget = lesson.options.seen_tokens or job.budget.seen_tokens
        self.student = self._fresh_student(job.seed)
        self.rows: list[TokenRow] = []
        self.too_long = 0
        self.sources: Sequence[Callable[[], Any]] = ()
        self.caches: list[Any] = []

    def through(self, pairs: Iterable[tuple[Any, ...]]) -> Checkpoint:
        """Train on the pairs; return the student, saved with its `cost.json` beside it."""
        self._read(pairs)
        loop = self._loop_settings()
        notes = {**self.lesson.notes, "learning_rate": loop.learning_rate}
        shared = [*self.lesson.shared, *(cache.cost() for cache in self.caches)]
        if self.job.tune:
            loop, tuned, search = self._tuned(loop)
            notes |= tuned
            shared.append(search)
        validation, objective = self._validation(), self._objective()
        spent = fit(
            self.student,
            rows=self.rows,
            validation=validation,
            objective=objective,
            settings=loop,
            training=self._training(),
        )
        notes |= self._notes(spent)
        cost = cost_of(self.student, self.rows, spent, objective)
        return self._saved({**cost, "shared": shared, "notes": {**notes, **cost["notes"]}})

    def _fresh_student(self, seed: int) -> LanguageModel:
        job = self.job
        student = student_of(
            job.student, job.student_base, seed=seed, device=job.device, dtype="float32"
        )
        return random_weights(student, seed=seed) if self.method.start == "random" else student

    def _read(self, pairs: Iterable[tuple[Any, ...]]) -> None:
        """Make rows of the pairs, and open or read the teachers over them."""
        teachers = self.lesson.teachers
        longest = min(self.student.context, common_context(teachers))
        encoder = self.lesson.options.encoder or encode
        self.rows, self.too_long = encoder(self.student.tokenizer, pairs, longest=longest)
        if not self.rows:
            raise CellFailed(no_rows_message(self.too_long, longest, self.student.context))
        if teachers:
            self.sources, self.caches = sources_of(
                teachers, self.job, self.rows, budget=self.budget
            )

    def _objective(self) -> Objective:
        teachers, options = self.lesson.teachers, self.lesson.options
        return Objective(
            terms=self.lesson.terms,
            sources=[source() for source in self.sources],
            vocabulary=teachers.vocabulary if teachers else None,
            selection=self.lesson.selection,
            inwards=options.inwards,
            rollout=options.rollout() if options.rollout else None,
        )

    def _loop_settings(self) -> LoopSettings:
        recipe = parse_student_cut(self.job.student)
        scratch = self.method.start == "random" or (recipe is not None and recipe.draws_weights)
        size = sum(parameter.numel() for parameter in self.student.model.parameters())
        return self.method.loop_settings(size, scratch=scratch)

    def _training(self) -> Training:
        job = self.job
        precision: Literal["no", "bf16"] = "bf16" if job.dtype == "bfloat16" else "no"
        return Training(
            seen_tokens=self.budget,
            seed=job.seed,
            workdir=job.workdir,
            mixed_precision=precision,
            track=job.track,
            progress=job.progress,
        )

    def _tuned(self, loop: LoopSettings) -> tuple[LoopSettings, dict[str, Any], dict[str, Any]]:
        """Return the loop with the best of several learning rates, what to note of the search, and
        its cost.
        """
        from methods.training.tuning import tune_learning_rate

        return tune_learning_rate(
            self.method,
            self.job,
            self.rows,
            loop,
            training=self._training(),
            student=self._fresh_student,
            objective=self._objective,
        )

    def _validation(self) -> list[TokenRow]:
        pairs = self.lesson.options.validation or self.lesson.held_out()
        return encode(self.student.tokenizer, pairs, longest=self.student.context)[0]

    def _taught_by(self) -> tuple[Checkpoint, ...]:
        if self.lesson.teachers:
            return self.lesson.teachers.models
        return (self.job.teacher,) if self.lesson.shared else ()

    def _notes(self, spent: TrainingResult) -> dict[str, Any]:
        """Return what the record says of rows, losses and teachers."""
        return {
            "taught_by": [teacher.name for teacher in self._taught_by()],
            "rows": len(self.rows),
            "rows_too_long": self.too_long,
            "kept_step": spent.kept_step,
            "terms": {name: asdict(term) for name, term in spent.terms.items()},
            "start_ce": round(spent.start_ce, 6),
            "best_ce": round(spent.best, 6),
            **self._cache_notes(),
        }

    def _cache_notes(self) -> dict[str, Any]:
        caches, teachers = self.caches, self.lesson.teachers
        if not caches:
            return {}
        notes: dict[str, Any] = {
            "teacher_cache": [cache.key for cache in caches],
            "cached_tokens_of_each": caches[0].k,
            "cached_mass": [cache.meta["kept_mass"] for cache in caches],
        }
        softened = teachers is not None and teachers.temperature != 1.0
        if teachers and softened and not all(cache.dense for cache in caches):
            notes["approximate"] = (
                f"temperature {teachers.temperature:g} over the {caches[0].k} likeliest tokens and "
                "their rest as one"
            )
        return notes

    def _saved(self, cost: Mapping[str, Any]) -> Checkpoint:
        base = self.job.student_base
        parents = (base.digest, *(teacher.digest for teacher in self._taught_by()))
        saved = save_student(
            self.student,
            self.job.workdir / "student",
            name=type(self.method).__name__,
            dtype=stored_dtype(base),
            parents=tuple(dict.fromkeys(parents)),
        )
        write_atomically(self.job.workdir / "cost.json", json.dumps(cost, indent=1))
        return saved


def no_rows_message(too_long: int, longest: int, context: int) -> str:
    """Say why nothing is left to train on."""
    if not too_long:
        return "there are no training rows; give more --rows, or another task"
    reader = "the student reads" if longest == context else "student and teachers can all read"
    return (
        f"all {too_long:,} training rows are longer than the {longest:,} tokens that {reader}; "
        "give one with more context, or other tasks"
    )


def cost_of(
    student: LanguageModel, rows: Sequence[TokenRow], spent: TrainingResult, objective: Objective
) -> dict[str, Any]:
    """Return what a training took, as the record's `Cost` has it."""
    length = sum(len(row.ids) for row in rows) / len(rows)
    each = forward_flops_per_token(student.model, length)
    return {
        "seen_tokens": spent.seen,
        "trained_tokens": spent.trained,
        "steps": spent.step,
        "seconds": spent.seconds,
        "flops": 3 * each * spent.seen + each * spent.written,
        "shared": [],
        "devices": spent.devices,
        "device_seconds": spent.device_seconds,
        "energy_joules": spent.energy_joules,
        "energy_source": spent.energy_source,
        "peak_bytes": spent.peak_bytes,
        "notes": _writing_notes(spent) if objective.rollout is not None else {},
        **(_teachers_cost(spent, objective, length) if objective.live else {}),
    }


def _writing_notes(spent: TrainingResult) -> dict[str, Any]:
    seconds = round(spent.writing_seconds, 2)
    return {"student_wrote_tokens": spent.written, "student_wrote_seconds": seconds}


def _teachers_cost(spent: TrainingResult, objective: Objective, length: float) -> dict[str, Any]:
    """Return what the live teachers took together; they read the same rows."""
    each = spent.teacher_tokens / len(objective.live)
    flops = sum(forward_flops_per_token(one.model, length) for one in objective.live)
    return {
        "teacher_tokens": spent.teacher_tokens,
        "teacher_flops": flops * each,
        "teacher_seconds": spent.teacher_seconds,
    }
