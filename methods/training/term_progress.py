"""How each term of the loss goes from step to step: its weight, its running mean, and whether it
explodes.
"""

import math
from collections.abc import Mapping, Sequence

from harness.errors import CellFailed
from methods.training.rows import TokenRow
from methods.training.state import LoopState, TermState
from methods.training.stepper import Stepper, StepValues
from methods.training.terms import Objective

# What `auto` gives a term at most: one that is nearly 0 from the start (a block and its own copy)
# has no more to say.
MAX_AUTO_WEIGHT = 1e6
DIVERGENCE_FACTOR = 1_000  # times its first value


class TrainingDiverged(CellFailed):
    """A loss or a gradient that is no number any more, or that has exploded."""


class TermProgress:
    """Weighs the terms of a step by the steps before it, and keeps in the state what they
    became.
    """

    def __init__(self, objective: Objective, state: LoopState) -> None:
        self.objective, self.state = objective, state

    def weights(self, stepper: Stepper, rows: Sequence[TokenRow], number: int) -> dict[str, float]:
        """Return each term's weight: `auto` ones count as much as the others together, by running
        means of earlier steps.
        """
        terms = self.objective.terms
        fixed = {term.name: float(term.weight) for term in terms if term.weight != "auto"}
        if len(fixed) == len(terms):
            return fixed
        if not self.state.means:
            self.state.means = stepper.values(rows, number).means
        free = [term.name for term in terms if term.weight == "auto"]
        return fixed | auto_weights(free, fixed, self.state.means)

    def refuse_explosion(self, number: int, means: Mapping[str, float], norm: float) -> None:
        """Raise `Diverged` for a loss or gradient that is no number, or a loss far above its first
        value.
        """
        for name, value in means.items():
            before = self.state.terms.get(name)
            first = before.first if before else value
            if not math.isfinite(value) or abs(value) > DIVERGENCE_FACTOR * max(abs(first), 1.0):
                raise TrainingDiverged(
                    f"the term {name} became {value:.4g} at step {number} (first {first:.4g}); try "
                    "a lower learning_rate"
                )
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient's norm became {norm} at step {number} (terms: {dict(means)}); try a "
                "lower learning_rate"
            )

    def remember(self, weights: Mapping[str, float], values: StepValues) -> None:
        """Take a step's terms into the state."""
        means = self.state.means
        self.state.means = {
            name: 0.9 * means.get(name, value) + 0.1 * value for name, value in values.means.items()
        }
        for name, value in values.means.items():
            before = self.state.terms.get(name)
            norm = values.norms.get(name, before.gradient_norm if before else None)
            first = before.first if before else value
            self.state.terms[name] = TermState(first, norm, weights[name], value)

    def summary(self, weights: Mapping[str, float], means: Mapping[str, float]) -> str:
        """Return a step's loss and terms in words."""
        loss = sum(weights[name] * value for name, value in means.items())
        parts = []
        for name, value in means.items():
            norm = self.state.terms[name].gradient_norm
            shown = "" if norm is None else f" |g| {norm:.2g}"
            parts.append(f"{name} {value:.3f} x{weights[name]:.3g}{shown}")
        return f"loss {loss:.3f} ({', '.join(parts)})"


def auto_weights(
    free: Sequence[str], fixed: Mapping[str, float], means: Mapping[str, float]
) -> dict[str, float]:
    """Return a weight for each free term, with which its mean is that of the terms of fixed weight
    together.
    """
    if not fixed:
        return dict.fromkeys(free, 1.0)
    anchor = sum(weight * means.get(name, 0.0) for name, weight in fixed.items())
    return {
        name: min(anchor / max(means.get(name, anchor), 1e-8), MAX_AUTO_WEIGHT) for name in free
    }
