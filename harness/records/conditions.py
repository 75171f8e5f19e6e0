"""Under which conditions a row is made and scored: one object, made by the plan. No torch.

The cell's job and its record hold it. Every field says in its own line whether two rows must agree
in it before they are compared, and how tables and baselines write it. Whatever groups, compares or
refuses rows reads that here: a new setting is a new field, and no list of names is kept elsewhere.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from harness.contract import Prompting
from harness.records.consistency import Checks, ConsistentModel, nonnegative_fields

# which rows a condition says something about
RowKind = Literal["every row", "students", "trained rows", "calibrated rows"]
EVERY_ROW: tuple[RowKind, ...] = ("every row",)
Text = Callable[[Any], str | None]  # None: nothing to say


class ModelReference(ConsistentModel):
    """Which model, by content."""

    checks: ClassVar[Checks] = nonnegative_fields("parameters", "weight_bytes")

    name: str
    digest: str
    parameters: int | None = None
    weight_bytes: int | None = None
    note: str = ""
    parents: tuple[str, ...] = ()


class DataReference(ConsistentModel):
    """Which data of a user's own, by content."""

    checks: ClassVar[Checks] = nonnegative_fields("examples", "weight")

    name: str
    digest: str
    examples: int
    weight: float = 1.0  # its share among several


@dataclass(frozen=True)
class BaselineText:
    """How a baseline writes a condition; texts of one name follow each other."""

    name: str
    text: Text
    # else only where it is not at its default: baselines from before it hold rows to that
    always: bool = True


@dataclass(frozen=True)
class MustAgree:
    """Two rows are compared only where they agree in this field.

    `name` is what tables call it. Fields of one name are one condition.
    """

    name: str
    text: Text = str
    of: RowKind = "every row"
    frozen: BaselineText | None = None  # None: as tables do, where it is not at its default
    in_baselines: bool = True


@dataclass(frozen=True)
class MayDiffer:
    """Rows may differ in this field and still be compared; `why` says what makes that right."""

    why: str


def _names(models: tuple[ModelReference, ...]) -> str:
    return " and ".join(model.name for model in models)


def _digests(models: tuple[ModelReference, ...]) -> str:
    return " ".join(model.digest for model in models)


def _data_text(sets: "tuple[DataReference, ...]") -> str | None:
    weighted = len(sets) > 1
    names = " and ".join(
        f"{data.name} ({data.digest[:8]})" + (f" x {data.weight:g}" if weighted else "")
        for data in sets
    )
    return names or None


class _FullyMarked(ConsistentModel):
    """A model whose every field says `MustAgree` or `MayDiffer`; other classes are refused."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, field in cls.model_fields.items():
            if not any(isinstance(mark, (MustAgree, MayDiffer)) for mark in field.metadata):
                raise TypeError(
                    f"{cls.__name__}.{name} says neither MustAgree(...) nor MayDiffer(...): must "
                    "two rows agree in it to be compared?"
                )


class Conditions(_FullyMarked):
    """What the plan fixes for a row."""

    checks: ClassVar[Checks] = nonnegative_fields("budget_tokens", "budget_rows")

    suites: Annotated[
        tuple[str, ...], MayDiffer("a task is asked in one way, whichever suite names it")
    ]
    teachers: Annotated[
        tuple[ModelReference, ...],
        MustAgree("teacher", _names, in_baselines=False),  # a folder may be renamed
        MustAgree("teacher digest", _digests, frozen=BaselineText("teacher", _digests)),
    ]
    # name@version; a baseline holds them score by score
    tasks: Annotated[tuple[str, ...], MustAgree("tasks", ", ".join, in_baselines=False)]
    device: Annotated[str, MustAgree("device", frozen=BaselineText("device", str))]
    dtype: Annotated[str, MustAgree("dtype", frozen=BaselineText("dtype", str))]
    limit: Annotated[
        int | dict[str, int] | None,
        MayDiffer("a score says how many items it has, and their digest"),
    ] = None
    limited: Annotated[  # scored on a sample of the items
        bool,
        MustAgree(
            "limited",
            lambda given: "a sample of the items" if given else "",
            frozen=BaselineText("limited", lambda on: "yes" if on else "no"),
        ),
    ] = False
    # of each task's items: its name, size and seed, or its name and digest; "": all of them
    subset: Annotated[str, MustAgree("subset", lambda name: name or None)] = ""
    chat: Annotated[  # prompts in the chat template
        bool,
        MustAgree(
            "prompts",
            lambda on: "chat template" if on else "",
            frozen=BaselineText("prompts", lambda on: "chat " if on else "plain"),
        ),
    ] = False
    system: Annotated[
        str | None,
        MustAgree(
            "prompts",
            lambda text: f"system prompt {text!r}" if text else "",
            frozen=BaselineText("prompts", lambda text: text or ""),
        ),
    ] = None
    student_recipe: Annotated[
        str, MustAgree("student", of="students", frozen=BaselineText("student", str))
    ]
    student_base: Annotated[  # what the recipe cuts, or what is trained as it is
        ModelReference,
        MustAgree(
            "student base",
            lambda base: base.digest,
            "students",
            BaselineText("student base", lambda base: base.digest),
        ),
    ]
    budget_tokens: Annotated[
        int,
        MustAgree(
            "budget",
            lambda count: f"{count:,} seen tokens",
            "trained rows",
            BaselineText("budget", lambda count: f"{count} tokens"),
        ),
    ]
    budget_rows: Annotated[
        int,
        MustAgree(
            "budget",
            lambda count: f"{count:,} items",
            "trained rows",
            BaselineText("budget", lambda count: f", {count} items"),
        ),
    ]
    tuned: Annotated[  # the learning rate was chosen on a held-out slice of the training rows
        bool,
        MustAgree(
            "budget",
            lambda on: "a learning rate of its own" if on else "",
            "trained rows",
            BaselineText("tuned", lambda on: "yes", always=False),
        ),
    ] = False
    teacher_weights: Annotated[  # of several teachers, where the user gave them
        tuple[float, ...],
        MustAgree(
            "weights", lambda shares: "+".join(f"{share:.3g}" for share in shares), "trained rows"
        ),
    ] = ()
    train_data: Annotated[  # in place of the tasks' train splits
        tuple[DataReference, ...], MustAgree("training data", _data_text, "trained rows")
    ] = ()
    calibration_data: Annotated[  # in place of the train splits' text, or of C4
        DataReference | None,
        MustAgree(
            "calibration data",
            lambda data: _data_text((data,)) if data else None,
            "calibrated rows",
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _limited(cls, values: Any) -> Any:
        """Mark a number of items as a sample.

        Records of schema 7 and before say only that it was one.
        """
        return (
            {**values, "limited": True}
            if isinstance(values, Mapping) and values.get("limit")
            else values
        )

    @property
    def has_all_items(self) -> bool:
        """Tell whether all items of each task are scored: neither a sample nor a subset."""
        return not self.limited and not self.subset

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks without their versions, in the same order."""
        return tuple(task.partition("@")[0] for task in self.tasks)

    @property
    def prompting(self) -> Prompting:
        """How prompts are shown."""
        return Prompting(chat=self.chat, system=self.system)


def shared_conditions(model: BaseModel, rows: Collection[RowKind] = EVERY_ROW) -> dict[str, str]:
    """Return what must be equal before two rows are compared, as tables write it.

    Only fields that say something about `rows` count.
    """
    texts: dict[str, list[str]] = {}
    for value, mark, _ in _comparable(model):
        if mark.of in rows and (text := mark.text(value)) is not None:
            texts.setdefault(mark.name, []).append(text)
    return {name: ", ".join(filter(None, parts)) for name, parts in texts.items()}


def baseline_conditions(model: BaseModel, rows: Collection[RowKind]) -> dict[str, str]:
    """Return the same as a baseline writes it."""
    texts: dict[str, str] = {}
    for value, mark, default in _comparable(model):
        writing = mark.frozen or BaselineText(mark.name, mark.text, always=False)
        if mark.of in rows and mark.in_baselines and (writing.always or value != default):
            texts[writing.name] = texts.get(writing.name, "") + (writing.text(value) or "")
    return texts


def first_difference(conditions: BaseModel, other: BaseModel) -> str:
    """Name the first field in which two conditions differ, "" where they are the same."""
    return next(
        (
            name
            for name in type(conditions).model_fields
            if getattr(conditions, name) != getattr(other, name, None)
        ),
        "",
    )


def _comparable(model: BaseModel) -> Iterator[tuple[Any, MustAgree, Any]]:
    """Yield value, mark and default of every field in which compared rows must agree."""
    for name, same, default in _marks(type(model)):
        yield getattr(model, name), same, default


@cache
def _marks(model: type[BaseModel]) -> tuple[tuple[str, MustAgree, Any], ...]:
    """Return name, mark and default of these fields of a class.

    They are cached, for a report groups thousands of records.
    """
    fields = model.model_fields.items()
    return tuple(
        (name, mark, field.get_default())
        for name, field in fields
        for mark in field.metadata
        if isinstance(mark, MustAgree)
    )


class WithConditions(BaseModel):
    """A model that holds its conditions.

    It is built from them, or from their fields among its own: files of every schema have them so.
    """

    # the fields that are parts, whose fields may stand among its own
    holds: ClassVar[tuple[str, ...]] = ("conditions",)
    conditions: Conditions

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, values: Any) -> Any:
        """Gather fields of the parts that stand among the model's own."""
        if not isinstance(values, Mapping):
            return values
        values_by_part = cls._parted(values)
        return {
            **values_by_part.pop(""),
            **{name: part for name, part in values_by_part.items() if name not in values},
        }

    @classmethod
    def _parted(cls, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Split values into those of each part, by its name, and the model's own under ""."""
        parts = {
            name: cls.model_fields[name].annotation for name in cls.holds if name not in values
        }
        part_of_field = {
            field: name
            for name, part in parts.items()
            if part is not None
            for field in part.model_fields
        }
        values_by_part: dict[str, dict[str, Any]] = {"": {}, **{name: {} for name in parts}}
        for key, value in values.items():
            values_by_part["" if key in cls.model_fields else part_of_field.get(key, "")][key] = (
                value
            )
        return values_by_part

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, those of its parts among them."""
        values_by_part = self._parted(update or {})
        own_values = values_by_part.pop("")
        return super().model_copy(
            update={
                **own_values,
                **{
                    name: getattr(self, name).model_copy(update=part)
                    for name, part in values_by_part.items()
                    if part
                },
            },
            deep=deep,
        )

    # our own code says `.conditions.device`; programs of users that read `record.device` go on
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            parts = (self.__dict__[part] for part in self.holds if part in self.__dict__)
            owner = next((part for part in parts if name in type(part).model_fields), None)
            return super().__getattr__(name) if owner is None else getattr(owner, name)


class WithFlatConditions(WithConditions):
    """A model that holds its conditions and is written with their fields among its own."""

    @model_serializer(mode="wrap")
    def _written(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, JsonValue]:
        written: dict[str, JsonValue] = {}
        fields: dict[str, JsonValue] = handler(self)
        for name, value in fields.items():
            if name == "conditions":
                written |= self.conditions.model_dump(mode=info.mode)
            else:
                written[name] = value
        return written
