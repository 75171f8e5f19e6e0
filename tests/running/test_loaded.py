"""A cell's own data: what a teacher writes is asked for once, counted, hashed and paid for."""

from types import SimpleNamespace

import pytest

from harness import catalog
from harness.api import plan_run
from harness.errors import HarnessError
from harness.planning.config import build_config
from harness.records.record import Cost
from harness.records.store import Store
from harness.running import runner
from harness.running.loaded import LoadedJob
from harness.running.student import with_data_notes
from harness.scoring.backend import Generation

TYPED = ("teacher[longest=80]=2", "teacher:free[seed=4]")


@pytest.fixture
def plan(tmp_path):
    options = {"train_data": TYPED, "rows": 30, "device": "cpu", "controls": False}
    folders = {"out": tmp_path / "runs", "cache": tmp_path / "cache"}
    config = build_config({"methods": "sft,int8", "suite": "mini", **options, **folders})
    return plan_run(config, say=lambda line: None)


@pytest.fixture
def calls(monkeypatch):
    """Let a stand-in write: numbered answers to prompts, every fifth of which does not end."""
    calls = []

    def write_traces(job, prompts, *, samples, temperature, longest):
        calls.append((len(prompts), samples, temperature, longest, job.seed))
        texts = [
            [
                Generation(
                    f" Text {len(prompts)} {index}. More", 5, "eos" if index % 5 else "length"
                )
                for index in range(first, first + samples)
            ]
            for first in range(len(prompts))
        ]
        cost = {"key": f"written {len(calls)}", "tokens": 50, "seconds": 2.0, "flops": 9.0}
        return SimpleNamespace(texts=texts, tokens=50, seconds=2.0, joules=3.0, cost=lambda: cost)

    monkeypatch.setattr(catalog, "write_traces", write_traces)
    return calls


def loaded_job(plan, label):
    [cell] = [cell for cell in plan.cells if cell.label.partition("[")[0] == label]
    job = runner._cell_job(plan, cell, Store(plan.config.out))
    return LoadedJob.of(job, lambda progress: None)


def test_a_trained_cell_asks_the_teacher_for_what_its_rows_need(plan, calls):
    loaded = loaded_job(plan, "sft")
    assert list(loaded.training_tasks) == ["teacher[longest=80]", "teacher:free[seed=4]"]
    assert not calls  # before somebody reads
    notes = loaded.own_data_notes()
    # 20 rows and two to hold out, 10 rows and one; 22 prompts, and 11 texts behind one
    assert calls[:2] == [(22, 1, 0.0, 80, 0), (1, 11, 1.0, 256, 4)]
    answered, free = notes["teacher[longest=80]"], notes["teacher:free[seed=4]"]
    assert (answered["written"], answered["unfinished"]) == (22, 5)
    assert answered["train"] == answered["used"] == 16 and answered["validation"] == 1
    assert (free["written"], free["cut"], free["unfinished"]) == (11, 3, 0)
    assert free["used"] == 10 and (free["tokens"], free["seconds"], free["joules"]) == (
        50,
        2.0,
        3.0,
    )
    assert len(answered["sha256"]) == 64 and answered["sha256"] != free["sha256"]
    assert loaded.data_digest()


def test_the_cost_of_a_trained_row_holds_the_writing(plan, calls):
    cost = with_data_notes(loaded_job(plan, "sft"), Cost(seconds=1.0, notes={"rows": 3}))
    assert [(shared.tokens, shared.seconds) for shared in cost.shared] == [(50, 2.0), (50, 2.0)]
    assert len({shared.key for shared in cost.shared}) == 2
    assert cost.notes["rows"] == 3 and set(cost.notes["train_data"]) == {
        data.name for data in plan.conditions.train_data
    }


@pytest.mark.parametrize("label", ["teacher", "int8"])
def test_a_cell_that_trains_nothing_asks_for_nothing(plan, calls, label):
    loaded = loaded_job(plan, label)
    with_data_notes(loaded, Cost())
    assert not calls


def test_what_one_set_holds_out_no_other_trains(plan, calls):
    loaded = loaded_job(plan, "sft")
    held_out = {
        example.completion
        for data in loaded.training_tasks.values()
        for example in data.examples("validation", loaded.source)
    }
    trained = {
        example.completion
        for data in loaded.training_tasks.values()
        for example in data.examples("train", loaded.source)
    }
    assert len(held_out) == 2 and trained and not trained & held_out


def test_evaluation_items_in_what_was_written_are_refused_where_that_is_asked(
    plan, calls, monkeypatch
):
    loaded = loaded_job(plan, "sft")
    [first, *_] = loaded.tasks.values()
    scored = next(iter(first.examples("test", loaded.source))).prompt
    monkeypatch.setattr(
        "harness.running.teacher_data.plain_examples",
        lambda tasks, split, source, *, rows: [
            SimpleNamespace(prompt=scored if number == 1 else f"Q{number}")
            for number in range(rows)
        ],
    )
    dropped = loaded.own_data_notes()["teacher[longest=80]"]
    assert dropped["dropped_for_evaluation_text"] == 1
    strict = loaded.job.model_copy(update={"overlap": "refuse"})
    with pytest.raises(HarnessError, match=r"1 of 17 examples of teacher\[longest=80\] hold"):
        LoadedJob.of(strict, lambda progress: None).own_data_notes()
