"""The options of a command, made from the fields of a settings model when the command is typed. No
torch.

`harness --help` shows no option of `run`, and does not pay for reading the model.
"""

import inspect
from typing import Any

import typer
from pydantic import BaseModel

from harness.planning.fields import Setting, settings_by_name


def option_parameters(model: type[BaseModel]) -> list[Any]:
    """Return a model's fields as a command's options, in their order. None of them is required:
    defaults are the model's.
    """

    def typed(**values: Any) -> None:
        """Take what was typed; only its signature is read."""

    takes = [_parameter(one) for one in settings_by_name(model).values()]
    typed.__signature__ = inspect.Signature(takes)  # type: ignore[attr-defined]
    typed.__annotations__ = {}
    app = typer.Typer(add_completion=False)
    app.command()(typed)
    return list(typer.main.get_command(app).params)


def typed_values(model: type[BaseModel], typed: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the settings that were typed. Raises `HarnessError` for a text that is
    none.
    """
    read = {name: one.value_of(typed.get(name)) for name, one in settings_by_name(model).items()}
    return {name: value for name, value in read.items() if value is not None}


def _parameter(one: Setting) -> inspect.Parameter:
    """Return a setting as a function's argument, in typer's terms."""
    annotation = (list[str] if one.repeated else one.type) | None
    option = typer.Option(
        None, *_flags(one), help=one.help, metavar=one.spelling.metavar, show_default=False
    )
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _flags(one: Setting) -> tuple[str, ...]:
    """Return an option's flags: a switch that is on has its opposite beside it, one that is off can
    only be turned on.
    """
    if one.type is bool:
        return (f"{one.flag}/--no-{one.flag[2:]}",) if one.field.default else (one.flag,)
    return (one.flag,)
