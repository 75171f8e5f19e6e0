"""Made-up records for the programs that test the verdicts."""

from functools import lru_cache

from harness.records.baseline import Baseline, Change, freeze_record
from harness.records.conditions import ModelReference
from harness.records.record import Cost, Environment, Measurement, RunRecord, TaskScore

ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up",
    platform="Linux x86_64",
    python="3.11.0",
    versions={},
    commit=None,
    dirty=False,
)
TEACHER = ModelReference(name="made-up", digest="t", weight_bytes=2_000_000)


def score(marks: str, *, task: str = "made-up", digest: str = "") -> TaskScore:
    """Return a score with these outcomes."""
    value = marks.count("1") / len(marks)
    return TaskScore(
        task=task,
        version="1",
        kind="generate",
        primary="strict-match",
        chance=0.0,
        n=len(marks),
        value=value,
        stderr=0.0,
        outcomes={"strict-match": marks},
        items_digest="i",
        answers_digest=digest or str(hash(marks)),
        invalid_share=0.0,
        truncated_share=0.0,
        tokens_per_answer=40.0,
        seconds=1.0,
    )


@lru_cache(maxsize=256)
def record(label: str, seed: int | None = None, *, control: bool = False) -> RunRecord:
    """Return a record without scores."""
    teacher = label == "teacher"
    return RunRecord(
        key=f"{label}-{seed}",
        status="success",
        label=label,
        method=label.partition("[")[0],
        family="distillation",
        is_control=control,
        trains=seed is not None,
        suites=("made-up",),
        tasks=("made-up@1",),
        device="cpu",
        dtype="float32",
        teachers=(TEACHER,),
        student_recipe="depth:0.5",
        student_base=TEACHER,
        student=TEACHER
        if teacher
        else ModelReference(name=label, digest=f"{label}-{seed}", weight_bytes=1_000_000),
        seed=seed,
        budget_tokens=1000,
        budget_rows=10,
        path="transformers/shared/1",
        environment=ENVIRONMENT,
        created="2026-11-25T00:00:00Z",
        cost=Cost(seen_tokens=990, seconds=10.0, flops=1e12) if seed is not None else Cost(),
        measurements=(
            Measurement(
                name="decode_speedup",
                value=1.0 if teacher else 1.9,
                low=1.0 if teacher else 1.8,
                high=1.0 if teacher else 2.0,
                unit="ratio",
                higher_is_better=True,
            ),
            Measurement(
                name="weight_bytes_disk",
                value=2e6 if teacher else 1e6,
                unit="bytes",
                higher_is_better=False,
            ),
        ),
    )


def scored_record(
    label: str, marks: str, seed: int | None = None, *, control: bool = False
) -> RunRecord:
    """Return a record with one task's outcomes."""
    return record(label, seed, control=control).model_copy(update={"scores": (score(marks),)})


def frozen_baseline(*records: RunRecord) -> Baseline:
    """Freeze records without a file."""
    change = Change(
        reason="made up", date="2026-11-25", commit=None, rows=tuple(row.label for row in records)
    )
    return Baseline(history=(change,), rows=tuple(freeze_record(row) for row in records))
