"""A record that contradicts itself is refused by name, though its digest is right.

One that does not is read, whatever its age.
"""

import json
from pathlib import Path

import pytest

from harness.records.conditions import ModelReference
from harness.records.record import (
    BadRecord,
    Cost,
    Environment,
    Fidelity,
    Measurement,
    RunRecord,
    SharedCost,
    StageRecord,
    TaskScore,
    _digest,
    read_record,
    write_record,
)
from harness.records.store import Store

ROOT = Path(__file__).parents[2]
MODEL = ModelReference(name="tiny", digest="t", parameters=1_000, weight_bytes=4_000)
BASE = {
    "version": "1",
    "chance": 0.0,
    "stderr": 0.01,
    "items_digest": "i",
    "answers_digest": "a",
    "invalid_share": 0.0,
    "seconds": 1.0,
}
HITS = TaskScore(
    task="gsm8k-mini",
    kind="generate",
    primary="strict-match",
    n=100,
    value=0.92,
    outcomes={"strict-match": "1" * 92 + "0" * 8, "numeric": "1" * 100},
    truncated_share=0.0,
    tokens_per_answer=40.0,
    groups={"2": 0.9, "3": 0.94},
    macro=0.92,
    **BASE,
)
CHOICES = TaskScore(
    task="arc",
    kind="choose",
    primary="acc",
    n=4,
    value=0.5,
    outcomes={"acc": "1100"},
    chosen={"A": 0.25, "B": 0.75},
    **BASE,
)
NUMBERS = TaskScore(
    task="rouge",
    kind="generate",
    primary="none",
    metric="rouge1",
    n=4,
    value=0.25,
    outcomes={},
    values={"none": (0.1, 0.2, 0.3, 0.4)},
    **BASE,
)
PARTS = TaskScore(
    task="group",
    kind="choose",
    primary="acc",
    n=4,
    value=0.5,
    outcomes={"acc": "1000"},
    parts=((1, 0.5), (3, 0.5 / 3)),
    **BASE,
)
TEXT = TaskScore(
    task="wikitext",
    kind="perplexity",
    primary="",
    n=2,
    value=7.38905609893065,
    outcomes={},
    totals=((-20.0, 10.0), (-40.0, 20.0)),
    **BASE,
)
BITS = TaskScore(
    task="pile",
    kind="perplexity",
    primary="",
    metric="bits_per_byte",
    n=1,
    value=2.0,
    outcomes={},
    totals=((-2.0 * 0.6931471805599453 * 10, 10.0),),
    **BASE,
)
TOGETHER = TaskScore(
    task="cola",
    kind="choose",
    primary="mcc",
    n=3,
    value=-0.2,
    outcomes={},
    unpaired="mcc is one figure",
    **BASE,
)
IMPOSSIBLE = TEXT.model_copy(
    update={"totals": ((float("-inf"), 10.0), (-40.0, 20.0)), "value": float("inf")}
)
SCORES = (HITS, CHOICES, NUMBERS, PARTS, TEXT, BITS, TOGETHER)


def record(**changes):
    stage = {"method": "x", "key": "k", "digest": "d", "weight_bytes": 1, "cost": Cost(seconds=1.0)}
    fields = {
        "key": "k",
        "status": "success",
        "label": "prune-depth+int8",
        "method": "int8",
        "family": "chain",
        "is_control": False,
        "suites": ("mini",),
        "tasks": tuple(f"{one.task}@1" for one in SCORES),
        "device": "cpu",
        "dtype": "float32",
        "teachers": (MODEL,),
        "student_recipe": "depth:0.5",
        "student_base": MODEL,
        "student": MODEL,
        "budget_tokens": 10,
        "budget_rows": 1,
        "path": "p",
        "scores": SCORES,
        "created": "2026-11-26T00:00:00Z",
        "seconds": 3.0,
        "fidelity": (
            Fidelity(
                task="arc",
                form="choices",
                items=4,
                kl=0.1,
                kl_stderr=0.01,
                agreement=0.9,
                agreement_stderr=0.01,
            ),
        ),
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
        "cost": Cost(
            seconds=2.0, flops=1e9, shared=(SharedCost(key="s", tokens=5),), peak_bytes=10
        ),
        "stages": (
            StageRecord(label="prune-depth", **stage),
            StageRecord(label="prune-depth+int8", scores={"arc": 0.5}, **stage),
        ),
        "environment": Environment(
            device="cpu",
            dtype="float32",
            threads=1,
            machine="m",
            platform="p",
            python="3.11",
            versions={},
            commit=None,
            dirty=None,
        ),
    }
    return RunRecord(**{**fields, **changes})


def planted(path, place, value):
    """Write a whole record, put `value` at `place`, and sign the file: its digest is right."""
    write_record(path, record())
    data = json.loads(path.read_text(encoding="utf-8"))
    inner = data
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    del data["digest"]
    path.write_text(json.dumps({**data, "digest": _digest(data)}), encoding="utf-8")


def test_a_whole_record_is_read(tmp_path):
    write_record(tmp_path / "r.json", record())
    assert read_record(tmp_path / "r.json") == record()


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("scores", 0, "value"), 0.97, "field scores.0.value: 0.97, and its 100 items make 0.92"),
        (("scores", 2, "value"), 0.26, "field scores.2.value: 0.26, and its 4 items make 0.25"),
        (("scores", 3, "value"), 0.25, "field scores.3.value: 0.25, and its 4 items make 0.5"),
        (("scores", 4, "value"), 7.0, "field scores.4.value: 7, and its 2 items make 7.38906"),
        (("scores", 5, "value"), 4.0, "field scores.5.value: 4, and its 1 items make 2"),
        (
            ("scores", 5, "metric"),
            "byte_perplexity",
            "field scores.5.value: 2, and its 1 items make 4",
        ),
        (
            ("scores", 0, "primary"),
            "numeric",
            "field scores.0.value: 0.92, and its 100 items make 1",
        ),
        (
            ("scores", 0, "primary"),
            "flexible",
            "field scores.0.value: 0.92, and no item of flexible says so",
        ),
        (("scores", 6, "unpaired"), "", "field scores.6.value: -0.2, and no item of mcc says so"),
        (
            ("scores", 0, "outcomes", "strict-match"),
            "1" * 91 + "0" * 9,
            "and its 100 items make 0.91",
        ),
        (
            ("scores", 0, "outcomes", "strict-match"),
            "1" * 92 + "0" * 7,
            "scores.0.outcomes: strict-match has 99 of 100 items",
        ),
        (
            ("scores", 0, "outcomes", "numeric"),
            "1" * 101,
            "scores.0.outcomes: numeric has 101 of 100 items",
        ),
        (
            ("scores", 0, "outcomes", "numeric"),
            "1" * 99 + "2",
            "scores.0.outcomes: numeric holds '2'; an outcome is 0 or 1",
        ),
        (("scores", 0, "n"), 1000, "scores.0.outcomes: strict-match has 100 of 1,000 items"),
        (("scores", 4, "n"), 3, "scores.4.n: 3, and there are 2 documents"),
        (("scores", 6, "n"), 0, "scores.6.n: 0; a score has an item"),
        (
            ("scores", 2, "values", "none"),
            [0.1, 0.2, 0.7],
            "scores.2.values: none has 3 of 4 items",
        ),
        (
            ("scores", 2, "values", "none"),
            [0.1, 0.2, 0.7, float("nan")],
            "scores.2.values: none holds an item that is no number",
        ),
        (
            ("scores", 2, "outcomes", "none"),
            "1000",
            "scores.2.outcomes: none stands among the values too",
        ),
        (("scores", 3, "parts"), [[1, 0.5], [2, 0.25]], "scores.3.parts: 3 items in parts of 4"),
        (
            ("scores", 3, "parts"),
            [[1, 0.5], [3, 0.5]],
            "scores.3.parts: weights that make 2 together",
        ),
        (
            ("scores", 4, "totals", 0),
            [-20.0, 0.0],
            "scores.4.totals: document 0 has a log-likelihood of -20 for 0 words",
        ),
        (
            ("scores", 4, "totals", 1),
            [40.0, 20.0],
            "scores.4.totals: document 1 has a log-likelihood of 40",
        ),
        (("scores", 0, "stderr"), -0.1, "scores.0.stderr: -0.1; it is a number of 0 or more"),
        (
            ("scores", 0, "stderr"),
            float("nan"),
            "scores.0.stderr: nan; it is a number of 0 or more",
        ),
        (
            ("scores", 0, "stderr"),
            float("inf"),
            "scores.0.stderr: inf; it is a number of 0 or more",
        ),
        (("scores", 0, "seconds"), -1.0, "scores.0.seconds: -1"),
        (("scores", 0, "tokens_per_answer"), -1.0, "scores.0.tokens_per_answer: -1"),
        (("scores", 0, "cut_prompts"), -1, "scores.0.cut_prompts: -1"),
        (("scores", 0, "from_journal"), -1, "scores.0.from_journal: -1"),
        (
            ("scores", 0, "groups"),
            {"2": 0.95, "3": 0.97},
            "scores.0.groups: 0.95 to 0.97, and the figure is 0.92",
        ),
        (("scores", 0, "groups", "3"), 0.93, "scores.0.macro: 0.92, and the groups' mean is 0.915"),
        (("scores", 0, "groups"), {}, "scores.0.macro: 0.92, and there are no groups"),
        (("scores", 0, "macro"), 0.5, "scores.0.macro: 0.5, and the groups' mean is 0.92"),
        (
            ("scores", 1, "chosen", "A"),
            0.5,
            "scores.1.chosen: shares of 1.25 together; they make 1",
        ),
        (("tasks", 0), "gsm8k@1", "field tasks: gsm8k@1, arc@1"),
        (("tasks", 0), "gsm8k-mini@2", "and there are scores of gsm8k-mini@1"),
        (("scores",), [], "and there are scores of none"),
        (("tasks",), [], "field tasks: none, and there are scores of gsm8k-mini@1"),
        (
            ("measurements", 0, "low"),
            1.95,
            "measurements.0.value: 1.9, outside its interval [1.95, 2]",
        ),
        (
            ("measurements", 0, "high"),
            1.85,
            "measurements.0.value: 1.9, outside its interval [1.8, 1.85]",
        ),
        (
            ("measurements", 0, "low"),
            float("nan"),
            "measurements.0.value: 1.9, outside its interval",
        ),
        (
            ("measurements", 0, "value"),
            -1.9,
            "measurements.0.value: -1.9; it is a number of 0 or more",
        ),
        (("student", "weight_bytes"), -1, "student.weight_bytes: -1"),
        (("teachers", 0, "parameters"), -1, "teachers.0.parameters: -1"),
        (("cost", "seconds"), -0.5, "cost.seconds: -0.5"),
        (("cost", "peak_bytes"), -1, "cost.peak_bytes: -1"),
        (("cost", "flops"), float("nan"), "cost.flops: nan"),
        (("cost", "shared", 0, "tokens"), -5, "cost.shared.0.tokens: -5"),
        (("seconds",), -1, "field seconds: -1"),
        (("budget_tokens",), -1, "field budget_tokens: -1"),
        (("fidelity", 0, "kl"), float("nan"), "fidelity.0.kl: nan is no finite number"),
        (("fidelity", 0, "kl"), float("inf"), "fidelity.0.kl: inf is no finite number"),
        (("fidelity", 0, "kl_stderr"), -0.1, "fidelity.0.kl_stderr: -0.1"),
        (("fidelity", 0, "task"), "mmlu", "field fidelity: a distance on mmlu, which has no score"),
        (
            ("label",),
            "prune-depth+int4",
            "field stages: the last one is prune-depth+int8, and the row prune-depth+int4",
        ),
        (
            ("stages", 1, "label"),
            "int8",
            "field stages: the last one is int8, and the row prune-depth+int8",
        ),
        (
            ("stages", 1, "scores", "arc"),
            0.6,
            "field stages: the last one scored 0.6 on arc, and the row did not",
        ),
        (("stages", 0, "weight_bytes"), -1, "stages.0.weight_bytes: -1"),
    ],
)
def test_a_contradiction_is_named_though_the_digest_is_right(tmp_path, place, value, said):
    path = tmp_path / "r.json"
    planted(path, place, value)
    with pytest.raises(BadRecord) as caught:
        read_record(path)
    told = str(caught.value)
    assert (
        said in told
        and str(path) in told
        and told.endswith("; delete it and run again")
        and "\n" not in told
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "failed", "reason": "nan at step 3", "scores": (), "fidelity": (), "stages": ()},
        {"status": "failed", "reason": "killed", "scores": SCORES[:2], "stages": ()},
        {
            "status": "skipped",
            "reason": "pip install x",
            "scores": (),
            "fidelity": (),
            "stages": (),
        },
        {
            "measurements": (
                Measurement(
                    name="skipped_scenario",
                    value=0,
                    unit="",
                    higher_is_better=False,
                    remark="not timed",
                ),
            )
        },
        {"scores": (HITS.model_copy(update={"groups": {}, "macro": None}), *SCORES[1:])},
        {"scores": (*SCORES[:4], IMPOSSIBLE, *SCORES[5:])},
        {
            "scores": (
                *SCORES[:3],
                PARTS.model_copy(update={"groups": {"a": 0.25, "b": 0.3}, "macro": 0.275}),
                *SCORES[4:],
            )
        },
    ],
    ids=[
        "failed",
        "failed after two tasks",
        "skipped",
        "not timed",
        "no groups",
        "a document of probability 0",
        "groups across parts",
    ],
)
def test_what_is_odd_and_true_is_read(tmp_path, changes):
    write_record(tmp_path / "r.json", record(**changes))
    assert read_record(tmp_path / "r.json").status == changes.get("status", "success")


def test_a_score_of_a_task_that_was_not_asked_is_refused_in_a_failed_record_too(tmp_path):
    write_record(
        tmp_path / "r.json",
        record(
            status="failed",
            reason="killed",
            scores=SCORES[:1],
            tasks=("arc@1",),
            fidelity=(),
            stages=(),
        ),
    )
    with pytest.raises(BadRecord, match="there is a score of gsm8k-mini@1"):
        read_record(tmp_path / "r.json")


def test_every_committed_record_is_read_and_says_the_same_twice():
    paths = [
        path
        for path in (ROOT / "results").rglob("*.json")
        if '"kind": "cell"' in path.read_text(encoding="utf-8")
    ]
    assert len(paths) > 150 and all(read_record(path).label for path in paths)


def test_a_cell_that_contradicts_itself_is_computed_again(tmp_path):
    store = Store(tmp_path)
    write_record(store.record_path("k"), record())
    assert store.finished("k") is not None
    planted(store.record_path("k"), ("scores", 0, "value"), 0.97)
    assert store.finished("k") is None


def test_objects_in_memory_are_not_checked():
    """A finished cell is never lost to a check: what is made here may be odd until it is read."""
    assert (
        HITS.model_copy(update={"value": 0.97}).value
        == TaskScore(**{**HITS.model_dump(), "value": 0.97}).value
    )
