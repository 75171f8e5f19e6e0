"""The contracts between harness, methods and suites: what a method is given and what it must
return.

Nothing here computes and nothing imports torch. A method sees a `Job` and returns a `Checkpoint`; a
suite is a list of tasks; the harness scores and measures the checkpoint itself, so no method
reports its own numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from harness.models.shape import Shape

Split = Literal["train", "validation", "test", "dev"]
Kind = Literal["generate", "choose", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk: the only thing that passes from a method to the scorer. The teacher is one
    too.
    """

    path: Path
    name: str  # what the user typed, or the method that made it
    digest: str  # sha256 of weights, configuration and tokenizer: same digest, same model
    parents: tuple[str, ...] = ()  # digests of the models that it was made from
    bytes_on_disk: int = 0  # weight files only
    note: str = ""  # e.g. "unpacked from GGUF Q4_1"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training item of a task. `prompt + completion` is the text; only the completion is
    trained.
    """

    task: str
    prompt: str  # exactly what the scorer will show the model
    completion: str  # worked solution in the scorer's answer form, from the training split's gold
    answer: str  # the same without the work: what `answer-only` trains on
    gold: str  # what a grader compares with
    plain: str = ""  # the prompt before it was shown in a chat template; "" where it was not
    # what closes an answer written in another form, so that the scorer reads it; "" where the task
    # has none
    ending: str = ""

    @property
    def asked(self) -> str:
        """The prompt without a template: what is shown to a model of another template."""
        return self.plain or self.prompt


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one extractor made of one output. `extracted` is None where it found no answer
    at all.
    """

    extractor: str
    extracted: str | None
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a trained row may see: tokens that pass through the student, prompt included,
    padding not.
    """

    seen_tokens: int
    rows: int = 2_000  # distinct training items, the same ones for every row of a table


class DataSource(Protocol):
    """Where tasks read real items from; `harness.data.source` has the one that reads a folder or
    the Hub.
    """

    @property
    def folder(self) -> Path | None:
        """The folder of the benchmarks' files; None where there is none."""
        ...

    @property
    def render(self) -> Callable[[Example], Example]:
        """What makes of a training item what the student is shown."""
        ...

    @property
    def show(self) -> Callable[[Any, str], str]:
        """What makes of a tokenizer and a plain prompt what a model with it is shown."""
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
        """Return the rows of a JSON-lines file, each checked; raises `HarnessError` with file and
        line.
        """
        ...

    def text(
        self, relative: str, *, expected: int | None = None, wanted: Sequence[str] = ()
    ) -> str:
        """Return a whole text file of so many lines."""
        ...

    def file(self, relative: str, *, wanted: Sequence[str] = ()) -> Path:
        """Return the path of a file, in plain or packed form."""
        ...

    def fingerprint(self, files: Iterable[str]) -> str:
        """Return one digest of files, the same for plain and packed ones."""
        ...


class Task(Protocol):
    """One benchmark: prompt, answer form, grader, chance level and version. Pure: no model, no I/O
    but its data.
    """

    @property
    def name(self) -> str:
        """What a record and a table call it."""
        ...

    @property
    def version(self) -> str:
        """Printed with every score; changes whenever a prompt, item or grader does."""
        ...

    @property
    def kind(self) -> Kind:
        """What is asked of a model."""
        ...

    @property
    def chance(self) -> float:
        """Accuracy of guessing, 0 where guessing is hopeless."""
        ...

    @property
    def primary(self) -> str:
        """The extractor that the score is made from."""
        ...

    @property
    def domain(self) -> str:
        """What it is about: math, knowledge, language."""
        ...

    def lm_eval_tasks(self, source: "DataSource") -> dict[str, Any]:
        """Return lm-eval's own task objects (`ConfigurableTask`) by name: one, or one a subject."""
        ...

    def examples(self, split: Split, source: "DataSource") -> Iterator[Example]:
        """Yield training items of a split, always in the same order."""
        ...

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade one output with every extractor of the task; the primary one comes first, the most
        lenient one last.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named list of tasks and of what is measured beside them."""

    name: str
    version: int
    tasks: tuple[str, ...]
    measure: bool = True
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How prompts are shown: as plain text, or as a conversation in the tokenizer's chat
    template.
    """

    chat: bool = False
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One sign of life of a running cell."""

    stage: str
    done: float
    total: float
    unit: str = ""
    detail: str = ""


def _ignore_progress(_: Progress) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a method may use. It writes below `workdir` and nowhere else."""

    teachers: tuple[Checkpoint, ...]
    student: str  # recipe: depth:0.5, width:0.5, scratch:0.5, or a model
    student_base: Checkpoint  # the model that the recipe cuts or that is trained as it is
    tasks: Mapping[str, Task]
    source: "DataSource"
    budget: Budget
    seed: int
    workdir: Path
    cache: Path
    device: str = "cpu"
    dtype: str = "float32"
    teacher_weights: tuple[float, ...] = ()  # of several teachers, where the user gave them
    tune: bool = False  # choose the learning rate on a held-out slice of the training rows
    # tensorboard, wandb or trackio: where the steps are shown, beside training.jsonl
    track: str = ""
    progress: Callable[[Progress], None] = field(default=_ignore_progress, compare=False)

    @property
    def teacher(self) -> Checkpoint:
        """The only teacher, or the first of several."""
        return self.teachers[0]


Family = Literal["control", "distillation", "pruning", "low-rank", "quantization"]
Start = Literal["teacher", "student"]


class Method:
    """One way to make a student. Its constructor's fields are its settings, with defaults; they are
    frozen.

    Every trait that the harness asks about stands here, with what holds where a class does not
    state it. A class may derive from this one or from nothing: `harness.traits` completes it when
    it is loaded, and refuses a trait that is not here, or a value that is none. Traits that are
    properties may follow from settings. A constant of a method's own begins with an underscore.
    """

    family: ClassVar[Family]  # always stated: its block of a table, and its place in a chain
    # What it changes where it stands first in a chain. Not stated: pruning, low-rank and
    # quantization
    # start from the teacher, all others from the student.
    starts_from: ClassVar[Start]
    controls: ClassVar[tuple[str, ...]] = ()  # methods whose rows must stand beside this one
    trains: ClassVar[bool] = False  # spends the token budget; then its student depends on the seed
    is_control: ClassVar[bool] = False
    draws_random_numbers: ClassVar[bool] = False  # without training: a student for every seed
    simulated: ClassVar[bool] = False  # floats that stand for packed weights: no bytes, no speed
    needs_several_teachers: ClassVar[bool] = False
    # it compares logits: one token map for both models
    needs_same_vocabulary: ClassVar[bool] = False
    needs_plain: ClassVar[bool] = False  # works on the architecture's own shapes alone
    drops_inputs: ClassVar[bool] = False  # columns of matrices go, and patterns of zeros with them
    leaves_zeros: ClassVar[bool] = False  # weights that a later stage keeps at zero

    @property
    def reads_teacher_live(self) -> bool:
        """Tell whether a teacher runs beside the student: no cache holds what is read of it."""
        return False

    @property
    def writes_traces(self) -> bool:
        """Tell whether a teacher writes answers before anything is trained."""
        return False

    @property
    def answers_per_row(self) -> int:
        """Return how many answers a teacher writes for each training row, where it writes any."""
        return 1

    @property
    def rows_at_once(self) -> int:
        """Return how many rows one forward pass of training holds."""
        return 16

    @property
    def discards_weights(self) -> bool:
        """Tell whether it starts from random weights, whatever the stages before it made."""
        return False

    @property
    def calibrates(self) -> bool:
        """Tell whether training text is read, though nothing is trained."""
        return False

    @property
    def bits_per_weight(self) -> float | None:
        """Return the bits of a packed weight with its share of scales and zeros; None: all are
        floats.
        """
        return None

    @property
    def zero_share(self) -> float:
        """Return the share of weights that become zero, where `leaves_zeros` says that they stay
        so.
        """
        return 0.0

    @property
    def zero_pattern(self) -> str:
        """Return the pattern of the zeros: unstructured, or 2:4 and its like."""
        return "unstructured"

    @property
    def keeps_architecture(self) -> bool:
        """Tell whether the student has the shapes of its architecture, or factors and widths of its
        own.
        """
        return True

    def calibration_tokens(self) -> tuple[int, int]:
        """Return how many sequences are read before a weight changes, and the tokens of each."""
        return 0, 0

    def control_settings(self) -> Mapping[str, object]:
        """Return settings that this row's controls take over, where they have them: they start
        alike.
        """
        return {}

    def resulting_shape(self, before: "Shape") -> "Shape":
        """Return the shape of the student, given that of the model that it is made from."""
        return before

    def compress(self, job: Job) -> Checkpoint:
        """Make the student and save it. Raises `CellFailed` with a reason where it cannot."""
        raise NotImplementedError
