"""The model card beside a student's weights: origin, cost, and scores as a `model-index`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.escape import markdown_text
from harness.files.writing import write_atomically
from harness.records import columns
from harness.records.conditions import ModelReference
from harness.records.record import RunRecord, TaskScore

_METRICS = {
    "generate": "exact_match",
    "choose": "acc",
    "continue": "acc",
    "perplexity": "word_perplexity",
}


def write_card(folder: Path, record: RunRecord) -> Path:
    """Write README.md into a student's folder; it is no part of the model's digest."""
    path = folder / "README.md"
    write_atomically(path, card_text(record))
    return path


def card_text(
    record: RunRecord,
    *,
    name: str = "",
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    datasets: Mapping[str, str] | None = None,
    sections: Sequence[str] = (),
) -> str:
    """Return the card: YAML in front, as the Hub reads it, then the same for people.

    `name` replaces the row's own, `metadata` entries of the YAML; `tags` and `sections` are added.
    `datasets` has the Hub's data set of a task, by the task's name.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=(datasets or {}).get(score.task, score.task),
            dataset_name=f"{score.task}@{score.version}",
            metric_type=_metric(score),
            metric_value=round(score.value, 6),
            metric_name=score.primary or _metric(score),
        )
        for score in record.scores
    ]
    name = name or _name(record)
    entries: dict[str, Any] = {
        "base_model": [_shown(starting_model(record).name)],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compression-harness", record.method, record.family, *tags],
        **(metadata or {}),
    }
    head = ModelCardData(model_name=name, eval_results=results or None, **entries)
    parts = (_lineage(record), _scores(record), *filter(None, sections), _settings(record))
    return f"---\n{head.to_yaml()}\n---\n\n# {name}\n\n" + "\n\n".join(parts) + "\n"


def _metric(score: TaskScore) -> str:
    return score.metric or _METRICS[score.kind]


def _name(record: RunRecord) -> str:
    seed = f"-seed{record.seed}" if record.seed is not None else ""
    return f"{_shown(starting_model(record).name)}-{markdown_text(record.label)}{seed}"


def starting_model(record: RunRecord) -> ModelReference:
    """Return the model that the method changed: the teacher itself, or the student's base."""
    conditions = record.conditions
    return conditions.teachers[0] if _from_teacher(record) else conditions.student_base


def _shown(name: str) -> str:
    """Return a model's name without the folder it lies in: a card travels, a path does not."""
    return markdown_text(Path(name).name if name.startswith(("/", "~", ".")) else name)


def _with_digest(model: ModelReference) -> str:
    return f"`{_shown(model.name)}` ({model.digest[:12]})"


def _lineage(record: RunRecord) -> str:
    names = record.cost.notes.get("taught_by", [])
    taught_by = [
        _with_digest(teacher)
        for teacher in record.conditions.teachers
        if isinstance(names, list) and teacher.name in names
    ]
    recipe = record.conditions.student_recipe
    is_cut = ":" in recipe and not _from_teacher(record)
    lines = [
        f"Made by the method `{record.label}` from {_with_digest(starting_model(record))}, started "
        f"{f'as `{recipe}` of it' if is_cut else 'as it is'}, taught by "
        f"{' and '.join(taught_by) or 'no teacher'}.",
        "Weights, configuration and tokenizer have the digest "
        f"`{record.student.digest if record.student else '-'}`.",
    ]
    if record.trains:
        cost = record.cost
        lines.append(
            f"Training saw {cost.seen_tokens:,} tokens ({cost.trained_tokens:,} trained) in "
            f"{cost.steps:,} steps, {cost.seconds:.0f} s on "
            f"{record.conditions.device} ({_where(record)}), seed {record.seed}."
        )
    return " ".join(lines)


def _where(record: RunRecord) -> str:
    """Return the GPU, else the machine, that a record was made on."""
    environment = record.environment
    if environment is None:
        return "-"
    return str(environment.gpu) if environment.gpu else environment.machine


def _from_teacher(record: RunRecord) -> bool:
    """Tell whether the first stage changed the teacher's own weights.

    Where that was not noted, a stage that does not train is taken to have started there.
    """
    if record.starts_from:
        return record.starts_from == "teacher"
    return (
        not (record.stages[0].cost.seen_tokens if record.stages else record.trains)
        and record.family != "control"
    )


def _scores(record: RunRecord) -> str:
    headers = (columns.TASK.header, columns.SCORE.header, columns.ITEMS.header)
    lines = [f"| {' | '.join(headers)} |", "|:--|--:|--:|"]
    for score in record.scores:
        shown = score.format_value(score.value)
        lines.append(f"| {score.task}@{score.version} | {shown} | {score.n} |")
    note = f"Scored by compression-harness on the path `{record.path}`, {record.conditions.dtype}."
    if record.conditions.limited:
        note += " A TRIAL on a sample of the items: not for quoting."
    if record.conditions.subset:
        note += f" Scored on the subset {record.conditions.subset} of the items."
    return (
        "\n".join(lines)
        + f"\n\n{note} Compare it with its controls ({', '.join(record.controls) or 'none'}) "
        "before you quote it."
    )


def _settings(record: RunRecord) -> str:
    notes = {key: value for key, value in record.cost.notes.items() if key != "terms"}
    content = {
        "settings": record.settings,
        "counts": notes,
        "terms": record.cost.notes.get("terms", {}),
    }
    versions = record.environment.versions if record.environment else {}
    return f"```json\n{json.dumps({**content, 'versions': versions}, indent=1)}\n```"
