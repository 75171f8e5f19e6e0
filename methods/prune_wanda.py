"""Wanda: prunes the lowest products of a weight and the norm of its input (Sun et al., 2024).

Products are compared within the row of an output. Cost: two passes over the calibration text. Dense
kernels gain nothing from zeros. The control is magnitude pruning at the same ratio.
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
        """Prune the lowest scores within the row of each output, block by block."""
        from methods.compression.sparsity import pruning_mask, wanda_score

        def prune(layer: "nn.Linear", squares: "Tensor", keep_mask: "Tensor | None") -> None:
            score = wanda_score(layer.weight, squares)
            mask = pruning_mask(score, ratio=self.ratio, pattern=self.pattern, compare="row")
            layer.weight.mul_(mask)

        return self.prune_blocks(job, "prune-wanda", kind="squares", prune=prune)
