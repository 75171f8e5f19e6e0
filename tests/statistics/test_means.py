"""Paired means against independent computations, and how often their intervals hold."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from harness.statistics import means


def draw(seed, n=60, seeds=1):
    rng = np.random.default_rng(seed)
    skill = rng.beta(0.8, 0.6, n)
    teacher = np.clip(skill + rng.normal(0, 0.05, n), 0, 1)
    students = [np.clip(skill * 0.9 + rng.normal(0, 0.1, n), 0, 1) for _ in range(seeds)]
    return [list(teacher)], [list(one) for one in students]


def test_a_difference_is_students_t_of_the_gaps_but_for_half_an_item():
    teacher, student = draw(1, n=4_000)
    interval = means.difference_interval(student, teacher)
    gaps = np.array(student[0]) - np.array(teacher[0])
    low, high = scipy_stats.t.interval(
        0.95, len(gaps) - 1, gaps.mean(), gaps.std(ddof=1) / np.sqrt(len(gaps))
    )
    assert interval.value == pytest.approx(gaps.mean()) and (
        interval.low,
        interval.high,
    ) == pytest.approx((low, high), rel=1e-2)
    met, unmet = means.retention_test(student, teacher, 0.0, points=True)
    assert unmet == pytest.approx(
        scipy_stats.ttest_rel(student[0], teacher[0], alternative="less").pvalue, abs=1e-3
    ) and met + unmet == pytest.approx(1)


def test_a_ratio_is_fiellers_and_agrees_with_the_bootstrap():
    teacher, student = draw(2, n=3_000)
    interval = means.ratio_interval(student, teacher)
    t, s = np.array(teacher[0]), np.array(student[0])
    rng = np.random.default_rng(0)
    taken = rng.integers(0, len(t), (4_000, len(t)))
    low, high = np.quantile(s[taken].mean(axis=1) / t[taken].mean(axis=1), [0.025, 0.975])
    assert interval.value == pytest.approx(s.mean() / t.mean()) and (
        interval.low,
        interval.high,
    ) == pytest.approx((low, high), abs=1.5e-3)
    # Fieller's end is where the test turns
    assert means.retention_test(student, teacher, interval.low)[1] == pytest.approx(0.975, abs=2e-3)
    above = means.ratio_interval(student, teacher, chance=0.25)
    assert (
        above.value == pytest.approx((s.mean() - 0.25) / (t.mean() - 0.25))
        and above.low < above.value < above.high
    )


def test_parts_that_count_alike_are_strata():
    rng = np.random.default_rng(3)
    values = [*rng.random(10), *rng.random(1_000)]
    parts = ((10, 1 / 20), (1_000, 1 / 2_000))
    assert means.run_figure(values, parts) == pytest.approx(
        (np.mean(values[:10]) + np.mean(values[10:])) / 2
    )
    squared = np.var(values[:10], ddof=1) / 10 / 4 + np.var(values[10:], ddof=1) / 1_000 / 4
    assert means.standard_error(values, parts) == pytest.approx(np.sqrt(squared))
    assert (
        means.standard_error([0.5]) is None
        and means.standard_error([1.0, 0.0, 1.0], ((1, 0.5), (2, 0.25))) > 0
    )


def test_no_item_that_differs_leaves_room_for_one():
    teacher = [[0.5] * 20 + [1.0] * 80]
    interval = means.difference_interval(teacher, teacher)
    assert interval.value == 0 and -0.05 < interval.low < 0 < interval.high < 0.05
    ratio = means.ratio_interval(teacher, teacher)
    assert ratio.value == 1 and 0.95 < ratio.low < 1 < ratio.high < 1.05
    assert means.inferiority_test(teacher, teacher) == 1.0


def test_direction_turns_the_tests():
    teacher, worse = [[0.2, 0.4, 0.3, 0.5] * 30], [[0.3, 0.6, 0.4, 0.6] * 30]  # an error rate
    assert (
        means.inferiority_test(worse, teacher, lower=True)
        < 1e-6
        < 0.5
        < means.inferiority_test(worse, teacher)
    )
    assert (
        means.retention_test(worse, teacher, 0.95, lower=True)[1] < 1e-6
        and means.retention_test(teacher, worse, 0.95, lower=True)[0] < 1e-6
    )


def test_what_has_no_ratio_says_why():
    assert "scores nothing" in means.ratio_interval([[0.5, 0.1]], [[0.0, 0.0]]).reason
    assert (
        "at chance"
        in means.ratio_interval([[0.5, 0.1, 0.3]], [[0.3, 0.2, 0.3]], chance=0.25).reason
    )
    assert (
        means.ratio_interval([[0.5]], [[1.0]]).value == 0.5
        and means.ratio_interval([[0.5]], [[1.0]]).low is None
    )
    with pytest.raises(ValueError, match="not the same items"):
        means.difference_interval([[0.1, 0.2]], [[0.1, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("n", "seeds", "mass"), [(30, 1, 0.0), (100, 1, 0.7), (200, 3, 0.0), (100, 1, 0.95)]
)
def test_intervals_hold_as_often_as_they_say(n, seeds, mass):
    """`mass`: share of items on which both are exactly 0 or 1, as F1 and ROUGE have many."""
    rng = np.random.default_rng(n + seeds)
    covered, trials = 0, 800
    truth = 0.5 * (1 - mass) * 0.8 + mass * 0.5
    for _ in range(trials):
        fixed = rng.random(n) < mass
        base = np.where(fixed, rng.random(n) < 0.5, rng.random(n))
        drift = rng.normal(0, 0.02, seeds) if seeds > 1 else [0.0]
        runs = [
            np.where(fixed, base, np.clip(base * (0.6 + 0.4 * rng.random(n)), 0, 1)) + shift
            for shift in drift
        ]
        interval = means.ratio_interval([list(one) for one in runs], [list(base)])
        covered += interval.low <= truth / 0.5 <= interval.high
    assert covered / trials >= 0.925


def test_bits_per_byte_are_compared_by_their_ratio():
    rng = np.random.default_rng(5)
    sizes = rng.integers(50, 500, 200)
    theirs = [(-1.0 * size * (1 + 0.1 * rng.normal()), float(size)) for size in sizes]
    ours = [(1.1 * total * (1 + 0.02 * rng.normal()), size) for total, size in theirs]
    interval = means.perplexity_ratio_interval([ours], [theirs], bits=True)
    assert (
        interval.value == pytest.approx(sum(a for a, _ in ours) / sum(a for a, _ in theirs))
        and interval.low < 1.1 < interval.high < 1.11
    )
    assert means.perplexity_ratio_interval([ours], [theirs[1:]], bits=True).reason
    assert means.perplexity_ratio_interval([[(-np.inf, 1.0)]], [[(-1.0, 1.0)]], bits=True).reason


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("count", [2, 4, 30])
def test_documents_are_clusters_corrected_as_bell_and_mccaffrey_do(count, bits):
    """Variance and degrees of freedom by whole matrices."""
    rng = np.random.default_rng(count)
    sizes = np.round(np.exp(rng.normal(7, 0.8, count)))
    theirs = -sizes * rng.normal(3, 0.3, count)
    ours = theirs - sizes * rng.gamma(3, 0.02, count)
    interval = means.perplexity_ratio_interval(
        [[*zip(ours, sizes, strict=True)]], [[*zip(theirs, sizes, strict=True)]], bits=bits
    )
    weight = -theirs if bits else sizes
    strayed = (
        (ours - ours.sum() / theirs.sum() * theirs) / -ours.sum()
        if bits
        else ((theirs - ours) - (theirs - ours).sum() / sizes.sum() * sizes) / sizes.sum()
    )
    share = weight / weight.sum()
    scale = np.diag(1 / np.sqrt(1 - share))
    hat = scale @ (np.eye(count) - np.outer(share, np.ones(count))) @ np.diag(weight)
    form = hat @ hat.T
    freedom = np.trace(form) ** 2 / np.trace(form @ form)
    half = scipy_stats.t.ppf(0.975, max(1.0, freedom)) * np.sqrt(((scale @ strayed) ** 2).sum())
    assert np.log(interval.high / interval.value) == pytest.approx(half, rel=1e-6) and np.log(
        interval.value / interval.low
    ) == pytest.approx(half, rel=1e-6)


def test_one_document_gives_no_interval():
    interval = means.perplexity_ratio_interval([[(-10.0, 3.0)]], [[(-9.0, 3.0)]])
    assert (
        interval.value == pytest.approx(np.exp(1 / 3))
        and interval.low is None
        and "one document" in interval.reason
    )
