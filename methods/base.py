"""What the settings of every method are made of: a frozen dataclass, and shared kinds of values.

Nothing of training or compressing is imported here, so that a method imports only what it uses.
"""

from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.renames.modules import by_old_name
from harness.renames.settings import accept_old_names, rename_stated_settings

Settings = TypeVar("Settings")
_frozen_dataclass = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(owner: type[Settings]) -> type[Settings]:
    """Make the annotated fields of a class its settings: frozen, keyword-only, validated.

    Settings that were renamed are read by their old names too.
    """
    rename_stated_settings(owner)
    checked = cast("type[Settings]", _frozen_dataclass(owner))
    accept_old_names(checked)
    return checked


def _as_tuple(value: Any) -> Any:
    """Read a single pattern as a tuple of one."""
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Weight = Annotated[float, Field(ge=0, le=1e6)] | Literal["auto"]


def non_default_settings(method: Any, *names: str) -> dict[str, object]:
    """Return the settings among `names` whose values are not the defaults."""
    defaults = type(method)()
    return {
        name: getattr(method, name)
        for name in names
        if getattr(method, name) != getattr(defaults, name)
    }


__getattr__ = by_old_name(__name__)
