"""What speaks for a plan's settings: this project's own records first, published ones
(`reporting/assets/published.json`) beside them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from harness.estimating.hardware import Hardware
from harness.estimating.workload import ROW_TOKENS, EstimateRequest, Workload
from harness.files.digests import digest_of
from harness.records.conditions import EVERY_ROW, shared_conditions
from harness.records.record import RunRecord, row_kinds

PUBLISHED = Path(__file__).parents[1] / "reporting" / "assets" / "published.json"
_DEFAULTS = {  # setting of `response` -> default, and what speaks for it
    "temperature": (
        "2.0",
        "our default; published classifiers are distilled at 8 (distil-20 to distil-22), "
        "language-model tools start at 1.0",
    ),
    "teacher_share": ("0.5", "our default, both terms alike; no published record isolates it"),
}


def advice(
    asked: EstimateRequest,
    work: Mapping[str, Workload],
    hardware: Hardware,
    *,
    fits: bool,
    records: Sequence[RunRecord],
) -> list[str]:
    """Say what to cache, which settings to start with, and what others have published for such a
    pair.
    """
    lines = []
    reading = [
        name
        for name in asked.chain
        if work[name].reads_teacher and not work[name].reads_live_teacher
    ]
    if reading:
        length, _, _ = ROW_TOKENS["mini" if asked.mini else "outside"]
        unique = min(asked.budget, asked.rows * length)
        passes = asked.budget / unique
        lines.append(
            "The teacher's distributions are kept and shared by every setting and seed: "
            f"{passes:.1f} passes of the teacher saved to one."
            if asked.budget >= asked.rows * length
            else "The budget reads fewer than all rows once: the teacher runs beside the student "
            "(or --set response.cache=on)."
        )
    if any(work[name].writes_traces for name in asked.chain):
        lines.append(
            "Traces are written once and shared by every row, seed and run that asks the same "
            "teacher the same questions."
        )
    if hardware.count > 1:
        lines.append(
            f"The layouts over {hardware.count} devices are arithmetic: this version trains in one "
            "process, on one device."
        )
    if not fits:
        lines.append("NOT EVERYTHING FITS: see the stages marked so.")
    if reading:
        lines += [
            _setting_advice(records, name, default, why)
            for name, (default, why) in _DEFAULTS.items()
        ]
    lines += _published_results(asked, any(work[name].trains for name in asked.chain))
    return lines


def _setting_advice(records: Sequence[RunRecord], name: str, default: str, otherwise: str) -> str:
    """Recommend a setting of `response`: the best of records that differ in nothing else, else the
    default.
    """
    alike: dict[str, dict[object, list[RunRecord]]] = {}
    for record in records:
        usable = (
            record.method == "response"
            and record.status == "success"
            and not record.conditions.limited
            and record.scores
        )
        if not usable or name not in record.settings or not record.scores[0].retains:
            continue
        others = {key: value for key, value in record.settings.items() if key != name}
        same = digest_of(
            shared_conditions(record.conditions, (*EVERY_ROW, *row_kinds(record))), others
        )
        alike.setdefault(same, {}).setdefault(record.settings[name], []).append(record)
    tried = max(alike.values(), key=len, default={})
    if len(tried) < 2:
        return f"{name.replace('_', ' ')}: {default} ({otherwise})."
    means = {value: fmean(r.scores[0].value for r in each) for value, each in tried.items()}
    best = max(means, key=lambda value: means[value])
    ordered = sorted(means.items(), key=lambda pair: str(pair[0]))
    told = ", ".join(f"{value} {tried[value][0].scores[0].shown(mean)}" for value, mean in ordered)
    keys = ", ".join(record.key[:12] for record in tried[best])
    return (
        f"{name.replace('_', ' ')}: {best}, the best measured here on "
        f"{tried[best][0].scores[0].task} ({told}; records {keys})."
    )


def _published_results(asked: EstimateRequest, trains: bool) -> list[str]:
    """Quote the published retentions nearest in size ratio, and the control that belongs beside
    them.
    """
    try:
        records = json.loads(PUBLISHED.read_text(encoding="utf-8"))["records"]
    except (OSError, ValueError, KeyError):
        return []
    ratio = asked.teacher.parameters / asked.student.parameters
    lines = []
    if trains:
        for metric in ("MMLU", "GSM8K"):
            held = [
                one
                for one in records
                if one["family"] in ("distillation", "prune+distil")
                and one["kind"] == "retention"
                and one["role"] == "method"
                and metric in one["metric"]
                and one["memory_basis"] == "parameters"
            ]
            held.sort(key=lambda one: abs(math.log(one["memory_ratio"] / ratio)))
            if held:
                told = "; ".join(
                    f"{one['retention_pct']:g} % at {one['memory_ratio']:g}x ({one['id']}, "
                    f"{one['model']})"
                    for one in held[:2]
                )
                lines.append(f"Published nearest to {ratio:.1f}x smaller, {metric}: {told}.")
        controls = [
            one
            for one in records
            if one["role"] == "control" and one["id"] in ("distil-12", "distil-13")
        ]
        if controls and ratio > 3:
            told = ", ".join(
                f"{one['metric']} {one['retention_pct']:g} % ({one['id']})" for one in controls
            )
            lines.append(
                f"Beside it: a smaller family member that nobody distilled keeps {told}. Run the "
                "controls before believing a gain."
            )
        data = [one for one in records if one["id"] in ("prune-distil-01", "distil-14")]
        for one in data:
            lines.append(f"Data others used: {one['method']}, {one['model']} ({one['id']}).")
    return lines
