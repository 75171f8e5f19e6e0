"""Perplexities against frozen ones. No torch.

Documents are a sample, and so are the trainings of a row that was trained anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.gate.frozen_items import ChangedScore, FrozenPair, Numbers
from harness.gate.rules import Finding, Verdict, items_needed
from harness.records import columns
from harness.statistics import means, stats
from harness.statistics.figures import BITS_PER_BYTE
from harness.statistics.intervals import Interval


@dataclass(frozen=True)
class PerplexityRise:
    """A perplexity (or bits per byte) relative to the frozen one."""

    per_seed: tuple[float, ...]  # logarithms of the ratios; above zero is worse
    ratio: Interval  # over all seeds

    @property
    def reason(self) -> str:
        """Why there is no interval, "" where there is one."""
        return "" if self.ratio.low is not None else self.ratio.reason

    def limit_test(self, limit: float) -> tuple[float, float]:
        """Test whether the ratio is at most `limit`.

        Returns (p of "it is not", p of "it is"), both 1 where there is no interval.
        """
        return stats.ratio_test(self.ratio, limit)


def rise_of(seeds: Sequence[FrozenPair]) -> PerplexityRise:
    """Compare the seeds of one row and task with their frozen documents.

    If the row was trained anew, both sides' trainings are random draws and their scatter counts.
    Students that are equal to the frozen ones are no new draw: the documents' means are compared.
    """
    current: list[means.Documents] = [pair.current.totals for pair in seeds]
    frozen: list[means.Documents] = [pair.frozen.totals for pair in seeds]
    bits = seeds[0].current.metric == BITS_PER_BYTE
    ratios = [
        means.perplexity_ratio_interval([after], [before], bits=bits)
        for after, before in zip(current, frozen, strict=True)
    ]
    undefined = next((ratio for ratio in ratios if ratio.value is None), None)
    if undefined is not None:
        return PerplexityRise((), undefined)
    if not any(pair.retrained for pair in seeds):
        current, frozen = [_mean_documents(current)], [_mean_documents(frozen)]
    return PerplexityRise(
        tuple(math.log(ratio.value) for ratio in ratios if ratio.value),
        means.perplexity_ratio_interval(current, frozen, bits=bits),
    )


def _mean_documents(runs: Sequence[means.Documents]) -> means.Documents:
    """Return each document's mean log-likelihood over runs, with its length."""
    return [
        (fmean(total for total, _ in document), document[0][1])
        for document in zip(*runs, strict=True)
    ]


def judge_documents(changed: ChangedScore) -> Finding:
    """Judge a perplexity: it may be the frozen one times 1 + `rules.perplexity` at most."""
    rules, rise, score = changed.rules, rise_of(changed.seeds), changed.seeds[0].current
    limit = 1 + rules.perplexity
    if rise.reason:
        return changed.finding(Verdict.cannot_tell, rise.reason, {})
    ratio = rise.ratio
    assert ratio.value is not None and ratio.low is not None and ratio.high is not None
    numbers: Numbers = {
        "value": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "n": score.n,
        "seeds": len(rise.per_seed),
        "p_holm": changed.p,
    }
    name = (columns.BITS_PER_BYTE if score.metric == BITS_PER_BYTE else columns.PERPLEXITY).header
    seeds_text = f" and {len(rise.per_seed)} seeds" if len(rise.per_seed) > 1 else ""
    line = (
        f"{name} {columns.RATIO.with_interval(ratio)} of the frozen one on {score.n} "
        f"documents{seeds_text}; at most x{limit:.3f}"
    )
    if changed.significant:
        judgement = changed.judge_loss([math.log(limit) - log_ratio for log_ratio in rise.per_seed])
        return changed.finding(judgement.verdict, line + judgement.remark, numbers)
    p_within, _ = rise.limit_test(limit)
    if p_within * changed.tests <= rules.alpha:
        return changed.finding(Verdict.passed, line, numbers)
    needed = stats.items_to_decide(p_within, score.n, alpha=rules.alpha / changed.tests)
    limited = not changed.seeds[0].record.conditions.has_all_items
    decision = items_needed(needed, score, limited, unit="documents")
    numbers |= {"needed": decision.needed, "task_items": decision.task_items}
    return changed.finding(
        Verdict.cannot_tell, f"{line}; {decision.text or 'the figure lies at the limit'}", numbers
    )
