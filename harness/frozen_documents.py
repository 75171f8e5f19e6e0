"""Perplexities against frozen ones: documents are a sample, and so are the trainings of a row that was trained anew. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness import stats
from harness.findings import Finding, Verdict, decides
from harness.frozen_items import Numbers, Pair, Tested
from harness.groups import BITS

_Documents = Sequence[tuple[float, float]]  # (log-likelihood, words) of each
_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rise:
    """A perplexity (or bits per byte) over the frozen one, mean over the seeds of its logarithm, with its error."""

    per_seed: tuple[float, ...]  # log ratios; above zero is worse
    error: float = 0.0
    freedom: float = 1.0  # Student's t
    reason: str = ""  # why there is no interval

    @property
    def mean(self) -> float:
        """The mean log ratio."""
        return math.fsum(self.per_seed) / len(self.per_seed)

    @property
    def ends(self) -> tuple[float, float, float]:
        """Return the ratio and its 95 % interval."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.freedom, 0.975)) * self.error
        return math.exp(self.mean), math.exp(self.mean - half), math.exp(self.mean + half)

    def keeps(self, limit: float) -> tuple[float, float]:
        """Test whether the ratio is at most `limit`; (p of "it is not", p of "it is"), both 1 where there is no interval."""
        from scipy.special import stdtr

        if self.reason:
            return 1.0, 1.0
        room = math.log(limit) - self.mean
        if self.error == 0:
            return (0.5, 0.5) if room == 0 else (0.0, 1.0) if room > 0 else (1.0, 0.0)
        t = room / self.error
        return float(stdtr(self.freedom, -t)), float(stdtr(self.freedom, t))


def rise_of(seeds: Sequence[Pair]) -> Rise:
    """Compare the seeds of one row and task with their frozen documents.

    Documents are clusters (linearised); of a row that was trained anew the spread between the seeds' log ratios is added, with
    Satterthwaite's degrees of freedom: a training is a draw. Students that are the frozen ones to the last byte are no new draw.
    """
    sides = [(pair.now.totals, pair.then.totals) for pair in seeds]
    if not all(math.isfinite(total) for side in sides for documents in side for total, _ in documents):
        return Rise((), reason="a document has no finite likelihood")
    bits = seeds[0].now.metric == BITS
    if bits and not all(_nats(now) > 0 and _nats(then) > 0 for now, then in sides):
        return Rise((), reason="a document has no finite likelihood")
    ratios = [_log_ratio(now, then, bits=bits) for now, then in sides]
    per_seed = tuple(ratio for ratio, _ in ratios)
    count = len(sides[0][0])
    if count < 2:
        return Rise(per_seed, reason="one document gives no interval")
    influence = np.mean([own for _, own in ratios], axis=0)
    items = float((influence**2).sum()) * count / (count - 1)
    trained = len(per_seed) > 1 and any(pair.anew for pair in seeds)
    between = float(np.var(per_seed, ddof=1)) / len(per_seed) if trained else 0.0
    squares = items**2 / (count - 1) + (between**2 / (len(per_seed) - 1) if trained else 0.0)
    freedom = (items + between) ** 2 / squares if squares > 0 else float(count - 1)
    return Rise(per_seed, math.sqrt(items + between), freedom)


def _nats(documents: _Documents) -> float:
    return -math.fsum(total for total, _ in documents)


def _log_ratio(now: _Documents, then: _Documents, *, bits: bool) -> tuple[float, _Vector]:
    """Return the log of a figure over the frozen one, and each document's influence on it; influences sum to zero."""
    ours, theirs = (np.asarray([total for total, _ in side]) for side in (now, then))
    words = np.asarray([size for _, size in now])
    if bits:
        ratio = float(ours.sum() / theirs.sum())
        return math.log(ratio), (ours - ratio * theirs) / float(ours.sum())
    mean = float((theirs - ours).sum() / words.sum())
    return mean, (theirs - ours - mean * words) / float(words.sum())


def documents_against_frozen(one: Tested) -> Finding:
    """Judge a perplexity: at most so many times the frozen one."""
    rules, rise = one.rules, rise_of(one.seeds)
    n, limit = one.seeds[0].now.n, 1 + one.rules.perplexity
    if rise.reason:
        return one.finding(Verdict.cannot_tell, rise.reason, {})
    value, low, high = rise.ends
    fine = rise.keeps(limit)[0]
    numbers: Numbers = {"value": value, "low": low, "high": high, "n": n, "seeds": len(rise.per_seed), "p_holm": one.p}
    over = f" and {len(rise.per_seed)} seeds" if len(rise.per_seed) > 1 else ""
    told = f"perplexity x{value:.3f} [{low:.3f}, {high:.3f}] of the frozen one on {n} documents{over}; at most x{limit:.3f}"
    if one.significant:
        verdict, more = one.fallen([math.log(limit) - ratio for ratio in rise.per_seed])
        return one.finding(verdict, told + more, numbers)
    if fine * one.tests <= rules.alpha:
        return one.finding(Verdict.passed, told, numbers)
    needed = stats.items_to_decide(fine, n, alpha=rules.alpha / one.tests)
    decided = decides(needed, one.seeds[0].now, one.seeds[0].record.limited, what="documents")
    numbers |= {"needed": decided.needed, "task_items": decided.task_items}
    return one.finding(Verdict.cannot_tell, f"{told}; {decided.told or 'it stands at the limit'}", numbers)
