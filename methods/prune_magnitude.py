"""Magnitude pruning: the smallest weights of every layer become zero (Han et al., 2015). The
control sets as many random ones to zero.

Dense kernels gain nothing from zeros: bytes and speed are those of the dense model. Cost: seconds,
no data. Fails early: at 50 % on models without recovery, because a small weight behind a large
input matters more than a large one behind nothing.
"""

from typing import ClassVar

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.sparsity import SparsityMethod


@settings
class MagnitudePruning(SparsityMethod):
    """Set the smallest weights of every layer to zero."""

    controls: ClassVar[tuple[str, ...]] = ("prune-random",)

    def compress(self, job: Job) -> Checkpoint:
        """Compare magnitudes within each layer."""
        return self.zeroed(
            job, "prune-magnitude", lambda name, layer: layer.weight.abs().float(), within="layer"
        )


@settings
class RandomPruning(SparsityMethod):
    """Set as many random weights to zero (control)."""

    is_control: ClassVar[bool] = True
    draws_random_numbers: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Draw a score for every weight."""
        import torch

        draw = torch.Generator().manual_seed(job.seed)
        return self.zeroed(
            job,
            "prune-random",
            lambda name, layer: torch.rand(layer.weight.shape, generator=draw).to(
                layer.weight.device
            ),
            within="layer",
        )
