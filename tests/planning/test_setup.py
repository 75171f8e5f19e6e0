"""What all rows of a plan share: which starts a row may have."""

import json
from types import SimpleNamespace

import pytest

from harness.data.teacher_sets import parse_teacher_set
from harness.data.training_sets import TrainingSet
from harness.errors import HarnessError
from harness.planning.setup import check_start, check_training_data
from harness.testing import method_registry


def row(name, settings=None):
    method = method_registry().build(name, settings or {})
    return SimpleNamespace(label=name, names=(name,), methods=(method,), trains=method.trains)


def models(folder, *, library, recipe=None):
    """Return the models of a run whose base is packed by a library."""
    quantization = {"quant_method": library, "modules": {"m": {"kind": "int4", "shape": [2, 2]}}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return SimpleNamespace(base=SimpleNamespace(path=folder, name="packed"), recipe=recipe)


def test_a_packed_base_is_trained_by_adapters_alone(tmp_path):
    ours = models(tmp_path, library="compression-harness")
    check_start([row("response", {"recipe": "lora"}), row("sft", {"recipe": "lora"})], ours)
    for recipe in ("full", "bf16"):
        message = (
            r"^response starts from packed, which is quantized \(int4\) and can neither be cut nor "
            r"trained; .*floats, or type --set response\.recipe=lora$"
        )
        with pytest.raises(HarnessError, match=message):
            check_start([row("response", {"recipe": recipe})], ours)


def test_weights_that_another_library_packed_take_no_adapters(tmp_path):
    theirs = models(tmp_path, library="bitsandbytes")
    with pytest.raises(HarnessError, match=r"quantized \(bitsandbytes\) .* are floats$"):
        check_start([row("response", {"recipe": "lora"})], theirs)


def test_a_packed_base_is_not_cut(tmp_path):
    ours = models(tmp_path, library="compression-harness", recipe=object())
    with pytest.raises(HarnessError, match=r"can neither be cut nor trained; .* floats$"):
        check_start([row("untouched")], ours)
    with pytest.raises(HarnessError, match=r"can neither be cut nor trained; .* floats$"):
        check_start([row("sft", {"recipe": "lora"})], ours)


@pytest.mark.parametrize(
    ("name", "settings", "is_refused"),
    [
        ("cot", {}, True),
        ("cot", {"form": "step-by-step"}, True),
        ("answer-only", {}, True),
        ("cot-unfiltered", {}, False),
        ("response", {}, False),
        ("int8", {}, False),
    ],
)
def test_what_a_teacher_writes_has_no_answers_to_compare_with(name, settings, is_refused):
    written = parse_teacher_set("teacher").data
    rows = [row(name, settings)]
    check_training_data(rows, [], [name])
    check_training_data(
        rows, [TrainingSet("chats.jsonl", 1.0)], [name]
    )  # its lines may have answers
    if not is_refused:
        check_training_data(rows, [written], [name])
        return
    message = rf"^{name} needs to know the right answers, .* --train-data teacher nobody does;"
    with pytest.raises(HarnessError, match=message):
        check_training_data(rows, [TrainingSet("chats.jsonl", 1.0), written], [name])


@pytest.mark.parametrize(
    ("typed", "is_refused"),
    [
        (["answer-only", "sft", "int8"], False),
        (["cot[form=step-by-step]", "response"], False),
        (["int8", "answer-only", "cot"], True),
        (["cot"], True),  # sft is its control
    ],
)
def test_rows_that_need_answers_stand_beside_others_that_train_on_what_the_teacher_writes(
    typed, is_refused
):
    rows = [row(name.partition("[")[0]) for name in [*typed, "sft"]]
    written = parse_teacher_set("teacher").data
    if not is_refused:
        check_training_data(rows, [written], typed)
        return
    with pytest.raises(HarnessError, match=r"needs to know the right answers"):
        check_training_data(rows, [written], typed)
