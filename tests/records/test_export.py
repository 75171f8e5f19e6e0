"""Records in other projects' forms, read back by those projects."""

import json
import sys
import types

import pytest
from typer.testing import CliRunner

from harness.cli.app import app
from harness.errors import HarnessError
from harness.records import export
from harness.records.conditions import ModelReference
from harness.records.record import Environment, RunRecord, TaskScore, write_record
from harness.records.samples import evidence_of

ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up",
    platform="Linux x86_64",
    python="3.11.0",
    versions={"transformers": "5.0"},
    commit="c" * 40,
    dirty=False,
)
TINY = ModelReference(name="tiny", digest="t", parameters=1_700_000, weight_bytes=4_000)
ITEMS = [
    {
        "task": "gsm8k-mini",
        "item": at,
        "group": "2",
        "doc_hash": "d",
        "prompt_hash": "p",
        "target_hash": "t",
        "gold": "7",
        "text": f" #### {at}",
        "extracted": {"strict-match": str(at)},
        "correct": {"strict-match": at == 7},
        "tokens": 5,
        "stop": "eos",
        "log_probabilities": [],
        "prompt": f"A shot.\n\nQuestion: how many {at}?\nAnswer:",
        "words": 0.0,
        "position": None,
    }
    for at in range(10)
]


def record(label, right, seed=None):
    outcomes = "1" * right + "0" * (10 - right)
    score = TaskScore(
        task="gsm8k-mini",
        version="1+0shot",
        kind="generate",
        primary="strict-match",
        chance=0.0,
        n=10,
        value=right / 10,
        stderr=0.1,
        outcomes={"strict-match": outcomes, "numeric": "1" * 10},
        items_digest="i",
        answers_digest=label,
        invalid_share=0.0,
        truncated_share=0.0,
        tokens_per_answer=5.0,
        seconds=1.0,
    )
    choice = score.model_copy(
        update={
            "task": "mmlu-mini",
            "kind": "choose",
            "primary": "acc",
            "outcomes": {"acc": outcomes},
            "version": "2",
        }
    )
    return RunRecord(
        key=f"{label}{seed}".ljust(24, "x"),
        status="success",
        label=label,
        method=label,
        family="distillation",
        is_control=False,
        trains=seed is not None,
        suites=("mini",),
        tasks=("gsm8k-mini@1+0shot", "mmlu-mini@2"),
        device="cpu",
        dtype="float32",
        teachers=(TINY,),
        student_recipe="depth:0.5",
        student_base=TINY,
        student=TINY,
        seed=seed,
        budget_tokens=1000,
        budget_rows=10,
        path="transformers/shared/1",
        scores=(score, choice),
        environment=ENVIRONMENT,
        created="2026-11-24T08:00:00Z",
    )


@pytest.fixture
def store(tmp_path):
    records = [record("teacher", 9), record("response", 6, seed=1)]
    for one in records:
        folder = tmp_path / "cells" / one.key[:24]
        write_record(folder / "record.json", one)
        (folder / "samples.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return tmp_path, records


def test_lm_evals_own_table_reads_our_results(store, tmp_path):
    from lm_eval.utils import make_table

    done = CliRunner().invoke(
        app,
        ["export", "lm-eval", str(store[0]), "--out", str(tmp_path / "out")],
        standalone_mode=False,
    )
    assert done.return_value == 0, done.exception
    data = json.loads((tmp_path / "out" / "results_response-seed1.json").read_text())
    table = make_table(data)
    row = next(line for line in table.splitlines() if "strict-match" in line)
    # sqrt(.6 * .4 / 9), as lm-eval's mean_stderr
    assert "gsm8k-mini" in table and "0.6" in row and "0.1633" in row
    assert "acc" in table and data["higher_is_better"]["mmlu-mini"] == {
        "acc": True,
        "acc_stderr": True,
    }


def test_standard_errors_are_lm_evals():
    from lm_eval.api.metrics import mean_stderr

    found = export.lm_eval_results(record("x", 6))["results"]["gsm8k-mini"]
    assert found["exact_match_stderr,strict-match"] == pytest.approx(mean_stderr([1] * 6 + [0] * 4))


def test_items_are_opened_by_datasets(store, tmp_path):
    from datasets import load_from_disk

    done = CliRunner().invoke(
        app,
        ["export", "datasets", str(store[0]), "--out", str(tmp_path / "out")],
        standalone_mode=False,
    )
    assert done.return_value == 0, done.exception
    found = load_from_disk(str(tmp_path / "out"))
    assert set(found) == {"teacher", "response_seed1"} and len(found["teacher"]) == 10
    assert found["response_seed1"][7]["row"] == "response" and json.loads(
        found["response_seed1"][7]["correct"]
    ) == {"strict-match": True}


def test_records_without_answers_say_so(tmp_path):
    one = record("teacher", 9)
    with pytest.raises(HarnessError, match="kept without their answers"):
        export.to_datasets([one], evidence_of(tmp_path, [one]), tmp_path / "out")


def test_a_tracker_that_is_missing_is_named():
    with pytest.raises(
        HarnessError, match="no_such_tracker is not installed; type: pip install no_such_tracker"
    ):
        export.to_tracker("no_such_tracker", [record("x", 6)], project="p")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_a_run_for_each_record(name, monkeypatch):
    """A stand-in with the two libraries' common calls: what is sent, and in which order."""
    calls = []
    stand_in = types.ModuleType(name)
    stand_in.__spec__ = types.SimpleNamespace(name=name)
    for call in ("init", "log", "finish"):
        setattr(
            stand_in, call, lambda *given, call=call, **named: calls.append((call, given, named))
        )
    monkeypatch.setitem(sys.modules, name, stand_in)
    told = export.to_tracker(name, [record("response", 6, seed=1)], project="p")
    assert [one[0] for one in calls] == ["init", "log", "finish"] and told == [
        f"{name}: p/response-seed1"
    ]
    assert (
        calls[0][2]["config"]["student"] == "depth:0.5"
        and calls[1][1][0]["gsm8k-mini/strict-match"] == 0.6
    )


def test_mlflow_reads_back_what_was_sent(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'm.db'}")
    export.to_tracker("mlflow", [record("response", 6, seed=1)], project="p")
    [run] = mlflow.search_runs(experiment_names=["p"], output_format="list")
    assert (
        run.data.metrics["gsm8k-mini/strict-match"] == 0.6
        and run.data.params["student"] == "depth:0.5"
    )
