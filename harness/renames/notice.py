"""A renamed thing as an object, and the one warning about it."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness import renames
from harness.errors import OldName

Kind = Literal["setting", "trait", "option", "module", "argument", "column"]


@dataclass(frozen=True, kw_only=True)
class Rename:
    """One row of the table."""

    kind: Kind
    old: str
    new: str
    version: str  # the first version that need not know the old name
    date: str  # and the first day, ISO 8601
    opposite: bool = False  # true by the old name is false by the new one
    methods: tuple[str, ...] = ()  # of ours, that have the setting

    @property
    def until(self) -> str:
        """How long the old name works, in words."""
        return f"works until version {self.version} and {self.date}"


def all_renames() -> Iterator[Rename]:
    """Yield the whole table, kind by kind."""
    for kind, table in _tables().items():
        for old in table:
            yield _rename(kind, old, table[old])


def find_rename(kind: Kind, old: str) -> Rename | None:
    """Return how something of an old name was renamed, None where it was not."""
    entry = _tables()[kind].get(old)
    return None if entry is None else _rename(kind, old, entry)


def renames_of(kind: Kind) -> dict[str, Rename]:
    """Return the renames of one kind, by old name."""
    table = _tables()[kind]
    return {old: _rename(kind, old, entry) for old, entry in table.items()}


def _tables() -> dict[Kind, Mapping[str, Any]]:
    return {
        "setting": renames.SETTINGS,
        "trait": renames.TRAITS,
        "option": renames.OPTIONS,
        "module": renames.MODULES,
        "argument": renames.ARGUMENTS,
        "column": renames.COLUMNS,
    }


def _rename(kind: Kind, old: str, entry: Any) -> Rename:
    """Return a line of the table as an object.

    A setting's line also has how its value is read, and which methods have it.
    """
    new, *reading_of_value, (version, date) = entry[:3] if kind == "setting" else entry
    methods = entry[3] if kind == "setting" else ()
    return Rename(
        kind=kind,
        old=old,
        new=new,
        version=version,
        date=date,
        opposite=reading_of_value == ["opposite"],
        methods=methods,
    )


_WARNED: set[tuple[Kind, str]] = set()  # in this process: every old name is said once


def warn_once(rename: Rename, *, where: str) -> None:
    """Warn once in a process that an old name was used; `where` is the place, as `int4.group`."""
    if (rename.kind, rename.old) in _WARNED:
        return
    _WARNED.add((rename.kind, rename.old))
    note = " (true by the old name is false by the new one)" if rename.opposite else ""
    message = f"{where}: {rename.old} is {rename.new} now{note}; the old name {rename.until}"
    # No file of the caller's: Python would print its line of source below, and this is one line.
    warnings.warn_explicit(message, OldName, "harness", 1)
