"""What a training cost, and what the record notes of it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harness.models.language_model import LanguageModel
from harness.models.shape import forward_flops_per_token, weight_counts
from methods.training.rows import TokenRow
from methods.training.sources import Teachers
from methods.training.state import TrainingResult
from methods.training.teacher_cache import CachedTeacher
from methods.training.terms import Objective


def training_cost(
    student: LanguageModel,
    rows: Sequence[TokenRow],
    result: TrainingResult,
    objective: Objective,
) -> dict[str, Any]:
    """Return what a training cost, with the fields of the record's `Cost`."""
    mean_length = sum(len(row.ids) for row in rows) / len(rows)
    forward_flops = forward_flops_per_token(student.model, mean_length)
    return {
        "seen_tokens": result.seen,
        "trained_tokens": result.trained,
        "steps": result.step,
        "seconds": result.seconds,
        "flops": step_flops(student.model, forward_flops) * result.seen
        + forward_flops * result.written,
        "shared": [],
        "devices": result.devices,
        "device_seconds": result.device_seconds,
        "energy_joules": result.energy_joules,
        "energy_source": result.energy_source,
        "peak_bytes": result.peak_bytes,
        "notes": _writing_notes(result) if objective.rollout is not None else {},
        **(_teacher_cost(result, objective, mean_length) if objective.live_teachers else {}),
    }


def step_flops(model: Any, forward_flops: float) -> float:
    """Return the FLOPs of a training step for each token.

    Forward, the gradient of the inputs, and that of the share of the weights that is trained.
    """
    counts = weight_counts(model)
    trained = sum(counts[id(weight)] for weight in model.parameters() if weight.requires_grad)
    share = trained / sum(counts.values())
    return (2 + share) * forward_flops


def _writing_notes(result: TrainingResult) -> dict[str, Any]:
    seconds = round(result.writing_seconds, 2)
    return {"student_wrote_tokens": result.written, "student_wrote_seconds": seconds}


def _teacher_cost(
    result: TrainingResult, objective: Objective, mean_length: float
) -> dict[str, Any]:
    """Return what the live teachers cost together; all read the same rows."""
    teachers = objective.live_teachers
    tokens_per_teacher = result.teacher_tokens / len(teachers)
    flops = sum(forward_flops_per_token(teacher.model, mean_length) for teacher in teachers)
    return {
        "teacher_tokens": result.teacher_tokens,
        "teacher_flops": flops * tokens_per_teacher,
        "teacher_seconds": result.teacher_seconds,
    }


def result_notes(result: TrainingResult) -> dict[str, Any]:
    """Return what the record notes of a training's losses."""
    return {
        "kept_step": result.kept_step,
        "terms": {name: asdict(term) for name, term in result.terms.items()},
        "start_ce": round(result.start_ce, 6),
        "best_ce": round(result.best, 6),
    }


def cache_notes(caches: Sequence[CachedTeacher], teachers: Teachers | None) -> dict[str, Any]:
    """Return what the record notes of the teachers' caches."""
    if not caches:
        return {}
    notes: dict[str, Any] = {
        "teacher_cache": [cache.key for cache in caches],
        "cached_tokens_of_each": caches[0].k,
        "cached_mass": [cache.meta["kept_mass"] for cache in caches],
        "cache_dtype": caches[0].dtype,
        "cache_rounding_kl": [cache.meta["rounding_kl"] for cache in caches],
    }
    softened = teachers is not None and teachers.temperature != 1.0
    if teachers and softened and not all(cache.dense for cache in caches):
        notes["approximate"] = (
            f"temperature {teachers.temperature:g} over the {caches[0].k} likeliest tokens and "
            "their rest as one"
        )
    return notes
