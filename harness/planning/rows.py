"""The rows of a run: every chain that is asked for, and beside it the controls that it needs, each
row once. No torch.

A row's label says what it is: its methods, with the settings that differ from their defaults in
brackets.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from harness.errors import HarnessError, unknown
from harness.planning.chain import check_chain, companion_chains, split_chain, without_settings
from harness.planning.config import RowSettings
from harness.planning.spec import parse_method
from harness.registry import Registry, settings_with_defaults
from harness.renames.settings import current_settings, settings_of_class

NamedMethod = tuple[str, Any]  # a method's name, and the method built from its settings


@dataclass(frozen=True)
class PlannedRow:
    """One row: its methods in order, one for most rows, several for a chain."""

    label: str
    names: tuple[str, ...]
    methods: tuple[Any, ...]
    controls: tuple[str, ...]

    @property
    def name(self) -> str:
        """The row's method: the chain without settings."""
        return "+".join(self.names)

    @property
    def last(self) -> Any:
        """The method of the last stage."""
        return self.methods[-1]

    @property
    def family(self) -> str:
        """The family of its method; chains are a family of their own."""
        return self.last.family if len(self.methods) == 1 else "chain"

    @property
    def settings(self) -> dict[str, JsonValue]:
        """Settings with defaults expanded; a chain's by method."""
        if len(self.methods) == 1:
            return settings_with_defaults(self.last)
        return {
            name: settings_with_defaults(method)
            for name, method in zip(self.names, self.methods, strict=True)
        }

    @property
    def inherited_by_controls(self) -> dict[str, JsonValue]:
        """The settings that the row's controls take over."""
        method = type(self.last)
        inherited = current_settings(
            method.__name__, self.last.control_settings(), settings_of_class(method)
        )
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in inherited.items()
        }

    @property
    def trains(self) -> bool:
        """Tell whether a stage spends the token budget."""
        return any(method.trains for method in self.methods)


def build_rows(config: RowSettings, methods: Registry) -> list[PlannedRow]:
    """Build every chain that is asked for, then the controls that they need, each row once."""
    for name in config.set:
        if name not in methods:
            raise unknown("method", name, methods.table, hint="(in --set)")
    book = _RowBuilder(config, methods)
    for spec in config.methods:
        book.add([book.stage(*parse_method(part)) for part in split_chain(spec)])
    if config.controls:
        book.add_controls()
    _refuse_unused_settings(config, book.rows.values())
    # what a chain begins with is scored before the chain
    return sorted(book.rows.values(), key=lambda row: len(row.methods))


@dataclass(frozen=True)
class _RowBuilder:
    """The rows so far by label, and how to build another one."""

    config: RowSettings
    methods: Registry
    rows: dict[str, PlannedRow] = field(default_factory=dict)

    def stage(self, name: str, settings: Mapping[str, JsonValue]) -> NamedMethod:
        """Build a method; settings that stand in the row's name win over those of `--set`."""
        name = self.methods.canonical(name)
        return name, self.methods.build(
            name,
            {
                **self.methods.current(name, self.config.set.get(name, {})),
                **self.methods.current(name, settings),
            },
        )

    def add(self, stages: Sequence[NamedMethod]) -> PlannedRow | None:
        """Add a row; None where it stands already."""
        names, methods = tuple(name for name, _ in stages), tuple(method for _, method in stages)
        parts = tuple(map(label_of, names, methods))
        if len(parts) > 1:
            check_chain(names, methods)
        chains = tuple(
            "+".join(map(without_settings, chain))
            for chain in companion_chains(parts, methods, self.methods.load)
        )
        row = PlannedRow(
            "+".join(parts), names, methods, chains if len(parts) > 1 else methods[-1].controls
        )
        return None if self.rows.setdefault(row.label, row) is not row else row

    def add_controls(self) -> None:
        """Add the controls of every row, then theirs."""
        pending = list(self.rows.values())
        while pending:
            for stages in self._controls_of(pending.pop(0)):
                # its own form: a variant that was asked for beside it is another row
                added = self.add(stages)
                pending += [added] if added else []

    def _controls_of(self, row: PlannedRow) -> Iterator[list[NamedMethod]]:
        """Yield the controls of a row, as stages that are built: settings that the row hands on are
        theirs too.
        """
        own = {
            label_of(name, method): (name, method)
            for name, method in zip(row.names, row.methods, strict=True)
        }
        if len(row.methods) == 1:
            yield from ([self._control(name, row)] for name in row.controls)
        for parts in companion_chains(tuple(own), row.methods, self.methods.load):
            yield [own[part] if part in own else self._control(part, row) for part in parts]

    def _control(self, name: str, row: PlannedRow) -> NamedMethod:
        known = {setting.name for setting in dataclasses.fields(self.methods.load(name))}
        return self.stage(
            name,
            {
                key: value
                for key, value in self.methods.current(name, row.inherited_by_controls).items()
                if key in known
            },
        )


def _refuse_unused_settings(config: RowSettings, rows: Iterable[PlannedRow]) -> None:
    unused = sorted(set(config.set) - {name for row in rows for name in row.names})
    if unused:
        raise HarnessError(
            f"--set names {unused[0]!r}, which no row of this run uses; add it to --methods or "
            "drop the setting"
        )


def label_of(name: str, method: Any) -> str:
    """Return the label of one method: settings that differ from the defaults stand in brackets."""
    defaults = settings_with_defaults(type(method)())
    differing = [
        f"{key}={_setting_text(value)}"
        for key, value in settings_with_defaults(method).items()
        if value != defaults[key]
    ]
    return f"{name}[{','.join(differing)}]" if differing else name


def _setting_text(value: object) -> str:
    """Return a setting's value as it stands in a label: a list's items joined by +, and no comma,
    which ends a row.
    """
    return (
        "+".join(map(str, value))
        if isinstance(value, (list, tuple))
        else str(value).replace(",", "+")
    )
