"""Magnitude pruning: the smallest weights of every layer become zero (Han et al., 2015).

The control sets as many random weights to zero. Dense kernels gain nothing from zeros: bytes and
speed are those of the dense model. Cost: seconds, no data. It fails early, at 50 % without a
recovery training: a small weight behind a large input matters more than a large weight behind a
small input.
"""

from typing import TYPE_CHECKING, ClassVar

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.sparsity import SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor, nn


@settings
class MagnitudePruning(SparsityMethod):
    """Set the smallest weights of every layer to zero."""

    controls: ClassVar[tuple[str, ...]] = ("prune-random",)

    def compress(self, job: Job) -> Checkpoint:
        """Prune the weights of the smallest magnitude within each layer."""
        return self.prune_lowest(job, "prune-magnitude", lambda layer: layer.weight.abs().float())


@settings
class RandomPruning(SparsityMethod):
    """Set as many random weights to zero (control)."""

    is_control: ClassVar[bool] = True
    draws_random_numbers: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Draw a score for every weight, and prune the lowest within each layer."""
        import torch

        generator = torch.Generator().manual_seed(job.seed)

        def random_score(layer: "nn.Linear") -> "Tensor":
            return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)

        return self.prune_lowest(job, "prune-random", random_score)
