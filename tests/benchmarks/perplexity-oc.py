"""How often the interval of a perplexity ratio holds the truth, with few unequal documents.

Documents are drawn as WikiText's are: their lengths scatter by a factor (log-normal), the student
loses another number of nats a word on each, more on some than on others. Coverage of the 95 %
interval of student's perplexity / teacher's, and how often a student that stands exactly at a limit
passes (one-sided alpha .05, at most .05 should); beside it the interval with 1.96 standard errors
that was used before.

python tests/benchmarks/perplexity-oc.py [--draws 20000]
"""

import argparse
import math

import numpy as np
import numpy.typing as npt
from _form import figure, write_figures

from harness.statistics import means
from harness.statistics.stats import ratio_test

DOCUMENTS = (2, 4, 10, 62)
# deviation of the logarithm of a document's length; the 62 articles of WikiText-2 have 1.1
SPREADS = (0.0, 0.5, 1.1)
LOSS, LIMIT = math.log(1.05), 1.05  # nats a word that the student loses in the mean


def draw_documents(
    count: int, spread: float, generator: np.random.Generator
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the student's and the teacher's documents as (log-likelihood, words).

    In the population the student is exactly LOSS a word worse.
    """
    words = np.maximum(20, np.round(np.exp(generator.normal(7.5, spread, count))))
    teacher = -words * generator.normal(3.4, 0.4, count)
    loss = generator.gamma(4.0, LOSS / 4.0, count)  # skewed: some documents lose much more
    student = teacher - words * loss
    return list(zip(student.tolist(), words.tolist(), strict=True)), list(
        zip(teacher.tolist(), words.tolist(), strict=True)
    )


def old_interval(
    student: list[tuple[float, float]], teacher: list[tuple[float, float]]
) -> tuple[float, float]:
    """Return the interval with a normal quantile and the plain sum of squares."""
    gaps: npt.NDArray[np.float64] = np.asarray(
        [theirs[0] - ours[0] for ours, theirs in zip(student, teacher, strict=True)]
    )
    words = np.asarray([size for _, size in student])
    mean = gaps.sum() / words.sum()
    error = (
        math.sqrt(((gaps - mean * words) ** 2).sum() * len(gaps) / (len(gaps) - 1)) / words.sum()
    )
    return math.exp(mean - 1.96 * error), math.exp(mean + 1.96 * error)


def coverage(
    count: int, spread: float, draws: int, generator: np.random.Generator
) -> dict[str, float]:
    """Return how often the new and the old interval hold the truth, and how often a limit passes.

    The student stands exactly at the limit.
    """
    holds, before, passed = 0, 0, 0
    for _ in range(draws):
        student, teacher = draw_documents(count, spread, generator)
        ratio = means.perplexity_ratio_interval([student], [teacher])
        assert ratio.low is not None and ratio.high is not None
        holds += ratio.low <= LIMIT <= ratio.high
        low, high = old_interval(student, teacher)
        before += low <= LIMIT <= high
        passed += ratio_test(ratio, LIMIT)[0] <= 0.05
    return {"held": holds / draws, "normal": before / draws, "passes at the limit": passed / draws}


def main() -> None:
    """Draw, judge, and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=20_000)
    draws = parser.parse_args().draws
    generator = np.random.default_rng(62)
    figures = []
    for count in DOCUMENTS:
        shares_by_spread = {spread: coverage(count, spread, draws, generator) for spread in SPREADS}
        worst = min(shares_by_spread.values(), key=lambda shares: shares["held"])
        name = f"perplexity-oc:coverage:{count}"
        target = None if count == 2 else 0.93
        figures.append(
            figure(
                name,
                [worst["held"]],
                unit=f"coverage of a 95 % interval, {count} documents, the lowest",
                better="higher",
                target=target,
                details={"draws": draws, "by spread of lengths": shares_by_spread},
            )
        )
        before = min(shares["normal"] for shares in shares_by_spread.values())
        figures.append(
            figure(
                f"{name}:normal",
                [before],
                unit="the same with 1.96 standard errors",
                better="higher",
                target=None,
                peer="normal quantile, plain sum of squares",
            )
        )
    write_figures("perplexity-oc", figures)


if __name__ == "__main__":
    main()
