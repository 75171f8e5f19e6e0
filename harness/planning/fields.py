"""Reads from a settings model how its fields are typed, with bounds and defaults. No typer.

A setting is defined once, as a field. The command line, its help, run files and the Python API
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
    """How a field is typed and shown, if its type alone does not say so.

    It is part of the field's `Annotated`.
    """

    # makes a value of all texts that were typed; an option with a reader may be repeated
    read: Callable[[Sequence[str]], Any] | None = None
    default: str | None = None  # as --help shows it; None: the default of the field
    metavar: str | None = None
    may_be_empty: bool = False
    environment: str = ""  # the variable that is read if the user gives no value


@dataclass(frozen=True)
class Setting:
    """One field of a settings model, as command line, run files and Python need it."""

    name: str
    field: FieldInfo

    @property
    def flag(self) -> str:
        """The long option."""
        return f"--{self.name.replace('_', '-')}"

    @cached_property
    def spelling(self) -> Spelling:
        """How it is typed; the usual way if the field does not say."""
        return next(
            (note for note in self.field.metadata if isinstance(note, Spelling)), Spelling()
        )

    @property
    def type(self) -> type:
        """The type of one typed value: bool, int, float or Path; else str.

        It is str for a field with a reader or validator of its own, which takes the text.
        """
        kinds = {kind for kind, _ in _allowed_types(self.field.annotation)}
        has_validator = any(
            isinstance(note, BeforeValidator) for _, notes in self._types() for note in notes
        )
        kind = kinds.pop() if len(kinds) == 1 else str
        return kind if kind in (bool, int, float, Path) and not has_validator else str

    @property
    def repeated(self) -> bool:
        """Tell whether its option may be typed several times."""
        return self.spelling.read is not None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it may have, in order; empty if there is no such list."""
        return tuple(
            word
            for kind, _ in _allowed_types(self.field.annotation)
            if get_origin(kind) is Literal
            for word in get_args(kind)
        )

    @property
    def bounds(self) -> str:
        """The range of its number in words; "" if it has none."""
        limits = {
            end: getattr(note, end)
            for _, notes in self._types()
            for note in notes
            for end in ("ge", "gt", "le", "lt")
            if hasattr(note, end)
        }
        if "ge" in limits and "le" in limits:
            return f"{limits['ge']} to {limits['le']}"
        words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}
        return ", ".join(text.format(limits[end]) for end, text in words.items() if end in limits)

    @property
    def default(self) -> str:
        """Its default as text; "" if there is nothing to show."""
        if self.spelling.default is not None:
            return self.spelling.default
        value = self.field.get_default(call_default_factory=True)
        if isinstance(value, bool) and self.type is bool:
            return self.name if value else ""
        if isinstance(value, tuple):
            return ",".join(value)
        return "" if value in (None, {}) else str(value)

    @property
    def help(self) -> str:
        """What `--help` shows: its description, default and bounds."""
        words = [*self.choices[:-2], " or ".join(self.choices[-2:])]  # a, b or c
        text = (self.field.description or "").replace("{choices}", ", ".join(words))
        default = f"default: {self.default}" if self.default else ""
        details = "; ".join(filter(None, (default, self.bounds)))
        return f"{text} [{details}]" if details else text

    def value_of(self, typed: Any) -> Any:
        """Return the value of the typed texts; None if nothing was typed."""
        if self.repeated:
            return self.spelling.read(typed) if typed and self.spelling.read else None
        return typed

    def _types(self) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        yield self.field.annotation, tuple(self.field.metadata)
        yield from _allowed_types(self.field.annotation)


def settings_by_name(model: type[BaseModel]) -> dict[str, Setting]:
    """Return the settings of a model by name, in their order."""
    return {name: Setting(name, field) for name, field in model.model_fields.items()}


def with_environment(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, with those added that only environment variables give."""
    variables = {
        name: setting.spelling.environment for name, setting in settings_by_name(model).items()
    }
    texts = {
        name: os.environ.get(variable)
        for name, variable in variables.items()
        if variable and values.get(name) is None
    }
    return {**values, **{name: text for name, text in texts.items() if text}}


def _allowed_types(annotation: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the types that an annotation allows except None, each with its notes.

    Notes are what pydantic reads in `Annotated`: bounds and validators.
    """
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _allowed_types(part)
    elif get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        notes: list[Any] = []
        for note in metadata:
            notes += note.metadata if isinstance(note, FieldInfo) else (note,)
        for inner_kind, inner_notes in _allowed_types(kind):
            yield inner_kind, (*notes, *inner_notes)
    elif annotation is not NoneType:
        yield annotation, ()
