"""What *passed* means: how often a check of these very items, flips and number of tests passes a
row that truly lost something. No torch.

A pass of the frozen layer says that no loss was shown, not that there is none; a pass of a claim
says that the margin was shown to be kept. Both err at rates that follow from n, the share of flips
and how many tests share one error rate, so they are computed and stated.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from harness.gate.rules import Finding, Rules, Verdict
from harness.statistics import stats

# the true loss whose chance to pass is stated: more than the usual tolerance, less than the usual
# drop to be detected
DROP = 0.03
_LISTED = 3  # tasks that the line has room for, those with the most flips
_FAR = 8.0  # standard deviations of the number of flips that are summed over


def passed_means(findings: Sequence[Finding], rules: Rules) -> str:
    """Return in one line what a pass of this check shows, and how often a true drop of 3 points
    passes here; "" where nothing is tested.
    """
    meanings = []
    claims = [finding for finding in findings if finding.layer == "claim"]
    if claims:
        above = (
            " (of choices: above chance)"
            if any(finding.numbers.get("chance") for finding in claims)
            else ""
        )
        kept = rules.claim() if rules.margin is not None else "keeps its margin"
        own = (
            " or the margin of its own"
            if any(finding.numbers.get("margin") not in (None, rules.margin) for finding in claims)
            else ""
        )
        where = (
            " over its tasks together, of which a single one may be unknown"
            if rules.decide == "pooled"
            else ""
        )
        meanings.append(
            f"claims: shown that every row {kept}{own}{above}{where}, wrongly in at most "
            f"{100 * rules.alpha:g} % of checks"
            f"{_rates(findings, 'claim', rules)}"
        )
    frozen = [finding for finding in findings if finding.layer == "frozen" and finding.task]
    if any("p_holm" in finding.numbers for finding in frozen):
        meanings.append(
            "frozen items: no loss was shown, which is not that there is "
            f"none{_rates(findings, 'frozen', rules)}"
        )
    elif frozen:
        meanings.append("frozen items: not one answer differs from the frozen ones")
    return f"passed means: {'; '.join(meanings)}" if meanings else ""


def _rates(findings: Sequence[Finding], layer: str, rules: Rules) -> str:
    """Say how often a true drop passes on each task, at the most flips of a row that passed (else
    of any); "" where no hits were tested.
    """
    tests = max(
        1,
        sum(
            "p_holm" in finding.numbers or "p_met_holm" in finding.numbers
            for finding in findings
            if layer in _family(finding)
        ),
    )
    flipped = [
        finding
        for finding in findings
        if finding.layer == layer
        and finding.numbers.get("flips") is not None
        and finding.numbers.get("seeds") == 1
        # a row with a margin of its own is another question
        and finding.numbers.get("margin") in (None, rules.margin)
    ]
    passed = [finding for finding in flipped if finding.verdict is Verdict.passed]
    worst = {
        finding.task: finding
        for finding in sorted(passed or flipped, key=lambda finding: _number(finding, "flips"))
    }  # the last of a task stays
    chosen = sorted(worst.values(), key=lambda finding: -_number(finding, "flips"))[:_LISTED]
    rates = [
        f"{_percent(_passes(finding, tests, rules))} of the time on {finding.task} (n "
        f"{int(_number(finding, 'n')):,}, "
        f"{100 * max(_number(finding, 'flips'), DROP):.1f} % flips)"
        for finding in chosen
    ]
    rest = f" and {len(worst) - _LISTED} more tasks" if len(worst) > _LISTED else ""
    return (
        f"; a true drop of {100 * DROP:g} points passes {', '.join(rates)}{rest}" if rates else ""
    )


def _family(finding: Finding) -> tuple[str, ...]:
    """Return the layers among whose tests a finding stands."""
    return (
        ("frozen",)
        if finding.layer in ("frozen", "pooled frozen")
        else ("claim",)
        if finding.layer in ("claim", "pooled")
        else ()
    )


def _number(finding: Finding, name: str) -> float:
    return float(finding.numbers.get(name) or 0.0)


def _passes(finding: Finding, tests: int, rules: Rules) -> float:
    n, flips = int(_number(finding, "n")), _number(finding, "flips")
    if finding.layer == "frozen":
        return frozen_passes(n, flips, DROP, tests, rules)
    held = replace(
        rules, margin=_number(finding, "margin"), points=bool(_number(finding, "points"))
    )
    return claim_passes(
        n, flips, DROP, _number(finding, "teacher"), tests, held, chance=_number(finding, "chance")
    )


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.01 else "over 99 %" if share > 0.99 else f"{100 * share:.0f} %"


def frozen_passes(n: int, flips: float, drop: float, tests: int, rules: Rules) -> float:
    """Return how often the frozen layer passes a row that truly lost `drop`, exactly: over the
    number of flips K and of lost items L of it.

    It passes where these K flips can show a drop of `detect`, the drop seen is at most that, and it
    is not both significant (McNemar at alpha over the number of tests, Holm's level of the first)
    and above the tolerance. Given K, all of this bounds L from above.
    """
    from scipy.special import bdtr

    flips, alpha = max(flips, drop), rules.frozen_alpha / tests
    middle, spread = n * flips, math.sqrt(n * flips * (1 - flips))
    counts = np.arange(
        max(0, math.floor(middle - _FAR * spread)), min(n, math.ceil(middle + _FAR * spread)) + 1
    )
    tolerated = np.floor((counts + rules.tolerance * n) / 2 + 1e-9)
    most = np.minimum(
        np.maximum(_critical(counts, alpha) - 1, tolerated),
        np.floor((counts + rules.detect * n) / 2 + 1e-9),
    )
    shown = np.array(
        [stats.items_to_detect(int(count) / n, rules.detect, alpha=alpha) <= n for count in counts]
    )
    lost = bdtr(np.minimum(most, counts), counts, (flips + drop) / (2 * flips))
    return float((_probabilities(counts, n, flips) * lost * shown).sum())


def _critical(counts: npt.NDArray[np.int64], alpha: float) -> npt.NDArray[np.int64]:
    """Return for each number of flips the fewest lost items of which McNemar's p is below alpha
    (one more than there are, if none is).
    """
    from scipy.special import bdtrc

    low, high = counts // 2, counts + 1  # at half of them p is above .5
    while (high - low > 1).any():
        middle = (low + high) // 2
        small = bdtrc(middle - 1, counts, 0.5) < alpha
        low, high = np.where(small, low, middle), np.where(small, middle, high)
    return high


def _probabilities(counts: npt.NDArray[np.int64], n: int, share: float) -> npt.NDArray[np.float64]:
    """Return the binomial probabilities of these counts."""
    from scipy.special import gammaln, xlog1py, xlogy

    ways = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    chances: npt.NDArray[np.float64] = np.exp(
        ways + xlogy(counts, share) + xlog1py(n - counts, -share)
    )
    return chances


def claim_passes(
    n: int,
    flips: float,
    drop: float,
    teacher: float,
    tests: int,
    rules: Rules,
    *,
    chance: float = 0.0,
) -> float:
    """Return about how often a claim passes a row that truly lost `drop` of its teacher's share:
    the normal approximation of its test.
    """
    assert rules.margin is not None
    lost, won = min((max(flips, drop) + drop) / 2, teacher), (max(flips, drop) - drop) / 2
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
