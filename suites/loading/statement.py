"""What a task's files say of it: what is asked, which metric is its figure, its version. Nothing is
built and nothing downloaded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contract import Kind
from harness.errors import HarnessError
from suites.loading.definition import (
    LM_EVAL_PREFIX,
    GroupAverage,
    TaskDefinition,
    find_definitions,
    metrics_of,
    reads_local_files,
)
from suites.loading.inputs import definition_digest, find_inputs

TaskSettings = Mapping[str, Any]  # of one task, as its YAML has them
_KINDS: dict[str, Kind] = {
    "multiple_choice": "choose",
    "generate_until": "generate",
    "loglikelihood_rolling": "perplexity",
}


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """A task or group of lm-eval as its files state it."""

    leaves: list[TaskDefinition]
    settings: list[TaskSettings]  # of each leaf
    kind: Kind
    metric: str  # of the figure
    by_size: bool  # a group weighs its tasks by their items
    aggregated: bool  # the group's own file says how it averages
    primary: str  # the first filter of a generating task, else the metric
    notes: tuple[str, ...]
    unknown_inputs: str  # why its version cannot tell all that it reads; "" where it can
    needs_hub: bool
    version: str


def summarize_task(name: str, folder: Path | None) -> TaskSummary:
    """Read the files behind a name, from the user's folder first. Raises `HarnessError` for a task
    that cannot be scored here.
    """
    leaves, averages = find_definitions(name.removeprefix(LM_EVAL_PREFIX), folder)
    if not leaves:
        raise HarnessError(f"{name} is an empty group; pick another task")
    settings: list[TaskSettings] = [leaf.settings() for leaf in leaves]
    kind = _common_kind(name, settings)
    _refuse_unsupported(name, settings)
    figure = _choose_metric(settings, kind, averages)
    notes = _left_out_note(leaves, figure)
    settings = [one for one, kept in zip(settings, figure.kept, strict=True) if kept]
    leaves = [leaf for leaf, kept in zip(leaves, figure.kept, strict=True) if kept]
    inputs = [find_inputs(leaf) for leaf in leaves if leaf.local]
    unknown = next((one.unknown for one in inputs if one.unknown), "")
    if unknown:
        notes += (f"{unknown}, so nothing of this task is kept from run to run",)
    return TaskSummary(
        leaves=leaves,
        settings=settings,
        kind=kind,
        metric=figure.metric,
        by_size=figure.by_size,
        aggregated=figure.aggregated,
        primary=_primary_extractor(settings, kind, figure.metric),
        notes=notes,
        unknown_inputs=unknown,
        needs_hub=not all(
            reads_local_files(one) or one.get("custom_dataset") is not None for one in settings
        ),
        version=_version(
            settings,
            figure,
            [
                definition_digest(*pair)
                for pair in zip(_local_definitions(leaves), inputs, strict=True)
            ],
        ),
    )


def _local_definitions(leaves: Sequence[TaskDefinition]) -> list[TaskDefinition]:
    return [leaf for leaf in leaves if leaf.local]


def _common_kind(name: str, settings: Sequence[TaskSettings]) -> Kind:
    types = sorted({str(one.get("output_type", "generate_until")) for one in settings})
    if len(types) > 1:
        raise HarnessError(
            f"{name} mixes {' and '.join(types)} tasks; name its tasks one by one, each as "
            "lm-eval:NAME"
        )
    if types[0] not in _KINDS:
        raise HarnessError(
            f"{name} has output_type {types[0]}; tasks of {', '.join(_KINDS)} can be scored, pick "
            "one of those"
        )
    return _KINDS[types[0]]


def _refuse_unsupported(name: str, settings: Sequence[TaskSettings]) -> None:
    for one in settings:
        if one.get("unsafe_code"):
            raise HarnessError(
                f"{name} runs code that a model wrote (unsafe_code), which is not done here; pick "
                "another task"
            )
        if one.get("doc_to_image") or one.get("doc_to_audio"):
            raise HarnessError(
                f"{name} shows pictures or sounds, and texts alone are scored here; pick another "
                "task"
            )


@dataclass(frozen=True)
class _PrimaryMetric:
    """The metric that a task's figure is made of, and which of a group's tasks have it."""

    metric: str
    by_size: bool
    aggregated: bool
    kept: tuple[bool, ...]


def _choose_metric(
    settings: Sequence[TaskSettings], kind: Kind, averages: Sequence[GroupAverage]
) -> _PrimaryMetric:
    """Choose the metric of the figure.

    A group's own `aggregate_metric_list` decides; tasks without that metric are left out, as
    lm-eval leaves them out of its figure. Else the first metric that all tasks have (of choices
    `acc`, where all have it), else each task's own.
    """
    own = [metrics_of(one, kind) for one in settings]
    stated = [one for one in averages if any(one.metric in names for names in own)]
    if stated:
        chosen = next(
            (one for one in stated if kind == "choose" and one.metric == "acc"), stated[0]
        )
        return _PrimaryMetric(
            chosen.metric, chosen.by_size, True, tuple(chosen.metric in names for names in own)
        )
    common = [name for name in own[0] if all(name in names for names in own)] or own[0]
    metric = "acc" if kind == "choose" and "acc" in common else common[0]
    return _PrimaryMetric(metric, True, False, (True,) * len(own))


def _left_out_note(leaves: Sequence[TaskDefinition], figure: _PrimaryMetric) -> tuple[str, ...]:
    """Say which tasks a group's figure is not made of."""
    dropped = [leaf.name for leaf, kept in zip(leaves, figure.kept, strict=True) if not kept]
    if not dropped:
        return ()
    return (
        f"without {', '.join(dropped[:6])}{' ...' if len(dropped) > 6 else ''}, which have no "
        f"{figure.metric}",
    )


def _primary_extractor(settings: Sequence[TaskSettings], kind: Kind, metric: str) -> str:
    """Return the name of the first filter of a generating task, else of the metric."""
    if kind != "generate":
        return metric
    filters = settings[0].get("filter_list")
    return str(filters[0]["name"]) if filters else "none"


def _version(settings: Sequence[TaskSettings], figure: _PrimaryMetric, digests: list[str]) -> str:
    """Return what lm-eval calls the version, and a digest of the user's own files."""
    stated = [one["metadata"] if isinstance(one.get("metadata"), dict) else {} for one in settings]
    # "Yaml" is lm-eval's word for none
    upstream = "/".join(sorted({str(one.get("version", "Yaml")) for one in stated}))
    if digests and figure.aggregated:  # the group's own file says how it averages
        digests = [*digests, repr((figure.metric, figure.by_size))]
    own = f"+{hashlib.sha256(''.join(digests).encode()).hexdigest()[:8]}" if digests else ""
    return f"{upstream}+lm-eval{own}"
