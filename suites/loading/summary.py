"""What the files of a task say of it: its kind, its metric, its version.

Nothing is built and nothing is downloaded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.contract import Kind
from harness.errors import HarnessError, unknown
from suites.loading.definition import (
    GroupAverage,
    TaskDefinition,
    find_tasks,
    metrics_of,
    reads_local_files,
    split_metric,
)
from suites.loading.hub_folder import local_files
from suites.loading.inputs import definition_digest, find_inputs
from suites.loading.shots import refuse_shots_from_scored_split, shots_note, with_shots

TaskSettings = Mapping[str, Any]  # of one task, as its YAML states them
_KINDS: dict[str, Kind] = {
    "multiple_choice": "choose",
    "loglikelihood": "continue",
    "generate_until": "generate",
    "loglikelihood_rolling": "perplexity",
}


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """A task or group of lm-eval, as its files state it."""

    definitions: list[TaskDefinition]
    settings: list[TaskSettings]  # one of each definition
    kind: Kind
    metric: str  # of the task's figure
    by_size: bool  # a group weighs its tasks by their items
    aggregated: bool  # the group's own file says how it averages
    primary: str  # the first filter of a generating task, else the metric
    notes: tuple[str, ...]
    hub_datasets: tuple[str, ...]  # that it reads from the Hub
    files: tuple[str, ...]  # that it reads from the data folder, relative to it
    unknown_inputs: str  # why it may read more than its version covers; "" where it cannot
    needs_hub: bool
    version: str


def summarize_task(
    name: str,
    folder: Path | None,
    data_folder: Path | None = None,
    num_fewshot: int | None = None,
) -> TaskSummary:
    """Read the files of a task or group, from the user's folder first.

    Data sets of the Hub are read from `data_folder` where they lie in it; `num_fewshot` takes the
    place of the definition's number of shots. Raises `HarnessError` for a name that is unknown, a
    task that cannot be scored, and for shots that would be scored items.
    """
    task_name, metric = split_metric(name)
    tasks = find_tasks(task_name, folder)
    definitions = [
        with_shots(replace(task, data_folder=data_folder), num_fewshot)
        for task in tasks.definitions
    ]
    averages = tasks.averages
    if not definitions:
        raise HarnessError(f"{name} is an empty group; choose another task")
    settings: list[TaskSettings] = [definition.settings() for definition in definitions]
    for values in settings if num_fewshot else ():
        refuse_shots_from_scored_split(name, values)
    kind = _common_kind(name, settings)
    _refuse_unsupported(name, settings)
    figure = (
        _named_metric(name, settings, kind, metric)
        if metric
        else _choose_metric(settings, kind, averages)
    )
    notes = _left_out_note(definitions, figure) + shots_note(num_fewshot, settings)
    settings = [values for values, kept in zip(settings, figure.kept, strict=True) if kept]
    definitions = [task for task, kept in zip(definitions, figure.kept, strict=True) if kept]
    local = [definition for definition in definitions if definition.local]
    inputs = [find_inputs(definition) for definition in local]
    unknown = next((task_inputs.unknown for task_inputs in inputs if task_inputs.unknown), "")
    if unknown:
        notes += (f"{unknown}, so no result of this task is reused",)
    digests = [definition_digest(*pair) for pair in zip(local, inputs, strict=True)]
    return TaskSummary(
        definitions=definitions,
        settings=settings,
        kind=kind,
        metric=figure.metric,
        by_size=figure.by_size,
        aggregated=figure.aggregated,
        primary=_primary_extractor(settings, kind, figure.metric),
        notes=notes,
        hub_datasets=_hub_datasets(settings),
        files=local_files(settings),
        unknown_inputs=unknown,
        needs_hub=not all(
            reads_local_files(values) or values.get("custom_dataset") is not None
            for values in settings
        ),
        version=_version(settings, figure, digests, num_fewshot),
    )


def _hub_datasets(settings: Sequence[TaskSettings]) -> tuple[str, ...]:
    """Return the data sets that tasks read from the Hub: a name, or `NAME@REVISION` if pinned."""
    on_hub = [
        f"{values['dataset_path']}@{revision}" if revision else str(values["dataset_path"])
        for values in settings
        for revision in [(values.get("dataset_kwargs") or {}).get("revision")]
        if values.get("dataset_path") and not reads_local_files(values)
    ]
    return tuple(dict.fromkeys(on_hub))


def _common_kind(name: str, settings: Sequence[TaskSettings]) -> Kind:
    """Return the kind that all tasks have. Raises `HarnessError` for several, or an unknown one."""
    types = sorted({str(values.get("output_type", "generate_until")) for values in settings})
    if len(types) > 1:
        raise HarnessError(
            f"{name} mixes {' and '.join(types)} tasks; name its tasks one by one, each as "
            "lm-eval:NAME"
        )
    if types[0] not in _KINDS:
        raise HarnessError(
            f"{name} has output_type {types[0]}; only tasks of {', '.join(_KINDS)} can be scored, "
            "choose one of those"
        )
    return _KINDS[types[0]]


def _refuse_unsupported(name: str, settings: Sequence[TaskSettings]) -> None:
    """Raise `HarnessError` for tasks that run a model's code, or show pictures or sounds."""
    for values in settings:
        if values.get("unsafe_code"):
            raise HarnessError(
                f"{name} runs code that a model wrote (unsafe_code), which the harness does not "
                "do; choose another task"
            )
        if values.get("doc_to_image") or values.get("doc_to_audio"):
            raise HarnessError(
                f"{name} shows pictures or sounds, and only texts can be scored; choose another "
                "task"
            )


@dataclass(frozen=True)
class _PrimaryMetric:
    """The metric of a task's figure, and which tasks of a group have it."""

    metric: str
    by_size: bool
    aggregated: bool
    kept: tuple[bool, ...]


def _named_metric(
    name: str, settings: Sequence[TaskSettings], kind: Kind, metric: str
) -> _PrimaryMetric:
    """Return the metric that the user named. Raises `HarnessError` where no task has it.

    Tasks of a group that have no such metric are left out.
    """
    metrics = [metrics_of(values, kind) for values in settings]
    if not any(metric in names for names in metrics):
        known = dict.fromkeys(metric for names in metrics for metric in names)
        raise unknown(f"metric of {name.rpartition(':')[0]}:", metric, known)
    return _PrimaryMetric(metric, True, False, tuple(metric in names for names in metrics))


def _choose_metric(
    settings: Sequence[TaskSettings], kind: Kind, averages: Sequence[GroupAverage]
) -> _PrimaryMetric:
    """Choose the metric of the figure.

    A group's own `aggregate_metric_list` decides; tasks without that metric are left out, as in
    lm-eval. Without such a list it is the first metric that all tasks have (`acc` for choices,
    and ends of texts, where all have it), or else the first metric of the first task.
    """
    metrics = [metrics_of(values, kind) for values in settings]
    has_accuracy = kind in ("choose", "continue")
    usable_averages = [
        average for average in averages if any(average.metric in names for names in metrics)
    ]
    if usable_averages:
        accuracies = (
            average for average in usable_averages if has_accuracy and average.metric == "acc"
        )
        chosen = next(accuracies, usable_averages[0])
        kept = tuple(chosen.metric in names for names in metrics)
        return _PrimaryMetric(chosen.metric, chosen.by_size, True, kept)
    common = [name for name in metrics[0] if all(name in names for names in metrics)] or metrics[0]
    metric = "acc" if has_accuracy and "acc" in common else common[0]
    return _PrimaryMetric(metric, True, False, (True,) * len(metrics))


def _left_out_note(
    definitions: Sequence[TaskDefinition], figure: _PrimaryMetric
) -> tuple[str, ...]:
    """Return a note on the tasks that a group's figure leaves out; () where there are none."""
    dropped = [task.name for task, kept in zip(definitions, figure.kept, strict=True) if not kept]
    if not dropped:
        return ()
    names = f"{', '.join(dropped[:6])}{' ...' if len(dropped) > 6 else ''}"
    return (f"without {names}, which have no {figure.metric}",)


def _primary_extractor(settings: Sequence[TaskSettings], kind: Kind, metric: str) -> str:
    """Return the name of the first filter of a generating task, else of the metric."""
    if kind != "generate":
        return metric
    filters = settings[0].get("filter_list")
    return str(filters[0]["name"]) if filters else "none"


def _version(
    settings: Sequence[TaskSettings],
    figure: _PrimaryMetric,
    digests: list[str],
    num_fewshot: int | None,
) -> str:
    """Return lm-eval's version of the tasks, shots asked for, and a digest of the user's files."""
    metadata = [
        values["metadata"] if isinstance(values.get("metadata"), dict) else {}
        for values in settings
    ]
    # "Yaml" is lm-eval's word for no version
    upstream = "/".join(sorted({str(entry.get("version", "Yaml")) for entry in metadata}))
    if digests and figure.aggregated:  # the group's own file says how it averages
        digests = [*digests, repr((figure.metric, figure.by_size))]
    files_digest = (
        f"+{hashlib.sha256(''.join(digests).encode()).hexdigest()[:8]}" if digests else ""
    )
    shots = "" if num_fewshot is None else f"+{num_fewshot}shot"
    return f"{upstream}+lm-eval{shots}{files_digest}"
