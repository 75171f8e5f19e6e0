"""What trained methods share: their loop settings, and the way from (prompt, completion) pairs to a
saved student.

Importing this imports no torch, so that settings can be checked before anything is computed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Example, Family, Job, Method, Start
from harness.renames.modules import by_old_name
from methods.base import non_default_settings, settings
from methods.training.settings import LoopSettings
from methods.training.sources import Teachers

if TYPE_CHECKING:
    from methods.training.rollout import Rollout
    from methods.training.rows import TokenRow
    from methods.training.selection import Selection
    from methods.training.taps import TapConfig
    from methods.training.terms import Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What few methods need beside terms and teachers, each in place of what the loop does as a
    rule.
    """

    inwards: "TapConfig | None" = None  # which blocks of student and teacher are compared
    rollout: "Callable[[], Rollout] | None" = None  # on-policy: rows are the student's own answers
    seen_tokens: int | None = None  # in place of the budget, where equal examples are wanted
    # In place of the worked answers of the validation split:
    validation: Iterable[tuple[str, str]] | None = None
    # In place of `rows.encode`: pairs to rows and the number left out as too long.
    encoder: "Callable[..., tuple[list[TokenRow], int]] | None" = None


_DEFAULT_OPTIONS = TrainOptions()


def default_learning_rate(parameters: int, *, scratch: bool = False) -> float:
    """Return a learning rate for a student of so many parameters: 1e-3 up to 10 million, then
    falling as their number to the power 2/3.

    A rule of thumb between what reports of pretraining and of full fine-tuning use (135M: 1.8e-4,
    1B: 4.6e-5, 8B: 1.2e-5); from random weights (`scratch`) the power is 1/3. It was not tuned:
    `--tune` searches.
    """
    return float(f"{1e-3 * min(1.0, 1e7 / parameters) ** (1 / 3 if scratch else 2 / 3):.2g}")


@settings
class Trained(Method):
    """Settings of the one training loop; the defaults are the same for every method."""

    family: ClassVar[Family] = "distillation"
    starts_from: ClassVar[Start] = "student"
    trains: ClassVar[bool] = True

    # random: the student's shape with weights drawn from the seed
    start: Literal["student", "random"] = "student"
    # auto: by the student's size, see `rate_for`
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows of one optimiser step
    # rows of one forward pass (accumulation); changes memory, not the gradient
    micro_batch_size: Annotated[int, Field(ge=1)] = 16
    # compute activations again in the backward pass: less memory, a third more time
    gradient_checkpointing: bool = False
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the budget
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    validation_rows: Annotated[int, Field(ge=1)] = 200
    # epochs without a better validation loss before training stops; 0: never
    patience: Annotated[int, Field(ge=0)] = 0

    @property
    def rows_at_once(self) -> int:
        """Return the rows of one forward pass."""
        return self.micro_batch_size

    @property
    def discards_weights(self) -> bool:
        """Tell whether the weights are drawn anew."""
        return self.start == "random"

    def control_settings(self) -> Mapping[str, object]:
        """Return settings that this row's controls take over, where they have them: they start
        alike.
        """
        return self.changed("start")

    def changed(self, *names: str) -> dict[str, object]:
        """Return those of the named settings that are not at their defaults."""
        return non_default_settings(self, *names)

    def loop_settings(self, parameters: int, *, scratch: bool) -> LoopSettings:
        """Return what the loop is set to for a student of so many parameters."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        known = {field.name for field in dataclasses.fields(LoopSettings)}
        shared = {name: value for name, value in own.items() if name in known}
        if self.learning_rate == "auto":
            shared["learning_rate"] = default_learning_rate(parameters, scratch=scratch)
        return LoopSettings(**shared)

    def train(
        self,
        job: Job,
        pairs: Iterable[tuple[Any, ...]],
        *,
        terms: "Sequence[Term]",
        teachers: Teachers | None = None,
        selection: "Selection | None" = None,
        options: TrainOptions = _DEFAULT_OPTIONS,
        notes: Mapping[str, Any] | None = None,
        shared: Sequence[dict[str, Any]] = (),
        **older: Any,
    ) -> Checkpoint:
        """Train the job's student on (prompt, completion[, tag]) pairs and save it, with
        `cost.json` beside it.

        `selection` trains a share of the tokens; `shared` is the teacher's cached work, as
        `SharedCost` has it. `older` are the fields of `options` by name, as they were given before
        it.
        """
        from harness.data.examples import examples_of
        from methods.training.trainer import Trainer, TrainingInputs

        def held_out() -> Iterable[tuple[str, str]]:
            return full_solution_pairs(
                examples_of(job.tasks, "validation", job.source, rows=self.validation_rows)
            )

        lesson = TrainingInputs(
            terms=terms,
            teachers=teachers,
            selection=selection,
            options=dataclasses.replace(options, **older) if older else options,
            notes=notes or {},
            shared=shared,
            held_out=held_out,
        )
        return Trainer(self, job, lesson).through(pairs)


def full_solution_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, worked completion) pairs."""
    return [(example.prompt, example.completion) for example in examples]


def answer_only_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, answer without the work) pairs."""
    return [(example.prompt, example.answer) for example in examples]


if not TYPE_CHECKING:  # a checker refuses old names; programs that use them go on working
    __getattr__ = by_old_name(__name__)
