"""What the fields of a settings model say of themselves: how they are typed, within which bounds,
with which default. No typer.

A setting is written once, as a field. The command line, its help, run files and the Python door
read it here.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a field is typed and shown where its type alone does not say so. It stands in the field's
    `Annotated`.
    """

    # makes a value of all texts typed; its option may be repeated
    read: Callable[[Sequence[str]], Any] | None = None
    default: str | None = None  # as --help says it; None: the field's own
    metavar: str | None = None
    may_be_empty: bool = False
    environment: str = ""  # the variable that stands in where nothing is given


@dataclass(frozen=True)
class Setting:
    """One field of a settings model, as a door sees it."""

    name: str
    field: FieldInfo

    @property
    def flag(self) -> str:
        """The long option."""
        return f"--{self.name.replace('_', '-')}"

    @cached_property
    def spelling(self) -> Spelling:
        """How it is typed; the usual way where the field does not say."""
        return next(
            (note for note in self.field.metadata if isinstance(note, Spelling)), Spelling()
        )

    @property
    def type(self) -> type:
        """What one typed value is: bool, int, float or Path; str where the field has a reader, or a
        type of its own.
        """
        kinds = {kind for kind, _ in _allowed_types(self.field.annotation)}
        read = any(
            isinstance(note, BeforeValidator) for _, notes in self._parts() for note in notes
        )
        kind = kinds.pop() if len(kinds) == 1 else str
        return kind if kind in (bool, int, float, Path) and not read else str

    @property
    def repeated(self) -> bool:
        """Tell whether its option may be typed several times."""
        return self.spelling.read is not None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be, in order; none where it may be any."""
        return tuple(
            word
            for kind, _ in _allowed_types(self.field.annotation)
            if get_origin(kind) is Literal
            for word in get_args(kind)
        )

    @property
    def bounds(self) -> str:
        """The range of its number, in words; "" where it has none."""
        notes = [note for _, parts in self._parts() for note in parts]
        limits = {
            end: getattr(note, end)
            for note in notes
            for end in ("ge", "gt", "le", "lt")
            if hasattr(note, end)
        }
        low = (
            f"{limits['ge']} or more"
            if "ge" in limits
            else f"above {limits['gt']}"
            if "gt" in limits
            else ""
        )
        high = (
            f"{limits['le']} or less"
            if "le" in limits
            else f"below {limits['lt']}"
            if "lt" in limits
            else ""
        )
        both = f"{limits['ge']} to {limits['le']}" if {"ge", "le"} <= set(limits) else ""
        return both or ", ".join(filter(None, (low, high)))

    @property
    def default(self) -> str:
        """Its default as text; "" where there is nothing to say."""
        value = self.field.get_default(call_default_factory=True)
        if self.spelling.default is not None:
            return self.spelling.default
        if isinstance(value, bool):
            return (self.name if value else "") if self.type is bool else str(value)
        return (
            ",".join(value)
            if isinstance(value, tuple)
            else ""
            if value in (None, {})
            else str(value)
        )

    @property
    def help(self) -> str:
        """What `--help` says: what it is, its default, its bounds."""
        words = [*self.choices[:-2], " or ".join(self.choices[-2:])]  # a, b or c
        text = (self.field.description or "").replace("{choices}", ", ".join(words))
        told = [
            part
            for part in (f"default: {self.default}" if self.default else "", self.bounds)
            if part
        ]
        return f"{text} [{'; '.join(told)}]" if told else text

    def value_of(self, typed: Any) -> Any:
        """Return the value of what was typed; None where nothing was."""
        if self.repeated:
            return self.spelling.read(typed) if typed and self.spelling.read else None
        return typed

    def _parts(self) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        yield self.field.annotation, tuple(self.field.metadata)
        yield from _allowed_types(self.field.annotation)


def settings_by_name(model: type[BaseModel]) -> dict[str, Setting]:
    """Return a model's fields by name, in their order."""
    return {name: Setting(name, field) for name, field in model.model_fields.items()}


def with_environment(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with those added that the environment gives to fields that nobody gave."""
    named = {name: one.spelling.environment for name, one in settings_by_name(model).items()}
    found = {
        name: os.environ.get(variable)
        for name, variable in named.items()
        if variable and values.get(name) is None
    }
    return {**values, **{name: text for name, text in found.items() if text}}


def _allowed_types(annotation: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the types that an annotation allows, None left out, each with its notes (bounds,
    validators).
    """
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _allowed_types(part)
    elif get_origin(annotation) is Annotated:
        kind, *given = get_args(annotation)
        notes = [
            note
            for one in given
            for note in (one.metadata if isinstance(one, FieldInfo) else (one,))
        ]
        for inner, more in _allowed_types(kind):
            yield inner, (*notes, *more)
    elif annotation is not NoneType:
        yield annotation, ()
