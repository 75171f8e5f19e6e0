"""Which trained positions count: those with the highest score by the teacher, or random ones."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.training.divergences import distribution_entropy, distribution_kl, label_loss
from methods.training.losses import cross_entropy
from methods.training.positions import Positions
from methods.training.rows import TokenRow
from methods.training.transfers import to_device

Score = Literal["kl", "entropy", "excess", "random"]


@dataclass(frozen=True)
class Selection:
    """Trains a share of each row's tokens, at least one: the highest scores, or random ones.

    kl: the teacher's divergence from the student at this step. entropy: the teacher's. excess: the
    label's cross-entropy under the student less that under the teacher (Lin et al., 2024, Rho-1).
    """

    share: float
    score: Score
    seed: int

    def tokens_kept(self, row: TokenRow) -> int:
        """Return how many tokens of a row are trained; known before anything is computed."""
        return max(1, int(self.share * row.trained_tokens + 0.5))

    def kept_positions(self, positions: Positions, step: int) -> Tensor:
        """Return which positions are trained, in ascending order: `tokens_kept` of each row."""
        assert positions.batch is not None
        with torch.no_grad():
            scores = self._scores(positions, step)
        kept: list[Tensor] = []
        start = 0
        for row in positions.batch.rows:
            row_scores = scores[start : start + row.trained_tokens]
            highest = row_scores.topk(self.tokens_kept(row)).indices
            kept.append(start + highest.sort().values)
            start += row.trained_tokens
        return torch.cat(kept)

    def _scores(self, positions: Positions, step: int) -> Tensor:
        """Return a score per position, (N,); the highest ones are trained."""
        if self.score == "random":
            return self._random_scores(positions, step)
        [teacher] = positions.teachers
        if self.score == "kl":
            return distribution_kl(positions.student_NV, teacher, 1.0)
        if self.score == "entropy":
            return distribution_entropy(teacher)
        student_loss = cross_entropy(positions.student_NV, positions.labels_N)
        return student_loss - label_loss(teacher, positions.labels_N)

    def _random_scores(self, positions: Positions, step: int) -> Tensor:
        """Return random scores, seeded by the row: any split into micro-batches gives the same."""
        assert positions.batch is not None
        scores = []
        for row in positions.batch.rows:
            row_seed = hash((self.seed, step, row.ids)) % 2**63
            generator = torch.Generator().manual_seed(row_seed)
            scores.append(torch.rand(row.trained_tokens, generator=generator))
        return to_device(torch.cat(scores), positions.labels_N.device)
