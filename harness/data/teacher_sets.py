"""Training data that the run's first teacher writes. No torch.

`teacher`: it answers the train prompts of the run's tasks, as in distillation of sequences (Kim &
Rush, 2016). `teacher:free`: it writes from its beginning-of-sequence token alone, as in LLM-QAT
(Liu et al., 2023) and MiniLLM (Gu et al., 2024); a teacher that is shown a chat template writes the
turn of a user first and answers it then (Magpie, Xu et al., 2024).

A set is known by its recipe before it is written: keys and conditions hold the recipe's digest, and
a record the digest of what was written. Whoever runs a cell gives the function that writes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.contract import Example
from harness.data.training_sets import HELD_OUT_SHARE, MOST_HELD_OUT, TrainingSet
from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.untrusted import parse_word

_TYPED = re.compile(r"(teacher(?::free)?)(?:\[(.*)\])?(?:=(.*))?")


class WritingRecipe(BaseModel):
    """How a teacher writes: the settings in brackets of `teacher[temperature=1,samples=2]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    free: bool  # from nothing, and not to the prompts of tasks
    temperature: Annotated[float, Field(ge=0, le=10)]  # 0: the likeliest token, always
    longest: Annotated[int, Field(ge=1)] = 256  # new tokens of a text
    samples: Annotated[int, Field(ge=1, le=64)] = 1  # texts to each prompt
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _texts_differ(self) -> Self:
        if self.free and self.samples > 1:
            raise ValueError("samples is for prompts; teacher:free has none")
        if self.temperature == 0 and (self.free or self.samples > 1):
            raise ValueError("temperature must be above 0: greedy texts are all the same")
        return self


class WrittenText(NamedTuple):
    """What a teacher wrote for a set, and what that took."""

    examples: tuple[Example, ...]
    counts: dict[str, Any]  # for the record
    costs: tuple[dict[str, Any], ...]  # with the fields of the record's `SharedCost`


def _nobody_writes(data: "TeacherSet") -> WrittenText:
    raise HarnessError(f"{data.name} is written by a run's cell, and this is none")


@dataclass(frozen=True)
class TeacherSet(TrainingSet):
    """Data that a teacher writes when it is first asked for; `place` is what the user typed."""

    recipe: WritingRecipe = field(default_factory=lambda: WritingRecipe(free=False, temperature=0))
    asked: int = 0  # texts that the teacher writes
    recipe_digest: str = ""  # of all that the texts depend on
    write: Callable[["TeacherSet"], WrittenText] = field(default=_nobody_writes, compare=False)

    @property
    def name(self) -> str:
        """The name that records and tables have: what was typed, without its weight."""
        return self.place

    @property
    def is_file(self) -> bool:
        """Tell that it is none."""
        return False

    @property
    def digest(self) -> str:
        """The digest of the recipe: what keys and conditions hold of a set."""
        return self.recipe_digest

    @cached_property
    def written(self) -> WrittenText:
        """What the teacher wrote; the first call lets it write, or reads its cache."""
        return self.write(self)

    @property
    def _examples(self) -> tuple[Example, ...]:
        return self.written.examples

    def __len__(self) -> int:
        """Return how many texts the teacher is asked for."""
        return self.asked

    def planned(self, share: int, *depends_on: object) -> "TeacherSet":
        """Return the set that gives `share` rows; `depends_on` is what else its texts depend on."""
        count = texts_for(share)
        digest = digest_of("teacher writes", self.recipe.model_dump(), count, *depends_on)
        return replace(self, asked=count, recipe_digest=digest)


def texts_for(rows: int) -> int:
    """Return how many texts are needed for so many rows beside those that are held out."""
    rows = max(1, rows)
    return rows + min(MOST_HELD_OUT, math.ceil(rows / (HELD_OUT_SHARE - 1)))


class TypedTeacher(NamedTuple):
    """A set as it was typed, and the text of its weight."""

    data: TeacherSet
    weight: str


def parse_teacher_set(text: str, option: str = "--train-data") -> TypedTeacher | None:
    """Read `teacher` or `teacher:free`, with settings in brackets; None for anything else.

    Raises `HarnessError` for an unknown setting or a value out of range.
    """
    match = _TYPED.fullmatch(text)
    if match is None:
        return None
    kind, typed, weight = match[1], match[2] or "", match[3]
    free = kind == "teacher:free"
    values: dict[str, Any] = {"temperature": 1.0 if free else 0.0}
    for part in filter(None, map(str.strip, typed.split(","))):
        setting, _, value = part.partition("=")
        values[setting.strip()] = parse_word(value.strip())
    names = [name for name in WritingRecipe.model_fields if name != "free"]
    try:
        if unknown := next((name for name in values if name not in names), ""):
            raise ValueError(f"there is no setting {unknown!r}")
        recipe = WritingRecipe(free=free, **values)
    except ValueError as problem:
        raise HarnessError(
            f"{option} {text}: {_reason(problem)}; the settings are {', '.join(names)}, for "
            f"example {kind}[longest=512,seed=1]"
        ) from problem
    place = kind + (f"[{typed}]" if typed else "")
    return TypedTeacher(TeacherSet(place, recipe=recipe), "1" if weight is None else weight)


def _reason(problem: ValueError) -> str:
    """Return what is wrong with a recipe, in one line."""
    if not isinstance(problem, ValidationError):
        return str(problem)
    first = problem.errors()[0]
    setting = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ").lower()
    return f"{setting}: {reason}" if setting else reason
