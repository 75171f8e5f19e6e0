"""What *passed* means: the stated rates are those of the check."""

import json

import numpy as np
import pytest
from claim_rows import GOOD, layer, row, score
from gate_rows import flipped, frozen, marks

from harness.gate import output
from harness.gate.check import check
from harness.gate.passed import claim_pass_rate, frozen_pass_rate
from harness.gate.rules import Rules, Verdict
from harness.statistics import stats


def test_what_a_pass_means_stands_under_the_verdict():
    checked = check(
        [GOOD, row("int8", score(flipped(marks(800), lose=22, win=18)))],
        Rules(margin=0.95),
        frozen(GOOD, row("int8", score(marks(800)))),
    )
    line = checked.passed_means
    assert line.startswith(
        "passed means: claims: shown that every row keeps 95 %, wrongly in at most 5 % of checks; "
        "a true drop of 3 points"
    )
    assert (
        "frozen items: no loss was shown, which does not prove that there is none; "
        "a true drop of 3 points passes" in line
    )
    assert "on gsm8k-mini (n 1,000, 4.0 % flips)" in line and "\n" not in line
    assert (
        output.terminal_text(checked).splitlines()[-1] == line
        and output.summary(checked) in output.terminal_text(checked).splitlines()[-2]
    )
    assert f"{output.summary(checked)}\n\n{line}\n" in output.markdown(checked)
    assert json.loads(output.as_json(checked))["passed_means"] == line


@pytest.mark.parametrize(
    ("n", "flips", "drop"),
    [(250, 0.04, 0.03), (400, 0.06, 0.03), (1000, 0.12, 0.03), (1000, 0.12, 0.05)],
)
def test_the_stated_rate_is_the_rate_of_the_check(n, flips, drop):
    """Drawn rows pass the check as often as the closed form says, within four standard errors."""
    draws = np.random.default_rng(n).multinomial(
        n, [(flips + drop) / 2, (flips - drop) / 2, 1 - flips], size=400
    )
    base, passed = marks(int(0.8 * n), n), []
    for lost, won, _ in draws:
        after = row("int8", score(flipped(base, lose=int(lost), win=int(won))))
        [finding] = layer(check([after], Rules(), frozen(row("int8", score(base)))), "frozen")
        passed.append(finding.verdict is Verdict.passed)
    stated = frozen_pass_rate(n, flips, drop, 1, Rules())
    assert np.mean(passed) == pytest.approx(
        stated, abs=4 * max(stated * (1 - stated), 0.01) ** 0.5 / 20
    )


@pytest.mark.parametrize(
    ("chance", "points", "margin"), [(0.0, False, 0.95), (0.25, False, 0.9), (0.0, True, 0.05)]
)
def test_the_stated_rate_of_a_claim_is_the_rate_of_its_test(chance, points, margin):
    n, flips, drop, teacher = 1000, 0.10, 0.03, 0.75
    lost, won = (flips + drop) / 2, (flips - drop) / 2
    draws = np.random.default_rng(1).multinomial(
        n, [teacher - lost, lost, won, 1 - teacher - won], size=3000
    )
    weights = stats.difference_weights(-margin) if points else stats.ratio_weights(margin, chance)
    passed = np.mean(
        [stats.score_z(stats.Pairs(*map(int, draw)), weights) >= 1.6449 for draw in draws]
    )
    assert claim_pass_rate(
        n, flips, drop, teacher, 1, Rules(margin=margin, points=points), chance=chance
    ) == pytest.approx(passed, abs=0.04)


def test_more_tests_and_fewer_flips_change_what_a_pass_means():
    rules = Rules(margin=0.95)
    assert frozen_pass_rate(1000, 0.12, 0.03, 1, rules) < frozen_pass_rate(
        1000, 0.12, 0.03, 4, rules
    )
    assert claim_pass_rate(1000, 0.1, 0.0, 0.8, 1, rules) > claim_pass_rate(
        1000, 0.1, 0.0, 0.8, 30, rules
    )
    assert (
        frozen_pass_rate(100, 0.12, 0.03, 1, rules) == 0
    )  # 100 items pass nothing but equal answers
    assert frozen_pass_rate(14_042, 0.1, 0.0, 1, rules) > 0.98


def test_the_page_on_ci_says_what_is_computed():
    """Its rates in words: one in three, six in ten, hardly ever.

    Below about 200 items only equal answers pass.
    """
    rules = Rules()
    assert frozen_pass_rate(1000, 0.12, 0.03, 1, rules) == pytest.approx(1 / 3, abs=0.05)
    assert frozen_pass_rate(250, 0.04, 0.03, 1, rules) == pytest.approx(0.6, abs=0.05)
    assert frozen_pass_rate(1000, 0.12, 0.05, 1, rules) < 0.02
    assert stats.items_to_detect(0.0, rules.detect, alpha=rules.frozen_alpha) == pytest.approx(
        200, abs=5
    )
    assert all(frozen_pass_rate(n, 0.01, 0.0, 1, rules) == 0 for n in (100, 190))
