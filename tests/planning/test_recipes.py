"""The recipe of rows that name none: by what fits, what is stored, and what a row allows."""

import pytest

import methods
from harness.api import plan_run
from harness.errors import HarnessError
from harness.models.shape import Shape
from harness.planning.config import build_config
from harness.planning.recipes import RecipeChooser, TrainingFit, first_recipes
from harness.planning.rows import build_rows, label_of
from harness.records.store import Store
from harness.registry import Registry

GIB = 2**30
REGISTRY = Registry("method", methods.METHODS)


class Needs:
    """Fits by a table: recipe -> GiB that its training needs."""

    def __init__(self, memory, **needs):
        self.memory, self.needs = memory * GIB, needs
        self.asked = []

    def fit(self, stages):
        name, method = stages[-1]
        self.asked.append((name, method.recipe))
        needed = self.needs[method.recipe] * GIB
        less = 0.75 * needed  # with another setting
        fits = needed <= self.memory
        smaller = "--set METHOD.micro_batch_size=1" if not fits and less <= self.memory else ""
        return TrainingFit(needed, less, self.memory, fits, smaller)

    def refusal(self, stages, needed):
        name, method = stages[-1]
        return f"{name} by {method.recipe} needs {needed / GIB:g}"


def chooser(needs, **settings):
    return RecipeChooser(needs, **{"has_package": lambda name: True, **settings})


def settled(needs, *stages, **settings):
    built = [(name, REGISTRY.build(name, changes)) for name, changes in stages]
    chosen, notes = chooser(needs, **settings).settle(built)
    return [getattr(method, "recipe", "") for _, method in chosen], notes


NEEDS = {"full": 25.1, "bf16": 12, "lora": 9}


def test_the_first_recipe_that_fits_is_taken_and_the_reason_is_said():
    assert settled(Needs(30, **NEEDS), ("response", {})) == (["full"], {})
    recipes, notes = settled(Needs(16, **NEEDS), ("response", {}))
    assert recipes == ["bf16"]
    assert notes == {"response": "recipe bf16: full needs 25.1 GiB of 16.0"}
    _, notes = settled(Needs(10, **NEEDS), ("response", {}))
    assert notes == {
        "response": "recipe lora: full needs 25.1 GiB of 10.0, bf16 needs 12.0 GiB of 10.0"
    }


def test_a_typed_recipe_is_kept_where_it_fits():
    assert settled(Needs(30, **NEEDS), ("response", {"recipe": "lora"})) == (["lora"], {})
    needs = Needs(1, **NEEDS)
    assert settled(needs, ("int8", {})) == ([""], {}) and not needs.asked


@pytest.mark.parametrize(
    ("memory", "recipe", "refusal"),
    [
        (
            13,
            "full",
            "response[recipe=full] needs 25.1 GiB, and this device has 13.0 GiB; type "
            "--set response.recipe=lora (9.0 GiB) or --set response.recipe=bf16 (12.0 GiB)",
        ),
        (
            10,
            "bf16",
            "response[recipe=bf16] needs 12.0 GiB, and this device has 10.0 GiB; type "
            "--set response.recipe=lora (9.0 GiB) or --set METHOD.micro_batch_size=1",
        ),
        (
            7,
            "lora",
            "response[recipe=lora] needs 9.0 GiB, and this device has 7.0 GiB; type "
            "--set METHOD.micro_batch_size=1",
        ),
        (6, "full", "response by lora needs 6.75"),
    ],
)
def test_a_typed_recipe_that_does_not_fit_is_refused_with_those_that_do(memory, recipe, refusal):
    with pytest.raises(HarnessError) as caught:
        settled(Needs(memory, **NEEDS), ("response", {"recipe": recipe}))
    assert str(caught.value) == refusal


def test_what_is_advised_in_place_of_a_typed_recipe_can_be_trained():
    needs = Needs(13, **NEEDS)
    with pytest.raises(HarnessError, match=r"type --set response\.recipe=bf16 \(12\.0 GiB\)$"):
        settled(needs, ("prune-magnitude", {}), ("response", {"recipe": "full"}))
    packed = Needs(10, full=8, bf16=8, lora=15)  # recipes that packed weights do not take
    for stages, changes in (
        ([("int8", {}), ("response", {"recipe": "lora"})], {}),
        ([("response", {"recipe": "lora"})], {"starts_packed": True}),
    ):
        with pytest.raises(
            HarnessError, match=r"by lora needs 11\.25; recipe=full: packed weights"
        ):
            settled(packed, *stages, **changes)


def test_a_typed_recipe_of_a_stored_student_and_of_a_control_is_kept():
    typed = ("response", {"recipe": "full"})
    assert settled(Needs(1, **NEEDS), typed, is_stored=lambda stages: True)[0] == ["full"]
    built = [(typed[0], REGISTRY.build(*typed))]
    assert chooser(Needs(1, **NEEDS)).settle_control(built).stages == built


@pytest.mark.parametrize(
    ("stages", "settings", "reason"),
    [
        ([("response", {})], {"lacks_bf16": "Tesla T4"}, "bf16: Tesla T4 has no bf16"),
        (
            [("response", {})],
            {"has_package": lambda name: name != "torchao"},
            "bf16: torchao is not installed (pip install 'compression-harness[bf16]')",
        ),
    ],
)
def test_what_a_card_or_an_installation_lacks_is_passed_over(stages, settings, reason):
    recipes, notes = settled(Needs(14, **NEEDS), *stages, **settings)
    assert recipes == ["lora"]
    assert notes == {"response": f"recipe lora: full needs 25.1 GiB of 14.0, {reason}"}


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        ([("response", {"start": "random"})], {}),
        ([("prune-magnitude", {}), ("response", {})], {}),
        ([("response", {})], {"draws_weights": True}),
    ],
    ids=["random start", "pruned", "new weights"],
)
def test_adapters_are_not_chosen_for_new_weights_or_beside_zeros(stages, settings):
    with pytest.raises(HarnessError, match=r"response by bf16 needs 9; recipe=lora: "):
        settled(Needs(8, **NEEDS), *stages, **settings)
    chosen, _ = settled(Needs(8, **NEEDS), ("prune-depth", {}), ("response", {}))
    assert chosen == ["", "lora"]


def test_nothing_fits_but_with_smaller_micro_batches():
    recipes, notes = settled(Needs(8, **NEEDS), ("response", {}))  # 0.75 * 9 fits
    assert recipes == ["lora"]
    assert notes["response"].endswith("it fits with --set METHOD.micro_batch_size=1")
    _, notes = settled(Needs(8, full=9, bf16=9, lora=9), ("response", {}))
    assert notes == {"response": "recipe full: it fits with --set METHOD.micro_batch_size=1"}
    with pytest.raises(HarnessError, match=r"response by lora needs 6\.75"):
        settled(Needs(6, **NEEDS), ("response", {}))


def test_a_stored_student_keeps_its_recipe():
    def is_stored(stages):
        return stages[-1][1].recipe == "lora"

    recipes, notes = settled(Needs(30, **NEEDS), ("response", {}), is_stored=is_stored)
    assert recipes == ["lora"]
    assert notes == {"response": "recipe lora: the stored student has it"}
    # the usual reason where the same would be chosen, and no refusal where nothing fits
    _, notes = settled(Needs(10, **NEEDS), ("response", {}), is_stored=is_stored)
    assert notes["response"].startswith("recipe lora: full needs 25.1 GiB")
    assert settled(Needs(1, **NEEDS), ("response", {}), is_stored=is_stored)[0] == ["lora"]


def test_a_card_without_bf16_refuses_a_typed_recipe():
    with pytest.raises(HarnessError, match=r"response\[recipe=bf16\]: Tesla T4 has no bf16"):
        settled(Needs(30, **NEEDS), ("response", {"recipe": "bf16"}), lacks_bf16="Tesla T4")


def test_controls_train_by_their_rows_recipe():
    config = build_config({"methods": ["response"]})
    rows = build_rows(config, REGISTRY, chooser(Needs(10, **NEEDS)).settle)
    labels = {row.label for row in rows}
    assert labels == {"response[recipe=lora]", "sft[recipe=lora]", "untouched"}
    assert [row.inherited_by_controls for row in rows if row.name == "response"] == [
        {"recipe": "lora"}
    ]
    # the first recipe is passed on too, and stands in no record
    stored = chooser(Needs(30, **NEEDS), is_stored=lambda stages: stages[-1][1].recipe == "lora")
    rows = build_rows(build_config({"methods": ["response[recipe=full]"]}), REGISTRY, stored.settle)
    assert {row.label for row in rows} == {"response", "sft", "untouched"}
    assert all(row.inherited_by_controls == {} for row in rows)
    # a control alone would fit in full
    only_sft = Needs(30, **NEEDS)
    config = build_config({"methods": ["response[recipe=bf16]"]})
    rows = build_rows(config, REGISTRY, chooser(only_sft).settle)
    assert "sft[recipe=bf16]" in {row.label for row in rows}
    assert only_sft.asked == [("response", "bf16")]  # what it typed, and of its controls nothing


def test_the_first_recipe_is_not_named_in_a_label():
    for recipe, label in (("auto", "sft"), ("full", "sft"), ("lora", "sft[recipe=lora]")):
        assert label_of("sft", REGISTRY.build("sft", {"recipe": recipe})) == label
    [(_, method)], notes = first_recipes([("sft", REGISTRY.build("sft", {}))])
    assert method.recipe == "full" and not notes


def planned(tmp_path, monkeypatch, memory=2**40, **settings):
    monkeypatch.setattr("harness.estimating.hardware.device_bytes", lambda device: memory)
    config = {"methods": ["response"], "suite": ["math"], "out": tmp_path, "controls": False}
    plan = plan_run(build_config({**config, **settings}), say=lambda line: None)
    return plan.cells[-1]


def test_a_key_holds_the_recipe_that_was_chosen(tmp_path, monkeypatch):
    chosen = planned(tmp_path, monkeypatch)
    typed = planned(tmp_path, monkeypatch, methods=["response[recipe=full]"])
    assert (chosen.key, chosen.label) == (typed.key, typed.label) == (typed.key, "response")
    assert chosen.settings["recipe"] == chosen.stages[0].settings["recipe"] == "full"
    assert not chosen.recipe_notes


def test_a_row_that_fits_less_is_another_row_and_a_stored_one_is_found_again(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    small = 0.74 * GIB + 119 * 2**20
    adapted = planned(tmp_path, monkeypatch, methods=["response[recipe=lora]"])
    monkeypatch.setattr("harness.planning.recipes.find_spec", lambda name: name == "peft" or None)
    with_less = planned(tmp_path, monkeypatch, memory=small)
    assert with_less.key == adapted.key and with_less.label == "response[recipe=lora]"
    assert with_less.recipe_notes["response"].startswith("recipe lora: full needs 0.")
    whole = planned(tmp_path, monkeypatch)
    assert whole.label == "response"
    # its student is there: a machine with more memory goes on with it
    folder = Store(tmp_path).student(adapted.student_key)
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{}")
    again = planned(tmp_path, monkeypatch)
    assert again.key == adapted.key
    assert again.recipe_notes == {"response": "recipe lora: the stored student has it"}
    assert planned(tmp_path, monkeypatch, force=True).label == "response"


def test_a_student_that_fits_no_recipe_is_refused_while_planning(tmp_path, monkeypatch):
    with pytest.raises(
        HarnessError,
        match=r"^response fits no recipe here: response\[recipe=\w+\], the smallest, needs .* GiB, "
        r"and CPU, \d+ cores has 0.7 GiB; give a card such as \w+ \(\d+ GiB\) or a --student",
    ) as refusal:
        planned(tmp_path, monkeypatch, memory=0.745 * GIB)
    assert "\n" not in str(refusal.value)
    # what was typed is no less refused, whether in brackets or by --set
    with pytest.raises(HarnessError, match=r"^response fits no recipe here: response\[recipe="):
        planned(tmp_path, monkeypatch, memory=0.745 * GIB, methods=["response[recipe=full]"])
    pytest.importorskip("peft")
    refused = (
        r"^response\[recipe=full\] needs 0\.\d GiB, and CPU, \d+ cores has 0\.9 GiB; type "
        r"--set response\.recipe=lora \(0\.\d GiB\) or --set response\.micro_batch_size=1$"
    )
    monkeypatch.setattr("harness.planning.recipes.find_spec", lambda name: name == "peft" or None)
    with pytest.raises(HarnessError, match=refused):
        small = 0.74 * GIB + 119 * 2**20
        planned(tmp_path, monkeypatch, memory=small, set={"response": {"recipe": "full"}})


def test_a_model_without_a_known_shape_trains_by_the_first_recipe(tmp_path, monkeypatch):
    def unknown(folder, *, name=""):
        raise HarnessError("no shape")

    monkeypatch.setattr(Shape, "of_folder", staticmethod(unknown))
    assert planned(tmp_path, monkeypatch).settings["recipe"] == "full"
