"""Int4: weights in four bits, two to a byte, a scale (and a zero) for every group of inputs.

`int4`: round to nearest, symmetric unless `symmetric=false`: the floor. `int4-calibrated`: GPTQ
(Frantar et al., 2023): columns are rounded one after the other, each one's error made up for in the
columns after it, by the second moments of what flows into the layer; block by block, each block
seeing the packed ones before it. Tokens count alike: as published each counts by its size, and in
models with attention sinks a handful of them decides alone (docs/design.md). `fake-int4`: the
rounded values kept as floats, for accuracy alone: it saves no byte and no second, and its row
prints neither.

Effective bits: 4 + 16 / group_size, and 4 / group_size for zero points; table and head are int8.
Cost: seconds; calibrated, two passes over the calibration text and one factorisation a layer. Fails
on small models with large groups; the control of the calibrated one is `int4`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from methods.base import settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops
from methods.compression.quantized import Quantized, pack_student

if TYPE_CHECKING:
    from torch import nn

    from methods.compression.rounding import QuantizedMatrix


@settings
class Int4(Quantized):
    """Weights in int4 by round to nearest, packed two to a byte."""

    # inputs that share a scale; 128 loses too much on models of this size
    group_size: Literal[32, 64, 128, 256] = 64
    symmetric: bool = True  # false: a zero point for every group

    @property
    def bits_per_weight(self) -> float | None:
        """Return 4 bits, and those of a scale and a zero for each group."""
        return 4 + (16 if self.symmetric else 20) / self.group_size

    def code(self, layer: "nn.Linear") -> "QuantizedMatrix":
        """Round one layer."""
        from methods.compression.rounding import round_to_nearest

        return round_to_nearest(
            layer.weight, bits=4, group=self.group_size, zeros=not self.symmetric
        )

    def compress(self, job: Job) -> Checkpoint:
        """Round every matrix to the nearest code."""
        from methods.compression.layers import layers_of

        making = StudentBuilder(job, "int4")
        layers = layers_of(making.model, skip=self.ignore, method="int4")
        return pack_student(
            job,
            making,
            self,
            layers,
            lambda name, layer: self.code(layer),
            kind="int4",
            notes={"group_size": self.group_size},
        )


@settings
class FakeInt4(Int4):
    """Int4's rounded values kept as floats: accuracy only, no bytes and no speed."""

    simulated: ClassVar[bool] = True

    @property
    def bits_per_weight(self) -> float | None:
        """Return None: floats are kept."""
        return None

    def compress(self, job: Job) -> Checkpoint:
        """Round, and write floats."""
        import torch

        from methods.compression.layers import layers_of
        from methods.compression.rounding import round_to_nearest

        making = StudentBuilder(job, "fake-int4")
        layers = layers_of(making.model, skip=self.ignore, method="fake-int4")
        with torch.no_grad():
            for layer in layers.linear.values():
                layer.weight.copy_(self.code(layer).dequantized())
            if self.embeddings == "int8":
                for name, module in (
                    layers.table,
                    *([layers.head] if layers.head and not layers.tied else []),
                ):
                    if name not in layers.left:
                        module.weight.copy_(round_to_nearest(module.weight, bits=8).dequantized())
        notes = {
            "group_size": self.group_size,
            "simulated": True,
            "packed_layers": len(layers.linear),
            "table_and_head": self.embeddings,
            "skipped": list(self.ignore),
            **layers.told,
        }
        return making.save(notes=notes, dtype="float32")  # a scale times a code is no bf16 number


@settings
class Int4Calibrated(Int4, Calibrated):
    """Weights in int4 by GPTQ: every rounding error made up for in the columns after it."""

    controls: ClassVar[tuple[str, ...]] = ("int4",)

    # of the mean of the second moments, added to each
    dampening_frac: Annotated[float, Field(gt=0, le=1)] = 0.01
    # alike: each token's input is divided by its norm first; raw: as published
    weighting: Literal["alike", "raw"] = "alike"

    def control_settings(self) -> dict[str, object]:
        """Its control rounds the same groups of the same layers."""
        return {
            name: getattr(self, name)
            for name in ("group_size", "symmetric", "embeddings", "ignore")
        }

    def compress(self, job: Job) -> Checkpoint:
        """Sweep over the blocks, round each, and let the next ones see it."""
        from methods.compression.calibration import InputStatistics, VisitOptions, visit_blocks
        from methods.compression.layers import layers_below, layers_of
        from methods.compression.rounding import round_with_gptq
        from methods.masks import kept_weights

        making = StudentBuilder(job, "int4-calibrated")
        layers = layers_of(making.model, skip=self.ignore, method="int4-calibrated")
        data = self.calibrate(job, making.opened)
        found: dict[str, Any] = {}

        def visit(block: str, flow: InputStatistics) -> None:
            for name, layer in layers_below(layers.linear, block):
                found[name] = round_with_gptq(
                    layer.weight,
                    flow.sums[name],
                    bits=4,
                    group=self.group_size,
                    zeros=not self.symmetric,
                    damp=self.dampening_frac,
                    stays=kept_weights(making.model.config, layer.weight),
                )
                layer.weight.copy_(found[name].dequantized())

        visit_blocks(
            making.opened,
            data,
            layers.linear,
            kind="gram",
            visit=visit,
            options=VisitOptions(
                alike=self.weighting == "alike", progress=job.progress, method="int4-calibrated"
            ),
        )
        notes = {
            "group_size": self.group_size,
            "weighting": self.weighting,
            "calibration": dict(data.told),
        }
        flops = calibration_flops(making, data, 2)
        return pack_student(
            job,
            making,
            self,
            layers,
            lambda name, layer: found[name],
            kind="int4",
            notes=notes,
            flops=flops,
        )
