"""Each term of the loss from step to step: its weight, its mean, and whether it diverges."""

import math
from collections.abc import Mapping, Sequence

from harness.errors import CellFailed
from methods.training.rows import TokenRow
from methods.training.state import LoopState, TermState
from methods.training.stepper import Stepper, StepValues
from methods.training.terms import Objective

# An `auto` weight is at most this: a term near 0 from the start (a block and its own copy) would
# get a weight without bound.
MAX_AUTO_WEIGHT = 1e6
DIVERGENCE_FACTOR = 1_000  # a term this many times its first value has diverged


class TrainingDiverged(CellFailed):
    """A loss or a gradient is not finite, or a loss is far above its first value."""


class TermProgress:
    """Weighs the terms of a step by the steps before it, and keeps their values in the state."""

    def __init__(self, objective: Objective, state: LoopState) -> None:
        self.objective, self.state = objective, state

    def weights(self, stepper: Stepper, rows: Sequence[TokenRow], step: int) -> dict[str, float]:
        """Return each term's weight.

        Terms of weight `auto` count as much as the others together, by running means of earlier
        steps.
        """
        terms = self.objective.terms
        fixed = {term.name: float(term.weight) for term in terms if term.weight != "auto"}
        if len(fixed) == len(terms):
            return fixed
        if not self.state.means:
            self.state.means = stepper.values(rows, step).means
        auto_terms = [term.name for term in terms if term.weight == "auto"]
        return fixed | auto_weights(auto_terms, fixed, self.state.means)

    def refuse_divergence(self, step: int, means: Mapping[str, float], norm: float) -> None:
        """Raise `TrainingDiverged` for a loss or gradient that is not finite, or far too large."""
        for name, value in means.items():
            earlier = self.state.terms.get(name)
            first = earlier.first if earlier else value
            limit = DIVERGENCE_FACTOR * max(abs(first), 1.0)
            if not math.isfinite(value) or abs(value) > limit:
                raise TrainingDiverged(
                    f"the term {name} became {value:.4g} at step {step} (first {first:.4g}); try "
                    "a lower learning_rate"
                )
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient's norm became {norm} at step {step} (terms: {dict(means)}); try a "
                "lower learning_rate"
            )

    def update(self, weights: Mapping[str, float], values: StepValues) -> None:
        """Write a step's terms into the state."""
        means = self.state.means
        self.state.means = {
            name: 0.9 * means.get(name, value) + 0.1 * value for name, value in values.means.items()
        }
        for name, value in values.means.items():
            earlier = self.state.terms.get(name)
            norm = values.norms.get(name, earlier.gradient_norm if earlier else None)
            first = earlier.first if earlier else value
            self.state.terms[name] = TermState(first, norm, weights[name], value)

    def summary(self, weights: Mapping[str, float], means: Mapping[str, float]) -> str:
        """Return a step's loss and terms in words."""
        loss = sum(weights[name] * value for name, value in means.items())
        parts = []
        for name, value in means.items():
            norm = self.state.terms[name].gradient_norm
            norm_text = "" if norm is None else f" |g| {norm:.2g}"
            parts.append(f"{name} {value:.3f} x{weights[name]:.3g}{norm_text}")
        return f"loss {loss:.3f} ({', '.join(parts)})"


def auto_weights(
    auto_terms: Sequence[str], fixed: Mapping[str, float], means: Mapping[str, float]
) -> dict[str, float]:
    """Return a weight per `auto` term.

    With it the term's weighted mean equals that of the terms of fixed weight together.
    """
    if not fixed:
        return dict.fromkeys(auto_terms, 1.0)
    target = sum(weight * means.get(name, 0.0) for name, weight in fixed.items())
    return {
        name: min(target / max(means.get(name, target), 1e-8), MAX_AUTO_WEIGHT)
        for name in auto_terms
    }
