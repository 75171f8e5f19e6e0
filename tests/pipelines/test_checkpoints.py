"""Rows from outside in a run: scored and compared beside their teacher, and gated."""

import shutil

import pytest

import harness
from harness.gate.check import Rules, check
from harness.models.resolve import EMBEDDED
from harness.planning.config import build_config
from harness.running.verify import verify


def with_another_vocabulary(folder):
    """Save the embedded teacher with one token more."""
    from tokenizers import Tokenizer

    shutil.copytree(EMBEDDED / "tiny", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<another>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def in_a_format_that_is_not_here(folder):
    shutil.copytree(EMBEDDED / "tiny", folder)
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    packed = ', "quantization_config": {"quant_method": "vptq"}}'
    (folder / "config.json").write_text(text + packed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run of four checkpoints alone, and its folder."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(EMBEDDED / "tiny", folder / "copy")
    with_another_vocabulary(folder / "other")
    in_a_format_that_is_not_here(folder / "packed")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    names = ("copy", "other", "adapter", "packed")
    run = harness.run(
        suite="gsm8k-mini",
        checkpoint={name: str(folder / name) for name in names},
        out=folder / "runs",
        cache=folder / "cache",
        subset="quick:6",
        grid="none",
        noise=0,
    )
    return run, folder


def record_of(run, label):
    return next(record for record in run.records if record.label == label)


def test_every_checkpoint_is_a_row_and_one_without_its_library_is_skipped(finished):
    run, _ = finished
    statuses = {record.label: record.status for record in run.records}
    assert statuses == dict.fromkeys(("teacher", "copy", "other", "adapter"), "success") | {
        "packed": "skipped"
    }
    assert record_of(run, "packed").reason.endswith("type: pip install vptq")
    assert record_of(run, "adapter").student.note.startswith("LoRA adapter of rank 2 on tiny")


def test_rows_of_a_frozen_subset_are_no_trial(finished):
    run, _ = finished
    for record in run.records:
        assert (record.conditions.subset, record.conditions.limited) == ("quick:6:1", False)
    assert {score.n for record in run.records for score in record.scores} == {6}
    assert "Scored on the frozen subset quick:6:1" in run.markdown()
    assert "TRIAL" not in run.markdown()


def test_the_teacher_under_another_name_answers_as_the_teacher(finished):
    run, _ = finished
    teacher, copy = record_of(run, "teacher"), record_of(run, "copy")
    assert copy.scores[0].answers_digest == teacher.scores[0].answers_digest
    assert copy.fidelity[0].kl == pytest.approx(0, abs=1e-9)
    assert copy.student.digest == teacher.student.digest


def test_nothing_of_a_checkpoint_is_saved_again(finished):
    _, folder = finished
    assert not any((folder / "runs" / "students").iterdir())
    saved = {path.name for path in (folder / "runs" / "cells").rglob("*.safetensors")}
    assert saved <= {"teacher-reads.safetensors"}


def test_tables_and_gate_take_checkpoints_as_rows(finished):
    run, _ = finished
    tables = run.markdown()
    assert "| copy" in tables and "adapter: the checkpoint adapter as it is, LoRA" in tables
    result = check(run.records, Rules(margin=0.5, rows=("copy",)))
    assert {finding.row for finding in result.findings if finding.layer == "claim"} == {"copy"}


def test_a_finished_checkpoint_is_not_computed_again_and_can_be_scored_again(finished):
    run, folder = finished
    again = harness.run(**run.plan.config.model_dump(exclude_unset=True))
    assert [cell.cached for cell in again.cells if cell.cell.label != "packed"] == [True] * 4
    cell = next(cell for cell in run.plan.cells if cell.label == "adapter")
    path = folder / "runs" / "cells" / cell.key[:24] / "record.json"
    verification = verify(path, score=True)
    assert not verification.difference and "its scores, computed again" in verification.checked


def test_a_checkpoint_of_another_vocabulary_is_scored_without_distances(finished):
    run, _ = finished
    record = record_of(run, "other")
    assert record.fidelity == ()
    assert "vocabulary" in record.measurement("skipped_fidelity").remark
    assert record.scores[0].items_digest == record_of(run, "teacher").scores[0].items_digest


def test_methods_beside_checkpoints_are_those_that_are_named():
    assert build_config({"checkpoint": ["a=tiny"]}).methods == ()
    assert build_config({"checkpoint": ["a=tiny"], "methods": ["int8"]}).methods == ("int8",)
    assert build_config({}).methods == ("cot", "response")
