"""The operating characteristic of the gate at n = 1,000, beside two rules that are in use: how often is each right and wrong?

Claim: a student that keeps exactly the margin (95 % of a teacher at 75 %, 10 % flips) should rarely pass. Frozen items: an unchanged
student (flips both ways alike, up to 12 %) should rarely be called regressed, and one that truly lost 5 points should be caught. 20,000
draws each through `harness.gate.check` on made-up records. Peers, on the same draws: vLLM's evaluation tests (score within a relative
0.08 of the expected one) and llm-compressor's (recovery rounded to two places, at least 0.95).

python tests/benchmarks/gate-oc.py
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from _form import figure, write
from _records import frozen, scored

from harness.gate import Rules, Verdict, check
from harness.stats import Pairs

N, DRAWS, TEACHER = 1_000, 20_000, 0.75


def strings(counts: Pairs) -> tuple[str, str]:
    """Return outcomes of then and now with these counts."""
    a, b, c, d = counts.both, counts.teacher_only, counts.student_only, counts.neither
    return "1" * a + "1" * b + "0" * c + "0" * d, "1" * a + "0" * b + "1" * c + "0" * d


@cache
def claim(a: int, b: int, c: int) -> Verdict:
    """What the gate's claim layer says of a table of teacher and student."""
    teacher, student = strings(Pairs(a, b, c, N - a - b - c))
    return check([scored("teacher", teacher), scored("response", student)], Rules(margin=0.95)).verdict


@cache
def against(a: int, b: int, c: int) -> Verdict:
    """What the gate's frozen layer says of a table of then and now."""
    then, now = strings(Pairs(a, b, c, N - a - b - c))
    found = check([scored("response", now)], Rules(), frozen(scored("response", then)))
    return next(one.verdict for one in found.findings if one.layer == "frozen")


def share(rule: Callable[[int, int, int], bool], cells: np.ndarray) -> float:
    """Return how often a rule says yes."""
    return float(np.mean([rule(*map(int, row[:3])) for row in cells]))


def drawn(flips: float, drop: float, seed: int) -> np.ndarray:
    """Draw tables of a model at 75 % and another one that loses `drop`."""
    lost, won = (flips + drop) / 2, (flips - drop) / 2
    return np.random.default_rng(seed).multinomial(N, [TEACHER - lost, lost, won, 1 - TEACHER - won], size=DRAWS)


def vllm(a: int, b: int, c: int) -> bool:
    """Pass by a relative tolerance of 0.08 around the expected score."""
    return abs((a + c) - (a + b)) <= 0.08 * (a + b)


def compressor(a: int, b: int, c: int) -> bool:
    """Pass where the recovery, rounded to two places, is at least 0.95."""
    return round((a + c) / (a + b), 2) >= 0.95


def main() -> None:
    """Draw, judge, and write the figures of the gate and of each peer."""
    margin, same, lower = drawn(0.10, 0.05 * TEACHER, 1), drawn(0.12, 0.0, 2), drawn(0.12, 0.05, 3)

    def all_three(ours: Verdict, judge: Callable[..., Verdict], cells: np.ndarray, *, passes: bool) -> dict[str, float]:
        peers = {"vllm": share(vllm, cells), "llm-compressor": share(compressor, cells)}
        return {
            "": share(lambda *one: judge(*one) is ours, cells),
            **{name: value if passes else 1 - value for name, value in peers.items()},
        }

    judges = {
        "margin-pass": (all_three(Verdict.passed, claim, margin, passes=True), "lower", 0.06,
                        "of students exactly at the margin that pass"),
        "no-loss-regressed": (all_three(Verdict.regressed, against, same, passes=False), "lower", 0.01,
                              "of unchanged students called regressed, 12 % flips"),
        "drop5-caught": (all_three(Verdict.regressed, against, lower, passes=False), "higher", 0.95,
                         "of true drops of 5 points that are caught, 12 % flips"),
    }  # fmt: skip
    other = share(lambda *cells: against(*cells) is Verdict.cannot_tell, same)
    details = {
        "n": N, "draws": DRAWS, "teacher": TEACHER, "unchanged students that it cannot tell": other,
        "flips at the margin": 0.10, "unchanged passes": share(lambda *cells: against(*cells) is Verdict.passed, same),
    }  # fmt: skip
    figures = [
        figure(f"gate-oc:{name}" if not judge else f"gate-oc:{name}:{judge}", [value], unit=unit, better=better, target=target,
               peer="" if not judge else f"rule of {judge}, same draws", details=details if not judge else None)
        for name, (shares, better, target, unit) in judges.items() for judge, value in shares.items()
    ]  # fmt: skip
    write(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
