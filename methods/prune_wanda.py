"""Wanda: weights times the norm of the inputs they meet, the lowest of each output's row become
zero (Sun et al., 2024).

Cost: two passes over the calibration text. Dense kernels gain nothing from zeros. The control is
magnitude at equal ratio.
"""

from typing import TYPE_CHECKING, ClassVar

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.sparsity import CalibratedSparsityMethod

if TYPE_CHECKING:
    from torch import Tensor, nn


@settings
class WandaPruning(CalibratedSparsityMethod):
    """Set weights with the smallest product of magnitude and input norm to zero."""

    controls: ClassVar[tuple[str, ...]] = ("prune-magnitude",)

    def compress(self, job: Job) -> Checkpoint:
        """Compare within each output's row."""
        from methods.compression.sparsity import pruning_mask, wanda_score

        def cut(layer: "nn.Linear", squares: "Tensor", tokens: int, stays: "Tensor | None") -> None:
            layer.weight.mul_(
                pruning_mask(
                    wanda_score(layer.weight, squares),
                    ratio=self.ratio,
                    pattern=self.pattern,
                    within="row",
                )
            )

        return self.swept(job, "prune-wanda", kind="squares", cut=cut)
