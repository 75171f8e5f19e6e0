"""What training needs in each recipe, and what would fit where none does."""

import re
from dataclasses import replace

import pytest

from harness import catalog
from harness.estimating.hardware import GIB, parse_hardware
from harness.estimating.recipes import RecipesThatFit
from harness.estimating.workload import EstimateRequest
from harness.models.shape import PUBLIC_SHAPES, shape_of_size

REQUEST = EstimateRequest(
    teacher=shape_of_size(8e9),
    student=shape_of_size(1e9),
    chain=(),
    budget=1_000_000,
    rows=2_000,
    items={"gsm8k": 100},
)


def on(hardware, **changes):
    return RecipesThatFit(replace(REQUEST, **changes), parse_hardware(hardware, []))


def stages(*specs):
    return [(name, catalog.methods().build(name, settings)) for name, settings in specs]


def test_what_is_needed_falls_from_recipe_to_recipe():
    fits = on("1x28GB")
    full, bf16 = (fits.fit(stages(("response", {"recipe": recipe}))) for recipe in ("full", "bf16"))
    assert full.memory == 28 * GIB and not full.fits and bf16.fits
    assert full.needed > 0.92 * 28 * GIB > bf16.needed and not bf16.advice
    # with one row at a time the batch takes a sixteenth
    assert full.smaller == "--set response.micro_batch_size=1" in full.advice
    assert full.least < full.needed and bf16.least == bf16.needed
    one = fits.fit(stages(("response", {"recipe": "full", "micro_batch_size": 1})))
    assert one.fits and one.needed == pytest.approx(full.least)


def test_a_stage_behind_a_cut_is_as_large_as_what_is_left():
    fits = on("1xB200")
    trained = ("sft", {"recipe": "full"})
    whole = fits.fit(stages(("identity", {}), trained)[1:])
    of_teacher = fits.fit(stages(("prune-depth", {"ratio": 0.5}), trained))
    assert whole.needed < of_teacher.needed
    half = replace(REQUEST.teacher, layers=16)
    alone = on("1xB200", student=half).fit(stages(trained))
    assert of_teacher.needed == pytest.approx(alone.needed)


def test_a_mixture_of_experts_has_more_weights_than_its_shape():
    dense, mixture = on("1xB200"), replace(on("1xB200"), student_factor=4.0)
    trained = stages(("sft", {"recipe": "bf16"}))
    more = mixture.fit(trained).needed - dense.fit(trained).needed
    assert more == pytest.approx(3 * 6.03 * REQUEST.student.parameters, rel=0.01)


def test_the_refusal_names_a_card_and_the_largest_student_that_fit():
    fits = on("1xT4", student=shape_of_size(13e9))
    trained = stages(("response", {"recipe": "bf16"}))
    line = fits.refusal(trained, fits.fit(trained).least)
    named = re.search(r"at most ([\d.]+) billion .* with (\d+) of its 40 blocks", line)
    assert "a card such as H200 (141 GiB)" in line
    blocks = int(named[2])
    student = shape_of_size(13e9)
    largest = student.shallower(blocks / 40)
    assert float(named[1]) == pytest.approx(largest.parameters / 1e9, rel=0.06)
    assert on("1xT4", student=largest).fit(trained).least < 0.92 * 16 * GIB
    more = student.shallower((blocks + 1) / 40)
    assert on("1xT4", student=more).fit(trained).least > 0.92 * 16 * GIB


def test_a_chain_from_the_teacher_is_told_to_cut_more_and_a_wide_student_to_be_narrower():
    chain = stages(("prune-depth", {}), ("response", {"recipe": "bf16"}))
    fits = on("1xT4", teacher=PUBLIC_SHAPES[-1])
    line = fits.refusal(chain, fits.fit(chain).least)
    assert line.startswith("prune-depth+response fits no recipe here: response[recipe=bf16]")
    assert line.endswith("give a stage before it that cuts the teacher further")
    wide = on("1xT4", student=PUBLIC_SHAPES[-1])
    line = wide.refusal(chain[1:], 10**13)
    assert line.endswith("give a --student that is narrower: one block of this one does not fit")
