"""The frozen items: verdicts by hand-counted flips, and what cannot be compared is named."""

import random
from pathlib import Path

import pytest
from gate_rows import ENVIRONMENT, SAME, TEACHES, flipped, frozen, marks, row, score

from harness.gate.check import check
from harness.gate.rules import Rules, Verdict
from harness.records.conditions import ModelReference
from harness.records.store import read_records
from harness.statistics import stats


def verdict_of(after, *, rules=None, before=SAME):
    result = check([after], rules or Rules(), frozen(before))
    return next(finding for finding in result.findings if finding.layer == "frozen")


def test_equal_answers_pass_at_once():
    finding = verdict_of(SAME)
    assert finding.verdict is Verdict.passed and "not one of 1,000 answers differs" in finding.told


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.01, Verdict.passed), (0.02, Verdict.passed), (0.05, Verdict.regressed)],
)
def test_injected_flips_give_the_predicted_verdicts(share, expected):
    """Losing 1 and 2 % of 1,000 items is within the tolerance of 2 points; 5 % is a regression.

    2 % are significant: a warning.
    """
    after = row("int8", flipped(SAME.scores[0].outcomes["strict-match"], lose=int(1000 * share)))
    finding = verdict_of(after)
    assert (
        finding.verdict is expected
        and finding.numbers["lost"] == 1000 * share
        and finding.numbers["won"] == 0
    )
    assert finding.numbers["p_holm"] == pytest.approx(0.5 ** (1000 * share))
    assert finding.warning == (expected is Verdict.passed)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, Verdict.passed),
        (0.01, Verdict.passed),
        (0.02, Verdict.passed),
        (0.05, Verdict.regressed),
    ],
)
def test_flips_injected_into_real_records_give_the_predicted_verdicts(share, expected):
    """Every seedless row of a committed study is compared with itself, with right answers flipped.

    Rows near zero have none to lose.
    """
    records, problems = read_records(Path(__file__).parents[2] / "results" / "compression-tiny")
    before = [
        one
        for one in records
        if one.seed is None and not one.is_control and one.scores[0].value > 0.7
    ]
    assert not problems and len(before) >= 8

    def changed(record):
        if record.method == "teacher" or not share:
            return record
        worse = flipped(
            record.scores[0].outcomes[record.scores[0].primary],
            lose=round(share * record.scores[0].n),
        )
        value = worse.count("1") / len(worse)
        outcomes = {**record.scores[0].outcomes, record.scores[0].primary: worse}
        first = record.scores[0].model_copy(
            update={"outcomes": outcomes, "value": value, "answers_digest": "changed"}
        )
        return record.model_copy(update={"scores": (first, *record.scores[1:])})

    checked = check([changed(one) for one in before], Rules(), frozen(*before))
    touched = [
        one
        for one in checked.findings
        if one.layer == "frozen" and one.task == before[0].scores[0].task and one.row != "teacher"
    ]
    assert {one.verdict for one in touched} == {expected} and len(touched) >= 7
    assert checked.verdict is expected


def test_flips_both_ways_alike_are_no_regression():
    after = row("int8", flipped(SAME.scores[0].outcomes["strict-match"], lose=50, win=50))
    finding = verdict_of(after)
    assert (
        finding.verdict is Verdict.passed
        and not finding.warning
        and finding.numbers["p_holm"] > 0.5
    )


@pytest.mark.parametrize("limited", [True, False])
def test_few_items_cannot_tell_and_say_how_many_would_where_the_task_has_them(limited):
    runs = marks(60, 100), flipped(marks(60, 100), lose=6, win=6)
    before, after = (
        row("int8", "", limited=limited, scores=(score(run, task="gsm8k"),)) for run in runs
    )
    finding = verdict_of(after, before=before)
    assert finding.verdict is Verdict.cannot_tell
    needed = stats.items_to_detect(0.12, 0.05, alpha=0.01)
    assert (finding.numbers["needed"], finding.numbers["task_items"]) == (
        (needed, 1_319) if limited else (None, 100)
    )
    assert (
        f"about {needed:,} items would decide" if limited else "more than gsm8k has (100)"
    ) in finding.told


def test_exact_takes_no_flip_on_the_same_machine_only():
    after = row("int8", flipped(SAME.scores[0].outcomes["strict-match"], lose=1))
    assert verdict_of(after).verdict is Verdict.passed
    assert verdict_of(after, rules=Rules(exact=True)).verdict is Verdict.regressed
    elsewhere = after.model_copy(
        update={"environment": ENVIRONMENT.model_copy(update={"machine": "another"})}
    )
    assert verdict_of(elsewhere, rules=Rules(exact=True)).verdict is Verdict.passed


@pytest.mark.parametrize(
    ("differs", "changes"),
    [
        ("dtype", {"dtype": "bfloat16"}),
        ("device", {"device": "cuda"}),
        ("path", {"path": "transformers/plain/1"}),
        ("teacher", {"teachers": (ModelReference(name="other", digest="other"),)}),
        ("student", {"student_recipe": "depth:0.25"}),
        ("limited", {"limited": True}),
        ("prompts", {"chat": True}),
        ("task version", {"scores": (score(marks(800), version="2"),)}),
        ("n", {"scores": (score(marks(790, 990)),)}),
        ("items", {"scores": (score(marks(800), items_digest="others"),)}),
        ("tasks", {"scores": (score(marks(800), task="mmlu-mini"),)}),
        (
            "extractor",
            {
                "scores": (
                    score(
                        marks(800),
                        primary="numeric",
                        outcomes={"numeric": marks(799)},
                        answers_digest="x",
                    ),
                )
            },
        ),
        ("invalid share", {"scores": (score(marks(799), invalid_share=0.1),)}),
        ("truncated share", {"scores": (score(marks(799), truncated_share=0.1),)}),
        ("answer length", {"scores": (score(marks(799), tokens_per_answer=50.0),)}),
    ],
)
def test_what_cannot_be_compared_is_named(differs, changes):
    after = row("int8", marks(800)).model_copy(update=changes)
    checked = check([after], Rules(), frozen(row("int8", marks(800))))
    finding = next(finding for finding in checked.findings if finding.layer == "frozen")
    assert finding.verdict is Verdict.not_comparable and finding.differs == differs, finding.told
    assert checked.exit_code == 4


def test_a_missing_row_and_a_failed_one_do_not_pass():
    [gone] = check([TEACHES], Rules(), frozen(SAME)).findings
    assert gone.verdict is Verdict.not_comparable and "int8 has no record" in gone.told
    broken = row("int8", "", scores=(), status="failed", reason="out of memory")
    checked = check([TEACHES, broken], Rules(), frozen(SAME))
    assert [finding.differs for finding in checked.findings] == [
        "status"
    ] and checked.exit_code == 4


def test_a_skipped_row_is_noted_unless_it_was_frozen():
    skipped = row("int8", "", scores=(), status="skipped", reason="pip install '.[quant]'")
    checked = check([TEACHES, row("int4", marks(799)), skipped], Rules(margin=0.9))
    assert checked.verdict is Verdict.passed and any("skipped" in note for note in checked.notes)
    assert check([TEACHES, skipped], Rules(), frozen(SAME)).verdict is Verdict.not_comparable


def test_a_new_row_is_said_and_judged_by_its_claim_alone():
    checked = check([TEACHES, SAME, row("int4", marks(795))], Rules(margin=0.95), frozen(SAME))
    assert (
        any("int4" in note and "not in the baseline" in note for note in checked.notes)
        and checked.verdict is Verdict.passed
    )


def test_bytes_are_compared_exactly():
    for size, expected, warned in (
        (1_000, Verdict.passed, False),
        (1_001, Verdict.regressed, False),
        (999, Verdict.passed, True),
    ):
        after = SAME.model_copy(
            update={"student": ModelReference(name="int8", digest="dint8", weight_bytes=size)}
        )
        finding = next(
            finding
            for finding in check([after], Rules(), frozen(SAME)).findings
            if finding.layer == "bytes"
        )
        assert (finding.verdict, finding.warning) == (expected, warned)


def test_several_seeds_count_an_item_once_by_its_net_loss():
    before = [row("response", marks(800), seed=seed) for seed in (1, 2)]
    after = [
        row("response", flipped(marks(800), lose=30), seed=1),
        row("response", flipped(marks(800), lose=20), seed=2),
    ]
    finding = next(
        finding
        for finding in check(after, Rules(), frozen(*before)).findings
        if finding.layer == "frozen"
    )
    assert (
        finding.numbers["lost"] == 30
        and finding.numbers["drop"] == pytest.approx(0.025)
        and finding.verdict is Verdict.regressed
    )


def test_holm_keeps_an_unchanged_run_of_many_rows_from_alarm():
    draw = random.Random(3)

    def noise(outcomes):
        return "".join("01"[mark == "0"] if draw.random() < 0.1 else mark for mark in outcomes)

    base = "".join("1" if draw.random() < 0.5 else "0" for _ in range(1000))
    before = [row(f"m{number}", base) for number in range(40)]
    after = [row(f"m{number}", noise(base)) for number in range(40)]
    assert check(after, Rules(), frozen(*before)).verdict is not Verdict.regressed


def test_net_losses_count_by_their_size():
    """All five seeds lost 110 items, and one seed each won 160: the score fell by 6.5 points.

    The numbers of signs alone would say otherwise.
    """
    before = [row("response", marks(900, 1200), seed=seed) for seed in range(1, 6)]
    lost = flipped(marks(900, 1200), lose=110)
    gains = [
        lost[:900]
        + "".join("1" if 32 * seed <= number < 32 * (seed + 1) else "0" for number in range(300))
        for seed in range(5)
    ]
    after = [row("response", run, seed=seed + 1) for seed, run in enumerate(gains)]
    finding = next(
        finding
        for finding in check(after, Rules(), frozen(*before)).findings
        if finding.layer == "frozen"
    )
    assert (finding.numbers["lost"], finding.numbers["won"]) == (
        110,
        160,
    ) and finding.verdict is Verdict.regressed


def test_seeds_that_were_trained_anew_must_agree():
    def made(loses, digest):
        return [
            row(
                "response",
                flipped(marks(800), lose=lose),
                seed=seed,
                student=ModelReference(name="r", digest=f"{digest}{seed}", weight_bytes=1),
            )
            for seed, lose in enumerate(loses, 1)
        ]

    before = frozen(*made((0, 0, 0), "old"))
    apart = next(
        finding
        for finding in check(made((150, 0, 0), "new"), Rules(), before).findings
        if finding.layer == "frozen"
    )
    assert apart.verdict is Verdict.cannot_tell and "do not agree" in apart.told
    together = next(
        finding
        for finding in check(made((50, 55, 48), "new"), Rules(), before).findings
        if finding.layer == "frozen"
    )
    assert together.verdict is Verdict.regressed


def test_frozen_controls_are_judged_only_when_they_are_named():
    before = row("untouched", marks(300), is_control=True)
    after = row("untouched", marks(100), is_control=True)
    assert (
        check([TEACHES, SAME, after], Rules(), frozen(TEACHES, SAME, before)).verdict
        is Verdict.passed
    )
    assert check([TEACHES, SAME], Rules(), frozen(TEACHES, SAME, before)).verdict is Verdict.passed
    assert (
        check([TEACHES, after], Rules(rows=("untouched",)), frozen(TEACHES, SAME, before)).verdict
        is Verdict.regressed
    )


def test_exact_takes_a_won_item_for_a_flip_too():
    after = row("int8", flipped(SAME.scores[0].outcomes["strict-match"], win=1))
    assert verdict_of(after, rules=Rules(exact=True)).verdict is Verdict.regressed
