"""Which trained positions count: those where a teacher has most to say."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.training.divergences import distribution_entropy, distribution_kl, label_loss
from methods.training.losses import cross_entropy
from methods.training.positions import Positions
from methods.training.rows import TokenRow

Score = Literal["kl", "entropy", "excess", "random"]


@dataclass(frozen=True)
class Selection:
    """Trains a share of each row's tokens: those with the highest score, or random ones. At least
    one a row.

    kl: the teacher's divergence from the student now. entropy: the teacher's. excess: the label's
    cross-entropy under the student less that under the teacher (Lin et al., 2024, Rho-1).
    """

    share: float
    score: Score
    seed: int

    def counts(self, row: TokenRow) -> int:
        """Return how many tokens of a row are trained; known before anything is computed."""
        return max(1, int(self.share * row.trained + 0.5))

    def chosen(self, at: Positions, number: int) -> Tensor:
        """Return which positions are trained, (N,) of booleans: exactly `counts` of each row's."""
        assert at.batch is not None
        with torch.no_grad():
            scores = self._scores(at, number)
        chosen = torch.zeros_like(at.labels_N, dtype=torch.bool)
        start = 0
        for row in at.batch.rows:
            own = scores[start : start + row.trained]
            chosen[start + own.topk(self.counts(row)).indices] = True
            start += row.trained
        return chosen

    def _scores(self, at: Positions, number: int) -> Tensor:
        if self.score == "random":  # by the row itself: the same for any split into micro-batches
            assert at.batch is not None
            drawn = [
                torch.rand(
                    row.trained,
                    generator=torch.Generator().manual_seed(
                        hash((self.seed, number, row.ids)) % 2**63
                    ),
                )
                for row in at.batch.rows
            ]
            return torch.cat(drawn).to(at.labels_N.device)
        [teacher] = at.teachers
        if self.score == "kl":
            return distribution_kl(at.student_NV, teacher, 1.0)
        if self.score == "entropy":
            return distribution_entropy(teacher)
        return cross_entropy(at.student_NV, at.labels_N) - label_loss(teacher, at.labels_N)
