"""What claims may say: above chance, missed or regressed, over seeds."""

import json
from xml.etree import ElementTree

import pytest
from claim_rows import BAD, GOOD, choices, layer, pair, row, score, valued
from gate_rows import flipped, frozen, marks

from harness.analysis import comparison
from harness.gate import output
from harness.gate.check import check
from harness.gate.rules import Rules, Verdict
from harness.records.record import (
    Measurement,
)
from harness.statistics import means, stats


def numbers(*runs):
    return [[float(mark) for mark in run] for run in runs]


@pytest.mark.parametrize(("chance", "right"), [(0.0, 720), (0.25, 745), (0.5, 770)])
def test_a_student_exactly_at_the_margin_is_neither_kept_nor_lost(chance, right):
    """90 % of what a teacher at 80 % has above chance: 72, 74.5 and 77 % of the items."""
    for students in ([marks(right)], [marks(right - 3), marks(right + 3)]):
        assert stats.retention_test(students, [marks(800)], 0.9, chance=chance) == pytest.approx(
            (0.5, 0.5), abs=1e-6
        )
        assert means.retention_test(
            numbers(*students), numbers(marks(800)), 0.9, chance=chance
        ) == pytest.approx((0.5, 0.5), abs=1e-6)
    assert stats.retention_test([marks(right + 30)], [marks(800)], 0.9, chance=chance)[0] < 0.01
    assert stats.retention_test([marks(right - 30)], [marks(800)], 0.9, chance=chance)[1] < 0.01


def test_means_above_chance_are_means_of_what_is_above_it():
    teacher, student = numbers(marks(800)), numbers(marks(770))
    shifted = [[[value - 0.25 for value in side[0]]] for side in (student, teacher)]
    assert means.retention_test(student, teacher, 0.9, chance=0.25) == pytest.approx(
        means.retention_test(*shifted, 0.9)
    )


def test_91_percent_above_chance_is_not_95_percent():
    """45 and 43.2 % of 10,000 questions of four choices: 96 % of the score is kept.

    Of what is above guessing it is 91 %.
    """
    teacher, student = (
        row("teacher", choices(marks(4500, 10_000))),
        row("int8", choices(marks(4320, 10_000))),
    )
    checked = check([teacher, student], Rules(margin=0.95))
    [finding] = checked.findings
    assert finding.verdict is Verdict.missed and finding.numbers["chance"] == 0.25
    assert finding.told.startswith("retention above chance 91.0 % [")
    assert finding.told.endswith(
        "must show that it keeps 95 % of what the teacher has above chance (25 %)"
    )
    pair = [comparison.ResultRow(record.label, (record,)) for record in (student, teacher)]
    shown = comparison.compare(*pair, "mmlu-mini", ratio=True, chance=0.25)
    assert (finding.numbers["value"], finding.numbers["low"], finding.numbers["high"]) == (
        shown.value,
        shown.low,
        shown.high,
    )
    # points are points
    assert check([teacher, student], Rules(margin=0.03, points=True)).verdict is Verdict.passed
    unguessed = [
        record.model_copy(update={"scores": (score(record.scores[0].outcomes["m"]),)})
        for record in (teacher, student)
    ]
    assert check(unguessed, Rules(margin=0.95)).verdict is Verdict.passed


def test_several_seeds_are_asked_above_chance_too():
    teacher = row("teacher", choices(marks(600)))
    seeds = [
        row("response", choices(marks(right)), seed=seed)
        for seed, right in ((1, 576), (2, 575), (3, 577))
    ]
    # 96 % of the score, 93.1 % of what is above chance
    [finding] = check([teacher, *seeds], Rules(margin=0.95)).findings
    assert (
        finding.numbers["value"] == pytest.approx(0.326 / 0.35)
        and finding.verdict is not Verdict.passed
    )
    assert check([teacher, *seeds], Rules(margin=0.85)).verdict is Verdict.passed


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_items_with_numbers_are_asked_above_chance(chance):
    base = [0.5 + 0.3 * (number % 5) / 5 for number in range(400)]
    teacher, student = (
        row(label, valued(values, chance=chance))
        for label, values in (("teacher", base), ("int8", [value - 0.02 for value in base]))
    )
    checked = check([teacher, student], Rules(margin=0.95))
    # 96.8 % of .62, 83 % of what lies above .5
    assert checked.verdict is (Verdict.missed if chance else Verdict.passed)
    assert ("above chance" in checked.findings[0].told) == bool(chance)


# A teacher at chance


@pytest.mark.parametrize(
    "rules", [Rules(margin=0.95), Rules(margin=0.02, points=True), Rules(margin=0.5)]
)
@pytest.mark.parametrize(
    ("teachers", "students"),
    [
        ([choices(marks(260))], [choices(marks(262))]),
        # nor is a student that is worse than guessing missed
        ([choices(marks(260))], [choices(marks(100))]),
        ([choices(marks(4, 8))], [choices(marks(8, 8))]),
        ([choices("1")], [choices("0")]),
        ([score(marks(0))], [score(marks(0))]),
        ([score(marks(20))], [score(marks(30))]),
        ([score(marks(0))], [score(marks(500))]),
        ([choices(marks(250))], [choices(marks(right)) for right in (250, 245, 255)]),
        (
            [valued([0.25 + 0.1 * (number % 3 - 1) for number in range(300)], chance=0.25)],
            [valued([0.25 + 0.1 * (number % 2) for number in range(300)], chance=0.25)],
        ),
    ],
    ids=[
        "guessers",
        "a worse guesser",
        "eight items",
        "one item",
        "nobody solves one",
        "2 %",
        "only the student does",
        "seeds",
        "numbers",
    ],
)
def test_a_teacher_at_chance_is_judged_nowhere(rules, teachers, students):
    records = [row("teacher", *teachers)]
    records += [
        row("r", finding, seed=seed if len(students) > 1 else None)
        for seed, finding in enumerate(students, 1)
    ]
    checked = check(records, rules)
    assert checked.verdict is Verdict.cannot_tell and checked.exit_code == 3
    assert all(
        finding.verdict is Verdict.cannot_tell and finding.layer == "claim"
        for finding in checked.findings
    )
    if len(teachers[0].outcomes.get("m", "11")) > 1:
        assert all("teacher at chance: not judged" in finding.told for finding in checked.findings)


@pytest.mark.parametrize("make", [score, choices])
@pytest.mark.parametrize("n", [8, 200])
def test_a_teacher_without_a_fault_is_judged(make, n):
    same, worse = row("same", make(marks(n, n))), row("worse", make(marks(n // 2, n)))
    findings = {
        finding.row: finding
        for finding in check(
            [row("teacher", make(marks(n, n))), same, worse], Rules(margin=0.9)
        ).findings
    }
    assert findings["same"].verdict is (Verdict.passed if n == 200 else Verdict.cannot_tell)
    assert findings["worse"].verdict is Verdict.missed or n == 8
    assert findings["same"].numbers["low"] < 1 == findings["same"].numbers["value"]


def test_a_teacher_near_chance_has_no_retention_above_it():
    """Below four standard errors above chance a ratio has no interval.

    33 % of 1,000 are far enough above 25 %, 31 % of 400 are not.
    """
    near = check(
        [row("teacher", choices(marks(124, 400))), row("int8", choices(marks(122, 400)))],
        Rules(margin=0.9),
    )
    assert near.verdict is Verdict.cannot_tell and "too near chance (25 %)" in near.findings[0].told
    assert (
        check(
            [row("teacher", choices(marks(330))), row("int8", choices(marks(330)))],
            Rules(margin=0.5),
        ).verdict
        is Verdict.passed
    )


# Missed and regressed


SLOW = Measurement(
    name="decode_speedup", value=0.8, low=0.7, high=0.9, unit="ratio", higher_is_better=True
)


@pytest.mark.parametrize(
    ("rules", "measured"),
    [(Rules(margin=0.95), ()), (Rules(faster=3.0), ()), (Rules(margin=0.5), (("int4", (SLOW,)),))],
    ids=["claim", "faster", "measured"],
)
def test_missed_without_a_baseline_and_regressed_where_it_holds_the_row(rules, measured):
    other = row("int8", score(marks(800)))
    assert check([GOOD, BAD], rules, measured=measured).verdict is Verdict.missed
    assert check([GOOD, BAD], rules, measured=measured).exit_code == 1
    against_frozen = check([GOOD, BAD], rules, frozen(BAD), measured=measured)
    assert against_frozen.verdict is Verdict.regressed and against_frozen.exit_code == 1
    beside = check([GOOD, BAD, other], rules, frozen(other), measured=measured).findings
    assert {finding.verdict for finding in beside if finding.row == "int4"} & {
        Verdict.missed,
        Verdict.regressed,
    } == {Verdict.missed}


def test_a_row_with_a_margin_of_its_own_is_held_to_that_by_task_and_pooled():
    weak = pair(150, 150, n=1000, label="weak")
    teacher = pair(0, 0, n=1000, label="teacher")
    baseline = frozen(teacher, weak, margin=0.95)
    baseline = baseline.model_copy(
        update={"rows": (baseline.rows[0], baseline.rows[1].model_copy(update={"margin": 0.6}))}
    )
    checked = check([teacher, weak], Rules(margin=0.95), baseline)
    assert {finding.verdict for finding in layer(checked, "claim") + layer(checked, "pooled")} == {
        Verdict.passed
    }
    assert all(
        "keeps 60 %" in finding.told and finding.numbers["margin"] == 0.6
        for finding in layer(checked, "claim")
    )
    assert "keeps 95 % or the margin of its own" in checked.passed_means
    assert check([teacher, weak], Rules(margin=0.95)).verdict is Verdict.missed


def test_missed_fails_in_every_form():
    checked = check([GOOD, BAD], Rules(margin=0.95))
    tree = ElementTree.fromstring(output.junit(checked).partition("?>")[2])
    assert tree.get("failures") == "1" and next(tree.iter("failure")).get("type") == "missed"
    assert json.loads(output.as_json(checked))["verdict"] == "missed"
    [line] = output.annotations(checked)
    assert line.startswith("::error title=int4 gsm8k-mini [claim]%3A missed::")
    assert "MISSED" in output.terminal_text(checked) and "**MISSED**" in output.markdown(checked)
    assert output.summary(checked) == "missed: 1 missed"


def test_a_claim_on_a_whole_task_never_asks_for_more_items():
    [finding] = check(
        [GOOD, row("int8", score(flipped(marks(800), lose=40, win=5)))], Rules(margin=0.95)
    ).findings
    assert (
        finding.verdict is Verdict.cannot_tell
        and finding.numbers["needed"] is None
        and finding.numbers["task_items"] == 1_000
    )
    assert "more than gsm8k-mini has (1,000)" in finding.told


# Seeds


def test_seeds_that_gave_equal_students_are_one_training():
    teacher, run = row("teacher", score(marks(800))), score(flipped(marks(800), lose=10, win=5))
    three = [row("r", run, seed=seed, digest="same") for seed in (1, 2, 3)]
    [finding] = check([teacher, *three], Rules(margin=0.95)).findings
    [alone] = check([teacher, three[0]], Rules(margin=0.95)).findings
    assert finding.numbers["seeds"] == 1 and "3 seeds, 1 training (equal students)" in finding.told
    assert (finding.verdict, finding.numbers["low"], finding.numbers["p_met"]) == (
        alone.verdict,
        alone.numbers["low"],
        alone.numbers["p_met"],
    )
    two = [*three[:2], row("r", score(flipped(marks(800), lose=12, win=5)), seed=3, digest="other")]
    [mixed] = check([teacher, *two], Rules(margin=0.95)).findings
    assert mixed.numbers["seeds"] == 2 and "3 seeds, 2 trainings" in mixed.told


def test_two_seeds_and_other_seeds_than_the_teachers_are_judged():
    teachers = [
        row("teacher", score(marks(800)), seed=seed, digest="t", trains=False) for seed in (7, 8)
    ]
    near = [
        row("r", score(flipped(marks(800), lose=lose)), seed=seed)
        for seed, lose in ((1, 4), (2, 6))
    ]
    for teacher in (teachers, teachers[:1], [row("teacher", score(marks(800)))]):
        [finding] = check([*teacher, *near], Rules(margin=0.9)).findings
        assert finding.verdict is Verdict.passed and finding.numbers["seeds"] == 2
        far = [
            row("r", score(flipped(marks(800), lose=lose)), seed=seed)
            for seed, lose in ((1, 2), (2, 90))
        ]
        assert check([*teacher, *far], Rules(margin=0.9)).verdict is Verdict.cannot_tell


def test_eight_items_show_nothing_but_break_nothing():
    for student in (marks(8, 8), marks(6, 8), marks(0, 8)):
        checked = check(
            [row("teacher", score(marks(7, 8))), row("int8", score(student))], Rules(margin=0.95)
        )
        assert checked.exit_code in (3, 1) and (checked.exit_code == 1) == (student == marks(0, 8))
        assert not checked.findings[0].numbers.get("needed")
    documents = [
        score(
            "1",
            "wikitext",
            kind="perplexity",
            primary="",
            outcomes={},
            value=20.0,
            totals=((-300.0 - number, 100.0),),
        )
        for number in range(2)
    ]
    [finding] = check(
        [row("teacher", documents[0]), row("int8", documents[1])], Rules(margin=0.95)
    ).findings
    assert (
        finding.verdict is Verdict.cannot_tell and "one document gives no interval" in finding.told
    )
