"""Rows made up for the gate, flips that are counted by hand, and the command that judges them."""

from typer.testing import CliRunner

from harness.cli.app import app
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
    versions={"torch": "2"},
    commit="c" * 40,
    dirty=False,
)
TEACHER = ModelReference(name="tiny", digest="t", weight_bytes=4_000)


def marks(right, n=1000):
    """Return the outcomes of n items, of which the first are right."""
    return "1" * right + "0" * (n - right)


def score(run, *, task="gsm8k-mini", **changes):
    fields = {
        "task": task,
        "version": "1",
        "kind": "generate",
        "primary": "strict-match",
        "chance": 0.0,
        "n": len(run),
        "value": run.count("1") / max(1, len(run)),
        "stderr": 0.01,
        "outcomes": {"strict-match": run},
        "items_digest": "items",
        "answers_digest": run,
        "invalid_share": 0.0,
        "truncated_share": 0.0,
        "tokens_per_answer": 40.0,
        "seconds": 1.0,
    }
    return TaskScore(**{**fields, **changes})


def row(label, outcomes, *, seed=None, scores=None, **changes):
    fields = {
        "key": f"{label}-{seed}",
        "status": "success",
        "label": label,
        "method": label,
        "family": "quantization",
        "is_control": False,
        "trains": seed is not None,
        "suites": ("math",),
        "tasks": ("gsm8k-mini@1",),
        "device": "cpu",
        "dtype": "float32",
        "teachers": (TEACHER,),
        "student_recipe": "depth:0.5",
        "student_base": TEACHER,
        "seed": seed,
        "budget_tokens": 1000,
        "student": ModelReference(
            name=label,
            digest=f"d{label}{seed or ''}",
            weight_bytes=4_000 if label == "teacher" else 1_000,
        ),
        "budget_rows": 10,
        "path": "transformers/shared/1",
        "scores": scores if scores is not None else (score(outcomes),),
        "environment": ENVIRONMENT,
        "created": "2026-11-24T08:00:00Z",
        "cost": Cost(),
        "measurements": (
            Measurement(
                name="decode_speedup",
                value=1.9,
                low=1.8,
                high=2.0,
                unit="ratio",
                higher_is_better=True,
            ),
        ),
    }
    return RunRecord(**{**fields, **changes})


def flipped(outcomes, *, lose=0, win=0):
    """Turn the first right items wrong and the last wrong ones right."""
    right = [position for position, mark in enumerate(outcomes) if mark == "1"][:lose]
    wrong = [position for position, mark in enumerate(outcomes) if mark == "0"][::-1][:win]
    marks_of = {**dict.fromkeys(right, "0"), **dict.fromkeys(wrong, "1")}
    return "".join(marks_of.get(position, mark) for position, mark in enumerate(outcomes))


def frozen(*records, margin=None):
    change = Change(
        reason="made up",
        date="2026-11-24",
        commit=None,
        rows=tuple(record.label for record in records),
    )
    return Baseline(
        history=(change,), rows=tuple(freeze_record(record) for record in records), margin=margin
    )


TEACHES = row("teacher", marks(800))
SAME = row("int8", flipped(marks(800), lose=20, win=20))


def text(factor, *, documents=50):
    totals = tuple(
        (-300.0 * (1 + 0.01 * (number % 3)) * factor, 100.0) for number in range(documents)
    )
    return score(
        "",
        task="wikitext",
        kind="perplexity",
        primary="",
        outcomes={},
        n=documents,
        value=20.0 * factor,
        totals=totals,
        answers_digest=str(factor),
    )


def harness(*line):
    """Run the command and return its result."""
    return CliRunner().invoke(app, [str(part) for part in line], standalone_mode=False)
