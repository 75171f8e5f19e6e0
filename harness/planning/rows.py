"""The rows of a run: every chain that the user named, and the controls that they need. No torch.

A row's label names its methods, and in brackets their settings that differ from the defaults.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from harness.errors import HarnessError, unknown
from harness.planning.chain import check_chain, companion_chains, split_chain, without_settings
from harness.planning.config import RowSettings
from harness.planning.recipes import AUTO, NamedMethod, Settle, SettledStages, first_recipes
from harness.planning.spec import parse_method
from harness.registry import Registry, settings_with_defaults
from harness.renames.settings import current_settings, settings_of_class


@dataclass(frozen=True)
class PlannedRow:
    """One row before it has keys: its methods in order, several for a chain."""

    label: str
    names: tuple[str, ...]
    methods: tuple[Any, ...]
    controls: tuple[str, ...]
    recipe_notes: Mapping[str, str] = field(default_factory=dict)  # of methods that have one

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
        """The family of its method; "chain" for a chain."""
        return self.last.family if len(self.methods) == 1 else "chain"

    @property
    def settings(self) -> dict[str, JsonValue]:
        """All settings with their defaults filled in; those of a chain by method."""
        if len(self.methods) == 1:
            return settings_with_defaults(self.last)
        return {
            name: settings_with_defaults(method)
            for name, method in zip(self.names, self.methods, strict=True)
        }

    @property
    def inherited_by_controls(self) -> dict[str, JsonValue]:
        """The settings that the row's controls inherit, but for the first of the recipes."""
        method = type(self.last)
        inherited = current_settings(
            method.__name__, self.last.control_settings(), settings_of_class(method)
        )
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in inherited.items()
            if key != "recipe" or value not in self.last.recipes[:1]
        }

    @property
    def trains(self) -> bool:
        """Tell whether any stage spends the token budget."""
        return any(method.trains for method in self.methods)


def build_rows(
    config: RowSettings,
    methods: Registry,
    settle: Settle = first_recipes,
    settle_control: Settle = first_recipes,
) -> list[PlannedRow]:
    """Build the row of every chain that is named, then the rows of their controls, each once.

    `settle` chooses the recipes of stages that name none, `settle_control` those of controls, which
    have most of theirs from the rows that they control.
    """
    for name in config.set:
        if name not in methods:
            raise unknown("method", name, methods.table, hint="(in --set)")
    builder = _RowBuilder(config, methods, settle_control)
    for spec in config.methods:
        stages = [builder.stage(*parse_method(part)) for part in split_chain(spec)]
        builder.add(settle(stages))
    if config.controls:
        builder.add_controls()
    _refuse_unused_settings(config, builder.rows.values())
    # the stages that a chain begins with are scored before the chain
    return sorted(builder.rows.values(), key=lambda row: len(row.methods))


@dataclass(frozen=True)
class _RowBuilder:
    """Builds rows, and keeps those built so far by label."""

    config: RowSettings
    methods: Registry
    settle_control: Settle
    rows: dict[str, PlannedRow] = field(default_factory=dict)

    def stage(self, name: str, settings: Mapping[str, JsonValue]) -> NamedMethod:
        """Build a method; settings in the row's name override those of `--set`."""
        name = self.methods.canonical(name)
        return name, self.methods.build(
            name,
            {
                **self.methods.current(name, self.config.set.get(name, {})),
                **self.methods.current(name, settings),
            },
        )

    def add(self, settled: SettledStages) -> PlannedRow | None:
        """Add a row and return it; None if there is a row of the same label."""
        stages, recipe_notes = settled
        names, methods = tuple(name for name, _ in stages), tuple(method for _, method in stages)
        parts = tuple(map(label_of, names, methods))
        controls = methods[-1].controls
        if len(parts) > 1:
            check_chain(names, methods)
            companions = companion_chains(parts, methods, self.methods.load)
            controls = tuple("+".join(map(without_settings, chain)) for chain in companions)
        row = PlannedRow("+".join(parts), names, methods, controls, recipe_notes)
        if row.label in self.rows:
            return None
        self.rows[row.label] = row
        return row

    def add_controls(self) -> None:
        """Add the controls of every row, and the controls of those controls."""
        pending = list(self.rows.values())
        while pending:
            for stages in self._controls_of(pending.pop(0)):
                # a variant with other settings that the user named is another row
                control = self.add(self.settle_control(stages))
                pending += [control] if control else []

    def _controls_of(self, row: PlannedRow) -> Iterator[list[NamedMethod]]:
        """Yield the controls of a row as built stages, with the settings that they inherit."""
        stages_by_label = {
            label_of(name, method): (name, method)
            for name, method in zip(row.names, row.methods, strict=True)
        }
        if len(row.methods) == 1:
            yield from ([self._control(name, row)] for name in row.controls)
        for parts in companion_chains(tuple(stages_by_label), row.methods, self.methods.load):
            yield [stages_by_label.get(part) or self._control(part, row) for part in parts]

    def _control(self, name: str, row: PlannedRow) -> NamedMethod:
        """Build a control with those settings that it inherits from the row and has itself."""
        fields = {setting.name for setting in dataclasses.fields(self.methods.load(name))}
        inherited = self.methods.current(name, row.inherited_by_controls)
        if recipe := getattr(row.last, "recipe", ""):
            inherited["recipe"] = recipe
        return self.stage(name, {key: value for key, value in inherited.items() if key in fields})


def _refuse_unused_settings(config: RowSettings, rows: Iterable[PlannedRow]) -> None:
    unused = sorted(set(config.set) - {name for row in rows for name in row.names})
    if unused:
        raise HarnessError(
            f"--set names {unused[0]!r}, which no row of this run uses; add it to --methods or "
            "drop the setting"
        )


def label_of(name: str, method: Any) -> str:
    """Return the label of one method, with the settings that differ from defaults in brackets.

    Of recipes, the first is not named: it is what every row trained by before there were others.
    """
    defaults = settings_with_defaults(type(method)())
    unnamed = {"recipe": (AUTO, *method.recipes[:1])} if method.recipes else {}
    differing = [
        f"{key}={_setting_text(value)}"
        for key, value in settings_with_defaults(method).items()
        if value != defaults[key] and value not in unnamed.get(key, ())
    ]
    return f"{name}[{','.join(differing)}]" if differing else name


def _setting_text(value: object) -> str:
    """Return a setting's value as text for a label.

    It contains no comma, which would separate two settings: items of a list are joined by +.
    """
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return str(value).replace(",", "+")
