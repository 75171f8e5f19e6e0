"""The contracts between harness, methods and suites: what a method is given and what it must return.

Nothing here computes and nothing imports torch. A method sees a `Job` and returns a `Checkpoint`; a suite is
a list of tasks; the harness scores and measures the checkpoint itself, so no method reports its own numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from harness.data import DataSource

Split = Literal["train", "validation", "test", "dev"]
Kind = Literal["generate", "choose", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model on disk: the only thing that passes from a method to the scorer. The teacher is one too."""

    path: Path
    name: str  # what the user typed, or the method that made it
    digest: str  # sha256 of weights, configuration and tokenizer: same digest, same model
    parents: tuple[str, ...] = ()  # digests of the models that it was made from
    bytes_on_disk: int = 0  # weight files only
    note: str = ""  # e.g. "unpacked from GGUF Q4_1"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training item of a task. `prompt + completion` is the text; only the completion is trained."""

    task: str
    prompt: str  # exactly what the scorer will show the model
    completion: str  # worked solution in the scorer's answer form, from the training split's gold
    answer: str  # the same without the work: what `answer-only` trains on
    gold: str  # what a grader compares with
    plain: str = ""  # the prompt before it was shown in a chat template; "" where it was not
    ending: str = ""  # what closes an answer written in another form, so that the scorer reads it; "" where the task has none

    @property
    def asked(self) -> str:
        """The prompt without a template: what is shown to a model of another template."""
        return self.plain or self.prompt


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one extractor made of one output. `extracted` is None where it found no answer at all."""

    extractor: str
    extracted: str | None
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a trained row may see: tokens that pass through the student, prompt included, padding not."""

    seen_tokens: int
    rows: int = 2_000  # distinct training items, the same ones for every row of a table


class Task(Protocol):
    """One benchmark: prompt, answer form, grader, chance level and version. Pure: no model, no I/O but its data."""

    name: ClassVar[str]
    version: ClassVar[str]  # printed with every score; changes whenever a prompt, item or grader does
    kind: ClassVar[Kind]
    chance: ClassVar[float]  # accuracy of guessing, 0 where guessing is hopeless
    primary: ClassVar[str]  # the extractor that the score is made from
    domain: ClassVar[str]

    def lm_eval_tasks(self, source: "DataSource") -> dict[str, Any]:
        """Return lm-eval's own task objects (`ConfigurableTask`) by name: one, or one a subject."""
        ...

    def examples(self, split: Split, source: "DataSource") -> Iterator[Example]:
        """Yield training items of a split, always in the same order."""
        ...

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade one output with every extractor of the task; the primary one comes first, the most lenient one last."""
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
    """How prompts are shown: as plain text, or as a conversation in the tokenizer's chat template."""

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


def _silent(_: Progress) -> None:
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
    track: str = ""  # tensorboard, wandb or trackio: where the steps are shown, beside training.jsonl
    progress: Callable[[Progress], None] = field(default=_silent, compare=False)

    @property
    def teacher(self) -> Checkpoint:
        """The only teacher, or the first of several."""
        return self.teachers[0]


@runtime_checkable
class Method(Protocol):
    """One way to make a student. Its constructor's fields are its settings, with defaults; they are frozen."""

    family: ClassVar[str]
    controls: ClassVar[tuple[str, ...]]  # names of the rows that must stand beside this one
    trains: ClassVar[bool]  # spends the token budget
    is_control: ClassVar[bool]
    same_vocabulary: ClassVar[bool]  # compares logits, so teacher and student must share one token map

    def compress(self, job: Job) -> Checkpoint:
        """Make the student and save it. Raises `CellFailed` with a reason where it cannot."""
        ...
