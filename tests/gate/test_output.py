"""Tables compare rows: sources of error, trainings and adjusted families of verdicts."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.analysis.comparison import best_labels, compare, equality_test, group_records
from harness.records.conditions import ModelReference
from harness.records.record import RunRecord, TaskScore
from harness.reporting.notes import group_notes
from harness.reporting.report import build_sections
from harness.statistics import means, stats
from harness.statistics.intervals import (
    ErrorSource,
    half_width,
    interval_around,
    one_sided_p,
    two_sided_p,
)

MODEL = ModelReference(name="tiny", digest="d")


def scored(
    label, outcomes, *, seed=None, digest="", controls=(), is_control=False, task="gsm8k-mini"
):
    """Return a record with these outcomes; without a seed it had no draw."""
    score = TaskScore(
        task=task,
        version="1",
        kind="generate",
        primary="strict-match",
        chance=0.0,
        n=len(outcomes),
        stderr=0.02,
        value=outcomes.count("1") / len(outcomes),
        outcomes={"strict-match": outcomes},
        items_digest="same",
        answers_digest=label,
        invalid_share=0.0,
        truncated_share=0.0,
        tokens_per_answer=31.5,
        seconds=4.0,
    )
    return RunRecord(
        key=f"{label}-{seed}",
        status="success",
        label=label,
        method=label.partition("[")[0],
        family="x",
        is_control=is_control,
        controls=controls,
        trains=seed is not None,
        suites=("math",),
        tasks=(f"{task}@1",),
        device="cpu",
        dtype="float32",
        student_base=MODEL,
        teachers=(MODEL,),
        student_recipe="depth:0.5",
        seed=seed,
        budget_tokens=1000,
        budget_rows=10,
        path="transformers/plain/1",
        scores=(score,),
        created="2026-11-24T08:00:00Z",
        student=ModelReference(name=label, digest=digest or f"{label}-{seed}"),
    )


def trainings(shares, items=400, seed=0, agree=0.6):
    """Return outcomes of several trainings of one method.

    A part of the items is answered alike in all of them.
    """
    rng = np.random.default_rng(seed)
    common = rng.random(items)
    return [
        "".join(
            "1" if (c if rng.random() < agree else rng.random()) < share else "0" for c in common
        )
        for share in shares
    ]


def test_one_source_of_error_is_students_t():
    for freedom in (1, 2, 9, 1e6):
        assert half_width([ErrorSource(4.0, freedom)]) == pytest.approx(
            2 * scipy_stats.t.ppf(0.975, freedom)
        )
        for gap in (0.5, 2.0, 30.0):
            assert one_sided_p(gap, [ErrorSource(4.0, freedom)]) == pytest.approx(
                scipy_stats.t.sf(gap / 2, freedom), rel=1e-6, abs=1e-12
            )
            assert one_sided_p(-gap, [ErrorSource(4.0, freedom)]) == pytest.approx(
                scipy_stats.t.cdf(gap / 2, freedom), rel=1e-6
            )
    assert two_sided_p(0.0, [ErrorSource(1.0, 2)]) == pytest.approx(1.0)
    assert (
        one_sided_p(0.0, []) == 0.5
        and one_sided_p(1.0, []) == 0.0
        and one_sided_p(-1.0, [ErrorSource(0.0, 3)]) == 1.0
    )


def test_several_sources_keep_their_own_quantiles_and_the_p_is_where_the_interval_ends():
    sources = [ErrorSource(1.0, 2), ErrorSource(0.5, 400)]
    expected = math.sqrt(
        scipy_stats.t.ppf(0.975, 2) ** 2 + 0.5 * scipy_stats.t.ppf(0.975, 400) ** 2
    )
    assert half_width(sources) == pytest.approx(expected)
    assert two_sided_p(expected, sources) == pytest.approx(0.05, rel=1e-6)
    interval = interval_around(1.0, sources)
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (1.0, 1.0 - expected, 1.0 + expected)
    )


def test_trainings_and_items_are_crossed_random_effects():
    """By the mean squares of the two-way table, written out another way: trainings, items, rest."""
    rng = np.random.default_rng(1)
    table = rng.normal(0, 1, (5, 40)) + rng.normal(0, 2, (5, 1)) + rng.normal(0, 1.5, (1, 40))
    reference = rng.normal(0, 1, 40)
    moments = means._moments(table, [reference], (), paired=False)
    gap = table - reference
    seeds, items = gap.shape
    rest = gap - gap.mean(0, keepdims=True) - gap.mean(1, keepdims=True) + gap.mean()
    of_items = seeds * ((gap.mean(0) - gap.mean()) ** 2).sum() / (items - 1)
    of_rest = (rest**2).sum() / ((seeds - 1) * (items - 1))
    of_seeds = items * ((gap.mean(1) - gap.mean()) ** 2).sum() / (seeds - 1)
    first, second = moments.sources(1.0)
    scale = (items - 1) / items  # ours divides the rest by items, the table by items - 1
    unseen = (
        2
        * 0.5
        * (max(table.max(), reference.max()) - min(table.min(), reference.min(), 0)) ** 2
        / items**2
    )
    assert (
        first.variance - unseen == pytest.approx((of_items - of_rest * scale) / (seeds * items))
        and first.freedom == items - 1
    )
    assert (
        second.variance == pytest.approx(of_seeds / (seeds * items)) and second.freedom == seeds - 1
    )


def test_equally_many_trainings_share_welchs_degrees_of_freedom_and_others_do_not():
    rng = np.random.default_rng(2)
    ours, theirs = (
        rng.random((3, 50)) + rng.normal(0, 0.1, (3, 1)),
        rng.random((3, 50)) + rng.normal(0, 0.3, (3, 1)),
    )
    _, both = means._moments(ours, theirs, (), paired=False).sources(1.0)
    spread = [side.mean(1).var(ddof=1) / 3 for side in (ours, theirs)]
    assert both.variance == pytest.approx(sum(spread))
    assert (
        both.freedom == pytest.approx(sum(spread) ** 2 / sum(one**2 / 2 for one in spread))
        and 2 < both.freedom < 4
    )
    assert [
        one.freedom
        for one in means._moments(ours[:2], theirs[:2], (), paired=False).sources(1.0)[1:]
    ] == [1, 1]
    assert [
        one.freedom for one in means._moments(ours[:2], theirs, (), paired=False).sources(1.0)[1:]
    ] == [1, 2]


def test_equal_methods_are_seldom_called_unequal_and_unequal_ones_often():
    rng = np.random.default_rng(3)
    for seeds, deviation in ((2, 0.02), (3, 0.02), (5, 0.0)):
        called = 0
        for _ in range(400):
            common = rng.random(300)
            sides = [
                np.stack(
                    [
                        (
                            np.where(rng.random(300) < 0.8, common, rng.random(300))
                            < 0.6 + rng.normal(0, deviation)
                        ).astype(float)
                        for _ in range(seeds)
                    ]
                )
                for _ in range(2)
            ]
            called += means.equality_test(*sides) <= 0.05
        assert called / 400 <= 0.07
    p_values = [
        means.equality_test(
            *(
                np.stack(
                    [
                        (rng.random(1_319) < share + rng.normal(0, 0.01)).astype(float)
                        for _ in range(3)
                    ]
                )
                for share in (0.60, 0.52)
            )
        )
        for _ in range(100)
    ]
    assert np.mean([p <= 0.05 for p in p_values]) > 0.8


def table_of(*records, name):
    [section] = build_sections(records)
    return next(table for table in section.tables if table.name == name)


def controlled(outcomes, **more):
    return scored("response", outcomes, controls=("sft",), **more)


def test_one_training_is_not_judged_and_two_are():
    teacher = scored("teacher", "1" * 380 + "0" * 20)
    good, poor = trainings([0.9] * 3, seed=1), trainings([0.4] * 3, seed=2)
    once = table_of(
        teacher,
        controlled(good[0], seed=1),
        scored("sft", poor[0], seed=1, is_control=True),
        name="controls",
    )
    assert [line["verdict"] for line in once.exact] == ["one training: not judged"] and once.exact[
        0
    ]["difference"] > 0.3
    records = [
        teacher,
        *(controlled(run, seed=number) for number, run in enumerate(good)),
        *(scored("sft", run, seed=number, is_control=True) for number, run in enumerate(poor)),
    ]
    [line] = table_of(*records, name="controls").exact
    assert line["verdict"] == "better" and line["p (Holm)"] < 0.05
    other_seeds = [
        teacher,
        *(controlled(run, seed=number) for number, run in enumerate(good)),
        *(
            scored("sft", run, seed=number + 7, is_control=True)
            for number, run in enumerate(poor[:2])
        ),
    ]
    assert table_of(*other_seeds, name="controls").exact[0]["verdict"] in ("better", "cannot tell")


def test_seeds_that_gave_the_same_student_are_one_training():
    teacher, run = scored("teacher", "1" * 380 + "0" * 20), trainings([0.9], seed=1)[0]
    alike = [controlled(run, seed=number, digest="same") for number in range(3)]
    control = [
        scored("sft", run, seed=number, is_control=True)
        for number, run in enumerate(trainings([0.4] * 3, seed=2))
    ]
    assert [
        line["verdict"] for line in table_of(teacher, *alike, *control, name="controls").exact
    ] == ["one training: not judged"]


def test_a_row_without_a_draw_needs_no_seeds():
    teacher = scored("teacher", "1" * 380 + "0" * 20)
    good, poor = trainings([0.9], seed=1)[0], trainings([0.4], seed=2)[0]
    [line] = table_of(
        teacher, controlled(good), scored("sft", poor, is_control=True), name="controls"
    ).exact
    assert line["verdict"] == "better"


def test_a_table_adjusts_its_verdicts_together():
    """Twenty lines of which one alone would be named at .05: none is."""
    teacher = scored("teacher", "1" * 900 + "0" * 100)
    base = "1" * 700 + "0" * 300
    nearly = "0" * 20 + "1" * 680 + "1" * 5 + "0" * 295  # 20 lost, 5 won of 1,000
    assert 0.001 < stats.equality_test([nearly], [base]) < 0.05
    rows = [
        scored(
            f"response[{number}]", nearly if number == 0 else base[1:] + base[:1], controls=("sft",)
        )
        for number in range(20)
    ]
    lines = table_of(teacher, *rows, scored("sft", base, is_control=True), name="controls").exact
    first = next(line for line in lines if line["row"] == "response[0]")
    assert (
        first["p"] < 0.05 < first["p (Holm)"]
        and first["verdict"] == "cannot tell"
        and first["high"] < 0
    )
    alone = table_of(teacher, rows[0], scored("sft", base, is_control=True), name="controls").exact
    assert alone[0]["verdict"] == "worse"


def test_nothing_is_bold_beside_a_row_that_was_trained_once_and_a_note_says_so():
    teacher = scored("teacher", "1" * 380 + "0" * 20)
    good, poor = trainings([0.9] * 3, seed=1), trainings([0.4] * 3, seed=2)
    once = [teacher, scored("response", good[0], seed=1), scored("feature", poor[0], seed=1)]
    [group] = group_records(once)
    assert not best_labels(group, "gsm8k-mini") and any(
        "one training (or draw) each" in line for line in group_notes(group)
    )
    [group] = group_records(
        [
            teacher,
            *(
                scored(name, run, seed=number)
                for name, runs in (("response", good), ("feature", poor))
                for number, run in enumerate(runs)
            ),
        ]
    )
    assert best_labels(group, "gsm8k-mini") == {"response"} and not any(
        "one training" in line for line in group_notes(group)
    )


def test_a_further_stage_of_the_same_trainings_is_compared_training_by_training():
    """Two points lost by every training alike: seen although the trainings are ten points apart."""
    teacher = scored("teacher", "1" * 990 + "0" * 10)
    runs = ["1" * share + "0" * (1_000 - share) for share in (500, 600, 700)]
    packed = ["0" * 20 + run[20:] for run in runs]
    [group] = group_records(
        [
            teacher,
            *(scored("response", run, seed=number) for number, run in enumerate(runs)),
            *(scored("response+int8", run, seed=number) for number, run in enumerate(packed)),
        ]
    )
    rows = {row.label: row for row in group.rows}
    gap = compare(rows["response+int8"], rows["response"], "gsm8k-mini", ratio=False)
    assert gap.value == pytest.approx(-0.02) and gap.high < 0
    assert equality_test(rows["response+int8"], rows["response"], "gsm8k-mini") < 0.01
    [apart] = group_records(
        [
            teacher,
            *(scored("response", run, seed=number) for number, run in enumerate(runs)),
            *(scored("other", run, seed=number) for number, run in enumerate(packed)),
        ]
    )
    rows = {row.label: row for row in apart.rows}
    assert compare(rows["other"], rows["response"], "gsm8k-mini", ratio=False).high > 0.05
