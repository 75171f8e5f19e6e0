"""Rows of older records and baselines by current names, without a warning: nobody typed them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.renames.notice import Rename, find_rename, warn_once
from harness.renames.settings import value_by_new_name

_PART = re.compile(r"([\w.-]+)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")  # NAME[SETTINGS], of a chain each
_SETTING = re.compile(r"(?:(?<=^)|(?<=,))(\s*)(\w+)=([^,]*)")


def settings_in_records(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an older record by current names; those of a chain stand by method."""
    if "+" in method:
        parts = {name: part for name, part in settings.items() if isinstance(part, Mapping)}
        return {
            **settings,
            **{name: settings_in_records(name, part) for name, part in parts.items()},
        }
    current: dict[str, Any] = {}
    for name, value in settings.items():
        rename = _rename_of(method, name)
        current[rename.new if rename else name] = (
            value_by_new_name(rename, value) if rename else value
        )
    return current


def current_label(label: str, *, typed_in: str = "") -> str:
    """Return a row's label, `int4[group=64]+...`, by the current names of its settings.

    Where it was typed, `typed_in` is the option, and an old name in it gives a warning. Raises
    `HarnessError` for an old name beside its new one with another value.
    """
    return _PART.sub(lambda part: f"{part[1]}[{_current(part[1], part[2], typed_in)}]", label)


def current_labels(labels: Sequence[str] | None, *, typed_in: str) -> list[str]:
    """Return rows that were typed by their current names; an empty list where nothing was typed."""
    return [current_label(label, typed_in=typed_in) for label in labels or ()]


def _current(method: str, settings: str, typed_in: str) -> str:
    values = {name: value for _, name, value in _SETTING.findall(settings)}

    def renamed(match: re.Match[str]) -> str:
        blank, name, value = match.groups()
        rename = _rename_of(method, name)
        if rename is None:
            return match[0]
        current = str(value_by_new_name(rename, value))
        if typed_in:
            warn_once(rename, where=f"{typed_in} {method}[{name}={value}]")
        if typed_in and values.get(rename.new, current) != current:
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
