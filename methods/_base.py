"""What trained methods share: their loop settings, and the way from (prompt, completion) pairs to a saved student.

Importing this imports no torch, so that settings can be checked before anything is computed.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.contract import Checkpoint, Example, Job

if TYPE_CHECKING:
    from harness.model import LanguageModel
    from methods._teacher_cache import CachedTeacher
    from methods._training import Row, Term

settings = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))


@settings
class Trained:
    """Settings of the one training loop; the defaults are the same for every method."""

    family: ClassVar[str] = "distillation"
    controls: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    is_control: ClassVar[bool] = False
    same_vocabulary: ClassVar[bool] = False

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    batch_rows: Annotated[int, Field(ge=1)] = 16  # rows of one optimiser step
    micro_rows: Annotated[int, Field(ge=1)] = 16  # rows of one forward pass; changes memory, not the gradient
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the budget
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    validation_rows: Annotated[int, Field(ge=1)] = 200

    def train(
        self,
        job: Job,
        pairs: Iterable[tuple[str, str]],
        *,
        terms: "Sequence[Term]",
        teacher: "LanguageModel | None" = None,
        distil: "Distil | None" = None,
        vocabulary: int | None = None,
        seen_tokens: int | None = None,
        validation: Iterable[tuple[str, str]] | None = None,
        notes: dict[str, Any] | None = None,
        shared: Sequence[dict[str, Any]] = (),
    ) -> Checkpoint:
        """Train the job's student on (prompt, completion) pairs and save it, with `cost.json` beside it.

        `seen_tokens` replaces the budget where equal examples are wanted; `validation` replaces the worked
        answers of the validation split; `shared` is the teacher's cached work, as `SharedCost` has it.
        """
        from harness.arithmetic import forward_flops_per_token
        from harness.checkpoint import write_whole
        from harness.data import examples_of
        from harness.model import save_student, stored_dtype, student_of
        from methods._training import LoopSettings, encode, fit, forget_state

        student = student_of(job.student, job.student_base, seed=job.seed, device=job.device, dtype="float32")
        rows, too_long = encode(student.tokenizer, pairs, longest=student.context)
        budget = seen_tokens or job.budget.seen_tokens
        cached = None
        if distil is not None:
            teacher, cached = _teacher_of(distil, job, rows, budget=budget, vocabulary=vocabulary)
        shared = [*shared, *([cached.cost()] if cached else [])]
        held_out = validation or worked(examples_of(job.tasks, "validation", job.source, rows=self.validation_rows))
        spent = fit(
            student,
            rows=rows,
            validation=encode(student.tokenizer, held_out, longest=student.context)[0],
            terms=terms,
            settings=LoopSettings(**{field.name: getattr(self, field.name) for field in fields(LoopSettings) if hasattr(self, field.name)}),
            seen_tokens=budget,
            seed=job.seed,
            workdir=job.workdir,
            teacher=teacher,
            cached=cached,
            vocabulary=vocabulary,
            mixed_precision="bf16" if job.dtype == "bfloat16" else "no",
            progress=job.progress,
        )
        length = sum(len(row.ids) for row in rows) / len(rows)
        cost = {
            "seen_tokens": spent["seen"],
            "trained_tokens": spent["trained"],
            "steps": spent["step"],
            "seconds": spent["seconds"],
            "flops": 3 * forward_flops_per_token(student.model, length) * spent["seen"],
            "shared": list(shared),
            **{name: spent[name] for name in ("devices", "device_seconds", "energy_joules", "energy_source", "peak_bytes")},
            "notes": {
                "rows": len(rows),
                "rows_too_long": too_long,
                "kept_step": spent["kept_step"],
                **(notes or {}),
                **({"teacher_cache": cached.key, "cached_tokens_of_each": cached.k} if cached else {}),
            },
        }
        if teacher is not None:
            cost["teacher_tokens"] = spent["seen"]
            cost["teacher_flops"] = forward_flops_per_token(teacher.model, length) * spent["seen"]
            cost["teacher_seconds"] = spent["teacher_seconds"]
        parents = tuple(dict.fromkeys((job.student_base.digest, *(one.digest for one in job.teachers if teacher or shared))))
        made = save_student(
            student, job.workdir / "student", name=type(self).__name__, dtype=stored_dtype(job.student_base), parents=parents
        )
        write_whole(job.workdir / "cost.json", json.dumps(cost, indent=1))
        forget_state(job.workdir)
        return made


@dataclasses.dataclass(frozen=True)
class Distil:
    """A teacher whose distributions the loss reads, and how they are to be had."""

    teacher: Checkpoint
    k: int
    cache: Literal["auto", "on", "off"]  # auto: where the budget reads every row at least once
    whole: bool = False  # the loss needs every token's probability, not the k likeliest


def _teacher_of(
    distil: Distil, job: Job, rows: "Sequence[Row]", *, budget: int, vocabulary: int | None
) -> "tuple[LanguageModel | None, CachedTeacher | None]":
    """Return a live teacher, or its cache over these rows."""
    from harness.arithmetic import Shape
    from harness.errors import CellFailed
    from harness.model import open_model
    from methods._teacher_cache import DENSE, teacher_cache

    width = vocabulary or Shape.of_folder(distil.teacher.path).vocabulary
    partial = width > DENSE  # only the likeliest tokens would be kept
    if distil.cache == "on" and partial and distil.whole:
        raise CellFailed(f"this divergence needs all {width:,} probabilities and a cache keeps {distil.k}; type --set METHOD.cache=off")
    if partial and distil.cache != "off" and distil.k >= width:
        raise CellFailed(f"top_k={distil.k} is not below the vocabulary of {width:,}; give a smaller one, or cache=off")
    seldom = budget < sum(len(row.ids) for row in rows)
    if distil.cache == "off" or (distil.cache == "auto" and (seldom or (partial and distil.whole))):
        return open_model(distil.teacher, device=job.device, dtype=job.dtype), None
    return None, teacher_cache(job, distil.teacher, rows, k=distil.k, width=width)


def worked(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, worked completion) pairs."""
    return [(example.prompt, example.completion) for example in examples]


def bare(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, answer without the work) pairs."""
    return [(example.prompt, example.answer) for example in examples]
