"""Made-up records for the tests of claims: one or two tasks of hits, choices or values."""

import gate_rows
import numpy as np
from gate_rows import flipped, marks

from harness.records.conditions import ModelReference


def score(run, task="gsm8k-mini", **changes):
    """Return a score of answers that are right or wrong."""
    share = run.count("1") / len(run)
    fields = {
        "primary": "m",
        "outcomes": {"m": run},
        "stderr": (share * (1 - share) / len(run)) ** 0.5,
        "items_digest": f"items of {task}",
    }
    return gate_rows.score(run, task=task, **{**fields, **changes})


def choices(run, **changes):
    """Return a score of choices among four."""
    return score(run, "mmlu-mini", kind="choose", chance=0.25, **changes)


def valued(values, task="f1", **changes):
    """Return a score of items with values."""
    return score(
        "1" * len(values),
        task,
        outcomes={},
        values={"m": tuple(values)},
        value=float(np.mean(values)),
        stderr=float(np.std(values, ddof=1)) / len(values) ** 0.5,
        metric="f1",
        answers_digest=str(hash(tuple(values))),
        **changes,
    )


def row(label, *scores, seed=None, digest=None, **changes):
    """Return the record of a row; equal digests are equal students."""
    student = ModelReference(
        name=label, digest=digest or f"d{label}{seed or ''}", weight_bytes=1_000
    )
    tasks = tuple(f"{score.task}@1" for score in scores)
    fields = {"seed": seed, "scores": scores, "tasks": tasks, "student": student}
    return gate_rows.row(label, "", **{**fields, **changes})


def pair(*lose, n=300, win=4, seed=None, label="int8", digest=None):
    """Return a row of two tasks, of generated answers and of choices, that loses items of each."""
    generated, chosen = (
        flipped(marks(int(0.8 * n), n), lose=lost, win=win if lost else 0) for lost in lose
    )
    return row(label, score(generated), choices(chosen), seed=seed, digest=digest)


def layer(result, name):
    """Return the findings of one layer."""
    return [finding for finding in result.findings if finding.layer == name]


BAD = row("int4", score(flipped(marks(800), lose=150)))
GOOD = row("teacher", score(marks(800)))
TWO = pair(0, 0, label="teacher")
NEAR = pair(12, 12)  # keeps 96.7 % of one task, 95.1 % of what is above chance of the other
