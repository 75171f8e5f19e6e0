"""Perplexities against frozen ones: documents are a sample, and so are the trainings of a row that
was trained anew. No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.gate.frozen_items import Numbers, Pair, Tested
from harness.gate.rules import Finding, Verdict, decides
from harness.records import columns
from harness.statistics import means, stats
from harness.statistics.figures import BITS_PER_BYTE
from harness.statistics.intervals import Interval


@dataclass(frozen=True)
class Rise:
    """A perplexity (or bits per byte) over the frozen one: of each seed the logarithm, and of all
    of them the ratio with its interval.
    """

    per_seed: tuple[float, ...]  # log ratios; above zero is worse
    ratio: Interval

    @property
    def reason(self) -> str:
        """Why there is no interval, "" where there is one."""
        return "" if self.ratio.low is not None else self.ratio.reason

    def keeps(self, limit: float) -> tuple[float, float]:
        """Test whether the ratio is at most `limit`; (p of "it is not", p of "it is"), both 1 where
        there is no interval.
        """
        return stats.ratio_test(self.ratio, limit)


def rise_of(seeds: Sequence[Pair]) -> Rise:
    """Compare the seeds of one row and task with their frozen documents, as tables compare a
    student's with its teacher's.

    Of a row that was trained anew both sides' trainings are draws, and their scatter counts.
    Students that are the frozen ones to the last byte are no new draw: their documents' means are
    compared.
    """
    now, then = (
        list(sides)
        for sides in zip(*((pair.now.totals, pair.then.totals) for pair in seeds), strict=True)
    )
    bits = seeds[0].now.metric == BITS_PER_BYTE
    alone = [
        means.perplexity_ratio_interval([after], [before], bits=bits)
        for after, before in zip(now, then, strict=True)
    ]
    if any(one.value is None for one in alone):
        return Rise((), next(one for one in alone if one.value is None))
    drawn = any(pair.anew for pair in seeds)
    ratio = means.perplexity_ratio_interval(
        now if drawn else [_mean(now)], then if drawn else [_mean(then)], bits=bits
    )
    return Rise(tuple(math.log(one.value) for one in alone if one.value), ratio)


def _mean(runs: Sequence[means.Documents]) -> means.Documents:
    """Return each document's mean log-likelihood over runs."""
    return [
        (fmean(total for total, _ in document), document[0][1])
        for document in zip(*runs, strict=True)
    ]


def documents_against_frozen(one: Tested) -> Finding:
    """Judge a perplexity: at most so many times the frozen one."""
    rules, rise = one.rules, rise_of(one.seeds)
    n, limit = one.seeds[0].now.n, 1 + one.rules.perplexity
    if rise.reason:
        return one.finding(Verdict.cannot_tell, rise.reason, {})
    value, low, high = rise.ratio.value, rise.ratio.low, rise.ratio.high
    assert value is not None and low is not None and high is not None
    fine = rise.keeps(limit)[0]
    numbers: Numbers = {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "seeds": len(rise.per_seed),
        "p_holm": one.p,
    }
    over = f" and {len(rise.per_seed)} seeds" if len(rise.per_seed) > 1 else ""
    name = (
        columns.BITS_PER_BYTE if one.seeds[0].now.metric == BITS_PER_BYTE else columns.PERPLEXITY
    ).header
    told = (
        f"{name} {columns.RATIO.with_interval(rise.ratio)} of the frozen one on {n} "
        f"documents{over}; at most x{limit:.3f}"
    )
    if one.significant:
        verdict, more = one.fallen([math.log(limit) - ratio for ratio in rise.per_seed])
        return one.finding(verdict, told + more, numbers)
    if fine * one.tests <= rules.alpha:
        return one.finding(Verdict.passed, told, numbers)
    needed = stats.items_to_decide(fine, n, alpha=rules.alpha / one.tests)
    decided = decides(
        needed, one.seeds[0].now, one.seeds[0].record.conditions.limited, what="documents"
    )
    numbers |= {"needed": decided.needed, "task_items": decided.task_items}
    return one.finding(
        Verdict.cannot_tell, f"{told}; {decided.told or 'it stands at the limit'}", numbers
    )
