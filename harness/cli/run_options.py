"""The options of a command, built from the fields of a settings model when it is typed. No torch.

`harness --help` shows no option of `run`, and does not pay for reading the model.
"""

import inspect
from typing import Any

import typer
from pydantic import BaseModel

from harness.planning.fields import Setting, settings_by_name


def option_parameters(model: type[BaseModel]) -> list[Any]:
    """Return a model's fields as options of a command, in their order.

    None of them is required: defaults are the model's.
    """

    def typed(**values: Any) -> None:
        """Take what was typed; only its signature is read."""

    parameters = [_parameter(setting) for setting in settings_by_name(model).values()]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__annotations__ = {}
    app = typer.Typer(add_completion=False)
    app.command()(typed)
    return list(typer.main.get_command(app).params)


def typed_values(model: type[BaseModel], typed: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the settings that were typed.

    Raises `HarnessError` for a text that is no value.
    """
    values = {
        name: setting.value_of(typed.get(name)) for name, setting in settings_by_name(model).items()
    }
    return {name: value for name, value in values.items() if value is not None}


def _parameter(setting: Setting) -> inspect.Parameter:
    """Return a setting as a function's argument, in typer's terms."""
    annotation = (list[str] if setting.repeated else setting.type) | None
    option = typer.Option(
        None,
        *_flags(setting),
        help=setting.help,
        metavar=setting.spelling.metavar,
        show_default=False,
    )
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation
    )


def _flags(setting: Setting) -> tuple[str, ...]:
    """Return an option's flags.

    A switch that is on by default has its opposite beside it; one that is off has not.
    """
    if setting.type is bool:
        return (
            (f"{setting.flag}/--no-{setting.flag[2:]}",)
            if setting.field.default
            else (setting.flag,)
        )
    return (setting.flag,)
