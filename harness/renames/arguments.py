"""Arguments of functions and classes that a program gives by their old names."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from harness.errors import HarnessError
from harness.renames.notice import find_rename, warn_once

Owner = TypeVar("Owner", bound=Callable[..., Any])


def accept_old_arguments(owner: Owner) -> Owner:
    """Let a function, or the constructor of a class, take arguments by their old names."""
    place = f"{owner.__module__}:{owner.__qualname__}"
    if isinstance(owner, type):
        constructor: Any = owner
        constructor.__init__ = _accepting(constructor.__init__, place)
        return owner
    accepting: Owner = _accepting(owner, place)
    return accepting


def _accepting(function: Any, place: str) -> Any:
    @wraps(function)
    def with_current_names(*positional: Any, **keywords: Any) -> Any:
        return function(*positional, **current_arguments(place, keywords))

    return with_current_names


def current_arguments(place: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments by their current names; `place` is "module:function".

    Raises `HarnessError` where one is given by both names, with two values.
    """
    current: dict[str, Any] = {}
    for name, value in keywords.items():
        rename = find_rename("argument", f"{place}.{name}")
        if rename is None:
            current[name] = value
            continue
        if keywords.get(rename.new, value) is not value:
            raise HarnessError(
                f"{place}: {name} and {rename.new} are two names for one argument, and differ; "
                f"which is meant? Keep {rename.new}, its name now"
            )
        warn_once(rename, where=place)
        current[rename.new] = value
    return current
