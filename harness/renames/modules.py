"""Modules, and names in modules, that a program imports by their old names."""

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from harness.renames.notice import find_rename, warn_once


def current_modules(name: str) -> tuple[str, ...]:
    """Return the current name of a module; several where it was split."""
    rename = find_rename("module", name)
    return tuple(rename.new.split(", ")) if rename else (name,)


def spec_of(name: str) -> ModuleSpec | None:
    """Return where a renamed module is loaded from, None for any other.

    It is the module itself and not a copy, so that its classes stay one class.
    """
    rename = find_rename("module", name)
    if rename is None:
        return None
    warn_once(rename, where="import")
    return ModuleSpec(name, _Alias(rename.new))


class _Alias(Loader):
    """Loads the module of the new name; of one that was split, a module that asks each part."""

    def __init__(self, new: str) -> None:
        self.parts = new.split(", ")

    def exec_module(self, module: ModuleType) -> None:
        if len(self.parts) == 1:
            sys.modules[module.__name__] = importlib.import_module(self.parts[0])
        else:
            module.__getattr__ = self._find  # type: ignore[method-assign]

    def _find(self, name: str) -> Any:
        for part in self.parts:
            if not name.startswith("__") and hasattr(importlib.import_module(part), name):
                return getattr(importlib.import_module(part), name)
        raise AttributeError(f"none of {', '.join(self.parts)} has {name!r}")


def by_old_name(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module: it finds functions and classes by their old names."""

    def attribute(name: str) -> Any:
        rename = find_rename("module", f"{module}:{name}")
        if rename is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_once(rename, where="import")
        home, _, new = rename.new.partition(":")
        return getattr(importlib.import_module(home), new)

    return attribute
