"""Every trained method under every recipe: what is opened, trained and saved, in which type."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from math import isfinite

import pytest
import torch
from distilling import REGISTRY, job
from safetensors.torch import load_file

from harness.checking.fresh import reopen
from harness.errors import CellFailed, Skipped
from harness.models.language_model import open_model, stored_dtype
from methods import METHODS
from methods.training.recipes import recipe_of

TRAINED = [
    name for name in METHODS if REGISTRY.load(name).trains and REGISTRY.canonical(name) == name
]
RECIPES = ["full", "bf16", "lora"]
NEEDED = {"full": "torch", "bf16": "torchao", "lora": "peft"}
SMALL = {"validation_rows": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3}
# terms of the loss that only few methods have by default
MORE_TERMS = [
    ("response", {"divergence": "reverse-kl"}),
    ("response", {"divergence": "jsd"}),
    ("response", {"divergence": "skew-kl"}),
    ("response", {"cache": "off"}),
    ("response", {"terms": ("forward-kl=0.5", "ce=0.5", "feature=auto", "attention=auto")}),
    ("selective", {"by": "excess"}),
]
CASES = [(name, {}) for name in TRAINED] + MORE_TERMS


def settings_of(name, changes, recipe):
    settings = {**SMALL, **changes, "recipe": recipe, "lora_rank": 2}
    if name == "on-policy":
        settings["longest"] = 4
    return settings


def tensors_of(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """Return a folder whose cache the trainings share: traces and teachers' distributions."""
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def packed_students(random_model, shared_cache):
    """Return a maker of packed copies of the random model, by their method; each is made once."""

    @cache
    def make(kind):
        folder = shared_cache / "packed" / kind
        packing_job = job([random_model], folder, student=str(random_model.path))
        return REGISTRY.build(kind, {}).compress(packing_job)

    return make


@pytest.fixture
def make_job(random_model, tiny, specialist, foreign, shared_cache, request):
    """Return the job of a method: a random student of two blocks, and what teaches it."""

    def make(name, folder, **changes):
        teachers = {"uld": [foreign], "cot": [tiny], "cot-unfiltered": [tiny]}.get(name, [tiny])
        if REGISTRY.load(name).needs_several_teachers:
            teachers = [tiny, specialist]
        place = re.sub(r"[^\w-]+", "_", request.node.name)
        options = {"student": str(random_model.path), "student_base": random_model, **changes}
        return job(teachers, shared_cache / place / folder, tokens=700, rows=12, **options)

    return make


def trained_tensors(method, training_job):
    """Train, check what every recipe promises, and return the tensors before and after."""
    student = method.compress(training_job)
    notes = json.loads((student.path.parent / "cost.json").read_text())["notes"]
    assert notes.get("recipe", "full") == method.recipe
    assert ("torchao AdamW8bit" in notes.get("optimizer", "")) == (method.recipe == "bf16")
    assert ("adapter_weights" in notes) == (method.recipe == "lora")
    assert notes["terms"] and all(
        isfinite(term["first"]) and isfinite(term["last"]) and term["weight"] > 0
        for term in notes["terms"].values()
    )
    return tensors_of(training_job.student_base.path), tensors_of(student.path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_every_term_trains_by_every_recipe(name, changes, recipe, make_job):
    pytest.importorskip(NEEDED[recipe])
    method = REGISTRY.build(name, settings_of(name, changes, recipe))
    before, after = trained_tensors(method, make_job(name, "a"))
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    assert any(re.search(r"layers\.\d\.mlp", key) for key in changed)
    if recipe == "lora":  # norms and the table are frozen
        assert all(re.search(r"layers\.\d\.(mlp|self_attn)", key) for key in changed)
    expected_type = torch.bfloat16 if recipe == "bf16" else torch.float32
    assert {tensor.dtype for tensor in after.values()} == {expected_type}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_every_term_trains_adapters_beside_packed_weights(name, changes, make_job, packed_students):
    pytest.importorskip("peft")
    method = REGISTRY.build(name, settings_of(name, changes, "lora"))
    packed = packed_students("int4")
    packed_job = make_job(name, "a", student=str(packed.path), student_base=packed)
    before, after = trained_tensors(method, packed_job)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    ups = [tensor for key, tensor in after.items() if key.endswith("adapter_up.weight")]
    assert len(ups) == 2 * 7 and any(bool(up.abs().max() > 0) for up in ups)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_seed_gives_the_same_bytes_and_plain_transformers_opens_them(
    recipe, make_job, random_model
):
    pytest.importorskip(NEEDED[recipe])
    method = REGISTRY.build("response", settings_of("response", {}, recipe))
    first = method.compress(make_job("response", "first"))
    again = method.compress(make_job("response", "again"))
    other = method.compress(make_job("response", "other", seed=2))
    assert first.digest == again.digest != other.digest
    reopen(first, fresh=True, imports_packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "int8", "int8-dynamic"])
def test_adapters_learn_beside_packed_weights_and_are_kept_there(kind, make_job, packed_students):
    pytest.importorskip("peft")
    packed = packed_students(kind)
    settings = settings_of("sft", {"lora_rank": 4, "learning_rate": 2e-2}, "lora")
    method = REGISTRY.build("sft", settings)
    changes = {"student": str(packed.path), "student_base": packed}
    student = method.compress(make_job("sft", "adapted", **changes))
    again = method.compress(make_job("sft", "again", **changes))
    assert student.digest == again.digest and student.parents[0] == packed.digest
    before, after = tensors_of(packed.path), tensors_of(student.path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    ups = [tensor for name, tensor in after.items() if name.endswith("adapter_up.weight")]
    assert len(ups) == 14 and all(bool(up.abs().max() > 0) for up in ups)
    notes = json.loads((student.path.parent / "cost.json").read_text())["notes"]
    assert notes["adapter_weights"] == sum(
        tensor.numel() for name, tensor in after.items() if ".adapter_" in name
    )
    assert notes["best_ce"] < notes["start_ce"] - 0.03  # it learnt; 0.043 by each kind
    reopen(student, fresh=True, imports_packed=True)


@pytest.mark.slow
def test_low_rank_factors_are_adapted_as_floats_and_as_packed_weights(make_job, packed_students):
    """Merged into the second factor of a pair; kept beside it where the pair is packed."""
    pytest.importorskip("peft")
    factors = packed_students("lowrank-plain")
    method = REGISTRY.build("sft", settings_of("sft", {"learning_rate": 2e-2}, "lora"))
    changes = {"student": str(factors.path), "student_base": factors}
    merged = method.compress(make_job("sft", "merged", **changes))
    before, after = tensors_of(factors.path), tensors_of(merged.path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() == before.keys()
    seconds = {name for name in before if name.endswith(".up.weight")}
    firsts = {name.replace(".up.", ".") for name in seconds}
    assert seconds and seconds <= changed and not firsts & changed
    reopen(merged, fresh=False, imports_packed=True)

    packing_job = make_job("sft", "int8", student=str(factors.path), student_base=factors)
    packed = REGISTRY.build("int8", {}).compress(packing_job)
    changes = {"student": str(packed.path), "student_base": packed}
    beside = method.compress(make_job("sft", "beside", **changes))
    before, after = tensors_of(packed.path), tensors_of(beside.path)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    adapters = {name for name in after if name.endswith("adapter_up.weight")}
    assert {name.replace(".weight", ".adapter_up.weight") for name in seconds} <= adapters
    assert not {name.replace(".weight", ".adapter_up.weight") for name in firsts} & adapters
    reopen(beside, fresh=False, imports_packed=True)


@pytest.mark.slow
def test_a_training_beside_packed_weights_that_was_stopped_goes_on_to_the_same_bytes(
    make_job, packed_students, monkeypatch
):
    pytest.importorskip("peft")
    from methods.training import trainer

    packed = packed_students("int4")
    method = REGISTRY.build("sft", settings_of("sft", {}, "lora"))
    changes = {"student": str(packed.path), "student_base": packed}
    whole = method.compress(make_job("sft", "whole", **changes))
    fit = trainer.fit

    class Killed(Exception):
        pass

    def fit_two_steps(student, **options):
        training = replace(options.pop("training"), stop_after_steps=2)
        fit(student, training=training, **options)
        raise Killed

    monkeypatch.setattr(trainer, "fit", fit_two_steps)
    with pytest.raises(Killed):
        method.compress(make_job("sft", "parts", **changes))
    monkeypatch.undo()
    assert method.compress(make_job("sft", "parts", **changes)).digest == whole.digest


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["full", "bf16"])
def test_packed_students_are_refused_by_recipes_that_train_every_weight(
    recipe, make_job, packed_students
):
    packed = packed_students("int8")
    method = REGISTRY.build("response", {"recipe": recipe})
    packed_job = make_job("sft", "x", student=str(packed.path), student_base=packed)
    message = r"packed \(int8\+tied\), and packed weights take no gradient; use recipe=lora$"
    with pytest.raises(CellFailed, match=message):
        recipe_of(method, packed_job).refuse()


def test_weights_that_another_library_packed_are_refused(make_job, random_model, tmp_path):
    folder = tmp_path / "nf4"
    shutil.copytree(random_model.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    base = replace(random_model, path=folder)
    method = REGISTRY.build("response", {"recipe": "lora"})
    with pytest.raises(CellFailed, match=r"packed \(bitsandbytes\), and adapters are trained"):
        recipe_of(method, make_job("sft", "x", student=str(folder), student_base=base)).refuse()


@pytest.mark.parametrize(("recipe", "name"), [("bf16", "torchao"), ("lora", "peft")])
@pytest.mark.parametrize("method", ["cot", "best-single-teacher", "multi-teacher", "selective"])
def test_what_is_missing_is_said_before_a_teacher_works(
    method, recipe, name, make_job, monkeypatch
):
    from harness.models import language_model
    from methods.training import traces

    def work(*arguments, **options):
        raise AssertionError("a teacher was opened")

    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(traces, "teacher_traces", work)
    monkeypatch.setattr(language_model, "open_model", work)
    settings = {"selective": {"by": "correct"}, "multi-teacher": {"weighting": "domain"}}
    built = REGISTRY.build(method, {"recipe": recipe, **settings.get(method, {})})
    with pytest.raises(Skipped, match=rf"{name} is not installed; type: pip install"):
        built.compress(make_job(method, "x"))


def test_a_half_float_base_trained_in_bf16_is_saved_in_bf16_and_else_in_its_own_type(
    make_job, random_model, tmp_path
):
    from harness.models.checkpoint import describe

    opened = open_model(random_model, dtype="float16")
    opened.model.save_pretrained(tmp_path / "half")
    opened.tokenizer.save_pretrained(tmp_path / "half")
    base = describe(tmp_path / "half", name="half")
    assert stored_dtype(base) == torch.float16
    half_job = make_job("sft", "x", student=str(base.path), student_base=base)
    saved = {
        recipe: recipe_of(REGISTRY.build("sft", {"recipe": recipe}), half_job).saved_dtype
        for recipe in RECIPES
    }
    assert saved == {"full": torch.float16, "lora": torch.float16, "bf16": torch.bfloat16}
