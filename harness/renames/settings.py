"""Settings of methods by their old names: typed, given by a program, stated by a plug-in."""

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from functools import wraps
from typing import Any

from harness.errors import HarnessError
from harness.renames.notice import Rename, find_rename, renames_of, warn_once


def value_by_new_name(rename: Rename, value: Any) -> Any:
    """Return a value as the new setting has it.

    A setting of the opposite sense turns truth values. Pydantic, which reads the setting, reads
    them here too: a spelling that only one of the two knew would be turned wrongly. Any other value
    stays as it is, for the setting to refuse.
    """
    if not rename.opposite:
        return value
    from pydantic import TypeAdapter, ValidationError

    try:
        return not TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return value


def default_by_new_name(rename: Rename, default: Any) -> Any:
    """Return a stated default as the new setting has it: a value, or a field that holds one."""
    if rename.opposite and isinstance(getattr(default, "default", None), bool):
        # a truth value has no bounds that the field could hold beside it
        return not default.default
    return value_by_new_name(rename, default)


def current_settings(
    where: str, settings: Mapping[str, Any], fields: Collection[str]
) -> dict[str, Any]:
    """Return settings by the names that a class has now, in their order; `where` is the method.

    An old name is read where the class has the new setting and none of the old name. Raises
    `HarnessError` where both are given and differ.
    """
    current: dict[str, Any] = {}
    for name, value in settings.items():
        rename = find_rename("setting", name)
        if rename is None or name in fields or rename.new not in fields:
            current[name] = value
            continue
        renamed = value_by_new_name(rename, value)
        if settings.get(rename.new, renamed) != renamed:
            raise HarnessError(
                f"{where}: {name}={value} and {rename.new}={settings[rename.new]} are two names "
                f"for one setting, and differ; which is meant? Keep {rename.new}, its name now"
            )
        warn_once(rename, where=f"{where}.{name}")
        current[rename.new] = renamed
    return current


def settings_of_class(owner: type[Any]) -> tuple[str, ...]:
    """Return the names of a class's settings."""
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    return tuple(field.name for field in fields)


def rename_stated_settings(owner: type[Any]) -> None:
    """Let a class that states an inherited setting by its old name state the new one.

    Called before the class is made a dataclass. A setting that its bases do not have is its own.
    """
    inherited = {name for base in owner.__mro__[1:] for name in settings_of_class(base)}
    annotations = inspect.get_annotations(owner)
    for old, rename in renames_of("setting").items():
        if old not in annotations or old in inherited or rename.new not in inherited:
            continue
        if rename.new in annotations:
            raise HarnessError(
                f"{owner.__qualname__}: {old} and {rename.new} are two names for one setting; keep "
                f"{rename.new}"
            )
        warn_once(rename, where=f"{owner.__qualname__}.{old}")
        annotations[rename.new] = annotations.pop(old)
        if old in vars(owner):
            setattr(owner, rename.new, default_by_new_name(rename, vars(owner)[old]))
            delattr(owner, old)
    owner.__annotations__ = annotations


def accept_old_names(owner: type[Any]) -> None:
    """Let a constructor take settings by their old names, and its instances be read by them."""
    build = owner.__init__
    names = settings_of_class(owner)

    @wraps(build)
    def construct(self: Any, *args: Any, **keywords: Any) -> None:
        build(self, *args, **current_settings(type(self).__name__, keywords, names))

    owner.__init__ = construct
    if not hasattr(owner, "__getattr__"):
        owner.__getattr__ = _by_old_name


def _by_old_name(self: Any, name: str) -> Any:
    """Return a setting that a program reads by its old name."""
    rename = find_rename("setting", name)
    if rename is None or rename.new not in settings_of_class(type(self)):
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    warn_once(rename, where=f"{type(self).__name__}.{name}")
    return value_by_new_name(rename, getattr(self, rename.new))
