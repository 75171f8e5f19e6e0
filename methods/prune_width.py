"""Width pruning: removes feed-forward channels and groups of heads with small activations.

A channel's score is `mean |act(gate) * up| * ||down column||` over calibration text. The score of a
KV group is the same of its part of the output projection's input. A group is removed with its query
heads, key head and value head, so that the ratio of heads and the head size stay. By default every
block loses as many channels, and the student opens with plain transformers. `allocation=global`
compares channels over all blocks, so that widths differ; such a student opens after
`import methods.packed`. Control: random channels and groups.

Parameters of a gated block afterwards: 3 H F + 2 H A d + 2 H K d and norms, which is checked. Cost:
one pass over the calibration text.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.base import Compressed, StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops
from methods.compression.sizes import WidthReduction

if TYPE_CHECKING:
    from torch import Tensor

    from harness.models.shape import Shape

Allocation = Literal["uniform", "global"]


@settings
class WidthPruningSettings(Compressed):
    """Settings of width pruning and of its control: how much is removed."""

    needs_plain: ClassVar[bool] = True
    drops_inputs: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2  # share of the feed-forward channels to remove
    groups: Annotated[int, Field(ge=0)] = 0  # KV groups to remove from every block
    # the number of kept channels is rounded to a multiple of it, which kernels need no padding for
    multiple: Annotated[int, Field(ge=1)] = 16

    def reduction(self) -> WidthReduction:
        """Return how much is removed."""
        return WidthReduction(ratio=self.ratio, groups=self.groups, multiple=self.multiple)

    def resulting_shape(self, before: "Shape") -> "Shape":
        """Return the shape after pruning; at least one channel and one group is kept."""
        from dataclasses import replace

        kv_heads = max(1, before.kv_heads - self.groups)
        channels = max(1, self.reduction().kept_channels(before.intermediate))
        return replace(
            before,
            intermediate=channels,
            kv_heads=kv_heads,
            heads=before.heads // before.kv_heads * kv_heads,
        )


@settings
class WidthPruning(WidthPruningSettings, Calibrated):
    """Remove the feed-forward channels (and head groups) with the smallest activations."""

    controls: ClassVar[tuple[str, ...]] = ("prune-width-random",)

    allocation: Allocation = "uniform"  # global: channels of all blocks are compared; widths differ

    @property
    def keeps_architecture(self) -> bool:
        """Tell whether all blocks have one width."""
        return self.allocation == "uniform"

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it removes as many."""
        return {"ratio": self.ratio, "groups": self.groups, "multiple": self.multiple}

    def compress(self, job: Job) -> Checkpoint:
        """Score channels and heads by the inputs that they give to a projection; keep the best."""
        import torch

        from methods.compression.calibration import InputStatistics, recording_inputs
        from methods.compression.narrowing import WidthPruner, weight_matrix

        builder = StudentBuilder(job, "prune-width", plain=True)
        pruner = WidthPruner(builder, self.reduction())
        data = self.calibrate(job, builder.opened)
        statistics = InputStatistics("magnitude")
        with torch.no_grad(), recording_inputs(statistics, pruner.readers()):
            for batch in data.batches():
                builder.model(input_ids=batch, use_cache=False, logits_to_keep=1)
        tokens = int(data.ids.numel())

        def score(reader: str) -> "Tensor":
            norms = weight_matrix(builder.model, reader).float().norm(dim=0)
            return statistics.sums[reader] / tokens * norms

        channels = {part.name: score(part.reader) for part in pruner.parts}
        heads = {name: score(reader) for name, reader in pruner.output_projections().items()}
        notes = {"calibration": dict(data.description), "allocation": self.allocation}
        flops = calibration_flops(builder, data, 1)
        return pruner.save(channels, heads, self.allocation, notes, flops=flops)


@settings
class RandomWidthPruning(WidthPruningSettings):
    """Remove as many random channels and head groups (control)."""

    is_control: ClassVar[bool] = True
    draws_random_numbers: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Draw a score for every channel and head output, and keep the best."""
        import torch

        from methods.compression.narrowing import WidthPruner, weight_matrix

        builder = StudentBuilder(job, "prune-width-random", plain=True)
        pruner = WidthPruner(builder, self.reduction())
        generator = torch.Generator().manual_seed(job.seed)

        def random_score(outputs: int) -> "Tensor":
            return torch.rand(outputs, generator=generator)

        channels = {part.name: random_score(part.width) for part in pruner.parts}
        heads = {
            name: random_score(weight_matrix(builder.model, reader).shape[1])
            for name, reader in pruner.output_projections().items()
        }
        return pruner.save(channels, heads, "uniform", {})
