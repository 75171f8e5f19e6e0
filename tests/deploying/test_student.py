"""Exporting a row: checks before, the export's own files, opened and scored again."""

import json
import shutil

import pytest
from gate_rows import harness

import harness as package
from harness.deploying.reopened import Reopened
from harness.deploying.row import find_row
from harness.deploying.student import ExportOptions, export_student, refuse_other_weights
from harness.deploying.written import Written
from harness.errors import CellFailed, HarnessError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the store of a run of int8 and a teacher on six items."""
    folder = tmp_path_factory.mktemp("exported")
    package.run(
        "int8", "gsm8k-mini", limit=6, grid="none", noise=0, controls=False,
        out=folder / "runs", cache=folder / "cache",
    )  # fmt: skip
    return folder / "runs"


def test_a_row_is_exported_opened_again_and_gives_its_answers(finished, tmp_path):
    done = harness("export", "student", "int8", finished, "--out", tmp_path / "out", "--check", "4")
    assert done.return_value == 0, done.output
    assert "opened again in a fresh process by transformers" in done.output
    assert "all 74 weights are equal" in done.output
    assert "scored again on 4 items of the row: 4 as in its record, 0 not" in done.output
    notes = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (notes["row"], notes["form"], notes["passed"]) == ("int8", "safetensors", True)
    assert notes["rescored"]["agreeing"] == notes["rescored"]["items"] == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_export_that_answers_otherwise_fails_its_check(finished, tmp_path, monkeypatch):
    store = tmp_path / "runs"
    shutil.copytree(finished, store)
    samples = find_row("int8", store).file("samples.jsonl")
    from harness.scoring.items import read_rows, write_rows

    rows = read_rows(samples)
    changed = [{**vars(row), "correct": {k: not v for k, v in row.correct.items()}} for row in rows]
    write_rows(samples, [type(rows[0])(**row) for row in changed])
    done = harness("export", "student", "int8", store, "--out", tmp_path / "out", "--check", "all")
    assert done.return_value == 1
    assert "the row: 0 as in its record, 6 not (OUTSIDE the tolerance of 0)" in done.output


def test_weights_other_than_announced_fail_the_export(tmp_path):
    made = Written(tmp_path / "out", 0.004, ())
    refuse_other_weights(Reopened(9, (), 0.004, "a", ()), made)
    with pytest.raises(CellFailed, match=r"a differs by 0.5 % .* at most 0.4 % was announced"):
        refuse_other_weights(Reopened(9, (), 0.005, "a", ()), made)
    with pytest.raises(CellFailed, match="a differs by nan"):
        refuse_other_weights(Reopened(9, (), float("nan"), "a", ()), made)
    with pytest.raises(CellFailed, match=r"b is not in the opened export \(2 weights"):
        refuse_other_weights(Reopened(9, ("b", "c"), 0.0, "", ()), made)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ("int4", ("--form", "onnx"), "onnx"),
        ("int4", (), "--out is missing; name a new folder"),
        ("int4", ("--out", "new", "--dtype", "int3"), "unknown type 'int3'"),
        ("int4", ("--out", "new", "--check", "some"), "--check some: give a number of items"),
        ("int4", ("--out", "new", "--check", "0"), "--check 0: give a number of items"),
        ("int4", ("--out", "new", "--tolerance", "2"), "--tolerance 2: give a share"),
        ("int4", ("--out", "full"), "--out full holds files; give a new folder"),
        ("int4", ("--out", "new"), "int4: its answers were not kept.*--check none"),
        ("int5", ("--out", "new"), "did you mean 'int4'"),
        ("int4[group_size=32]", ("--out", "new"), "its student is not here"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    row, options, message, made_store, tmp_path, monkeypatch
):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    done = harness("export", "student", row, made_store.root, *options)
    shown = getattr(done.exception, "message", "") or str(done.exception)
    assert re.search(message, shown) and "\n" not in shown
    assert not (tmp_path / "new").exists()


def test_an_export_that_does_not_hold_the_weights_is_deleted(
    made_store, packed_student, tmp_path, monkeypatch
):
    from harness.deploying import student

    folder = made_store.student("student-of-int4") / "student"
    shutil.rmtree(folder)
    shutil.copytree(packed_student("int4", group_size=32), folder)
    monkeypatch.setattr(student, "require_answers", lambda row: None)
    monkeypatch.setattr(student, "reopen", lambda *_: Reopened(20, (), 0.5, "a.weight", ()))
    row, options = find_row("int4", made_store.root), ExportOptions(form="safetensors")
    with pytest.raises(CellFailed, match=r"a.weight differs by 50 % .* at most 0 % was announced"):
        export_student(row, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_said_before_anything_is_written(made_store, tmp_path, monkeypatch):
    from harness.deploying import student

    missing = "compressed_tensors is not installed here; type: pip install compressed-tensors"
    monkeypatch.setattr(student, "library_problem", lambda form: missing)
    monkeypatch.setattr(student, "require_answers", lambda row: None)
    row, options = find_row("int4", made_store.root), ExportOptions(form="compressed-tensors")
    with pytest.raises(HarnessError, match=r"pip install compressed-tensors; .*--check none"):
        export_student(row, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_quantized_cache_is_in_no_exported_form(made_store, tmp_path):
    from harness.models.cache_format import CacheFormat, with_cache_format

    config = made_store.student("student-of-int4") / "student" / "config.json"
    config.write_text(json.dumps(with_cache_format({}, CacheFormat(bits=8, group=64))))
    row = find_row("int4", made_store.root)
    with pytest.raises(HarnessError, match=r"a quantized cache \(int8-64\).*without its kv stage"):
        export_student(row, tmp_path / "out", ExportOptions(form="safetensors"))
    assert not (tmp_path / "out").exists()
