"""What trained methods share: their loop settings, and the way from (prompt, completion) pairs to a saved student.

Importing this imports no torch, so that settings can be checked before anything is computed.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.contract import Checkpoint, Example, Job

if TYPE_CHECKING:
    from harness.model import LanguageModel
    from methods._training import Term

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
        held_out = validation or worked(examples_of(job.tasks, "validation", job.source, rows=self.validation_rows))
        spent = fit(
            student,
            rows=rows,
            validation=encode(student.tokenizer, held_out, longest=student.context)[0],
            terms=terms,
            settings=LoopSettings(**{field.name: getattr(self, field.name) for field in fields(LoopSettings) if hasattr(self, field.name)}),
            seen_tokens=seen_tokens or job.budget.seen_tokens,
            seed=job.seed,
            workdir=job.workdir,
            teacher=teacher,
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
            "notes": {"rows": len(rows), "rows_too_long": too_long, "kept_step": spent["kept_step"], **(notes or {})},
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


def worked(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, worked completion) pairs."""
    return [(example.prompt, example.completion) for example in examples]


def bare(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, answer without the work) pairs."""
    return [(example.prompt, example.answer) for example in examples]
