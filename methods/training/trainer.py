"""From (prompt, completion) pairs to a saved student.

On the way: rows, teachers, the learning rate, training itself, and what it cost.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.contract import Checkpoint, Job
from harness.errors import CellFailed
from harness.files.writing import write_atomically
from harness.models.language_model import LanguageModel
from harness.models.shape import weight_counts
from harness.models.shaping import parse_student_cut, random_weights, student_of
from methods.training.cost import cache_notes, result_notes, training_cost
from methods.training.loop import fit
from methods.training.recipes import recipe_of
from methods.training.rows import TokenRow, encode
from methods.training.selection import Selection
from methods.training.settings import LoopSettings, Training
from methods.training.sources import Teachers, TeacherSources, common_context, sources_of
from methods.training.terms import Objective, Term
from methods.training.tuning import TunedRate, tune_learning_rate

if TYPE_CHECKING:
    from methods.training.base import Trained, TrainOptions


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a method trains a student with: its loss, its teachers, and how text becomes rows."""

    terms: Sequence[Term]
    teachers: Teachers | None
    selection: Selection | None
    options: "TrainOptions"
    notes: Mapping[str, Any]  # for the record
    # what a teacher did for the method itself: traces, or losses on validation rows
    shared: Sequence[dict[str, Any]]
    validation_pairs: Callable[[], Iterable[tuple[str, str]]]  # of the validation split


class Trainer:
    """Trains one job's student with what its method gives."""

    def __init__(self, method: "Trained", job: Job, inputs: TrainingInputs) -> None:
        self.method, self.job, self.inputs = method, job, inputs
        self.budget = inputs.options.seen_tokens or job.budget.seen_tokens
        self.recipe = recipe_of(method, job)
        self.recipe.refuse()
        self.parameters = 0  # of the student, without adapters
        self.student = self._new_student(job.seed)
        self.rows: list[TokenRow] = []
        self.too_long = 0
        self.sources = TeacherSources([], [])

    def train(self, pairs: Iterable[tuple[Any, ...]]) -> Checkpoint:
        """Train on the pairs; return the student, saved with its `cost.json` beside it."""
        self._read(pairs)
        loop_settings = self._loop_settings()
        notes = {**self.inputs.notes, "learning_rate": loop_settings.learning_rate}
        shared = [*self.inputs.shared, *(cache.cost() for cache in self.sources.caches)]
        if self.job.tune:
            tuned = self._tune(loop_settings)
            loop_settings = tuned.settings
            notes |= tuned.notes
            shared.append(tuned.cost)
        validation, objective = self._validation_rows(), self._objective()
        result = fit(
            self.student,
            rows=self.rows,
            validation=validation,
            objective=objective,
            settings=loop_settings,
            training=self._training(),
        )
        notes |= {
            "taught_by": [teacher.name for teacher in self._teachers()],
            "rows": len(self.rows),
            "rows_too_long": self.too_long,
            **self.recipe.notes(),
            **result_notes(result),
            **cache_notes(self.sources.caches, self.inputs.teachers),
        }
        cost = training_cost(self.student, self.rows, result, objective)
        self.recipe.finish(self.student)
        return self._save({**cost, "shared": shared, "notes": {**notes, **cost["notes"]}})

    def _new_student(self, seed: int) -> LanguageModel:
        job = self.job
        student = student_of(
            job.student,
            job.student_base,
            seed=seed,
            device=job.device,
            dtype=self.recipe.opened_as,
        )
        if self.method.start == "random":
            student = random_weights(student, seed=seed)
        self.parameters = sum(weight_counts(student.model).values())
        self.recipe.prepare(student, seed)
        return student

    def _read(self, pairs: Iterable[tuple[Any, ...]]) -> None:
        """Make rows of the pairs, and open the teachers or their caches over the rows."""
        teachers = self.inputs.teachers
        longest = min(self.student.context, common_context(teachers))
        encoder = self.inputs.options.encoder or encode
        self.rows, self.too_long = encoder(self.student.tokenizer, pairs, longest=longest)
        if not self.rows:
            raise CellFailed(no_rows_message(self.too_long, longest, self.student.context))
        if teachers:
            self.sources = sources_of(teachers, self.job, self.rows, budget=self.budget)

    def _objective(self) -> Objective:
        teachers, options = self.inputs.teachers, self.inputs.options
        return Objective(
            terms=self.inputs.terms,
            sources=[make_source() for make_source in self.sources.makers],
            vocabulary=teachers.vocabulary if teachers else None,
            selection=self.inputs.selection,
            taps=options.taps,
            rollout=options.rollout() if options.rollout else None,
        )

    def _loop_settings(self) -> LoopSettings:
        cut = parse_student_cut(self.job.student)
        scratch = self.method.start == "random" or (cut is not None and cut.draws_weights)
        return self.method.loop_settings(self.parameters, scratch=scratch)

    def _training(self) -> Training:
        job = self.job
        mixed = job.dtype == "bfloat16" and self.recipe.mixes_precision
        precision: Literal["no", "bf16"] = "bf16" if mixed else "no"
        return Training(
            seen_tokens=self.budget,
            seed=job.seed,
            workdir=job.workdir,
            mixed_precision=precision,
            track=job.track,
            progress=job.progress,
        )

    def _tune(self, loop_settings: LoopSettings) -> TunedRate:
        return tune_learning_rate(
            self.method,
            self.job,
            self.rows,
            loop_settings,
            training=self._training(),
            student=self._new_student,
            objective=self._objective,
        )

    def _validation_rows(self) -> list[TokenRow]:
        pairs = self.inputs.options.validation or self.inputs.validation_pairs()
        return encode(self.student.tokenizer, pairs, longest=self.student.context)[0]

    def _teachers(self) -> tuple[Checkpoint, ...]:
        """Return the teachers that the student learnt from, directly or by their shared work."""
        if self.inputs.teachers:
            return self.inputs.teachers.models
        return (self.job.teacher,) if self.inputs.shared else ()

    def _save(self, cost: Mapping[str, Any]) -> Checkpoint:
        parents = (
            self.job.student_base.digest,
            *(teacher.digest for teacher in self._teachers()),
        )
        student = self.recipe.save(
            self.student, self.job.workdir / "student", parents=tuple(dict.fromkeys(parents))
        )
        write_atomically(self.job.workdir / "cost.json", json.dumps(cost, indent=1))
        return student


def no_rows_message(too_long: int, longest: int, context: int) -> str:
    """Say why no row is left to train on.

    `longest` is the longest row in tokens that all models read, `context` the student's own.
    """
    if not too_long:
        return "there are no training rows; give more --rows, or another task"
    reader = "the student reads" if longest == context else "student and teachers can all read"
    return (
        f"all {too_long:,} training rows are longer than the {longest:,} tokens that {reader}; "
        "give one with more context, or other tasks"
    )
