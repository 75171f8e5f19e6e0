"""What trained methods share: their loop settings, and the way from (prompt, completion) pairs to a saved student.

Importing this imports no torch, so that settings can be checked before anything is computed.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Example, Family, Job, Method, Start
from methods.base import changed, settings

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from methods.training.rollout import Rollout
    from methods.training.rows import Row
    from methods.training.selection import Selection
    from methods.training.taps import Inwards
    from methods.training.teachers import Source
    from methods.training.terms import Objective, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teachers:
    """The teachers whose distributions the loss reads, and how they are to be had."""

    models: tuple[Checkpoint, ...]
    vocabulary: int | None  # leading logit columns that mean the same token in all models
    k: int = 64
    cache: Literal["auto", "on", "off"] = "auto"  # auto: where the budget reads every row at least once
    whole: bool = False  # the loss needs every token's probability, not the k likeliest
    inside: bool = False  # it looks into the teacher, which no cache of distributions holds
    own_tokens: bool = False  # the teacher reads the text in its own tokenizer
    temperature: float = 1.0  # that the loss reads them at
    over: Any = None  # rows that the cache shall hold beside the trained ones, so that methods with fewer rows share one


def rate_for(parameters: int, *, scratch: bool = False) -> float:
    """Return a learning rate for a student of so many parameters: 1e-3 up to 10 million, then falling as their number to the power 2/3.

    A rule of thumb between what reports of pretraining and of full fine-tuning use (135M: 1.8e-4, 1B: 4.6e-5, 8B: 1.2e-5); from random
    weights (`scratch`) the power is 1/3. It was not tuned: `--tune` searches.
    """
    return float(f"{1e-3 * min(1.0, 1e7 / parameters) ** (1 / 3 if scratch else 2 / 3):.2g}")


@settings
class Trained(Method):
    """Settings of the one training loop; the defaults are the same for every method."""

    family: ClassVar[Family] = "distillation"
    starts_from: ClassVar[Start] = "student"
    trains: ClassVar[bool] = True

    start: Literal["student", "random"] = "student"  # random: the student's shape with weights drawn from the seed
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"  # auto: by the student's size, see `rate_for`
    batch_rows: Annotated[int, Field(ge=1)] = 16  # rows of one optimiser step
    micro_rows: Annotated[int, Field(ge=1)] = 16  # rows of one forward pass (accumulation); changes memory, not the gradient
    checkpointing: bool = False  # compute activations again in the backward pass: less memory, a third more time
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the budget
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    validation_rows: Annotated[int, Field(ge=1)] = 200
    patience: Annotated[int, Field(ge=0)] = 0  # epochs without a better validation loss before training stops; 0: never

    @property
    def rows_at_once(self) -> int:
        """Return the rows of one forward pass."""
        return self.micro_rows

    @property
    def discards_weights(self) -> bool:
        """Tell whether the weights are drawn anew."""
        return self.start == "random"

    def control_settings(self) -> Mapping[str, object]:
        """Return settings that this row's controls take over, where they have them: they start alike."""
        return self.changed("start")

    def changed(self, *names: str) -> dict[str, object]:
        """Return those of the named settings that are not at their defaults."""
        return changed(self, *names)

    def train(
        self,
        job: Job,
        pairs: Iterable[tuple[Any, ...]],
        *,
        terms: "Sequence[Term]",
        teachers: Teachers | None = None,
        selection: "Selection | None" = None,
        inwards: "Inwards | None" = None,
        rollout: "Callable[[], Rollout] | None" = None,
        seen_tokens: int | None = None,
        validation: Iterable[tuple[str, str]] | None = None,
        notes: Mapping[str, Any] | None = None,
        shared: Sequence[dict[str, Any]] = (),
        encoder: "Callable[..., tuple[list[Row], int]] | None" = None,
    ) -> Checkpoint:
        """Train the job's student on (prompt, completion[, tag]) pairs and save it, with `cost.json` beside it.

        `seen_tokens` replaces the budget where equal examples are wanted; `validation` replaces the worked
        answers of the validation split; `shared` is the teacher's cached work, as `SharedCost` has it; `encoder` replaces the plain way
        to rows.
        """
        from harness.data.examples import examples_of
        from harness.errors import CellFailed
        from harness.files.writing import write_whole
        from harness.models.language_model import stored_dtype
        from harness.models.shaping import parse_recipe, random_weights, save_student, student_of
        from methods.training.loop import LoopSettings, fit
        from methods.training.rows import encode
        from methods.training.terms import Objective

        def fresh_student(seed: int) -> "LanguageModel":
            made = student_of(job.student, job.student_base, seed=seed, device=job.device, dtype="float32")
            return random_weights(made, seed=seed) if self.start == "random" else made

        student = fresh_student(job.seed)
        longest = min(student.context, context_of(teachers))
        rows, too_long = (encoder or encode)(student.tokenizer, pairs, longest=longest)
        if not rows:
            raise CellFailed(_no_rows(too_long, longest, student.context))
        budget = seen_tokens or job.budget.seen_tokens
        sources, kept = sources_of(teachers, job, rows, budget=budget) if teachers else ((), [])

        def objective() -> "Objective":
            return Objective(
                terms=terms, sources=[source() for source in sources], vocabulary=teachers.vocabulary if teachers else None,
                selection=selection, inwards=inwards, rollout=rollout() if rollout else None,
            )  # fmt: skip

        recipe = parse_recipe(job.student)
        scratch = self.start == "random" or (recipe is not None and recipe.draws_weights)
        size = sum(parameter.numel() for parameter in student.model.parameters())
        rate = rate_for(size, scratch=scratch) if self.learning_rate == "auto" else self.learning_rate
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {field.name: own[field.name] for field in fields(LoopSettings) if field.name in own}
        loop = LoopSettings(**{**given, "learning_rate": rate})
        told: dict[str, Any] = {**(notes or {}), "learning_rate": rate}
        written = list(shared)  # what the method itself had a teacher do: traces, or losses on validation rows
        shared = [*shared, *(one.cost() for one in kept)]
        run = {"seen_tokens": budget, "mixed_precision": "bf16" if job.dtype == "bfloat16" else "no"}
        if job.tune:
            from methods.training.tuning import best_rate

            loop, tuned, spent_on_it = best_rate(self, job, rows, loop, run=run, student=fresh_student, objective=objective)
            told |= tuned
            shared.append(spent_on_it)
        held_out = validation or worked(examples_of(job.tasks, "validation", job.source, rows=self.validation_rows))
        aim = objective()
        spent = fit(
            student, rows=rows, validation=encode(student.tokenizer, held_out, longest=student.context)[0], objective=aim, settings=loop,
            seed=job.seed, workdir=job.workdir, track=job.track, progress=job.progress, **run,
        )  # fmt: skip
        taught = teachers.models if teachers else (job.teacher,) if written else ()
        told["taught_by"] = [one.name for one in taught]
        told |= {"rows": len(rows), "rows_too_long": too_long, "kept_step": spent["kept_step"], "terms": spent["terms"]}
        told |= {"start_ce": round(spent["start_ce"], 6), "best_ce": round(spent["best"], 6)}
        if kept:
            told |= {"teacher_cache": [one.key for one in kept], "cached_tokens_of_each": kept[0].k}
            told["cached_mass"] = [one.meta["kept_mass"] for one in kept]
            if teachers and teachers.temperature != 1.0 and not all(one.dense for one in kept):
                told["approximate"] = f"temperature {teachers.temperature:g} over the {kept[0].k} likeliest tokens and their rest as one"
        cost = _cost(student, rows, spent, aim, shared=shared, notes=told)
        parents = tuple(dict.fromkeys((job.student_base.digest, *(one.digest for one in taught))))
        made = save_student(
            student, job.workdir / "student", name=type(self).__name__, dtype=stored_dtype(job.student_base), parents=parents
        )
        write_whole(job.workdir / "cost.json", json.dumps(cost, indent=1))
        return made


def _no_rows(too_long: int, longest: int, context: int) -> str:
    """Say why nothing is left to train on."""
    if not too_long:
        return "there are no training rows; give more --rows, or another task"
    whose = "the student reads" if longest == context else "student and teachers can all read"
    return f"all {too_long:,} training rows are longer than the {longest:,} tokens that {whose}; give one with more context, or other tasks"


def _cost(
    student: "LanguageModel", rows: "Sequence[Row]", spent: Mapping[str, Any], aim: "Objective", *, shared: Sequence[Any], notes: Any
) -> dict[str, Any]:
    from harness.models.shape import forward_flops_per_token

    length = sum(len(row.ids) for row in rows) / len(rows)
    each = forward_flops_per_token(student.model, length)
    cost = {
        "seen_tokens": spent["seen"],
        "trained_tokens": spent["trained"],
        "steps": spent["step"],
        "seconds": spent["seconds"],
        "flops": 3 * each * spent["seen"] + each * spent["written"],
        "shared": list(shared),
        **{name: spent[name] for name in ("devices", "device_seconds", "energy_joules", "energy_source", "peak_bytes")},
        "notes": notes,
    }
    if aim.rollout is not None:
        cost["notes"] |= {"student_wrote_tokens": spent["written"], "student_wrote_seconds": round(spent["writing_seconds"], 2)}
    if aim.live:
        cost["teacher_tokens"] = spent["teacher_tokens"]  # of all teachers together; they read the same rows
        each = spent["teacher_tokens"] / len(aim.live)
        cost["teacher_flops"] = sum(forward_flops_per_token(one.model, length) for one in aim.live) * each
        cost["teacher_seconds"] = spent["teacher_seconds"]
    return cost


def sources_of(teachers: Teachers, job: Job, rows: "Sequence[Row]", *, budget: int) -> "tuple[Sequence[Callable[[], Source]], list[Any]]":
    """Return makers of what the loss reads, and the caches among them: live teachers, or what was kept of each over these rows."""
    from harness.errors import CellFailed
    from harness.models.language_model import open_model
    from harness.models.shape import DENSE, Shape
    from methods.training.teacher_cache import teacher_cache
    from methods.training.teachers import Live, OtherTokens

    width = teachers.vocabulary or Shape.of_folder(teachers.models[0].path).vocabulary
    partial = width > DENSE  # only the likeliest tokens would be kept
    if teachers.cache == "on" and partial and teachers.whole:
        raise CellFailed(f"this loss needs all {width:,} probabilities and a cache keeps {teachers.k}; type --set METHOD.cache=off")
    if teachers.cache != "off" and teachers.k > width:
        raise CellFailed(f"top_k={teachers.k} is above the vocabulary of {width:,}; give a smaller one, or cache=off")
    several = len(teachers.models) > 1
    seldom = budget < sum(len(row.ids) for row in rows) and not several
    live = teachers.cache == "off" or (teachers.cache == "auto" and (seldom or (partial and teachers.whole)))
    if teachers.inside or teachers.own_tokens or live:
        opened = [open_model(one, device=job.device, dtype=job.dtype) for one in teachers.models]
        kind = OtherTokens if teachers.own_tokens else Live
        return [lambda one=one: kind(one) for one in opened], []
    rows = teachers.over or rows
    kept = [teacher_cache(job, one, rows, k=teachers.k, width=width) for one in teachers.models]  # one in memory at a time
    return [lambda one=one: one for one in kept], kept


def context_of(teachers: Teachers | None) -> int:
    """Return the longest row, in the student's tokens, that all these teachers can read; those with tokens of their own are not asked."""
    from harness.models.shape import Shape

    asked = teachers.models if teachers and not teachers.own_tokens else ()
    return min((Shape.of_folder(one.path).context for one in asked), default=2**31)


def shared_vocabulary(job: Job, teachers: Sequence[Checkpoint]) -> int:
    """Return how many logit columns the student and all these teachers share; refuses other token maps."""
    from harness.models.language_model import student_tokenizer
    from harness.models.vocabulary import common_vocabulary

    ours = student_tokenizer(job.student_base).get_vocab()
    return min(
        common_vocabulary(ours, student_tokenizer(one).get_vocab(), names=(f"student {job.student_base.name}", f"teacher {one.name}"))
        for one in teachers
    )


def worked(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, worked completion) pairs."""
    return [(example.prompt, example.completion) for example in examples]


def bare(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, answer without the work) pairs."""
    return [(example.prompt, example.answer) for example in examples]
