"""SparseGPT: weights that cost least go, and the columns after them make up for it (Frantar and
Alistarh, 2023).

Cost: two passes over the calibration text and one factorisation a layer. Dense kernels gain nothing
from zeros. The control is magnitude at equal ratio.
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
    """Set the cheapest weights to zero and let the others make up for it."""

    controls: ClassVar[tuple[str, ...]] = ("prune-magnitude",)

    # of the mean of the second moments, added to each
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01

    def compress(self, job: Job) -> Checkpoint:
        """Sweep over the blocks."""
        from methods.compression.sparsity import sparse_gpt

        def cut(layer: "nn.Linear", gram: "Tensor", tokens: int, stays: "Tensor | None") -> None:
            kept = sparse_gpt(
                layer.weight,
                gram,
                ratio=self.ratio,
                pattern=self.pattern,
                damp=self.dampening_frac,
                stays=stays,
            )
            layer.weight.copy_(kept)

        return self.swept(job, "prune-sparsegpt", kind="gram", cut=cut)
