"""Width pruning: feed-forward channels and whole groups of heads go, by what flows through them on
calibration text.

A channel's score is `mean |act(gate) * up| * ||down column||`; a KV group's (its query heads, key
head and value head together, so that the ratio of heads and the head size stay) is the same of its
part of the output projection's input. By default every block loses as much, and the student opens
with plain transformers; `allocation=global` compares channels over all blocks, so that widths
differ: such a student opens after `import methods.packed`. Control: random channels and groups.

Parameters of a gated block afterwards: 3 H F + 2 H A d + 2 H K d and norms, asserted. Cost: one
pass over the calibration text.
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
    """Settings of both rows: what is dropped, and how much of it."""

    needs_plain: ClassVar[bool] = True
    drops_inputs: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2  # of the feed-forward channels that go
    groups: Annotated[int, Field(ge=0)] = 0  # KV groups that go from every block
    # channels that stay, rounded to the nearest of it: what kernels take without filling up
    multiple: Annotated[int, Field(ge=1)] = 16

    def narrower(self) -> WidthReduction:
        """Return how much goes, as the cut has it."""
        return WidthReduction(ratio=self.ratio, groups=self.groups, multiple=self.multiple)

    def resulting_shape(self, before: "Shape") -> "Shape":
        """Return the shape of what is left of a model; at least one channel and one group stays."""
        from dataclasses import replace

        kept = max(1, before.kv_heads - self.groups)
        channels = max(1, self.narrower().kept_channels(before.intermediate))
        return replace(
            before,
            intermediate=channels,
            kv_heads=kept,
            heads=before.heads // before.kv_heads * kept,
        )


@settings
class WidthPruning(WidthPruningSettings, Calibrated):
    """Drop the feed-forward channels (and head groups) through which least flows."""

    controls: ClassVar[tuple[str, ...]] = ("prune-width-random",)

    allocation: Allocation = "uniform"  # global: channels of all blocks are compared; widths differ

    @property
    def keeps_architecture(self) -> bool:
        """Tell whether all blocks are of one width."""
        return self.allocation == "uniform"

    def control_settings(self) -> dict[str, object]:
        """Its control drops as many."""
        return {"ratio": self.ratio, "groups": self.groups, "multiple": self.multiple}

    def compress(self, job: Job) -> Checkpoint:
        """Sum what flows into every down and output projection, keep the largest."""
        import torch

        from methods.compression.calibration import InputStatistics, recording_inputs
        from methods.compression.narrowing import WidthPruner, weight_matrix

        making = StudentBuilder(job, "prune-width", plain=True)
        cut = WidthPruner(making, self.narrower())
        data = self.calibrate(job, making.opened)
        flow = InputStatistics("magnitude")
        with torch.no_grad(), recording_inputs(flow, cut.readers()):
            for batch in data.batches():
                making.model(input_ids=batch, use_cache=False, logits_to_keep=1)
        tokens = int(data.ids.numel())

        def score(reader: str) -> "Tensor":
            return (
                flow.sums[reader] / tokens * weight_matrix(making.model, reader).float().norm(dim=0)
            )

        channels = {part.name: score(part.reader) for part in cut.parts}
        heads = {name: score(reader) for name, reader in cut.outputs().items()}
        told = {"calibration": dict(data.told), "allocation": self.allocation}
        return cut.saved(
            channels, heads, self.allocation, told, flops=calibration_flops(making, data, 1)
        )


@settings
class RandomWidthPruning(WidthPruningSettings):
    """Drop as many random channels and head groups (control)."""

    is_control: ClassVar[bool] = True
    draws_random_numbers: ClassVar[bool] = True

    def compress(self, job: Job) -> Checkpoint:
        """Draw a score for every channel and group."""
        import torch

        from methods.compression.narrowing import WidthPruner, weight_matrix

        making = StudentBuilder(job, "prune-width-random", plain=True)
        cut = WidthPruner(making, self.narrower())
        draw = torch.Generator().manual_seed(job.seed)

        def score(outputs: int) -> "Tensor":
            return torch.rand(outputs, generator=draw)

        channels = {part.name: score(part.width) for part in cut.parts}
        heads = {
            name: score(weight_matrix(making.model, reader).shape[1])
            for name, reader in cut.outputs().items()
        }
        return cut.saved(channels, heads, "uniform", {})
