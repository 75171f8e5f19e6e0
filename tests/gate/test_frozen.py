"""The frozen layer: answers, their scoring and their conditions, seed by seed; made-up records."""

import math

import pytest

from harness.gate.check import check
from harness.gate.frozen_documents import rise_of
from harness.gate.frozen_items import FrozenPair, rules_for_row
from harness.gate.rules import Rules, Verdict
from harness.records.baseline import Baseline, Change, freeze_record
from harness.records.conditions import ModelReference
from harness.records.record import Environment, RunRecord, TaskScore
from harness.scoring.items import ItemRow
from harness.scoring.outcomes import likelihoods_digest
from harness.statistics import means

ENVIRONMENT = Environment(
    device="cpu",
    dtype="float32",
    threads=2,
    machine="made up",
    platform="Linux x86_64",
    python="3.11.0",
    versions={"torch": "2", "lm-eval": "0.4.13"},
    commit="c" * 40,
    dirty=False,
)
TEACHER = ModelReference(name="tiny", digest="t", weight_bytes=4_000)
BASE = {
    "task": "a",
    "version": "1",
    "chance": 0.0,
    "stderr": 0.01,
    "items_digest": "items",
    "answers_digest": "same",
    "invalid_share": 0.0,
    "seconds": 1.0,
}


def hits(marks, **changes):
    fields = {
        "kind": "generate",
        "primary": "strict-match",
        "n": len(marks),
        "value": marks.count("1") / len(marks),
        "outcomes": {"strict-match": marks},
        "truncated_share": 0.0,
        "tokens_per_answer": 40.0,
    }
    return TaskScore(**{**BASE, **fields, **changes})


def choices(marks, **changes):
    return hits(
        marks,
        **{
            "kind": "choose",
            "primary": "acc",
            "outcomes": {"acc": marks},
            "chance": 0.25,
            "truncated_share": None,
            "tokens_per_answer": None,
            **changes,
        },
    )


def numbers(values, **changes):
    fields = {
        "kind": "generate",
        "primary": "none",
        "metric": "rouge1",
        "n": len(values),
        "value": sum(values) / len(values),
        "outcomes": {},
        "values": {"none": tuple(values)},
    }
    return TaskScore(**{**BASE, **fields, **changes})


def documents(totals, **changes):
    value = math.exp(-sum(total for total, _ in totals) / sum(words for _, words in totals))
    fields = {
        "kind": "perplexity",
        "primary": "",
        "metric": "word_perplexity",
        "n": len(totals),
        "value": value,
        "outcomes": {},
        "totals": tuple(totals),
    }
    return TaskScore(**{**BASE, **fields, **changes})


def row(*scores, label="int8", seed=None, digest="d", versions=None, **changes):
    environment = (
        ENVIRONMENT if versions is None else ENVIRONMENT.model_copy(update={"versions": versions})
    )
    fields = {
        "key": f"{label}-{seed}",
        "status": "success",
        "label": label,
        "method": label,
        "family": "x",
        "is_control": False,
        "trains": seed is not None,
        "suites": ("math",),
        "tasks": tuple(f"{score.task}@{score.version}" for score in scores),
        "device": "cpu",
        "dtype": "float32",
        "teachers": (TEACHER,),
        "student_recipe": "depth:0.5",
        "student_base": TEACHER,
        "seed": seed,
        "student": ModelReference(name=label, digest=f"{digest}{seed}", weight_bytes=1_000),
        "budget_tokens": 1000,
        "budget_rows": 10,
        "path": "p",
        "scores": scores,
        "environment": environment,
        "created": "2026-11-24T08:00:00Z",
    }
    return RunRecord(**{**fields, **changes})


def frozen(*records):
    change = Change(
        reason="made up",
        date="2026-11-24",
        commit=None,
        rows=tuple(record.label for record in records),
    )
    return Baseline(history=(change,), rows=tuple(map(freeze_record, records)))


def judged(before, after, **rules):
    before, after = (
        list(side) if isinstance(side, (list, tuple)) else [side] for side in (before, after)
    )
    return next(
        finding
        for finding in check(after, Rules(**rules), frozen(*before)).findings
        if finding.layer == "frozen"
    )


def flipped(marks, *, lose=0, win=0):
    right = [position for position, mark in enumerate(marks) if mark == "1"][:lose]
    wrong = [position for position, mark in enumerate(marks) if mark == "0"][:win]
    return "".join(
        "0" if position in right else "1" if position in wrong else mark
        for position, mark in enumerate(marks)
    )


MARKS = "1" * 800 + "0" * 200
VALUES = [0.1 * (number % 10) for number in range(400)]
TEXT = [(-30.0 - number % 7, 10.0) for number in range(60)]


# The same answers


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (hits(MARKS), hits(flipped(MARKS, lose=50)), "50 outcomes differ"),
        (hits(MARKS), hits(flipped(MARKS, lose=25, win=25)), "50 outcomes differ"),
        (hits(MARKS), hits(flipped(MARKS, win=1)), "1 outcomes differ"),
        (choices(MARKS), choices(flipped(MARKS, lose=2, win=1)), "3 outcomes differ"),
        (numbers(VALUES), numbers([*VALUES[:-3], 0.0, 0.0, 0.0]), "3 values differ"),
        (numbers(VALUES), numbers([value * 0.5 for value in VALUES]), "360 values differ"),
        (
            documents(TEXT),
            documents([(total, 2 * words) for total, words in TEXT]),
            "60 documents differ",
        ),
        (documents(TEXT), documents([(TEXT[0][0], 11.0), *TEXT[1:]]), "1 documents differ"),
        (documents(TEXT), documents(TEXT, value=2.0), "the figure is another one (26.84 -> 2)"),
        (hits(MARKS, value=0.8), hits(MARKS, value=0.9), "the figure is another one (0.8 -> 0.9)"),
        (
            hits(MARKS),
            hits(MARKS, parts=((500, 0.0015), (500, 0.0005))),
            "the items have other weights",
        ),
        (
            hits(MARKS),
            hits(MARKS, outcomes={}, unpaired="mcc is one figure", value=0.3),
            "another one (0.8 -> 0.3)",
        ),
        (
            hits(MARKS, outcomes={}, unpaired="m", value=0.3),
            hits(MARKS, outcomes={}, unpaired="m", value=0.2),
            "another one (0.3 -> 0.2)",
        ),
    ],
)
def test_the_same_answers_with_another_figure_are_another_scoring(before, after, message):
    finding = judged(row(before), row(after))
    assert finding.verdict is Verdict.not_comparable and finding.differs == "scoring", finding.told
    assert (
        finding.told.startswith("the scoring changed: the same answers, ")
        and message in finding.told
    )


def test_another_scoring_of_one_seed_is_enough_and_exits_with_4():
    before = [row(hits(MARKS, answers_digest=f"{seed}"), label="r", seed=seed) for seed in (1, 2)]
    after = [before[0], row(hits(flipped(MARKS, lose=3), answers_digest="2"), label="r", seed=2)]
    checked = check(after, Rules(), frozen(*before))
    assert checked.exit_code == 4 and any(
        finding.differs == "scoring" for finding in checked.findings
    )


@pytest.mark.parametrize(
    "score",
    [
        hits(MARKS),
        choices(MARKS),
        numbers(VALUES),
        documents(TEXT),
        hits(MARKS, outcomes={}, unpaired="m"),
    ],
)
def test_the_same_answers_and_figures_pass(score):
    finding = judged(row(score), row(score))
    assert (
        finding.verdict is Verdict.passed
        and finding.told == f"not one of {score.n:,} answers differs"
    )


def test_what_an_older_baseline_did_not_know_of_the_items_is_no_other_scoring():
    """Figures of all items together had no values of items before.

    Then only the figure and the answers are compared.
    """
    before = hits(MARKS, outcomes={}, unpaired="mcc is one figure", value=0.3)
    after = numbers([0.3] * 1000, parts=((1000, 0.001),), primary="strict-match", metric="")
    after = after.model_copy(update={"values": {"strict-match": after.values["none"]}})
    assert judged(row(before), row(after)).verdict is Verdict.passed
    finding = judged(row(before), row(after.model_copy(update={"answers_digest": "others"})))
    assert finding.verdict is Verdict.cannot_tell and "mcc is one figure" in finding.told


@pytest.mark.parametrize(
    ("before", "after", "message", "equal"),
    [
        ("x", "x", ", and log-probabilities are equal to the last bit", 1),
        ("x", "y", "; log-probabilities are not equal to the last bit", 0),
        ("", "y", "answers differs", None),
        ("x", "", "answers differs", None),
    ],
)
def test_log_probabilities_are_said_and_judged_by_exact_alone(before, after, message, equal):
    frozen, fresh = (
        row(choices(MARKS, likelihoods_digest=before)),
        row(choices(MARKS, likelihoods_digest=after)),
    )
    finding = judged(frozen, fresh)
    assert (
        finding.verdict is Verdict.passed
        and finding.told.endswith(message)
        and finding.numbers["likelihoods_equal"] == equal
    )
    exact = judged(frozen, fresh, exact=True)
    assert exact.verdict is (Verdict.regressed if equal == 0 else Verdict.passed) and (
        "--exact" in exact.told
    ) == (equal == 0)


@pytest.mark.parametrize(
    ("differs", "after"),
    [
        ("metric", numbers(VALUES, metric="rouge2", answers_digest="others")),
        ("weights", numbers(VALUES, parts=((200, 0.004), (200, 0.001)), answers_digest="others")),
    ],
)
def test_another_metric_or_weighing_is_not_compared(differs, after):
    finding = judged(row(numbers(VALUES)), row(after))
    assert finding.verdict is Verdict.not_comparable and finding.differs == differs


def item(number, position, log_probabilities, *, text="", **more):
    fields = {
        "task": "a",
        "item": number,
        "group": "",
        "doc_hash": "d",
        "prompt_hash": "p",
        "target_hash": "t",
        "gold": "A",
        "extracted": {},
        "correct": {"acc": True},
        "tokens": 0,
        "stop": "",
    }
    return ItemRow(
        **{
            **fields,
            "text": text,
            "position": position,
            "log_probabilities": log_probabilities,
            **more,
        }
    )


def test_a_digest_of_likelihoods_sees_the_last_bit_and_positions_and_no_written_answers():
    rows = [item(0, 1, (-1.5, -0.25), text="B"), item(1, 0, (-0.5, -2.0), text="A")]
    digest = likelihoods_digest(rows)
    assert digest and digest == likelihoods_digest(
        [item(0, 1, (-1.5, -0.25), text="other"), rows[1]]
    )
    assert digest != likelihoods_digest(
        [item(0, 1, (math.nextafter(-1.5, 0), -0.25), text="B"), rows[1]]
    )
    assert digest != likelihoods_digest([item(0, 0, (-1.5, -0.25), text="B"), rows[1]])
    assert likelihoods_digest([item(0, None, (-30.0,), words=10.0, correct={})]) not in ("", digest)
    assert likelihoods_digest([item(0, None, (), text="#### 7")]) == ""


def test_the_answer_to_a_choice_covers_its_position():
    """The text stands for a choice if no other choice has the same text.

    Else, or where metrics judge by something else, it is the position with the outcomes.
    """
    assert item(0, 1, (), text="B").answer != item(0, 0, (), text="A").answer
    for more in (
        {"twins": True},
        {"correct": {"acc": True, "acc_norm": False}},
        {"values": {"acc": 0.5}},
    ):
        assert (
            item(0, 1, (), text="same", **more).answer != item(0, 0, (), text="same", **more).answer
        )


# Conditions


def test_another_lm_eval_is_another_condition():
    finding = judged(
        row(hits(MARKS)), row(hits(MARKS), versions={"lm-eval": "0.4.14", "torch": "2"})
    )
    assert (
        finding.verdict is Verdict.not_comparable
        and finding.differs == "lm-eval"
        and "0.4.13 in the baseline, 0.4.14 now" in finding.told
    )
    gone = judged(row(hits(MARKS)), row(hits(MARKS), versions={"torch": "2"}))
    assert (
        gone.verdict is Verdict.not_comparable and "0.4.13 in the baseline, none now" in gone.told
    )


def test_other_versions_beside_are_no_condition():
    after = row(hits(MARKS), versions={"lm-eval": "0.4.13", "torch": "3", "datasets": "9"})
    assert judged(row(hits(MARKS)), after).verdict is Verdict.passed


def test_a_baseline_that_knows_no_lm_eval_is_compared_without_it_and_says_so():
    before = row(hits(MARKS), versions={"torch": "2"})
    checked = check([row(hits(MARKS))], Rules(), frozen(before))
    assert checked.verdict is Verdict.passed
    assert [note for note in checked.notes if "does not say which lm-eval scored int8" in note]
    silent = check([before], Rules(), frozen(before))
    assert silent.verdict is Verdict.passed and not silent.notes


# Seeds that were trained anew


def seeds(make, changes, *, digest):
    return [
        row(make(change), label="r", seed=seed, digest=digest)
        for seed, change in enumerate(changes, 1)
    ]


def anew(make, changes, **rules):
    """Return what is said of seeds that were trained anew and changed so."""
    return judged(
        seeds(make, [0.0] * len(changes), digest="old"), seeds(make, changes, digest="new"), **rules
    )


def numbers_that_fell(share):
    return numbers([value * (1 - share) for value in VALUES], answers_digest=f"fell by {share}")


def errors_that_rose(share):
    return numbers(
        [value * (1 + share) for value in VALUES],
        answers_digest=f"rose by {share}",
        higher_is_better=False,
        unit="number",
    )


def hits_that_fell(share):
    return hits(flipped(MARKS, lose=round(1000 * share)), answers_digest=f"fell by {share}")


def documents_that_rose(share):
    return documents(
        [
            (total - share * words * (1 + 0.1 * (number % 3)), words)
            for number, (total, words) in enumerate(TEXT)
        ],
        answers_digest=f"rose by {share}",
    )


KINDS = {
    "hits": hits_that_fell,
    "numbers": numbers_that_fell,
    "errors": errors_that_rose,
    "documents": documents_that_rose,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_seeds_that_were_trained_anew_must_agree_whatever_items_carry(make):
    apart = anew(make, (0.30, 0.0, 0.0))
    assert apart.verdict is Verdict.cannot_tell, apart.told
    together = anew(make, (0.20, 0.21, 0.19))
    assert together.verdict is Verdict.regressed, together.told
    alone = anew(make, (0.20,))
    assert (
        alone.verdict is Verdict.regressed
        and "trained anew: one seed may be an unlucky training, freeze three" in alone.told
    )


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_lax_alpha_of_the_frozen_layer_does_not_hide_that_seeds_disagree(make):
    finding = anew(make, (0.30, 0.06, 0.0), frozen_alpha=0.4)
    assert (
        finding.verdict is Verdict.cannot_tell
        and "trained anew, and the 3 seeds do not agree; more would decide" in finding.told
    ), finding.told


@pytest.mark.parametrize("make", [hits_that_fell, documents_that_rose])
def test_of_the_same_students_items_alone_decide(make):
    """Without a new training the checkpoints are worse, even if a single one is not."""
    before = seeds(make, (0.0, 0.0, 0.0), digest="d")
    assert judged(before, seeds(make, (0.30, 0.0, 0.0), digest="d")).verdict is Verdict.regressed


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_identical_seeds_and_unchanged_ones_pass(make):
    assert anew(make, (0.0, 0.0)).verdict is Verdict.passed
    assert anew(make, (0.25, 0.25, 0.25)).verdict is Verdict.regressed


def pairs(before, after):
    return [
        FrozenPair(freeze_record(old), freeze_record(old).scores[0], new, new.scores[0])
        for old, new in zip(before, after, strict=True)
    ]


def test_the_spread_between_trainings_widens_a_perplexity_with_students_t():
    """Three seeds at log ratios 0, .1 and .2.

    Over documents alone the interval has width 0; with the trainings it is t(2) x .0577.
    """

    def flat(share):
        return documents(
            [(total - share * words, words) for total, words in TEXT], answers_digest=f"{share}"
        )

    before, after = (
        seeds(flat, (0.0, 0.0, 0.0), digest="old"),
        seeds(flat, (0.0, 0.1, 0.2), digest="new"),
    )
    rise = rise_of(pairs(before, after))
    value, low, high = rise.ratio.value, rise.ratio.low, rise.ratio.high
    assert value == pytest.approx(math.exp(0.1))
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (math.log(low), math.log(high)) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-5)
    # a rise of 10 % over three trainings that are 10 % apart proves nothing
    assert rise.limit_test(1.02)[1] > 0.05
    same = rise_of(pairs(before, seeds(flat, (0.0, 0.1, 0.2), digest="old")))
    assert same.ratio.high == pytest.approx(same.ratio.value)


def test_few_documents_are_judged_with_students_t():
    """Four documents of equal length: t(3) = 3.18 in place of 1.96.

    For unequal ones it is the corrected error of the tables.
    """
    four = [(-30.0, 10.0), (-33.0, 10.0), (-31.0, 10.0), (-36.0, 10.0)]
    gaps = (0.9, 0.3, 0.5, 0.7)
    after = documents(
        [(total - gap, words) for (total, words), gap in zip(four, gaps, strict=True)],
        answers_digest="x",
    )
    ratio = rise_of(pairs([row(documents(four))], [row(after)])).ratio
    mean, error = sum(gaps) / 40, math.sqrt(sum((gap - 0.6) ** 2 for gap in gaps) * 4 / 3) / 40
    assert math.log(ratio.value) == pytest.approx(mean) and math.log(ratio.high) == pytest.approx(
        mean + 3.182446 * error
    )
    uneven = [
        (total * size, 10.0 * size) for (total, _), size in zip(four, (1, 9, 2, 3), strict=True)
    ]
    moved = [(total - gap, words) for (total, words), gap in zip(uneven, gaps, strict=True)]
    uneven_ratio = rise_of(
        pairs([row(documents(uneven))], [row(documents(moved, answers_digest="x"))])
    ).ratio
    assert uneven_ratio == means.perplexity_ratio_interval([moved], [uneven])


def test_bits_per_byte_are_compared_by_their_ratio():
    fields = {"metric": "bits_per_byte", "value": 4.76}
    before = documents(TEXT, **fields)
    after = documents([(1.1 * total, words) for total, words in TEXT], **fields, answers_digest="x")
    rise = rise_of(pairs([row(before)], [row(after)]))
    assert (
        rise.ratio.value == pytest.approx(1.1)
        and judged(row(before), row(after)).verdict is Verdict.regressed
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            documents(TEXT[:1]),
            documents([(-40.0, 10.0)], answers_digest="x"),
            "one document gives no interval",
        ),
        (
            documents(TEXT),
            documents([(-math.inf, 10.0), *TEXT[1:]], answers_digest="x", value=math.inf),
            "no finite likelihood",
        ),
        (
            hits("1" * 8),
            hits("1" * 7 + "0", answers_digest="x"),
            "8 items cannot show a drop of 5 points",
        ),
        (hits("1"), hits("0", answers_digest="x"), "1 items cannot show"),
        (hits("0" * 500), hits("0" * 499 + "1", answers_digest="x"), ""),
        (hits("1" * 500), hits("1" * 500, answers_digest="x"), ""),
        (numbers([0.5]), numbers([0.1], answers_digest="x"), "1 items can show drops from"),
    ],
)
def test_few_items_and_ends_of_the_scale_break_nothing(before, after, message):
    finding = judged(row(before), row(after))
    assert (
        finding.verdict is (Verdict.cannot_tell if message else Verdict.passed)
        and message in finding.told
    )


# A margin of its own


def test_a_row_with_a_margin_of_its_own_is_held_to_that_alone():
    baseline = frozen(row(hits(MARKS)), row(hits(MARKS), label="weak"))
    weak = baseline.rows[1].model_copy(update={"margin": 0.21})
    baseline = baseline.model_copy(update={"rows": (baseline.rows[0], weak), "margin": 0.95})
    rules = Rules(margin=0.95, alpha=0.1)
    assert (
        rules_for_row(baseline, "weak", rules) == Rules(margin=0.21, alpha=0.1)
        and rules_for_row(baseline, "int8", rules) is rules
    )
    assert (
        rules_for_row(None, "weak", rules) is rules
        and "keeps 21 %" in rules_for_row(baseline, "weak", rules).claim()
    )
    lost = baseline.model_copy(
        update={"rows": (weak.model_copy(update={"margin": 0.04, "points": True}),)}
    )
    assert rules_for_row(lost, "weak", rules) == Rules(margin=0.04, points=True, alpha=0.1)
