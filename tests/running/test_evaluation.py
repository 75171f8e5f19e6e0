"""Nothing optional fails a scored row: each part runs out of memory here, and becomes a remark."""

import time

import pytest
import torch

from harness.errors import CellFailed
from harness.running import cell, evaluation

ITEMS = 4


def out_of_memory(*_, **__):
    """Fail as CUDA's allocator does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def job(tmp_path):
    """Return the job of the embedded teacher's row: both tasks of the suite, few items."""
    from harness.api import plan_run
    from harness.planning.config import build_config
    from harness.records.store import Store
    from harness.running.runner import _cell_job

    changes = {"suite": ("mini",), "limit": ITEMS, "grid": "none", "noise": 2, "device": "cpu"}
    plan = plan_run(
        build_config(
            {
                "methods": ("identity",),
                "controls": False,
                "out": tmp_path,
                "cache": tmp_path / "c",
                **changes,
            }
        )
    )
    store = Store(tmp_path)
    store.cell(plan.cells[0].key).mkdir(parents=True)
    return _cell_job(plan, plan.cells[0], store)


def computed(job):
    """Return the record of a cell, whose scores must all be there."""
    record = cell._compute(job, lambda _: None, time.monotonic())
    assert record.status == "success" and [score.n for score in record.scores] == [ITEMS] * 2
    return record


PARTS = {
    "its distances": ("_distances_to_teacher", {"noise": 0}, "skipped_fidelity"),
    "its noise floor": ("_flip_measurements", {}, "noise_flips:gsm8k-mini"),
    "its timing": ("measure", {"noise": 0, "measure": True, "grid": "8x1x2"}, "skipped_scenario"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_without_memory_is_a_remark_of_a_row_with_all_scores(part, job, monkeypatch):
    function, changes, name = PARTS[part]
    monkeypatch.setattr(evaluation, function, out_of_memory)
    remark = computed(job.model_copy(update=changes)).measurement(name).remark
    assert "out of memory" in remark and "--batch-size" in remark


def test_the_second_task_of_a_noise_floor_may_fail_alone(job, monkeypatch):
    flips = evaluation._flip_measurements

    def first_alone(*arguments):
        yield next(flips(*arguments))
        out_of_memory()

    monkeypatch.setattr(evaluation, "_flip_measurements", first_alone)
    record = computed(job)
    assert record.measurement("noise_flips:gsm8k-mini").values == (2.0,)
    assert "out of memory" in record.measurement("noise_flips:mmlu-mini").remark


def test_distances_on_texts_without_memory_are_a_remark(job, embedded, monkeypatch, tmp_path):
    from harness.errors import HarnessError
    from harness.running import text_distances
    from harness.running.loaded import LoadedJob
    from harness.scoring.text_divergence import NotANumber

    loaded = LoadedJob.of(
        job.model_copy(update={"teacher_samples": tmp_path / "samples.jsonl"}), lambda _: None
    )
    texts = [("wikitext", next(iter(loaded.tasks.values())))]
    monkeypatch.setattr(text_distances, "_text_tasks", lambda loaded: texts)
    monkeypatch.setattr(text_distances, "_compare", out_of_memory)
    [skipped] = text_distances.text_measurements(loaded, embedded, [])
    assert skipped.name == "skipped_text_distance" and "out of memory" in skipped.remark
    for problem in (CellFailed("the teacher is torn"), HarnessError("KL is infinite"), OSError(5)):

        def fail(*_, problem=problem):
            raise problem

        monkeypatch.setattr(text_distances, "_compare", fail)
        [skipped] = text_distances.text_measurements(loaded, embedded, [])
        assert skipped.name == "skipped_text_distance" and skipped.remark
    monkeypatch.setattr(text_distances, "_compare", lambda *_: None)
    [skipped] = text_distances.text_measurements(loaded, embedded, [])
    assert "in other windows" in skipped.remark

    def not_a_number(*_):
        raise NotANumber("logits are NaN")

    monkeypatch.setattr(text_distances, "_compare", not_a_number)
    with pytest.raises(CellFailed, match="NaN"):
        text_distances.text_measurements(loaded, embedded, [])


def test_timings_that_cannot_be_written_and_a_teacher_that_cannot_be_saved_cost_no_score(
    job, monkeypatch, capsys
):
    from types import SimpleNamespace

    from harness.scoring import fidelity

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fidelity, "save_hidden_states", out_of_memory)
    timed = SimpleNamespace(measurements=(), raw={}, skipped=())
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: timed)
    monkeypatch.setattr(evaluation, "write_atomically", full)
    changes = {"noise": 0, "measure": True, "grid": "8x1x2"}
    record = computed(job.model_copy(update=changes))
    assert "space" in record.measurement("skipped_scenario").remark
    assert (
        "the teacher's distributions could not be saved: out of memory" in capsys.readouterr().err
    )


def test_a_model_card_that_cannot_be_written_leaves_the_record(job, monkeypatch, tmp_path, capsys):
    record = computed(job.model_copy(update={"noise": 0}))
    (tmp_path / "stage" / "student").mkdir(parents=True)
    monkeypatch.setattr(cell, "write_card", out_of_memory)
    cell._write_model_card(job.model_copy(update={"stage_folders": (tmp_path / "stage",)}), record)
    assert "the model card could not be written: CUDA out of memory" in capsys.readouterr().err


def test_a_mistake_while_distances_are_measured_is_a_remark_and_numbers_that_are_none_fail(
    job, monkeypatch
):
    from harness.errors import HarnessError

    def raises(problem):
        def fail(*_, **__):
            raise problem

        return fail

    job = job.model_copy(update={"noise": 0})
    refused = HarnessError("the teacher cannot be opened")
    monkeypatch.setattr(evaluation, "_distances_to_teacher", raises(refused))
    assert "cannot be opened" in computed(job).measurement("skipped_fidelity").remark
    monkeypatch.setattr(evaluation, "_distances_to_teacher", raises(CellFailed("logits are NaN")))
    with pytest.raises(CellFailed, match="NaN"):
        computed(job)


def test_what_vllm_scored_keeps_its_scores_where_transformers_cannot_open_it_beside(
    job, embedded, monkeypatch
):
    from vllm_stand_in import install

    from harness.models import language_model
    from harness.models.shape import parameters_on_disk

    engines = install(monkeypatch, embedded)
    monkeypatch.setattr(language_model, "open_model", out_of_memory)
    record = computed(job.model_copy(update={"backend": "vllm", "dtype": "bfloat16"}))
    assert "out of memory" in record.measurement("skipped_fidelity").remark
    assert record.student.parameters == parameters_on_disk(embedded.checkpoint.path)
    # the noise floor takes no wider type, which may not fit, but fewer rows at once
    assert [(engine["dtype"], engine.get("max_num_seqs")) for engine in engines] == [
        ("bfloat16", None),
        ("bfloat16", 8),
    ]
    floor = record.measurement("noise_flips:gsm8k-mini")
    assert floor.condition == "bfloat16, 8 rows at once" and not floor.remark


def test_a_quantized_cache_is_compared_by_prompt_length_and_a_full_one_is_not(
    job, embedded, monkeypatch, tmp_path
):
    from harness.models.cache_format import CacheFormat
    from harness.models.language_model import open_model
    from harness.models.shaping import copy_student
    from harness.running import text_distances
    from harness.running.loaded import LoadedJob

    codes = CacheFormat(bits=4, group=32)
    student = open_model(
        copy_student(embedded.checkpoint, tmp_path / "kv", name="kv", cache_format=codes)
    )
    texts = [" ".join(f"{n} is {n * 7}." for n in range(k, k + 90)) for k in (0, 50)]
    monkeypatch.setattr(text_distances, "_scored_documents", lambda *_: texts)
    loaded = LoadedJob.of(job, lambda _: None)
    task = next(iter(loaded.tasks.values()))

    def measured(opened):
        return {
            one.name: one
            for one in text_distances._measurements_by_length(loaded, "wiki", task, opened, [])
        }

    assert measured(embedded) == {}
    found = measured(student)
    bands = [name.rpartition(":")[2] for name in found if name.startswith("kl_at_length:wiki:")]
    assert bands[:2] == ["0-128", "128-512"]
    for band in bands:
        distance = found[f"kl_at_length:wiki:{band}"]
        assert 0 < distance.value < 1 and "of 2 texts" in distance.condition
        ratio = found[f"perplexity_at_length:wiki:{band}"]
        assert ratio.low <= ratio.value <= ratio.high and 0.5 < ratio.value < 2
