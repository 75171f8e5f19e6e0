"""What the settings of every method are made of: the frozen dataclass, and the kinds of values that
several methods take.

Nothing of training or compressing is imported here: a method's code reaches only what the method
uses.
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
    """Make a class's annotated fields its settings: frozen, given by name, checked. Renamed ones
    are read by their old names too.
    """
    rename_stated_settings(owner)
    checked = cast("type[Settings]", _frozen_dataclass(owner))
    accept_old_names(checked)
    return checked


def _as_tuple(given: Any) -> Any:
    """Read a lone pattern as a list of it."""
    return (given,) if isinstance(given, str) else given


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Weight = Annotated[float, Field(ge=0, le=1e6)] | Literal["auto"]


def non_default_settings(method: Any, *names: str) -> dict[str, object]:
    """Return those of a method's named settings that are not at their defaults."""
    defaults = type(method)()
    return {
        name: getattr(method, name)
        for name in names
        if getattr(method, name) != getattr(defaults, name)
    }


__getattr__ = by_old_name(__name__)
