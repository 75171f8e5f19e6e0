"""The figure of one model on one task with its interval, compared with nothing. No torch."""

from harness.analysis.comparison import BITS_PER_BYTE
from harness.records.record import TaskScore
from harness.statistics import means
from harness.statistics.intervals import Interval


def score_interval(score: TaskScore) -> Interval:
    """Return a score with its 95 % interval over the items.

    Hits and misses have Wilson's score interval (1927), numbers Student's t over items, and a
    perplexity that of the logarithm over documents. A figure that all items make together has no
    interval of its own.
    """
    if score.kind == "perplexity" and score.totals and score.metric != BITS_PER_BYTE:
        certain = [(0.0, size) for _, size in score.totals]  # a model of perplexity 1
        return means.perplexity_ratio_interval([score.totals], [certain])
    if score.form or score.unpaired or not score.numbers:
        return Interval(score.value, reason="no interval of its own")
    if score.hit_or_miss:
        return _wilson(score.outcomes[score.primary])
    zeros = [0.0] * len(score.numbers)
    return means.difference_interval([score.numbers], [zeros], score.parts)


def _wilson(outcomes: str) -> Interval:
    """Return the share of hits with Wilson's score interval."""
    from scipy.stats import binomtest

    hits, count = outcomes.count("1"), len(outcomes)
    ends = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return Interval(hits / count, float(ends.low), float(ends.high))
