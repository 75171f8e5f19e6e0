"""A run on an old store says which cells it computes again, and why."""

import json
import time

import pytest

from harness.api import plan_run
from harness.files.digests import digest_of
from harness.files.writing import read_signed
from harness.planning import keys
from harness.planning.config import build_config
from harness.planning.rows import label_of
from harness.records.store import Store
from harness.running import recomputation
from harness.running.recomputation import PARTS_FILE, recomputation_lines, save_key_parts

ROWS = ("cot", "response", "int8", "prune-wanda", "untouched")


def plan(**values):
    return plan_run(build_config({"methods": ROWS, "suite": ("mini",), **values}))


def stored(planned, store):
    """Leave in a store what a finished run leaves, without its numbers."""
    for cell in planned.cells:
        store.cell(cell.key).mkdir(parents=True)
        (store.cell(cell.key) / "record.json").write_text("{}")
        for stage in cell.stages:
            store.student(stage.key).mkdir(parents=True, exist_ok=True)
        save_key_parts(planned, cell, store)


def altered(monkeypatch, function, *files):
    """Let the code of students or scores be another one in these files."""
    original = getattr(keys.CodeDigests, function)

    def other(self, *arguments, **settings):
        digests = original(self, *arguments, **settings)
        return digests | {file: "0" for file in files if file in digests}

    monkeypatch.setattr(keys.CodeDigests, function, other)


def test_a_finished_store_says_nothing(tmp_path):
    store, planned = Store(tmp_path), plan()
    assert recomputation_lines(planned, store) == []
    stored(planned, store)
    assert (
        recomputation_lines(planned, store)
        == []
        == recomputation_lines(plan(budget=2_000, methods=("sft",)), store)[:0]
    )


def test_parts_make_the_key_and_are_signed(tmp_path):
    store, planned = Store(tmp_path), plan()
    stored(planned, store)
    for cell in planned.cells:
        parts = read_signed(store.cell(cell.key) / PARTS_FILE)
        assert digest_of("cell", *parts["students"][-1:], parts["held"]) == cell.key
    parts = read_signed(store.student(planned.cells[1].student_key) / PARTS_FILE)
    assert digest_of("student", parts["held"]) == planned.cells[1].student_key


def test_a_change_is_told_once_with_its_files_and_versions(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr("harness.planning.plan.lm_eval_version", lambda: "0.4.12")
    altered(
        monkeypatch, "for_scores", "suites/loading/numbers.py", "harness/scoring/lm_eval_model.py"
    )
    stored(plan(), store)
    monkeypatch.undo()
    monkeypatch.setattr("harness.planning.plan.lm_eval_version", lambda: "0.4.13")
    planned = plan()
    lines = recomputation_lines(planned, store)
    why = (
        "code changed (harness/scoring/lm_eval_model.py, suites/loading/numbers.py); lm-eval "
        "0.4.12 -> 0.4.13"
    )
    assert lines == [
        f"1 cell is computed again: {why}",
        f"{len(planned.cells) - 1} cells are computed again: {why}; students are kept and "
        "scored again",
    ]


def test_students_that_are_made_anew_say_by_which_file(tmp_path, monkeypatch):
    store = Store(tmp_path)
    altered(monkeypatch, "for_student", "methods/training/traces.py", "methods/int8.py")
    stored(plan(), store)
    monkeypatch.undo()
    assert recomputation_lines(plan(), store) == [
        "1 cell is computed again: code changed (methods/training/traces.py)",
        "1 cell is computed again: code changed (methods/int8.py)",
    ]


@pytest.mark.parametrize(
    "method", ["int4[group_size=32]", "prune-depth[num_calibration_samples=8]"]
)
def test_a_row_whose_setting_was_renamed_is_the_same_row(tmp_path, monkeypatch, method):
    store = Store(tmp_path)
    rows = {"methods": (method, "int8"), "controls": False}
    old_names = {"group_size": "group", "num_calibration_samples": "sequences"}

    def old_label(name, built):
        label = label_of(name, built)
        for new, old in old_names.items():
            label = label.replace(f"{new}=", f"{old}=")
        return label

    altered(monkeypatch, "for_scores", "harness/scoring/lm_eval_model.py")
    # labels and identities as they were written before the rename
    monkeypatch.setattr("harness.planning.rows.label_of", old_label)
    monkeypatch.setattr("harness.planning.plan.label_of", old_label)
    before = plan(**rows)
    stored(before, store)
    monkeypatch.undo()
    current = plan(**rows)
    assert [cell.label for cell in current.cells] != [cell.label for cell in before.cells]
    changes = "code changed (harness/scoring/lm_eval_model.py)"
    assert recomputation_lines(current, store) == [
        f"1 cell is computed again: {changes}",
        f"2 cells are computed again: {changes}; students are kept and scored again",
    ]
    assert recomputation_lines(plan(**rows, budget=1_000), store) == []


def test_other_questions_are_other_cells(tmp_path):
    store = Store(tmp_path)
    stored(plan(), store)
    for other in ({"budget": 1_000}, {"suite": ("math",)}, {"limit": 5}, {"student": "depth:0.25"}):
        assert recomputation_lines(plan(**other), store) == []


def test_a_store_of_an_older_version_says_so(tmp_path):
    store, planned = Store(tmp_path), plan()
    for number, cell in enumerate(planned.cells):
        folder = store.cell(f"{number:024}")
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
        under = planned.conditions
        job = {
            "cell": {"label": cell.label, "seed": cell.seed},
            "tasks": under.task_names,
            "student_recipe": under.student_recipe,
        }
        (folder / "job.json").write_text(json.dumps({**job, "budget_tokens": under.budget_tokens}))
    [line] = recomputation_lines(planned, store)
    assert line.startswith(
        f"{len(planned.cells)} cells are computed again: the store is of an older version of "
        "the harness, whose keys did not include "
    )
    (store.cell(f"{0:024}") / "job.json").write_text("{torn")
    assert recomputation_lines(planned, store)[0].startswith(f"{len(planned.cells) - 1} cells ")


@pytest.mark.parametrize(
    "harm", [lambda text: text[:-9], lambda text: text.replace('"held"', '"hold"'), lambda text: ""]
)
def test_parts_that_are_not_as_they_were_written_are_not_believed(tmp_path, monkeypatch, harm):
    store = Store(tmp_path)
    altered(monkeypatch, "for_scores", "harness/scoring/lm_eval_model.py")
    stored(plan(), store)
    monkeypatch.undo()
    for file in tmp_path.glob(f"cells/*/{PARTS_FILE}"):
        file.write_text(harm(file.read_text()))
    assert recomputation_lines(plan(), store) == []


def test_a_dry_run_says_it_too(tmp_path, monkeypatch):
    from harness.cli.dry_run import plan_lines

    altered(monkeypatch, "for_scores", "harness/scoring/lm_eval_model.py")
    stored(plan(out=tmp_path), Store(tmp_path))
    monkeypatch.undo()
    text = "\n".join(plan_lines(plan(out=tmp_path)))
    assert "cells are computed again: code changed (harness/scoring/lm_eval_model.py)" in text


def test_a_store_of_thousands_of_cells_is_looked_through_quickly(tmp_path, monkeypatch):
    store = Store(tmp_path)
    altered(monkeypatch, "for_scores", "harness/scoring/lm_eval_model.py")
    stored(plan(), store)
    text = (
        next(tmp_path.glob(f"cells/*/{PARTS_FILE}"))
        .read_text()
        .replace('"identity": "', '"identity": "f')
    )
    for number in range(3_000):
        folder = tmp_path / "cells" / f"{number:024}"
        folder.mkdir()
        (folder / PARTS_FILE).write_text(text)
        (folder / "record.json").write_text("{}")
    monkeypatch.undo()
    planned = plan()
    began = time.process_time()
    assert len(recomputation_lines(planned, store)) == 2
    assert time.process_time() - began < 2 and recomputation.PARTS_FILE == PARTS_FILE
