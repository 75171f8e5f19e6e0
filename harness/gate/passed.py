"""What *passed* means: how often a check passes a row that truly lost something. No torch.

A pass of the frozen layer says that no loss was shown, not that there is none. A pass of a claim
says that the row was shown to keep the margin. How often both are wrong follows from the number of
items, the share of flips and how many tests share one error rate. It is computed for the items of
this very check, and stated.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from harness.gate.rules import Finding, Rules, Verdict
from harness.statistics import stats

# The true loss for which the rate of passes is stated: it lies between the usual tolerance and the
# usual drop that must be detected.
STATED_DROP = 0.03
_MAX_LISTED_TASKS = 3  # of the line; the tasks with the most flips
_SUMMED_DEVIATIONS = 8.0  # how far the number of flips is summed, in standard deviations


def meaning_of_passed(findings: Sequence[Finding], rules: Rules) -> str:
    """Return in one line what a pass of this check shows, "" if nothing is tested.

    The line also says how often a true drop of 3 points passes.
    """
    meanings = []
    claims = [finding for finding in findings if finding.layer == "claim"]
    if claims:
        kept = rules.claim() if rules.margin is not None else "keeps its margin"
        if any(finding.numbers.get("margin") not in (None, rules.margin) for finding in claims):
            kept += " or the margin of its own"
        if any(finding.numbers.get("chance") for finding in claims):
            kept += " (of choices: above chance)"
        if rules.decide == "pooled":
            kept += " over its tasks together, while single ones may be unknown"
        meanings.append(
            f"claims: shown that every row {kept}, wrongly in at most {100 * rules.alpha:g} % of "
            f"checks{_pass_rates_text(findings, 'claim', rules)}"
        )
    frozen = [finding for finding in findings if finding.layer == "frozen" and finding.task]
    if any("p_holm" in finding.numbers for finding in frozen):
        meanings.append(
            "frozen items: no loss was shown, which does not prove that there is "
            f"none{_pass_rates_text(findings, 'frozen', rules)}"
        )
    elif frozen:
        meanings.append("frozen items: not one answer differs from the frozen ones")
    return f"passed means: {'; '.join(meanings)}" if meanings else ""


def _pass_rates_text(findings: Sequence[Finding], layer: str, rules: Rules) -> str:
    """Return how often a true drop passes on each task, "" if no hits were tested.

    Of each task it is the passed row with the most flips or, if none passed, any row's.
    """
    tests = sum(
        "p_holm" in finding.numbers or "p_met_holm" in finding.numbers
        for finding in findings
        if layer in _holm_family(finding)
    )
    flipped = [
        finding
        for finding in findings
        if finding.layer == layer
        and finding.numbers.get("flips") is not None
        and finding.numbers.get("seeds") == 1
        # a row with a margin of its own answers another question
        and finding.numbers.get("margin") in (None, rules.margin)
    ]
    passed = [finding for finding in flipped if finding.verdict is Verdict.passed]
    by_flips = sorted(passed or flipped, key=lambda finding: _number(finding, "flips"))
    most_flips = {finding.task: finding for finding in by_flips}  # the last one of a task stays
    listed = sorted(most_flips.values(), key=lambda finding: -_number(finding, "flips"))
    listed = listed[:_MAX_LISTED_TASKS]
    rates = [
        f"{_percent_text(_pass_rate(finding, max(1, tests), rules))} of the time on {finding.task} "
        f"(n {int(_number(finding, 'n')):,}, "
        f"{100 * max(_number(finding, 'flips'), STATED_DROP):.1f} % flips)"
        for finding in listed
    ]
    if not rates:
        return ""
    unlisted = len(most_flips) - len(listed)
    rest = f" and {unlisted} more tasks" if unlisted else ""
    return f"; a true drop of {100 * STATED_DROP:g} points passes {', '.join(rates)}{rest}"


def _holm_family(finding: Finding) -> tuple[str, ...]:
    """Return the layer whose tests share an error rate with this finding's, () for none."""
    if finding.layer in ("frozen", "pooled frozen"):
        return ("frozen",)
    return ("claim",) if finding.layer in ("claim", "pooled") else ()


def _number(finding: Finding, name: str) -> float:
    return float(finding.numbers.get(name) or 0.0)


def _pass_rate(finding: Finding, tests: int, rules: Rules) -> float:
    """Return how often a row with this finding's items and flips passes after the stated drop."""
    n, flips = int(_number(finding, "n")), _number(finding, "flips")
    if finding.layer == "frozen":
        return frozen_pass_rate(n, flips, STATED_DROP, tests, rules)
    return claim_pass_rate(
        n,
        flips,
        STATED_DROP,
        _number(finding, "teacher"),
        tests,
        replace(rules, margin=_number(finding, "margin"), points=bool(_number(finding, "points"))),
        chance=_number(finding, "chance"),
    )


def _percent_text(share: float) -> str:
    if share < 0.01:
        return "under 1 %"
    return "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def frozen_pass_rate(n: int, flips: float, drop: float, tests: int, rules: Rules) -> float:
    """Return how often the frozen layer passes a row that truly lost `drop`, exactly.

    `flips` is the share of the n items that flip. The sum goes over their number K and the number
    of lost items L among them. The row passes where K flips can show a drop of `detect`, the drop
    seen is at most that, and it is not both significant (McNemar at alpha over the number of tests,
    the first level of Holm) and above the tolerance. Given K, all of this bounds L from above.
    """
    from scipy.special import bdtr

    flips, alpha = max(flips, drop), rules.frozen_alpha / tests
    mean, deviation = n * flips, math.sqrt(n * flips * (1 - flips))
    fewest = max(0, math.floor(mean - _SUMMED_DEVIATIONS * deviation))
    most = min(n, math.ceil(mean + _SUMMED_DEVIATIONS * deviation))
    counts = np.arange(fewest, most + 1)
    tolerated = np.floor((counts + rules.tolerance * n) / 2 + 1e-9)
    most_lost = np.minimum(
        np.maximum(_critical_losses(counts, alpha) - 1, tolerated),
        np.floor((counts + rules.detect * n) / 2 + 1e-9),
    )
    can_detect = np.array(
        [stats.items_to_detect(int(count) / n, rules.detect, alpha=alpha) <= n for count in counts]
    )
    p_few_lost = bdtr(np.minimum(most_lost, counts), counts, (flips + drop) / (2 * flips))
    return float((_binomial_probabilities(counts, n, flips) * p_few_lost * can_detect).sum())


def _critical_losses(counts: npt.NDArray[np.int64], alpha: float) -> npt.NDArray[np.int64]:
    """Return for each number of flips the fewest lost items with McNemar's p below alpha.

    Where no number of lost items is enough, it is one more than there are flips.
    """
    from scipy.special import bdtrc

    low, high = counts // 2, counts + 1  # with half of the flips lost, p is above .5
    while (high - low > 1).any():
        middle = (low + high) // 2
        significant = bdtrc(middle - 1, counts, 0.5) < alpha
        low, high = np.where(significant, low, middle), np.where(significant, middle, high)
    return high


def _binomial_probabilities(
    counts: npt.NDArray[np.int64], n: int, share: float
) -> npt.NDArray[np.float64]:
    """Return the binomial probabilities of these counts among n."""
    from scipy.special import gammaln, xlog1py, xlogy

    log_ways = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    probabilities: npt.NDArray[np.float64] = np.exp(
        log_ways + xlogy(counts, share) + xlog1py(n - counts, -share)
    )
    return probabilities


def claim_pass_rate(
    n: int,
    flips: float,
    drop: float,
    teacher: float,
    tests: int,
    rules: Rules,
    *,
    chance: float = 0.0,
) -> float:
    """Return about how often a claim passes a row that truly lost `drop`.

    `flips` (items that only one of the two has right), `drop` and `teacher` are shares of the n
    items, and `chance` is the share that guessing gets right; `tests` is how many Holm adjusts for.
    The rate is the normal approximation of the claim's test: the mean over items of a weight, which
    is positive where the row keeps more than the margin.
    """
    assert rules.margin is not None
    flips = max(flips, drop)  # flips = lost + won, drop = lost - won
    lost = min((flips + drop) / 2, teacher)
    won = (flips - drop) / 2
    # shares of items: both right, only the teacher, only the student, neither
    cells = (teacher - lost, lost, won, max(0.0, 1 - teacher - won))
    weights = (
        stats.difference_weights(-rules.margin)
        if rules.points
        else stats.ratio_weights(rules.margin, chance)
    )
    mean = sum(cell * weight for cell, weight in zip(cells, weights, strict=True))
    variance = sum(cell * weight**2 for cell, weight in zip(cells, weights, strict=True)) - mean**2
    if variance <= 0:
        return float(mean > 0)
    return NormalDist().cdf(
        mean / math.sqrt(variance / n) + NormalDist().inv_cdf(rules.alpha / tests)
    )
