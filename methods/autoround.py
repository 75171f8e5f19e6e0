"""AutoRound by Intel's auto-round: learns which way weights are rounded (Cheng et al., 2023).

Needs the `autoround` extra; runs on a CPU and on a GPU. A block at a time, an offset within half a
step is learned for every weight, and a clipping for every group, by signed gradient descent on the
block's output error over calibration text (arXiv 2309.05516). Codes and scales that the library
finds are packed into the format of `int4`: its bytes, kernels and files, table and head in int8
too, so that the rows differ by their rounding alone.

Cost: per block, `iters` steps forward and backward over `batch_size` sequences, more than any other
row without training; the whole model is in memory, and a block's offsets with their gradients. It
draws sequences, so a row has seeds. With few steps it loses to `int4-calibrated`, which costs less.
The control is `int4`, with the same groups. Source: https://github.com/intel/auto-round
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.contract import Checkpoint, Job
from harness.errors import CellFailed
from methods.base import settings
from methods.compression.base import StudentBuilder
from methods.compression.calibrated import Calibrated, calibration_flops
from methods.compression.quantized import Packer, Quantized

if TYPE_CHECKING:
    from torch import Tensor

    from methods.compression.layers import Layers
    from methods.compression.rounding import QuantizedMatrix

_BACKWARD = 3.0  # forward passes that a step forward and backward costs


@settings
class AutoRound(Quantized, Calibrated):
    """Weights in int4 by auto-round: offsets before rounding are learned, a block at a time."""

    needs_plain: ClassVar[bool] = True
    controls: ClassVar[tuple[str, ...]] = ("int4",)
    draws_random_numbers: ClassVar[bool] = True
    # an offset, its gradient and the best offset so far, in fp32
    block_bytes_per_weight: ClassVar[float] = 12.0

    group_size: Literal[32, 64, 128, 256] = 64
    symmetric: bool = True  # false: a zero point for every group
    iters: Annotated[int, Field(ge=1, le=2000)] = 200  # steps for each block; the library's default
    batch_size: Annotated[int, Field(ge=1, le=512)] = 8  # sequences of a step

    @property
    def bits_per_weight(self) -> float:
        """Return 4 bits, and those of the scale and the zero point of a group."""
        return 4 + (16 if self.symmetric else 20) / self.group_size

    @property
    def calibration_passes(self) -> float:
        """Return the forward passes over the text that all steps together cost, and the two more.

        The library runs each block once before it tunes it, and once behind that.
        """
        sequences = self.num_calibration_samples
        return 2 + _BACKWARD * self.iters * min(self.batch_size, sequences) / sequences

    def control_settings(self) -> dict[str, object]:
        """Return what the control takes over: it rounds the same groups of the same layers."""
        return {
            name: getattr(self, name)
            for name in ("group_size", "symmetric", "embeddings", "ignore")
        }

    def compress(self, job: Job) -> Checkpoint:
        """Let the library choose codes and scales, and pack them as int4's."""
        from methods.compression.external import explaining_library_errors, require_package
        from methods.compression.layers import layers_of

        require_package("auto_round", "autoround")
        builder = StudentBuilder(job, "autoround", plain=True)
        layers = layers_of(builder.model, ignore=self.ignore, method="autoround")
        data = self.calibrate(job, builder.opened)
        with explaining_library_errors("autoround", "auto-round", builder.base):
            self._tune(builder, layers, data.ids)
        packer = Packer(builder, layers, kind="int4")
        for name, layer in layers.linear.items():
            packer.add_layer(name, layer, self._chosen(name, layer))
        notes = {
            "library": "auto-round",
            "group_size": self.group_size,
            "iters": self.iters,
            "calibration": dict(data.description),
        }
        flops = calibration_flops(builder, data, 1) * self.calibration_passes
        return packer.finish(self, notes, flops=flops)

    def _tune(self, builder: StudentBuilder, layers: "Layers", ids: "Tensor") -> None:
        """Run the library on the opened model: it leaves each layer what its codes stand for."""
        import torch
        from auto_round import AutoRound as Library

        sequences = [
            {"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.cpu()
        ]
        left_alone = [
            name
            for name, module in builder.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in layers.linear
        ]
        Library(
            builder.model,
            tokenizer=builder.opened.tokenizer,
            scheme="W4A16",
            bits=4,
            group_size=self.group_size,
            sym=self.symmetric,
            scale_dtype="bf16",  # as our format stores them
            iters=self.iters,
            batch_size=min(self.batch_size, len(ids)),
            nsamples=len(ids),
            seqlen=int(ids.shape[1]),
            dataset=torch.utils.data.DataLoader(sequences, batch_size=self.batch_size),
            layer_config={name: {"bits": 16} for name in left_alone},
            device_map=builder.job.device,
            enable_torch_compile=False,
            amp=builder.job.device != "cpu",
            seed=builder.job.seed,
        ).quantize()

    def _chosen(self, name: str, layer: Any) -> "QuantizedMatrix":
        """Return the codes and scales that the library left at a layer.

        Raises `CellFailed` for a layer that it did not round, or rounded to other numbers.
        """
        import torch

        from methods.compression.rounding import QuantizedMatrix

        weight = layer.weight.float()
        scale = getattr(layer, "scale", None)
        if scale is None:
            raise CellFailed(f"autoround: auto-round did not round {name}; use int4-calibrated")
        scale = scale.detach().reshape(len(weight), -1).to(torch.bfloat16)
        zero_point = torch.as_tensor(layer.zp, device=scale.device).float()
        if zero_point.ndim:  # one for each group, where they are not all the middle
            zero_point = zero_point.reshape(scale.shape)
        zero_point = zero_point.expand_as(scale).clone()
        steps = scale.float().repeat_interleave(self.group_size, dim=1)[:, : weight.shape[1]]
        zeros = zero_point.repeat_interleave(self.group_size, dim=1)[:, : weight.shape[1]]
        codes = torch.round(weight / steps + zeros)
        if not torch.equal(steps * (codes - zeros), weight) or codes.min() < 0 or codes.max() > 15:
            raise CellFailed(
                f"autoround: {name} holds numbers that are no int4 codes of its scales; "
                "use int4-calibrated"
            )
        return QuantizedMatrix(codes.to(torch.int8), scale, zero_point, self.group_size)
