"""Advice on the settings of a plan: from this project's records, and from published ones.

Published records are those of `reporting/assets/published.json`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.estimating.hardware import Hardware
from harness.estimating.workload import EstimateRequest, Workload
from harness.files.digests import digest_of
from harness.models.shape import MAX_DENSE_VOCABULARY
from harness.records.conditions import EVERY_ROW, shared_conditions
from harness.records.record import RunRecord, row_kinds

PUBLISHED = Path(__file__).parents[1] / "reporting" / "assets" / "published.json"
_DEFAULTS = {  # setting of `response` -> default, and the reason for it
    "temperature": (
        "2.0",
        "our default; published classifiers are distilled at 8 (distil-20 to distil-22), "
        "language-model tools start at 1.0",
    ),
    "teacher_share": ("0.5", "our default, both terms alike; no published record isolates it"),
}


def advice(
    request: EstimateRequest,
    workloads: Mapping[str, Workload],
    hardware: Hardware,
    *,
    fits: bool,
    records: Sequence[RunRecord],
) -> list[str]:
    """Return lines of advice: what is cached, which settings to start with, published results.

    `workloads` are by the names of the chain's methods; `fits` tells whether all stages fit.
    """
    stages = [workloads[name] for name in request.chain]
    has_cache = request.teacher.vocabulary <= MAX_DENSE_VOCABULARY
    reads_cache = any(
        stage.reads_teacher
        and not stage.reads_teacher_live
        and (has_cache or not stage.needs_all_probabilities)
        for stage in stages
    )
    lines = []
    if reads_cache:
        lines.append(_cache_advice(request))
    if any(stage.writes_traces for stage in stages):
        lines.append(
            "Traces are written once and shared by all rows, seeds and runs that ask the same "
            "teacher the same questions."
        )
    if hardware.count > 1:
        lines.append(
            f"The layouts over {hardware.count} devices are only calculated: this version trains "
            "in one process, on one device."
        )
    if not fits:
        lines.append("NOT EVERYTHING FITS: see the stages that are marked.")
    if reads_cache:
        lines += [
            _setting_advice(records, name, default, reason)
            for name, (default, reason) in _DEFAULTS.items()
        ]
    lines += _published_results(request, any(stage.trains for stage in stages))
    return lines


def _cache_advice(request: EstimateRequest) -> str:
    """Return whether the teacher's distributions are cached, and how much that saves."""
    all_tokens = request.rows * request.row_tokens.mean
    if request.budget < all_tokens:
        return (
            "The budget is too small to read every row once, so the teacher runs beside the "
            "student (or type --set response.cache=on)."
        )
    return (
        "The teacher's distributions are cached and shared by all settings and seeds: one pass of "
        f"the teacher instead of {request.budget / all_tokens:.1f}."
    )


def _setting_advice(records: Sequence[RunRecord], name: str, default: str, reason: str) -> str:
    """Recommend a value for a setting of `response`.

    It is the best of records that may be compared and differ in no other setting, by the mean over
    their seeds; without such records, the default.
    """
    # digest of what compared rows must agree in, and of all other settings -> value of this setting
    comparable: dict[str, dict[object, list[RunRecord]]] = {}
    for record in records:
        usable = (
            record.method == "response"
            and record.status == "success"
            and record.conditions.has_all_items
            and record.scores
        )
        if not usable or name not in record.settings or not record.scores[0].retains:
            continue
        others = {key: value for key, value in record.settings.items() if key != name}
        shared = shared_conditions(record.conditions, (*EVERY_ROW, *row_kinds(record)))
        group = comparable.setdefault(digest_of(shared, others), {})
        group.setdefault(record.settings[name], []).append(record)
    by_value = max(comparable.values(), key=len, default={})
    if len(by_value) < 2:
        return f"{name.replace('_', ' ')}: {default} ({reason})."
    means = {
        value: fmean(record.scores[0].value for record in group)
        for value, group in by_value.items()
    }
    best = max(means, key=lambda value: means[value])
    task_score = by_value[best][0].scores[0]
    ordered = sorted(means.items(), key=lambda pair: str(pair[0]))
    shown = ", ".join(
        f"{value} {by_value[value][0].scores[0].format_value(mean)}" for value, mean in ordered
    )
    keys = ", ".join(record.key[:12] for record in by_value[best])
    return (
        f"{name.replace('_', ' ')}: {best}, the best measured here on {task_score.task} ({shown}; "
        f"records {keys})."
    )


def _published_results(request: EstimateRequest, trains: bool) -> list[str]:
    """Quote the published results of the nearest size ratio, with their controls and data."""
    try:
        records = json.loads(PUBLISHED.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError):
        return []
    ratio = request.teacher.parameters / request.student.parameters
    if not trains:
        return []
    lines = [
        line for metric in ("MMLU", "GSM8K") if (line := _nearest_published(records, metric, ratio))
    ]
    controls = [
        record
        for record in records
        if record["role"] == "control" and record["id"] in ("distil-12", "distil-13")
    ]
    if controls and ratio > 3:
        shown = ", ".join(
            f"{record['metric']} {record['retention_pct']:g} % ({record['id']})"
            for record in controls
        )
        lines.append(
            f"For comparison: a smaller model of the same family, without distillation, keeps "
            f"{shown}. Run the controls before you believe a gain."
        )
    for record in records:
        if record["id"] in ("prune-distil-01", "distil-14"):
            lines.append(
                f"Data that others used: {record['method']}, {record['model']} ({record['id']})."
            )
    return lines


def _nearest_published(records: Sequence[Mapping[str, Any]], metric: str, ratio: float) -> str:
    """Quote the two published retentions of a metric nearest in size ratio; "" if there is none."""
    retentions = [
        record
        for record in records
        if record["family"] in ("distillation", "prune+distil")
        and record["kind"] == "retention"
        and record["role"] == "method"
        and metric in record["metric"]
        and record["memory_basis"] == "parameters"
    ]
    retentions.sort(key=lambda record: abs(math.log(record["memory_ratio"] / ratio)))
    shown = "; ".join(
        f"{record['retention_pct']:g} % at {record['memory_ratio']:g}x ({record['id']}, "
        f"{record['model']})"
        for record in retentions[:2]
    )
    return f"Published nearest to {ratio:.1f}x smaller, {metric}: {shown}." if shown else ""
