"""Figures that all items make together equal lm-eval's; intervals hold as often as they say."""

import numpy as np
import pytest
from lm_eval.api import metrics

from harness.scoring.parts import json_value, recorded_statistics
from harness.statistics import corpus
from harness.statistics.pooled import Corpus

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "over",
    "mat",
    "tree",
    "house",
    "quickly",
    "and",
    "it",
    "was",
    "red",
]


def labels(n, classes=2, *, right=0.7, seed=0):
    """Return (gold, prediction) pairs, a share of them alike."""
    rng = np.random.default_rng(seed)
    golds = rng.integers(0, classes, n)
    guesses = np.where(rng.random(n) < right, golds, rng.integers(0, classes, n))
    return [[int(gold), int(guess)] for gold, guess in zip(golds, guesses, strict=True)]


def sentences(n, *, wrong=0.3, references=1, seed=0):
    """Return (references, text): the text is the first one with words replaced or left out."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        base = list(rng.choice(WORDS, rng.integers(3, 14)))
        words = [
            str(rng.choice(WORDS)) if rng.random() < wrong else word
            for word in base
            if rng.random() > wrong / 3
        ]
        others = [" ".join([*base[1:], "again."]) for _ in range(references - 1)]
        pairs.append(
            [[" ".join(base), *others] if references > 1 else " ".join(base), " ".join(words)]
        )
    return pairs


AGGREGATED = {
    "f1": (metrics.f1_score, labels(90)),
    "f1, none right": (metrics.f1_score, [[1, 0], [0, 1], [1, 0]]),
    "f1, no positive": (metrics.f1_score, [[0, 0]] * 5),
    "f1, all right": (metrics.f1_score, [[1, 1], [0, 0], [1, 1]]),
    "mcc": (metrics.matthews_corrcoef, labels(90)),
    "mcc, below zero": (metrics.matthews_corrcoef, [[0, 1], [1, 0], [1, 1], [0, 1]]),
    "mcc, four classes": (metrics.matthews_corrcoef, labels(90, 4)),
    "mcc, named classes": (
        metrics.matthews_corrcoef,
        [["no", "yes"], ["yes", "yes"], ["no", "no"], ["maybe", "no"]],
    ),
    "mcc, one class": (metrics.matthews_corrcoef, [[0, 0]] * 4),
    "bleu": (metrics.bleu, sentences(60)),
    "bleu, two references": (metrics.bleu, sentences(40, references=2)),
    "bleu, nothing long matches": (
        metrics.bleu,
        [["a red cat sat there", "blue dog cat ran away now"], ["the tree", "the house"]],
    ),
    "bleu, nothing matches": (metrics.bleu, [["a cat", "dog"]] * 3),
    "bleu, nothing written": (metrics.bleu, [["a cat sat", ""]] * 3),
    "bleu, short": (metrics.bleu, [["a cat sat on it", "a cat"], ["the dog ran", "the dog"]]),
    "chrf": (metrics.chrf, sentences(60)),
    "chrf, two references": (metrics.chrf, sentences(40, references=2)),
    "chrf, nothing written": (metrics.chrf, [["a cat", ""], ["a dog", ""]]),
    "chrf++": (metrics.chrfpp, sentences(60)),
    "ter": (metrics.ter, sentences(40)),
    "ter, two references": (metrics.ter, sentences(20, references=2)),
    "brier": (metrics.brier_score, [[at % 3, [0.5, 0.3, 0.2]] for at in range(20)]),
    "perplexity": (metrics.perplexity, [-0.3 * at for at in range(12)]),
}


@pytest.mark.parametrize("name", AGGREGATED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_makes_lm_evals_figure_again(name):
    function, parts = AGGREGATED[name]
    value = float(function(parts))
    recorded = recorded_statistics(
        [json_value(tuple(part) if isinstance(part, list) else part) for part in parts],
        function,
        "it",
        value,
    )
    assert recorded.corpus is not None and recorded.reason == ""
    assert corpus.run_figure(recorded.corpus) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert all(line for line in recorded.corpus.statistics) and len(
        recorded.corpus.statistics
    ) == len(parts)


@pytest.mark.parametrize(
    ("name", "lower"),
    [("bleu", 0), ("chrf++", 0), ("ter", 0), ("f1", 0), ("mcc, four classes", -1)],
)
def test_every_draw_has_the_figure_of_its_items(name, lower):
    """Draws by sums are the aggregation of the items drawn, one by one."""
    function, parts = AGGREGATED[name]
    run = recorded_statistics(parts, function, "it", float(function(parts))).corpus
    counts, drawn = corpus.resample_counts(len(parts), 0), corpus.resample(run, ())
    assert (
        counts.shape == (corpus.RESAMPLES, len(parts)) and (counts.sum(axis=1) == len(parts)).all()
    )
    for at in (0, 1, 777, 3_999):
        again = [part for part, times in zip(parts, counts[at], strict=True) for _ in range(times)]
        assert drawn.draws[at] == pytest.approx(float(function(again)), rel=1e-9)
    assert drawn.draws.min() >= lower and drawn.draws.std() > 0


def test_what_cannot_be_made_again_says_why():
    def f1_score(items):
        return 0.5

    pairs = labels(20)
    value = float(metrics.f1_score(pairs))
    # its name does not make it lm-eval's
    assert "made by the task's own code" in recorded_statistics(pairs, f1_score, "f1", 0.5).reason
    assert (
        "another figure" in recorded_statistics(pairs, metrics.f1_score, "f1", value + 1e-6).reason
    )
    assert (
        "no item has one" in recorded_statistics([0.5, 1.0], metrics.median, "median", 1.0).reason
    )
    assert (
        "1 of 20 items have no part"
        in recorded_statistics([None, *pairs[1:]], metrics.f1_score, "f1", value).reason
    )
    assert (
        "an unexpected form (ValueError)"
        in recorded_statistics([[1, 2, 3]] * 3, metrics.f1_score, "f1", value).reason
    )
    assert "an unexpected form" in recorded_statistics([1.0, 2.0], metrics.bleu, "bleu", 1.0).reason
    assert recorded_statistics(pairs, {"unhashable": 1}, "f1", value).corpus is None


def test_parts_are_as_json_holds_them():
    import json

    given = (np.int64(1), (np.float32(0.5), True), ["a", np.array([1, 2])])
    assert (
        json_value(given)
        == [1, [0.5, True], ["a", [1, 2]]]
        == json.loads(json.dumps(json_value(given)))
    )
    assert (
        json_value(object()) is None
        and json_value((1, object())) is None
        and json_value(float("nan")) is None
        and json_value(None) is None
    )


def pair(n, seed, *, share=0.7, prevalence=0.5):
    """Return F1 runs of student and teacher; a share of the student's answers is the teacher's."""
    rng = np.random.default_rng(seed)
    gold = rng.random(n) < prevalence
    teacher = np.where(rng.random(n) < 0.88, gold, ~gold)
    student = np.where(rng.random(n) < share, teacher, np.where(rng.random(n) < 0.75, gold, ~gold))
    return tuple(
        Corpus("f1", tuple(f"{int(a)} {int(b)}" for a, b in zip(gold, side, strict=True)))
        for side in (student, teacher)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "share", "prevalence"), [(80, 0.6, 0.5), (200, 0.8, 0.3)])
def test_intervals_hold_as_often_as_they_say(n, share, prevalence):
    whole = pair(400_000, 99, share=share, prevalence=prevalence)
    ours, theirs = (corpus.run_figure(run) for run in whole)
    trials, covered = 200, [0, 0]
    for seed in range(trials):
        student, teacher = pair(n, seed, share=share, prevalence=prevalence)
        gap, kept_share = (
            corpus.difference_interval([student], [teacher]),
            corpus.ratio_interval([student], [teacher]),
        )
        covered[0] += gap.low <= ours - theirs <= gap.high
        covered[1] += kept_share.low <= ours / theirs <= kept_share.high
    assert all(0.91 <= count / trials <= 0.995 for count in covered), covered


def test_pairing_narrows_the_interval():
    student, teacher = pair(300, 1, share=0.9)
    # the same figure, other items
    shuffled = Corpus("f1", tuple(np.random.default_rng(0).permutation(teacher.statistics)))
    assert corpus.run_figure(shuffled) == corpus.run_figure(teacher)
    paired, unpaired = (
        corpus.difference_interval([student], [teacher]),
        corpus.difference_interval([student], [shuffled]),
    )
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)


def test_it_is_the_bootstrap_of_scipy():
    from scipy import stats

    student, teacher = pair(1_000, 3)
    columns = [
        np.array([line.split() for line in run.statistics], dtype=float)
        for run in (student, teacher)
    ]

    def f1(gold, guess):
        return 2 * (gold * guess).sum(axis=-1) / (gold + guess).sum(axis=-1)

    def gap(gold, ours, theirs, axis=-1):
        return f1(gold, ours) - f1(gold, theirs)

    data = (columns[0][:, 0], columns[0][:, 1], columns[1][:, 1])
    theirs = stats.bootstrap(
        data,
        gap,
        paired=True,
        vectorized=True,
        n_resamples=4_000,
        method="percentile",
        rng=0,
        batch=500,
    )
    interval = corpus.difference_interval([student], [teacher])
    ends = theirs.confidence_interval
    assert (interval.low, interval.high) == pytest.approx(
        (ends.low, ends.high), abs=0.15 * (ends.high - ends.low) / 2
    )


def test_tests_turn_where_intervals_end():
    student, teacher = pair(250, 4)
    interval, gap = (
        corpus.ratio_interval([student], [teacher]),
        corpus.difference_interval([student], [teacher]),
    )
    assert corpus.retention_test([student], [teacher], interval.low) == pytest.approx(
        (0.025, 0.975), abs=1e-4
    )
    assert corpus.retention_test([student], [teacher], -gap.low, points=True) == pytest.approx(
        (0.025, 0.975), abs=1e-4
    )
    assert (
        corpus.retention_test([student], [teacher], 0.5)[0] < 1e-4
        and corpus.retention_test([teacher], [student], 0.95)[0] < 1e-3
    )
    # the same draws in every process and call
    assert corpus.difference_interval([student], [teacher]) == gap
    assert corpus.error_of_difference([student], [teacher]) == pytest.approx(
        (gap.high - gap.low) / 3.92, rel=0.05
    )


def test_direction_turns_the_tests():
    good, bad = (
        recorded_statistics(parts, metrics.ter, "ter", float(metrics.ter(parts))).corpus
        for parts in (sentences(80), sentences(80, wrong=0.6))
    )
    assert corpus.run_figure(bad) > corpus.run_figure(good)
    assert (
        corpus.inferiority_test([bad], [good], lower=True)
        < 1e-3
        < 0.9
        < corpus.inferiority_test([bad], [good])
        and corpus.inferiority_test([good], [good]) == 1.0
    )
    assert (
        corpus.retention_test([good], [bad], 0.95, lower=True)[0] < 1e-3
        and corpus.retention_test([bad], [good], 0.95, lower=True)[1] < 1e-3
    )
    assert corpus.ratio_interval([bad], [good]).low > 1


def test_no_item_that_differs_leaves_room_for_one():
    for right in (0.7, 1.0):  # a perfect teacher has no item whose absence changes anything
        few, many = (
            Corpus("f1", tuple(f"{a} {b}" for a, b in labels(n, right=right))) for n in (6, 600)
        )
        gap = corpus.difference_interval([few], [few])
        assert gap.value == 0 and gap.low < -0.1 and gap.high > 0.1
        assert (
            corpus.retention_test([few], [few], 0.95)[0]
            > 0.05
            > corpus.retention_test([many], [many], 0.95)[0]
        )


def test_several_runs_add_their_spread():
    student, teacher = pair(400, 5)
    other = pair(400, 5, share=0.4)[0]
    single, alone, both = (
        corpus.difference_interval(runs, [teacher])
        for runs in ([student], [student, student], [student, other])
    )
    assert alone.high - alone.low == pytest.approx(single.high - single.low)
    assert both.high - both.low > 1.5 * (alone.high - alone.low)
    assert both.value == pytest.approx(
        (corpus.run_figure(student) + corpus.run_figure(other)) / 2 - corpus.run_figure(teacher)
    )


def test_tasks_of_a_group_are_strata():
    (ours, theirs), (more, base) = pair(40, 6), pair(300, 7)
    student, teacher = (
        Corpus("f1", a.statistics + b.statistics) for a, b in ((ours, more), (theirs, base))
    )
    parts = ((40, 1 / 80), (300, 1 / 600))
    assert corpus.run_figure(student, parts) == pytest.approx(
        (corpus.run_figure(ours) + corpus.run_figure(more)) / 2
    )
    squares = [corpus.standard_error(run) ** 2 for run in (ours, more)]
    assert corpus.standard_error(student, parts) == pytest.approx(
        np.sqrt(sum(squares)) / 2, rel=0.1
    )
    assert corpus.difference_interval([student], [teacher], parts).low is not None
    with pytest.raises(ValueError, match="40 items in parts, 340 in the run"):
        corpus.run_figure(student, parts[:1])


def test_what_has_no_ratio_says_why():
    none, some = Corpus("f1", ("1 0",) * 9), Corpus("f1", ("1 1",) * 9)
    assert (
        "scores nothing" in corpus.ratio_interval([some], [none]).reason
        and corpus.ratio_interval([none], [some]).value == 0
    )
    rare = Corpus("f1", ("1 1", "1 0", "1 0", "0 1", *["0 0"] * 40))
    assert "too uncertain" in corpus.ratio_interval([rare], [rare]).reason
    assert (
        "one item"
        in corpus.difference_interval([Corpus("f1", ("1 1",))], [Corpus("f1", ("1 0",))]).reason
    )
    assert corpus.ratio_interval([Corpus("f1", ("1 0",))], [Corpus("f1", ("1 1",))]).low is None
    with pytest.raises(ValueError, match="are not the same"):
        corpus.difference_interval([none], [rare])
