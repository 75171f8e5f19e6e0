"""Records made up for tests: of outcomes, numbers, and figures that all items make together."""

import random

from harness.records.conditions import ModelReference
from harness.records.record import Cost, Environment, Measurement, RunRecord, TaskScore

ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up, 2 cores",
    platform="Linux x86_64",
    python="3.11.0",
    versions={},
    commit=None,
    dirty=None,
)


def outcomes_of(share, n=400, seed=0):
    draw = random.Random(seed)
    return "".join("1" if draw.random() < share else "0" for _ in range(n))


def make(
    label,
    share=0.6,
    *,
    seed=None,
    status="success",
    control=False,
    controls=(),
    task="gsm8k-mini",
    chance=0.0,
    **changes,
):
    """Return a record of one task with a share of right answers."""
    base = ModelReference(name="tiny", digest="d")
    score = _score(task, outcomes_of(share, seed=hash_of(label, seed)), chance, label)
    fields = {
        "key": f"{label}-{seed}",
        "status": status,
        "label": label,
        "method": label.partition("[")[0],
        "family": "x",
        "is_control": control,
        "controls": controls,
        "trains": seed is not None,
        "suites": ("math",),
        "tasks": (f"{task}@1",),
        "device": "cpu",
        "dtype": "float32",
        "student_base": base,
        "teachers": (base,),
        "student_recipe": "depth:0.5",
        "seed": seed,
        "budget_tokens": 1000,
        "budget_rows": 10,
        "path": "transformers/plain/1",
        "scores": (score,) if status == "success" else (),
        "measurements": _measurements(megabytes=4 if label == "teacher" else 2),
        "cost": Cost(seen_tokens=990, seconds=1.5, flops=1e9) if seed is not None else Cost(),
        "environment": ENVIRONMENT,
        "created": "2026-11-24T08:00:00Z",
    }
    return RunRecord(**{**fields, **changes})


def _score(task, marks, chance, digest):
    return TaskScore(
        task=task,
        version="1",
        kind="choose" if chance else "generate",
        primary="strict-match",
        chance=chance,
        n=len(marks),
        value=marks.count("1") / len(marks),
        stderr=0.02,
        outcomes={"strict-match": marks},
        items_digest="same",
        answers_digest=digest,
        invalid_share=0.01,
        truncated_share=None if chance else 0.0,
        tokens_per_answer=None if chance else 31.5,
        seconds=4.0,
    )


def _measurements(*, megabytes):
    size = 2**20 * megabytes
    return (
        Measurement(name="decode_speedup", value=1.9, unit="ratio", higher_is_better=True),
        Measurement(name="weight_bytes_disk", value=size, unit="bytes", higher_is_better=False),
    )


def hash_of(label, seed):
    return sum(map(ord, label)) + (seed or 0) * 7919


RECORDS = [
    make("teacher", 0.9),
    *(make("cot", 0.6, seed=seed, controls=("answer-only", "untouched")) for seed in (1, 2, 3)),
    *(make("answer-only", 0.2, seed=seed, control=True) for seed in (1, 2, 3)),
    make("untouched", 0.05, control=True),
    make("response", seed=1, status="failed", reason="the loss became nan at step 3"),
]


def rows_of(text, title):
    """Return the rows of the table under a title, as {row: {column: cell}}."""
    lines = [
        line
        for line in text.split(f"**{title}")[1].split("**", 1)[1].split("**")[0].splitlines()
        if line.startswith("|")
    ]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def timed(value, low, high, **changes):
    return Measurement(
        name="decode_speedup",
        value=value,
        unit="ratio",
        higher_is_better=True,
        low=low,
        high=high,
        **changes,
    )


def megabytes_of(record):
    return record.measurement("weight_bytes_disk").value / 2**20


def weighed(label, family, share, *, decode, megabytes, seconds, **more):
    record = make(label, share, family=family, **more)
    measured = (
        Measurement(
            name="decode_speedup",
            value=decode,
            unit="ratio",
            higher_is_better=True,
            low=decode - 0.1,
            high=decode + 0.1,
        ),
        Measurement(
            name="weight_bytes_disk", value=2**20 * megabytes, unit="bytes", higher_is_better=False
        ),
    )
    return record.model_copy(update={"measurements": measured, "cost": Cost(seconds=seconds)})


def good(label, like, lost, **more):
    """A record that misses so many of the items that another one has right."""
    marks = list(like.scores[0].outcomes["strict-match"])
    for at in [at for at, mark in enumerate(marks) if mark == "1"][:lost]:
        marks[at] = "0"
    score = like.scores[0].model_copy(
        update={
            "outcomes": {"strict-match": "".join(marks)},
            "value": marks.count("1") / len(marks),
        }
    )
    return weighed(label, share=0.9, **more).model_copy(update={"scores": (score,)})


def numbered(label, numbers, **changes):
    """Return a record whose items carry numbers."""
    record = make(label, 0.5)
    value = sum(numbers) / len(numbers)
    update = {
        "outcomes": {},
        "values": {"strict-match": tuple(numbers)},
        "value": value,
        "stderr": 0.01,
        "metric": "f1",
        "n": len(numbers),
        **changes,
    }
    return record.model_copy(update={"scores": (record.scores[0].model_copy(update=update),)})


TEACHERS = [(at % 10) / 10 for at in range(400)]


def together(label, metric, runs, **changes):
    """Return a record whose figure all items make together, from (gold, prediction) pairs."""
    from harness.statistics import corpus

    run = corpus.Corpus(metric, tuple(f"{gold} {chosen}" for gold, chosen in runs))
    update = {
        "values": {},
        "form": metric,
        "statistics": run.statistics,
        "metric": metric,
        "value": corpus.run_figure(run),
        "signed": metric in corpus.SIGNED_FORMS,
        "unit": "share" if metric in corpus.SHARE_FORMS else "number",
        "answers_digest": label,
    }
    return numbered(label, [0.0] * len(runs), **{**update, **changes})


def guesses(wrong):
    """Return 600 pairs, every `wrong`-th prediction a miss."""
    return [(at % 2, at % 2 if at % wrong else 1 - at % 2) for at in range(600)]
