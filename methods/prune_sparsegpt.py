"""SparseGPT: prunes the weights that cost least; later columns compensate the error.

Frantar and Alistarh, 2023. Cost: two passes over the calibration text and one factorisation per
layer. Dense kernels gain nothing from zeros. The control is magnitude pruning at the same ratio.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.sparsity import CalibratedSparsityMethod

if TYPE_CHECKING:
    from torch import Tensor, nn


@settings
class SparseGptPruning(CalibratedSparsityMethod):
    """Set the cheapest weights to zero; the others are changed to compensate the error."""

    controls: ClassVar[tuple[str, ...]] = ("prune-magnitude",)

    # share of the mean second moment, added to each second moment
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01

    def compress(self, job: Job) -> Checkpoint:
        """Prune block by block, by the second moments of the layers' inputs."""
        from methods.compression.sparsity import sparse_gpt

        def prune(layer: "nn.Linear", gram: "Tensor", keep_mask: "Tensor | None") -> None:
            pruned = sparse_gpt(
                layer.weight,
                gram,
                ratio=self.ratio,
                pattern=self.pattern,
                dampening=self.dampening_frac,
                keep_mask=keep_mask,
            )
            layer.weight.copy_(pruned)

        return self.prune_blocks(job, "prune-sparsegpt", kind="gram", prune=prune)
