"""What trained methods share: loop settings, and training on pairs of prompt and completion.

Importing this imports no torch, so that settings can be checked before anything is computed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from harness.contract import Checkpoint, Example, Family, Job, Method, Start
from harness.renames.arguments import accept_old_arguments, current_arguments
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


@accept_old_arguments
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What few methods need beside terms and teachers; each replaces a default of the loop."""

    taps: "TapConfig | None" = None  # which blocks of student and teacher are compared
    rollout: "Callable[[], Rollout] | None" = None  # on-policy: rows are the student's own answers
    seen_tokens: int | None = None  # replaces the budget, where equal examples are compared
    # replaces the worked answers of the validation split
    validation: Iterable[tuple[str, str]] | None = None
    # replaces `rows.encode`: pairs to rows, and the number of pairs left out as too long
    encoder: "Callable[..., tuple[list[TokenRow], int]] | None" = None


_DEFAULT_OPTIONS = TrainOptions()
# of `recipe=bf16`: weight, gradient, and two moments of a byte with a scale of 4 for each 256
BF16_BYTES_PER_WEIGHT = 2.0 + 2.0 + 2 * (1 + 4 / 256)
# settings of every trained method that its controls take over: what is trained, and from where
SHARED_WITH_CONTROLS = ("start", "recipe", "lora_rank", "lora_alpha")


def default_learning_rate(parameters: int, *, scratch: bool = False) -> float:
    """Return a learning rate for a student of so many parameters.

    It is 1e-3 up to 10 million parameters, and falls as their number to the power 2/3 above; from
    random weights (`scratch`) the power is 1/3. This is a rule of thumb between what reports of
    pretraining and of full fine-tuning use (135M: 1.8e-4, 1B: 4.6e-5, 8B: 1.2e-5). It was not
    tuned: `--tune` searches for a better one.
    """
    power = 1 / 3 if scratch else 2 / 3
    rate = 1e-3 * min(1.0, 1e7 / parameters) ** power
    return float(f"{rate:.2g}")


@settings
class Trained(Method):
    """Settings of the one training loop; the defaults are the same for every method."""

    family: ClassVar[Family] = "distillation"
    starts_from: ClassVar[Start] = "student"
    trains: ClassVar[bool] = True
    recipes: ClassVar[tuple[str, ...]] = ("full", "bf16", "lora")

    # random: the student's shape with weights drawn from the seed
    start: Literal["student", "random"] = "student"
    # auto: by the student's size, see `default_learning_rate`
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    batch_size: Annotated[int, Field(ge=1)] = 16  # rows of one optimiser step
    # rows of one forward pass (accumulation); changes memory, not the gradient
    micro_batch_size: Annotated[int, Field(ge=1)] = 16
    # compute activations again in the backward pass: less memory, a third more time
    gradient_checkpointing: bool = False
    # rows of a forward pass one after another, without padding and without attention between them;
    # the gradient is the same up to rounding. auto: on a GPU, where the model can
    packing: Literal["auto", "on", "off"] = "auto"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of the budget
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    validation_rows: Annotated[int, Field(ge=1)] = 200
    # epochs without a better validation loss before training stops; 0: never
    patience: Annotated[int, Field(ge=0)] = 0
    # full: every weight in float32 (16 bytes each); bf16: every weight in bf16, with 8-bit moments
    # (6 bytes each), saved in bf16; lora: adapters of low rank beside frozen weights (about 5 bytes
    # each), merged when the student is saved; auto: the first of these that fits, chosen while
    # planning
    recipe: Literal["auto", "full", "bf16", "lora"] = "auto"
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[int, Field(ge=1, le=4096)] = 32  # adapters count alpha/rank times

    @model_validator(mode="after")
    def _adapters_need_weights_to_adapt(self) -> Self:
        if self.recipe == "lora" and self.start == "random":
            raise ValueError(
                "recipe=lora freezes the weights that start=random draws; use recipe=full"
            )
        return self

    @property
    def rows_at_once(self) -> int:
        """Return the rows of one forward pass."""
        return self.micro_batch_size

    @property
    def training_bytes_per_weight(self) -> float:
        """Return the bytes that training holds for each weight of the student.

        In bf16: 2 each for the weight and its gradient, and 2 for the moments with their scales.
        With adapters: the frozen weight, and 16 bytes for each of theirs, which are at most
        rank/256 for a weight where the model is 512 wide or more.
        """
        full = super().training_bytes_per_weight
        if self.recipe == "bf16":
            return BF16_BYTES_PER_WEIGHT
        return 4.0 + full * min(1.0, self.lora_rank / 256) if self.recipe == "lora" else full

    @property
    def trains_adapters(self) -> bool:
        """Tell whether adapters are trained beside frozen weights."""
        return self.recipe == "lora"

    @property
    def discards_weights(self) -> bool:
        """Tell whether the student starts from random weights."""
        return self.start == "random"

    def control_settings(self) -> Mapping[str, object]:
        """Return settings that this row's controls take over, where they have them.

        With them all start alike.
        """
        return self.changed(*SHARED_WITH_CONTROLS)

    def changed(self, *names: str) -> dict[str, object]:
        """Return those of the named settings that are not at their defaults."""
        return non_default_settings(self, *names)

    def loop_settings(self, parameters: int, *, scratch: bool) -> LoopSettings:
        """Return the settings of the loop for a student of so many parameters."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        loop_names = {field.name for field in dataclasses.fields(LoopSettings)}
        loop_values = {name: value for name, value in values.items() if name in loop_names}
        if self.learning_rate == "auto":
            rate = default_learning_rate(parameters, scratch=scratch)
            loop_values["learning_rate"] = rate * self._rate_factor
        if self.recipe == "bf16":
            loop_values["optimizer"] = "adamw-8bit"
        return LoopSettings(**loop_values)

    @property
    def _rate_factor(self) -> float:
        """The learning rate of the recipe over that of full training."""
        if self.recipe != "lora":
            return 1.0
        from methods.training.lora import LEARNING_RATE_FACTOR

        return LEARNING_RATE_FACTOR

    def refuse_recipe(self, job: Job) -> None:
        """Raise `CellFailed` or `Skipped` where the recipe cannot be followed for a job.

        `train` does so too; methods whose teacher works before they train ask earlier.
        """
        from methods.training.recipes import recipe_of

        recipe_of(self, job).refuse()

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
        """Train the job's student on (prompt, completion[, tag]) pairs; save it with `cost.json`.

        `selection` trains a share of the tokens; `notes` go into the record; `shared` is the
        teacher's cached work, with the fields of `SharedCost`. `older` are fields of `options` by
        name, which is how methods passed them before `options` existed.
        """
        from harness.data.examples import examples_of
        from methods.training.trainer import Trainer, TrainingInputs

        def validation_pairs() -> Iterable[tuple[str, str]]:
            return full_solution_pairs(
                examples_of(job.tasks, "validation", job.source, rows=self.validation_rows)
            )

        by_current_name = current_arguments("methods.training.base:TrainOptions", older)
        inputs = TrainingInputs(
            terms=terms,
            teachers=teachers,
            selection=selection,
            options=dataclasses.replace(options, **by_current_name),
            notes=notes or {},
            shared=shared,
            validation_pairs=validation_pairs,
        )
        return Trainer(self, job, inputs).train(pairs)


def full_solution_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, answer with its solution steps) pairs."""
    return [(example.prompt, example.completion) for example in examples]


def answer_only_pairs(examples: Iterable[Example]) -> list[tuple[str, str]]:
    """Return (prompt, answer without the steps) pairs."""
    return [(example.prompt, example.answer) for example in examples]


if not TYPE_CHECKING:  # a checker refuses old names; programs that use them go on working
    __getattr__ = by_old_name(__name__)
