"""Rows of older records and baselines by the names of now: in silence, for files are no mistake."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.renames.notice import Rename, find_rename, warn_once
from harness.renames.settings import value_by_new_name

_PART = re.compile(r"([\w.-]+)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")  # NAME[SETTINGS], of a chain each
_SETTING = re.compile(r"(?:(?<=^)|(?<=,))(\s*)(\w+)=([^,]*)")


def settings_in_records(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an older record by their names now; a chain's stand by method."""
    if "+" in method:
        parts = {name: own for name, own in settings.items() if isinstance(own, Mapping)}
        return {**settings, **{name: settings_in_records(name, own) for name, own in parts.items()}}
    current: dict[str, Any] = {}
    for name, value in settings.items():
        rename = _rename_of(method, name)
        current[rename.new if rename else name] = (
            value_by_new_name(rename, value) if rename else value
        )
    return current


def current_label(label: str, *, typed_in: str = "") -> str:
    """Return a row's label, `int4[group=64]+...`, by the names that its settings have now.

    Where it was typed, `typed_in` is the option: an old name in it is said. Raises `HarnessError`
    for one beside its new name.
    """
    return _PART.sub(lambda part: f"{part[1]}[{_current(part[1], part[2], typed_in)}]", label)


def current_labels(labels: Sequence[str] | None, *, typed_in: str) -> list[str]:
    """Return rows that were typed by the names that they have now; none where nothing was typed."""
    return [current_label(label, typed_in=typed_in) for label in labels or ()]


def _current(method: str, settings: str, typed_in: str) -> str:
    given = {name: value for _, name, value in _SETTING.findall(settings)}

    def renamed(match: re.Match[str]) -> str:
        blank, name, value = match.groups()
        rename = _rename_of(method, name)
        if rename is None:
            return match[0]
        current = str(value_by_new_name(rename, value))
        if typed_in:
            warn_once(rename, where=f"{typed_in} {method}[{name}={value}]")
        if typed_in and given.get(rename.new, current) != current:
            raise HarnessError(
                f"{typed_in}: {method}[{settings}] names one setting twice, as {name} and "
                f"{rename.new}; keep {rename.new}"
            )
        return f"{blank}{rename.new}={current}"

    return _SETTING.sub(renamed, settings)


def _rename_of(method: str, name: str) -> Rename | None:
    """Return how a setting of one of our methods was renamed, None where it was not."""
    rename = find_rename("setting", name)
    return rename if rename and method in rename.methods else None
