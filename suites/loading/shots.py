"""How many examples are shown before each item of a task of lm-eval, and where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.errors import HarnessError
from suites.loading.definition import TaskDefinition
from suites.loading.hub_folder import shots_split


def with_shots(definition: TaskDefinition, num_fewshot: int | None) -> TaskDefinition:
    """Return a definition whose items have `num_fewshot` examples before them; None changes none.

    A definition that states 0 keeps it, as in lm-eval: its prompt is made for no examples.
    """
    if num_fewshot is None or states_no_shots(definition.settings()):
        return definition
    return replace(definition, changes={**definition.changes, "num_fewshot": num_fewshot})


def states_no_shots(settings: Mapping[str, Any]) -> bool:
    """Tell whether a task's settings state that no example is shown."""
    return settings.get("num_fewshot") == 0


def refuse_shots_from_scored_split(name: str, settings: Mapping[str, Any]) -> None:
    """Raise `HarnessError` where the examples before items would be scored items themselves."""
    if not settings.get("num_fewshot"):
        return
    scored = settings.get("test_split") or settings.get("validation_split")
    if shots_split(settings) == scored:
        raise HarnessError(
            f"--num-fewshot {settings['num_fewshot']}: {name} has no split but {scored} to take "
            "examples from, and that one is scored; leave --num-fewshot out"
        )


def shots_note(num_fewshot: int | None, settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a note on tasks that show no examples although some were asked for."""
    without = sum(states_no_shots(values) for values in settings) if num_fewshot else 0
    if not without:
        return ()
    part = "its definition states" if len(settings) == 1 else f"{without} of its tasks state"
    return (f"no examples are shown where {part} 0, whatever --num-fewshot says",)
