"""Literal, lazy tables from a name to the place of its class. Imports a class when it is needed.

Our own methods stand in `methods/__init__.py`; other packages add theirs through the
`harness.methods` entry-point group. A name that two packages claim is an error; the last one does
not win.
"""

import ast
import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from harness.errors import HarnessError, in_one_line, unknown
from harness.renames.modules import by_old_name
from harness.renames.settings import current_settings, settings_of_class
from harness.rooms import refuse_forbidden_imports
from harness.traits import complete_method, refuse_values


@dataclass(frozen=True)
class Registry:
    """A table of classes by name."""

    kind: str  # "method", "task": what error messages call an entry
    table: Mapping[str, str]  # name -> "module:Class"

    @classmethod
    def with_entry_points(cls, kind: str, table: Mapping[str, str], group: str) -> "Registry":
        """Join a literal table with what installed packages declare in an entry-point group."""
        joined = dict(table)
        for point in metadata.entry_points(group=group):
            if joined.get(point.name, point.value) != point.value:
                raise HarnessError(
                    f"two packages claim the {kind} {point.name!r}: {joined[point.name]} and "
                    f"{point.value}; rename or uninstall one"
                )
            joined[point.name] = point.value
        return cls(kind, joined)

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def canonical(self, name: str) -> str:
        """Return the first name of the class behind a name: a later one is an alias."""
        where = self.table.get(name)
        return next((first for first, path in self.table.items() if path == where), name)

    def load(self, name: str) -> Any:
        """Import the class behind a name."""
        if name not in self.table:
            raise unknown(self.kind, name, self.table, hint=f"(type: harness list {self.kind}s)")
        module, _, attribute = self.table[name].partition(":")
        try:
            entry: Any = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as problem:
            raise HarnessError(
                f"{self.kind} {name!r} cannot be imported from {self.table[name]}: {problem}"
            ) from problem
        # whatever the module of another package does while it is imported
        except Exception as problem:
            raise HarnessError(
                f"{self.kind} {name!r} cannot be imported from {self.table[name]}: "
                f"{in_one_line(problem)}"
            ) from problem
        if self.kind != "method":
            return entry
        if not isinstance(entry, type):
            raise HarnessError(
                f"method {name!r} ({self.table[name]}) is no class, and must be one with "
                "compress(self, job)"
            )
        return admit_method(name, entry, frozenset(self.table))

    def summary(self, name: str) -> str:
        """Return the first docstring line of the class behind a name, without importing it."""
        module, _, attribute = self.table[name].partition(":")
        try:
            spec = importlib.util.find_spec(module)
            source = (
                importlib.util.decode_source(Path(spec.origin).read_bytes())
                if spec and spec.origin
                else ""
            )
        except (ImportError, OSError) as problem:
            return f"(cannot be found: {problem})"
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").partition("\n")[0]
        return f"(no class {attribute} in {module})"

    def current(self, name: str, settings: Mapping[str, object]) -> dict[str, Any]:
        """Return settings of an entry by their current names; each old name is reported once."""
        return current_settings(name, settings, settings_of_class(self.load(name)))

    def build(self, name: str, settings: Mapping[str, object]) -> Any:
        """Construct an entry with settings, refusing unknown names and values out of range."""
        entry = construct(name, self.load(name), settings)
        if self.kind == "method":
            refuse_values(name, entry)
        return entry


def construct(name: str, entry_class: type[Any], settings: Mapping[str, object]) -> Any:
    """Construct a class with settings, refusing unknown names and values out of range."""
    setting_names = settings_of_class(entry_class)
    settings = current_settings(name, settings, setting_names)
    for key in settings:
        if key not in setting_names:
            hint = f"({name} has: {', '.join(setting_names) or 'no settings'})"
            raise unknown(f"setting of {name}", key, setting_names or ["none"], hint=hint)
    try:
        return TypeAdapter(entry_class).validate_python(settings)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = str(first["loc"][0]) if first["loc"] else name
        message = re.sub(r"^(Input|Value error,) ?", "", first["msg"])
        value = first["input"]
        raise HarnessError(
            f"{name}.{where}: {message}; given {value!r}; write for example --set "
            f"{name}.{where}=VALUE"
        ) from problem


@cache
def admit_method(name: str, method_class: Any, methods: frozenset[str]) -> Any:
    """Return a method's class, completed with default traits, after its imports were checked."""
    refuse_forbidden_imports(name, method_class.__module__)
    return complete_method(name, method_class, methods)


def settings_with_defaults(instance: Any) -> dict[str, Any]:
    """Return an entry's settings with defaults expanded, in declaration order."""
    if not dataclasses.is_dataclass(instance):
        return {}
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


__getattr__ = by_old_name(__name__)
