"""AWQ: scales inputs so that the weights of large ones are rounded more finely (Lin et al., 2023).

Before rounding to nearest, each input channel of a layer is multiplied by a scale in the weight and
divided by it in the norm or the layer before, which changes nothing in the model. The scale is
`x^a`, where x is the root mean square of the channel on calibration text (the paper: its mean
magnitude) and a, of 20 values from 0 to 0.95, leaves the least squared error of the outputs of all
layers that share the input. At a = 0 it is rounding to nearest, so their error never grows. Blocks
are scaled in order: the inputs of a block come from the packed blocks before it. Inputs that no
module before can be divided for stay as they are; the notes say how many layers were scaled. The
paper's search for a clipped range is `scales=mse`. Source: arXiv 2306.00978.

The packed format is that of `int4`: its bytes, kernels and files. Cost: two passes over the text,
and 20 roundings of every layer. The control is `int4`, with the same groups.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.contract import Checkpoint, Job
from harness.errors import CellFailed
from methods.base import settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops
from methods.compression.quantized import Packer
from methods.int4 import Int4

if TYPE_CHECKING:
    from torch import Tensor

    from methods.compression.calibration import InputStatistics
    from methods.compression.folding import Fold
    from methods.compression.layers import Layers

_EXPONENTS = tuple(step / 20 for step in range(20))


@settings
class Awq(Int4, Calibrated):
    """Weights in int4 to nearest, behind scales that spare the largest inputs (AWQ)."""

    controls: ClassVar[tuple[str, ...]] = ("int4",)

    # alike: each token's input is divided by its norm first; raw: as published
    weighting: Literal["alike", "raw"] = "alike"

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it rounds the same groups of the same layers."""
        return {
            name: getattr(self, name)
            for name in ("group_size", "symmetric", "scales", "embeddings", "ignore")
        }

    def compress(self, job: Job) -> Checkpoint:
        """Scale and round block by block; later blocks get the inputs that rounded ones give."""
        from methods.compression.calibration import VisitOptions, visit_blocks
        from methods.compression.layers import layers_of

        builder = StudentBuilder(job, "awq", blockwise=True)
        layers = layers_of(builder.model, ignore=self.ignore, method="awq")
        scaler = _Scaler(builder, layers, self)
        data = self.calibrate(job, builder.opened)
        options = VisitOptions(
            normalize_tokens=self.weighting == "alike",
            progress=job.progress,
            method="awq",
            changing=builder.writer.changing,
        )
        visit_blocks(
            builder.opened, data, layers.linear, kind="gram", visit=scaler.visit, options=options
        )
        notes = {**scaler.notes(), "calibration": dict(data.description)}
        return scaler.packer.finish(self, notes, flops=calibration_flops(builder, data, 2))


class _Scaler:
    """Scales, folds and packs the layers of one block after another."""

    def __init__(self, builder: StudentBuilder, layers: "Layers", method: Awq) -> None:
        """Find what can be scaled. Raises `CellFailed` where nothing can."""
        from methods.compression.folding import find_folds

        self.builder, self.layers, self.method = builder, layers, method
        self.packer = Packer(builder, layers, kind="int4")
        self.folds = find_folds(builder.model, layers)
        self.exponents: list[float] = []
        if not any(self.folds.values()):
            raise CellFailed(
                f"awq: no layer of {type(builder.model).__name__} reads a norm or a layer that can "
                "take its scale; use int4-calibrated"
            )

    def visit(self, block: str, statistics: "InputStatistics") -> None:
        """Fold the best scales into a block, then round and pack its layers."""
        from methods.compression.folding import fold_scale
        from methods.compression.layers import layers_below

        for fold in self.folds[block]:
            scale = self._best_scale(fold, statistics.sums[fold.readers[0]])
            fold_scale(
                self.builder.model,
                self.layers.linear,
                fold,
                scale,
                dtype=self.builder.writer.dtype,
            )
        for name, layer in layers_below(self.layers.linear, block):
            rounded = self.method.quantize(layer)
            self.packer.add_layer(name, layer, rounded)
            rounded.write_into(layer.weight)

    def _best_scale(self, fold: "Fold", gram: "Tensor") -> "Tensor":
        """Return the scale (I,) of the least error of a fold's readers; note its exponent."""
        size = fold.shared(gram.diagonal().clamp(min=0).sqrt())
        weights = [self.layers.linear[name].weight.float() for name in fold.readers]
        method = self.method
        errors = {
            exponent: sum(
                scaled_error(
                    weight,
                    scale_of(size, exponent),
                    gram,
                    group_size=method.group_size,
                    symmetric=method.symmetric,
                )
                for weight in weights
            )
            for exponent in _EXPONENTS
        }
        best = min(errors, key=lambda exponent: errors[exponent])
        self.exponents.append(best)
        return scale_of(size, best)

    def notes(self) -> dict[str, Any]:
        """Return the settings, how many layers were scaled, and their exponents."""
        readers = sum(len(fold.readers) for folds in self.folds.values() for fold in folds)
        return {
            "group_size": self.method.group_size,
            "scales": self.method.scales,
            "weighting": self.method.weighting,
            "scaled_layers": readers,
            "mean_exponent": round(sum(self.exponents) / len(self.exponents), 3),
        }


def scale_of(size: "Tensor", exponent: float) -> "Tensor":
    """Return `size^exponent` (I,), with a geometric mean of 1 between its smallest and largest.

    Inputs that were always 0 have size 0; they are counted as the smallest of the others.
    """
    import torch

    smallest = torch.where(size > 0, size, torch.inf).amin()
    if not torch.isfinite(smallest):
        return torch.ones_like(size)
    scale = size.clamp(min=smallest).pow(exponent).clamp(min=1e-4)
    return scale / (scale.amax() * scale.amin()).sqrt()


def scaled_error(
    weight: "Tensor", scale: "Tensor", gram: "Tensor", *, group_size: int, symmetric: bool
) -> float:
    """Return the squared error of a layer's outputs where W diag(scale) is rounded.

    `weight` is (O, I), `gram` X^T X of the inputs before they are divided by the scale (I,).
    """
    from methods.compression.rounding import round_to_nearest

    rounded = round_to_nearest(weight * scale, bits=4, group_size=group_size, symmetric=symmetric)
    difference = rounded.dequantized() / scale - weight
    return float(((difference @ gram) * difference).sum())
