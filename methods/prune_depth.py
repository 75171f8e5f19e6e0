"""Depth pruning: whole blocks go, those that change what passes through them least (Men et al.,
2024, ShortGPT).

A block's influence is `1 - mean cos(what enters, what leaves)` over calibration text. `contiguous`
drops the run of neighbours with the least influence together instead. The rest is renumbered and
opens with plain transformers. Control: as many random blocks.

Really smaller and really faster, in proportion to the blocks. Cost: one pass over the calibration
text. One cut without recovery falls off a cliff on long answers while multiple choice hides it (36
to 32 blocks: 98.7 % of MMLU, 32.8 % of GSM8K): chain a distillation behind it,
`prune-depth+response`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.base import Compressed, StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops

if TYPE_CHECKING:
    from harness.models.shape import Shape


@settings
class DepthPruning(Calibrated):
    """Drop the blocks that change what passes through them least."""

    needs_plain: ClassVar[bool] = True
    controls: ClassVar[tuple[str, ...]] = ("prune-depth-random",)

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25  # of the blocks that go
    contiguous: bool = False  # drop neighbours: the run of least influence together

    def control_settings(self) -> dict[str, object]:
        """Its control drops as many."""
        return {"ratio": self.ratio}

    def resulting_shape(self, before: "Shape") -> "Shape":
        return shape_without_blocks(before, self.ratio)

    def compress(self, job: Job) -> Checkpoint:
        """Measure every block's influence, drop the least."""
        from methods.compression.calibration import block_influence

        making = StudentBuilder(job, "prune-depth", plain=True)
        data = self.calibrate(job, making.opened)
        scores = block_influence(making.opened, data)
        gone = blocks_to_drop(len(scores), self.ratio)
        if self.contiguous:
            first = min(range(len(scores) - gone + 1), key=lambda at: sum(scores[at : at + gone]))
            drop = list(range(first, first + gone))
        else:
            drop = sorted(sorted(range(len(scores)), key=lambda at: scores[at])[:gone])
        told = {"influence": [round(one, 5) for one in scores], "calibration": dict(data.told)}
        return save_without_blocks(making, drop, told, flops=calibration_flops(making, data, 1))


@settings
class RandomDepthPruning(Compressed):
    """Drop as many random blocks (control)."""

    needs_plain: ClassVar[bool] = True
    is_control: ClassVar[bool] = True
    draws_random_numbers: ClassVar[bool] = True

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25

    def resulting_shape(self, before: "Shape") -> "Shape":
        return shape_without_blocks(before, self.ratio)

    def compress(self, job: Job) -> Checkpoint:
        """Draw the blocks."""
        import random

        from harness.models.blocks import named_blocks

        making = StudentBuilder(job, "prune-depth-random", plain=True)
        count = len(named_blocks(making.model)[1])
        return save_without_blocks(
            making,
            sorted(random.Random(job.seed).sample(range(count), blocks_to_drop(count, self.ratio))),
            {},
        )


def blocks_to_drop(count: int, ratio: float) -> int:
    """Return how many of `count` blocks a ratio drops: rounded, at least one, never all."""
    from harness.errors import CellFailed

    gone = max(1, int(ratio * count + 0.5))
    if gone >= count:
        raise CellFailed(
            f"ratio {ratio} leaves none of {count} blocks; give at most {(count - 1) / count:.2f}"
        )
    return gone


def shape_without_blocks(before: "Shape", ratio: float) -> "Shape":
    """Return the shape of a model without the blocks that a ratio drops."""
    from dataclasses import replace

    return replace(before, layers=before.layers - blocks_to_drop(before.layers, ratio))


def save_without_blocks(
    making: StudentBuilder, drop: list[int], told: dict[str, Any], *, flops: float = 0.0
) -> Checkpoint:
    """Save the model without these blocks."""
    from dataclasses import replace

    from harness.errors import CellFailed
    from harness.models.blocks import named_blocks
    from harness.models.depth import with_blocks

    _, blocks = named_blocks(making.model)
    kept = [at for at in range(len(blocks)) if at not in drop]
    before = sum(parameter.numel() for parameter in making.model.parameters())
    model = with_blocks(making.model, kept, label=making.method)
    model.generation_config = making.model.generation_config
    after = sum(parameter.numel() for parameter in model.parameters())
    if after >= before:
        raise CellFailed(
            f"{making.method}: without blocks {drop} the model is no smaller (its blocks share "
            "their weights)"
        )
    making.opened = replace(making.opened, model=model.eval())
    return making.save(
        notes={"dropped": drop, "kept": len(kept), "parameters": [before, after], **told},
        flops=flops,
    )
