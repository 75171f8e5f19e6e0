"""The contracts between harness, methods and suites: what a method receives and must return.

Nothing here computes and nothing imports torch. A method receives a `Job` and returns a
`Checkpoint`. A suite is a list of tasks. The harness scores and measures the checkpoint itself, so
no method reports its own numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from harness.models.shape import Shape

Split = Literal["train", "validation", "test", "dev"]
Kind = Literal["generate", "choose", "continue", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk: all that passes from a method to the scorer. The teacher is one too."""

    path: Path
    name: str  # what the user typed, or the method that made it
    digest: str  # sha256 of weights, configuration and tokenizer: same digest, same model
    parents: tuple[str, ...] = ()  # digests of the models from which it was made
    bytes_on_disk: int = 0  # weight files only
    note: str = ""  # e.g. "unpacked from GGUF Q4_1"
    # of an adapter: the folder of the model that it is laid on; None for a model of its own
    base: Path | None = None

    @property
    def model_folder(self) -> Path:
        """The folder with configuration and tokenizer: of an adapter, those of its base."""
        return self.base or self.path


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training item of a task.

    Its text is `prompt + completion`, of which only the completion is trained.
    """

    task: str
    prompt: str  # exactly what the scorer will show the model
    completion: str  # the gold solution with its steps, in the answer form that the scorer reads
    answer: str  # the same without the steps: `answer-only` trains on it
    gold: str  # the grader compares an output with it
    plain: str = ""  # the prompt without a chat template; "" if `prompt` has no template either
    # text that closes an answer of another form, so that the scorer can read it; "": the task has
    # none
    ending: str = ""
    # (role, content) of what stands before a completion that is a turn of a conversation; it is
    # shown in the student's chat template, whatever other prompts are shown in
    conversation: tuple[tuple[str, str], ...] = ()

    @property
    def asked(self) -> str:
        """The prompt without a chat template, for a model that has another template."""
        return self.plain or self.prompt


@dataclass(frozen=True, kw_only=True)
class Grade:
    """How one extractor graded one output."""

    extractor: str
    extracted: str | None  # the answer that it read; None: it found none
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much data a trained row may use."""

    seen_tokens: int  # that pass through the student: prompts included, padding not
    rows: int = 2_000  # distinct training items, the same ones for every row of a table


class DataSource(Protocol):
    """The place from which tasks read real items.

    `harness.data.source` has the one that reads a folder or the Hub.
    """

    @property
    def folder(self) -> Path | None:
        """The folder with the files of the benchmarks, None without one."""
        ...

    @property
    def render(self) -> Callable[[Example], Example]:
        """The function that turns a training item into the form that the student is shown."""
        ...

    @property
    def show(self) -> Callable[[Any, str], str]:
        """The function (tokenizer, plain prompt) -> the prompt for a model with that tokenizer."""
        ...

    def rows(
        self,
        relative: str,
        *,
        fields: Sequence[str],
        expected: int | None = None,
        check: Callable[[dict[str, Any]], str | None] | None = None,
        wanted: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Return the rows of a JSON-lines file, each with these fields and checked.

        `expected` is their number; `check` returns what is wrong with a row, None if nothing is;
        `wanted` are the files to name in an error if the file is missing. Raises `HarnessError`
        with file and line.
        """
        ...

    def text(
        self, relative: str, *, expected: int | None = None, wanted: Sequence[str] = ()
    ) -> str:
        """Return a text file; `expected` is the number of its lines."""
        ...

    def file(self, relative: str, *, wanted: Sequence[str] = ()) -> Path:
        """Return the path of a file, which may be compressed."""
        ...

    def fingerprint(self, files: Iterable[str]) -> str:
        """Return one digest of files, the same for plain and compressed ones."""
        ...


class Task(Protocol):
    """One benchmark: its prompts, answer form, grader, chance level and version.

    It uses no model, and does no I/O but reading its data.
    """

    @property
    def name(self) -> str:
        """The name in records and tables."""
        ...

    @property
    def version(self) -> str:
        """The version, printed with every score; it changes with prompts, items and the grader."""
        ...

    @property
    def kind(self) -> Kind:
        """What a model must do.

        Generate text, choose an option, continue a text as it goes on, or predict a whole text.
        """
        ...

    @property
    def chance(self) -> float:
        """The accuracy of guessing, from 0 to below 1."""
        ...

    @property
    def primary(self) -> str:
        """The name of the extractor whose grades make the score."""
        ...

    @property
    def domain(self) -> str:
        """The domain: math, knowledge, language."""
        ...

    def lm_eval_tasks(self, source: "DataSource") -> dict[str, Any]:
        """Return lm-eval's task objects (`ConfigurableTask`) by name: one, or one per subject."""
        ...

    def examples(self, split: Split, source: "DataSource") -> Iterator[Example]:
        """Yield the training items of a split, always in the same order."""
        ...

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Return the grade of one output by every extractor of the task.

        The primary extractor comes first, the most lenient one last.
        """
        ...


class OwnData(Task, Protocol):
    """Training examples of a user's own: read as a task's, and never scored."""

    def all_examples(self, source: "DataSource") -> Iterator[Example]:
        """Yield the examples of every split."""
        ...

    def counts(self, source: "DataSource") -> dict[str, int]:
        """Return how many examples are trained on, held out, and dropped for evaluation text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named list of tasks, and whether speed and size are measured too."""

    name: str
    version: int
    tasks: tuple[str, ...]
    measure: bool = True
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How prompts are shown to a model."""

    chat: bool = False  # in the tokenizer's chat template; False: as plain text
    system: str | None = None  # the system message of a chat


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a running cell is."""

    stage: str
    done: float
    total: float
    unit: str = ""
    detail: str = ""


def _ignore_progress(_: Progress) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a method may use. It writes files in `workdir` and `cache` only."""

    teachers: tuple[Checkpoint, ...]
    student: str  # recipe: depth:0.5, width:0.5, scratch:0.5, or a model
    student_base: Checkpoint  # the model that the recipe cuts, or that is trained unchanged
    tasks: Mapping[str, Task]
    source: "DataSource"
    budget: Budget
    seed: int
    workdir: Path
    cache: Path
    device: str = "cpu"
    dtype: str = "float32"
    teacher_weights: tuple[float, ...] = ()  # of several teachers, if the user gave weights
    tune: bool = False  # choose the learning rate on a held-out slice of the training rows
    # where the training steps are shown beside training.jsonl: tensorboard, wandb or trackio
    track: str = ""
    progress: Callable[[Progress], None] = field(default=_ignore_progress, compare=False)
    # examples of the user's own to calibrate on (their train split), in place of the tasks'
    calibration: "OwnData | None" = None
    # what is scored, where that is not what is trained on: no text of it may be read
    evaluated_tasks: "Mapping[str, Task]" = field(default_factory=dict)

    @property
    def teacher(self) -> Checkpoint:
        """The only teacher, or the first of several."""
        return self.teachers[0]


Family = Literal["control", "distillation", "pruning", "low-rank", "quantization", "cache"]
Start = Literal["teacher", "student"]


class Method:
    """One way to make a student. The fields of its constructor are its settings; they are frozen.

    Every trait that the harness reads stands here with its default. A class may derive from this
    one or from nothing: `harness.traits` completes it when it is loaded. It refuses an unknown
    trait and a value of the wrong type. A property may compute a trait from the settings. The name
    of a method's own constant begins with an underscore.
    """

    family: ClassVar[Family]  # required: the block of a table, and the place in a chain
    # What the method changes if it stands first in a chain. Default: the teacher for pruning,
    # low-rank and quantization, the student for all others.
    starts_from: ClassVar[Start]
    controls: ClassVar[tuple[str, ...]] = ()  # methods whose rows must stand beside this one
    trains: ClassVar[bool] = False  # spends the token budget; its student then depends on the seed
    is_control: ClassVar[bool] = False
    draws_random_numbers: ClassVar[bool] = False  # without training; the student depends on it
    block_bytes_per_weight: ClassVar[float] = 0.0  # held for each weight of the block at work
    simulated: ClassVar[bool] = False  # floats that stand for packed weights: no bytes, no speed
    needs_several_teachers: ClassVar[bool] = False
    # it compares logits, so both models must have the same tokens
    needs_same_vocabulary: ClassVar[bool] = False
    needs_plain: ClassVar[bool] = False  # it works only on the architecture's own shapes
    drops_inputs: ClassVar[bool] = False  # it removes columns of matrices, with patterns of zeros
    leaves_zeros: ClassVar[bool] = False  # a later stage keeps these weights at zero
    # without training: the model's blocks stay in their files, but for the one at work
    works_by_block: ClassVar[bool] = False
    # what a plan chooses from where the setting `recipe` is auto, the dearest first; labels name
    # every one but the first
    recipes: ClassVar[tuple[str, ...]] = ()

    @property
    def reads_teacher_live(self) -> bool:
        """Tell whether a teacher runs beside the student, because no cache holds what it gives."""
        return False

    @property
    def writes_traces(self) -> bool:
        """Tell whether a teacher writes answers before training begins."""
        return False

    @property
    def needs_answers(self) -> bool:
        """Tell whether it trains only on examples whose answer is known apart from the text."""
        return False

    @property
    def answers_per_row(self) -> int:
        """Return how many answers a teacher writes for each training row, if it writes any."""
        return 1

    @property
    def training_bytes_per_weight(self) -> float:
        """Return the bytes that training holds for each weight of the student, whatever the batch.

        In float32: the weight, its gradient and AdamW's two moments.
        """
        return 16.0

    @property
    def rows_at_once(self) -> int:
        """Return how many rows one forward pass of training holds."""
        return 16

    @property
    def logits_in_parts(self) -> bool:
        """Tell whether its training never holds all logits of a batch."""
        return True

    @property
    def needs_all_probabilities(self) -> bool:
        """Tell whether it needs a teacher's whole distributions, not only the likeliest tokens."""
        return False

    @property
    def discards_weights(self) -> bool:
        """Tell whether it starts from random weights and ignores the stages before it."""
        return False

    @property
    def calibrates(self) -> bool:
        """Tell whether it reads training text without training."""
        return False

    @property
    def calibration_passes(self) -> float:
        """Return the work on the calibration text in forward passes of the model over all of it."""
        return 2.0

    @property
    def bits_per_weight(self) -> float | None:
        """Return the bits of a packed weight with its share of scales and zero points.

        None: all weights are floats.
        """
        return None

    @property
    def takes_adapters(self) -> bool:
        """Tell whether a later stage can train adapters beside the weights that it packs."""
        return False

    @property
    def trains_adapters(self) -> bool:
        """Tell whether it trains adapters beside frozen weights, which may be packed."""
        return False

    @property
    def bits_per_table_weight(self) -> float | None:
        """Return the bits of a packed weight of embedding and head; None where they are floats."""
        return None

    @property
    def zero_share(self) -> float:
        """Return the share of weights that become zero and stay zero, if it `leaves_zeros`."""
        return 0.0

    @property
    def zero_pattern(self) -> str:
        """Return the pattern of the zeros: "unstructured", "2:4" or another N:M."""
        return "unstructured"

    @property
    def keeps_architecture(self) -> bool:
        """Tell whether the student has the shapes of its architecture.

        False: it has factors or widths of its own.
        """
        return True

    def calibration_tokens(self) -> tuple[int, int]:
        """Return (number of calibration sequences, tokens of each); (0, 0) if none are read."""
        return 0, 0

    def control_settings(self) -> Mapping[str, object]:
        """Return the settings that this row's controls take over if they have them.

        A row and its controls then start alike.
        """
        return {}

    def resulting_shape(self, before: "Shape") -> "Shape":
        """Return the shape of the student; `before` is that of the model from which it is made."""
        return before

    def compress(self, job: Job) -> Checkpoint:
        """Make the student and save it. Raises `CellFailed` with a reason if it cannot."""
        raise NotImplementedError
