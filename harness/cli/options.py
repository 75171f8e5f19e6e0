"""What the options of all commands share: no empty values, `-h`, `--version`. No torch."""

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from harness.errors import HarnessError

# typer brings its own click in some versions and takes the installed one in others: contexts and
# parameters are typed Any here.
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}


def version_line() -> str:
    """Return the version as `--version` prints it."""
    from harness.records.record import SCHEMA

    try:
        number = metadata.version("compression-harness")
    except metadata.PackageNotFoundError:
        number = "(not installed)"
    return (
        f"compression-harness {number}, records of schema {SCHEMA}, Python "
        f"{platform.python_version()}"
    )


class Command(TyperCommand):
    """A command that refuses empty values and infinite numbers before it does anything."""

    may_be_empty: frozenset[str] = frozenset()  # parameters of which "" is a value

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises `HarnessError` for a value that is empty, infinite or not a number.
        """
        _answer_version(ctx, args)
        written = list(args)
        rest = super().parse_args(ctx, args)
        typed, _, _ = self.make_parser(ctx).parse_args(args=written)
        for parameter in self.params:
            if parameter.name not in self.may_be_empty:
                _refuse_empty(parameter, typed.get(parameter.name or ""))
            _refuse_infinite(parameter, ctx.params.get(parameter.name or ""))
        return rest


class ConfigCommand(Command):
    """A command whose options are the fields of `RunConfig`, beside its own.

    `context.obj` holds the values that were typed. The options are built when the command is typed
    or inspected, so that the help of all commands does not wait for them.
    """

    left_out: frozenset[str] = frozenset()  # fields that the command has no options for
    _params: list[Any]
    _whole: bool

    @property
    def params(self) -> list[Any]:
        """The command's arguments, the configuration's fields, the command's own options."""
        if not self._whole:
            from harness.cli.run_options import option_parameters
            from harness.planning import config
            from harness.planning.fields import settings_by_name

            fields = settings_by_name(config.RunConfig)
            self.may_be_empty = frozenset(
                name for name, setting in fields.items() if setting.spelling.may_be_empty
            )
            place = sum(setting.param_type_name == "argument" for setting in self._params)
            self._params[place:place] = [
                option
                for option in option_parameters(config.RunConfig)
                if option.name not in self.left_out
            ]
            self._whole = True
        # always the same list: click puts its help option there and takes it again
        return self._params

    @params.setter
    def params(self, parameters: list[Any]) -> None:
        self._params, self._whole = parameters, False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; those of the configuration go to `context.obj`.

        Raises `HarnessError` for a text that is no value.
        """
        from harness.cli.run_options import typed_values
        from harness.planning import config
        from harness.renames.options import current_flags

        rest = super().parse_args(ctx, current_flags(args))
        ctx.obj = typed_values(
            config.RunConfig,
            {
                name: ctx.params.pop(name)
                for name in config.RunConfig.model_fields
                if name not in self.left_out
            },
        )
        return rest


class CommandGroup(TyperGroup):
    """The commands together; it takes `--version`, as each of them does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Answer `--version` before a command is looked for."""
        _answer_version(ctx, args[:1])
        return super().parse_args(ctx, args)


def _answer_version(ctx: Any, args: Sequence[str]) -> None:
    if "--version" in args:
        typer.echo(version_line())
        ctx.exit(0)


def _typed_name(parameter: Any) -> str:
    """Return a parameter as it is typed: its long flag, or an argument's name."""
    flag: str = max(parameter.opts, key=len)
    return flag if parameter.param_type_name == "option" else flag.upper()


def _refuse_empty(parameter: Any, value: Any) -> None:
    values = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(text, str) and not text.strip(" ,\t\n") for text in values):
        missing = ", so no method is asked for" if parameter.name == "methods" else ""
        raise HarnessError(
            f"{_typed_name(parameter)} is empty{missing}; leave it out for its default, or see "
            "--help for what it takes"
        )


def _refuse_infinite(parameter: Any, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise HarnessError(f"{_typed_name(parameter)} {value:g}: give a finite number")


def refuse_duplicates(flag: str, names: Sequence[str], *, hint: str = "") -> None:
    """Raise `HarnessError` where a list names one thing twice."""
    duplicate = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if duplicate is not None:
        raise HarnessError(f"{flag}: {duplicate} is named twice; name it once{hint}")
