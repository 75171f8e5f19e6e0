"""Packed checkpoints: int8 and int4 weights, low-rank factors, layers of odd widths.

Importing this registers the format `compression-harness` with transformers. After that
`AutoModelForCausalLM.from_pretrained(folder)` needs nothing else. `config.json` names every module
that is not what the architecture says:

    "quantization_config": {"quant_method": "compression-harness", "version": 1,
                            "modules": {"model.layers.0.mlp.up_proj": {"kind": "int4", "shape":
                            [1536, 576], "group": 64}}}

Whatever is packed keeps the name `weight`, in another shape than the architecture's. transformers
only warns about a format that it does not know, and would start with random weights where a name is
missing, but it refuses a wrong shape.

An entry with `"adapter": R` has a pair of thin float matrices beside its weight, whose product is
added to it (`adapter_down` and `adapter_up`): what was trained beside packed weights.

Legend: O outputs, I inputs, G groups of inputs, R rank. `w_hat` is the float weight that a packed
one stands for. The kernels are PyTorch's own on both kinds of device, those that torchao calls. Few
rows (decoding) are multiplied with packed weights as they are; many rows (prompts) by a matrix
product with weights unpacked for that one call, or once for many calls
(`harness/models/unpacked.py`). On a GPU a kernel is tried on a small matrix before its first use:
where it is missing or wrong there, weights are unpacked for few rows too.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from harness.errors import CellFailed, in_one_line
from harness.files.untrusted import MODEL_LIMITS, read_object
from harness.models.blocks import is_tied, probe_ids, temporary_hooks
from harness.models.checkpoint import OWN_FORMAT, first_non_finite
from harness.models.int4_tiles import pack_tiles, unpack_tiles

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel

FORMAT = OWN_FORMAT
VERSION = 2  # the newest that is read
_VERSION_WITHOUT_ADAPTERS = 1  # earlier versions of this program read it
# Up to so many rows, decoding kernels on a CPU are faster than unpacking (measured: int8-smollm2).
MAX_KERNEL_ROWS = 8
# The same on a GPU, by kind, not measured yet. Published timings of the int4 kernel: from some
# hundred rows on it is 6 to 13 times slower than a bf16 product, which unpacking costs less than.
GPU_KERNEL_ROWS = {"int8": 8, "int4": 256}
INT4_CAPABILITY = (8, 0)  # of the first NVIDIA GPUs that the int4 kernel is built for
# The int8 kernel of few rows needs a multiple of so many inputs, and crashes on others.
INPUT_MULTIPLE = 16
KERNEL_GROUP_SIZES = (32, 64, 128, 256)  # of the int4 kernels
KERNEL_OUTPUT_MULTIPLES = {"cpu": 16, "cuda": 8}  # of which the int4 kernels need a multiple
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # on x86 only
# Levels of an int8 activation on each side of 0.
CPU_LEVELS = 127 if torch.cpu._is_vnni_supported() else 63
_LAID_OUT = "these weights were laid out for a kernel already; open the model again"


class WrongDevice(RuntimeError):
    """Packed weights were laid out for the kernel of one device and cannot be used otherwise."""


_PART_WEIGHTS = 2**22  # of a matrix that is unpacked for a comparison: 16 MiB in fp32


def row_parts(outputs: int, inputs: int) -> Iterator[slice]:
    """Yield the rows of a matrix in parts, so that no copy of the whole in fp32 is needed."""
    count = max(1, _PART_WEIGHTS // max(1, inputs))
    for start in range(0, outputs, count):
        yield slice(start, min(start + count, outputs))


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack integers 0..15 of shape (O, n) two to a byte; returns uint8.

    The even column goes to the low half. An odd n is filled up with 0.
    """
    codes = F.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Return the integers 0..15 that were packed, (O, columns) as uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]


class Int8Linear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Weight-only int8 with one scale an output channel: `w_hat = scale * weight`.

    Activations are rounded to bf16 for the kernels.
    """

    def __init__(
        self, shape: tuple[int, int], *, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(torch.empty((*shape, 1), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None
        )

    def dequantized(self, rows: slice = slice(None)) -> Tensor:
        """Return w_hat, (O, I) in fp32, or some rows of it."""
        codes = self.weight[rows].squeeze(-1)[:, : self.in_features]
        return codes.float() * self.scale[rows].float()[:, None]

    def unpacked(self) -> Tensor:
        """Return the codes as the product of many rows takes them on a GPU, (O, I) in bf16."""
        return self.weight.squeeze(-1).to(torch.bfloat16)

    def align(self) -> None:
        """Lay a CPU's weights out as its kernel of few rows reads them.

        They begin at a multiple of 64 bytes, and their inputs are filled up with zeros.
        """
        padding = -self.in_features % INPUT_MULTIPLE
        if self.weight.device.type == "cpu" and (padding or self.weight.data_ptr() % 64):
            self.weight.data = (
                F.pad(self.weight.data, (0, 0, 0, padding)) if padding else self.weight.data.clone()
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ w_hat^T + bias`."""
        return _with_bias(int8_product(x, self.weight, self.scale, kept_weight(self)), self.bias)


def kept_weight(module: nn.Module) -> Tensor | None:
    """Return the unpacked weight that a packed layer keeps for now; None for most of its life."""
    weight: Tensor | None = module.__dict__.get("kept")
    return weight


def int8_product(
    x: Tensor, weight: Tensor, scale: Tensor, unpacked: Tensor | None = None
) -> Tensor:
    """Return `x @ (scale * weight)^T` for x (..., I), weight (O, I, 1) of int8, scale (O,).

    The weight may have more inputs than I, filled up with 0. `unpacked` holds it in bf16, where
    that is kept.
    """
    codes = weight.squeeze(-1)
    rows = F.pad(x.reshape(-1, x.shape[-1]), (0, codes.shape[1] - x.shape[-1]))
    rows_bf16 = rows.to(torch.bfloat16).contiguous()
    if x.device.type != "cpu":
        takes_kernel = rows.shape[0] <= GPU_KERNEL_ROWS["int8"] and gpu_kernel_works("int8", x)
    else:
        is_readable = codes.shape[1] % INPUT_MULTIPLE == 0 and codes.data_ptr() % 64 == 0
        takes_kernel = rows.shape[0] <= MAX_KERNEL_ROWS and is_readable
    if takes_kernel:
        out = torch._weight_int8pack_mm(rows_bf16, codes, scale.to(torch.bfloat16)).to(x.dtype)
    else:  # int8 is exact in bf16; without bf16 instructions the same product is faster in fp32
        product_dtype = (
            torch.bfloat16
            if x.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
            else torch.float32
        )
        factor = codes.to(product_dtype) if unpacked is None else unpacked
        # sums over codes are too large for fp16
        out = (F.linear(rows_bf16.to(product_dtype), factor).float() * scale.float()).to(x.dtype)
    return out.view(*x.shape[:-1], -1)


class Int8Embedding(Int8Linear):
    """An int8 table of token vectors with one scale a token, which a tied head reads too.

    `multiplier` is what the architecture multiplies its vectors with on the way in (Gemma: the
    square root of the width). The head does not multiply by it.
    """

    multiplier = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of tokens, (..., I)."""
        vectors = self.weight.squeeze(-1)[ids][..., : self.in_features]
        return vectors.to(self.scale.dtype) * (self.scale[ids][..., None] * self.multiplier)


class TiedHead(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A language-model head that multiplies with the packed embedding."""

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self.table = (table,)  # in a tuple: not a child, whose tensors would be saved twice

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        table = self.table[0]
        return int8_product(x, table.weight, table.scale, kept_weight(table))


class Int8DynamicLinear(Int8Linear):
    """Int8 weights and int8 activations, one activation scale a *token*.

    So a row's answer does not depend on the other rows. PyTorch's fbgemm product takes one scale
    for a whole tensor, so every row is first divided by its own largest magnitude. On a processor
    without VNNI instructions fbgemm adds pairs of products in 16 bits, which eight bits of
    activation would overflow: there an activation gets seven. Where there is no fbgemm (ARM) the
    same numbers come from a float product, which is not faster.
    """

    def dequantized(self, rows: slice = slice(None)) -> Tensor:
        """Return w_hat, (O, I) in fp32, or some rows of it."""
        if hasattr(self, "prepared"):
            raise WrongDevice(_LAID_OUT)
        return super().dequantized(rows)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x_hat @ w_hat^T + bias`."""
        if x.device.type != "cpu":
            product = self._gpu_product(x)
        elif HAS_FBGEMM:
            product = self._fbgemm_product(x)
        else:
            product = self._float_product(quantized_rows(x, CPU_LEVELS))
        return _with_bias(product.to(x.dtype).view(*x.shape[:-1], -1), self.bias)

    def _fbgemm_product(self, x: Tensor) -> Tensor:
        """Return the product on an x86 processor, (N, O) in fp32."""
        if not hasattr(self, "prepared"):
            self._prepare()
        rows = x.reshape(-1, x.shape[-1]).float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / largest, 1.0 / CPU_LEVELS, CPU_LEVELS + 1, self.prepared
        )
        return product * largest

    def _prepare(self) -> None:
        """Lay the weight out for fbgemm, and free the saved one."""
        with warnings.catch_warnings():
            # torch warns that these tensors will be removed; nothing else reaches the product
            warnings.simplefilter("ignore", UserWarning)
            codes = torch._make_per_channel_quantized_tensor(
                self.weight.squeeze(-1),
                self.scale.double(),
                torch.zeros(self.out_features, dtype=torch.long),
                0,
            )
        self.prepared = torch.ops.quantized.linear_prepack(codes, None)
        self.kernel_bytes = self.weight.numel()  # fbgemm's own copy, which no parameter counts
        self.weight.data = self.weight.data.new_empty(0)

    def align(self) -> None:
        """Leave the weight as it was read: fbgemm lays it out itself, and takes no added inputs."""

    def forget_layout(self) -> None:
        """Forget the copy for fbgemm, so that weights can be read from a file again."""
        if hasattr(self, "prepared"):
            del self.prepared, self.kernel_bytes

    def _gpu_product(self, x: Tensor) -> Tensor:
        """Return the product on a GPU, (N, O) in fp32, by cuBLAS where it takes the shapes."""
        rows = quantized_rows(x, 127)
        takes_shape = self.in_features % 8 == 0 and self.out_features % 8 == 0  # cuBLAS's rule
        if not takes_shape or not gpu_kernel_works("int8-dynamic", x):
            return self._float_product(rows)
        count = rows.codes.shape[0]
        # cuBLAS takes 17 rows or more
        codes = F.pad(rows.codes, (0, 0, 0, 17 - count)) if count <= 16 else rows.codes
        product = torch._int_mm(codes, self.weight.squeeze(-1).t())[:count]
        return product.float() * rows.step * self.scale.float()

    def _float_product(self, rows: "QuantizedRows") -> Tensor:
        """Return the same numbers by a float product, where no integer kernel can compute them."""
        return F.linear(rows.codes.float() * rows.step, self.dequantized())


class QuantizedRows(NamedTuple):
    """Activations in int8."""

    codes: Tensor  # (N, I), int8
    step: Tensor  # (N, 1), fp32: what one level of a row stands for


def quantized_rows(x: Tensor, levels: int) -> QuantizedRows:
    """Return an input's rows (N, I) as int8, and the size of one step of each row, (N, 1).

    A row's largest magnitude is the last of `levels`.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    step = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / levels
    return QuantizedRows((rows / step).round_().to(torch.int8), step)


class Int4Linear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Weight-only int4, two weights to a byte, with a scale for each group of inputs.

    `w_hat = scale * (code - zero)`; zero is 8 where the layer is symmetric (`has_zeros` is false).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        group_size: int,
        has_zeros: bool,
        bias: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.group_size = group_size
        groups = -(-shape[1] // group_size)
        self.weight = nn.Parameter(
            torch.empty((shape[0], -(-shape[1] // 2)), dtype=torch.uint8), requires_grad=False
        )
        self.scale = nn.Parameter(torch.empty((shape[0], groups), dtype=dtype), requires_grad=False)
        packed_zeros = torch.empty((shape[0], -(-groups // 2)), dtype=torch.uint8)
        self.zero = nn.Parameter(packed_zeros, requires_grad=False) if has_zeros else None
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None
        )
        self.padding = 0  # inputs that the kernel's layout adds
        self.laid_out = ""  # for which kind of device; "" for the layout of the file

    def dequantized(self, rows: slice = slice(None)) -> Tensor:
        """Return w_hat, (O, I) in fp32, or some rows of it."""
        if self.laid_out:
            raise WrongDevice(_LAID_OUT)
        codes = unpack_nibbles(self.weight[rows], self.in_features).float()
        scale, zero = (
            values[rows].repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
            for values in (self.scale.float(), self._zeros())
        )
        return scale * (codes - zero)

    def _zeros(self) -> Tensor:
        """Return the zero of each output and group, (O, G) in fp32."""
        if self.zero is None:
            return torch.full_like(self.scale, 8.0, dtype=torch.float32)
        return unpack_nibbles(self.zero, self.scale.shape[1]).float()

    def kernel_fits(self, device: str) -> bool:
        """Tell whether a kernel multiplies with the packed weights; if not, they are unpacked.

        Odd shapes are padded.
        """
        return device in KERNEL_OUTPUT_MULTIPLES and self.group_size in KERNEL_GROUP_SIZES

    def unpacked(self) -> Tensor | None:
        """Return w_hat as products of many rows take it on a GPU, (O, I) in bf16, padded.

        None where the layer has no kernel's layout there, or the order of its codes is unknown.
        """
        self._lay_out_for(self.weight)
        codes = unpack_tiles(self.weight) if self.laid_out == "cuda" else None
        if codes is None:
            return None
        scale, shift = (part.T[..., None] for part in self.scale.unbind(-1))  # (O, G, 1)
        groups = (codes.to(torch.bfloat16) - 8).unflatten(1, (-1, self.group_size))
        return (groups * scale + shift).flatten(1)

    def _lay_out_for(self, x: Tensor) -> None:
        """Lay the codes out for the kernel of a tensor's device, if it has one; once."""
        device = x.device.type
        has_kernel = not self.laid_out and self.kernel_fits(device)
        if has_kernel and (device == "cpu" or gpu_kernel_works("int4", x)):
            self._lay_out(device)

    def forget_layout(self) -> None:
        """Forget the kernel's layout, so that weights can be read from a file again."""
        self.laid_out, self.padding = "", 0

    def _lay_out(self, device: str) -> None:
        """Reorder the codes for the device's kernel, in place of the saved ones.

        Scales and zeros become one tensor (G, O, 2) of bf16.
        """
        # the kernels need complete groups, and on a GPU complete tiles
        input_multiple = max(self.group_size, 128) if device == "cuda" else self.group_size
        self.padding = -self.in_features % input_multiple
        output_padding = -self.out_features % KERNEL_OUTPUT_MULTIPLES[device]
        codes = unpack_nibbles(self.weight, self.in_features).int()
        codes = F.pad(codes, (0, self.padding, 0, output_padding), value=8)
        scale, zero = self.scale.float(), self._zeros()
        group_padding = codes.shape[1] // self.group_size - scale.shape[1]
        scales_and_zeros = torch.stack((scale, scale * (8 - zero)), dim=-1)
        scales_and_zeros = F.pad(scales_and_zeros, (0, 0, 0, group_padding, 0, output_padding))
        if device == "cuda":
            self.weight.data = pack_tiles(codes)
        else:
            self.weight.data = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scale.data = scales_and_zeros.transpose(0, 1).contiguous().to(torch.bfloat16)
        self.laid_out = device

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ w_hat^T + bias`."""
        device = x.device.type
        self._lay_out_for(x)
        if not self.laid_out:
            return F.linear(x, self.dequantized().to(x.dtype), self.bias)
        if self.laid_out != device:
            raise WrongDevice(
                f"these weights are laid out for {self.laid_out} and the input is on {device}; "
                "open the model again"
            )
        rows = F.pad(x.reshape(-1, x.shape[-1]).to(torch.bfloat16), (0, self.padding)).contiguous()
        out = self._product(rows)[:, : self.out_features]
        return _with_bias(out.to(x.dtype).reshape(*x.shape[:-1], -1), self.bias)

    def _product(self, rows: Tensor) -> Tensor:
        """Return the product of rows of bf16 with the laid out weight, (N, O), padded.

        On a GPU many rows take the unpacked weight: the kernel reads the weight for every few.
        """
        out: Tensor
        if self.laid_out == "cpu":
            out = torch._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.scale)
            return out
        weight = kept_weight(self)
        if weight is None and rows.shape[0] > GPU_KERNEL_ROWS["int4"]:
            weight = self.unpacked()
        if weight is not None:
            return F.linear(rows, weight)
        out = torch._weight_int4pack_mm(rows, self.weight, self.group_size, self.scale)
        return out


def gpu_kernel_works(kind: str, x: Tensor) -> bool:
    """Tell whether this GPU's kernel of a kind computes what packed weights stand for.

    It is tried once a process, on a small matrix. Of fake tensors only shapes are asked.
    """
    return isinstance(x, FakeTensor) or _tried_kernel(kind)


@lru_cache
def _tried_kernel(kind: str) -> bool:
    """Multiply a small matrix of ones and compare; False where the GPU has no such kernel."""
    is_rocm = getattr(torch.version, "hip", None) is not None
    if kind == "int4" and (is_rocm or torch.cuda.get_device_capability() < INT4_CAPABILITY):
        return False
    shape, place = (16, 128), {"device": "cuda"}
    rows = torch.ones((8, shape[1]), dtype=torch.bfloat16, **place)
    codes = torch.ones(shape, dtype=torch.int8, **place)
    scale = torch.ones(shape[0], dtype=torch.bfloat16, **place)
    with torch.inference_mode():
        try:
            if kind == "int8":
                out = torch._weight_int8pack_mm(rows, codes, scale)
            elif kind == "int8-dynamic":
                out = torch._int_mm(codes.repeat(2, 1), codes.t())
            else:
                groups = torch.zeros((shape[1] // 32, shape[0], 2), dtype=torch.bfloat16, **place)
                groups[..., 0] = 1
                out = torch._weight_int4pack_mm(rows, pack_tiles(codes.int() + 8), 32, groups)
        except (RuntimeError, NotImplementedError):
            return False
    return bool((out.float() == shape[1]).all())


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(out.dtype)


def _apply_second_factor(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Multiply the output of the first factor by the second: `W' x = up (weight x)`."""
    result: Tensor = module.up(out)
    return result


def join_factors(first: nn.Module, up: nn.Module) -> nn.Module:
    """Return the first factor (R, I) with the second, (O, R), applied to its output.

    The second is the first one's child `up`.
    """
    first.up = up
    first.register_forward_hook(_apply_second_factor)
    return first


def packed_module(spec: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """Build the module that an entry of `config.json` describes, without its weights."""
    kind, shape, bias = spec["kind"], tuple(spec["shape"]), bool(spec.get("bias"))
    module: nn.Module
    if kind == "float":
        module = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    elif kind == "int8":
        module_class = Int8Embedding if spec.get("embedding") else Int8Linear
        module = module_class(shape, bias=bias, dtype=dtype)
        if "times" in spec:
            module.multiplier = float(spec["times"])
    elif kind == "int8-dynamic":
        module = Int8DynamicLinear(shape, bias=bias, dtype=dtype)
    elif kind == "int4":
        module = Int4Linear(
            shape,
            group_size=spec["group"],
            has_zeros=bool(spec.get("zeros")),
            bias=bias,
            dtype=dtype,
        )
    else:
        raise ValueError(
            f"a packed module of kind {kind!r} is not known to this version; upgrade "
            "compression-harness"
        )
    if spec.get("adapter"):
        put_adapter_beside(module, shape, rank=int(spec["adapter"]), dtype=dtype)
    return join_factors(module, nn.Identity()) if spec.get("factors") else module


def put_adapter_beside(
    layer: nn.Module, shape: tuple[int, int], *, rank: int, dtype: torch.dtype | None
) -> None:
    """Give a layer (O, I) the children of an adapter, whose product is added to its output."""
    layer.adapter_down = nn.Linear(shape[1], rank, bias=False, dtype=dtype)
    layer.adapter_up = nn.Linear(rank, shape[0], bias=False, dtype=dtype)
    layer.register_forward_hook(_add_adapter)


def _add_adapter(layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Add the adapter's output: `W' x = weight x + up (down x)`."""
    x = inputs[0].to(layer.adapter_down.weight.dtype)
    return out + layer.adapter_up(layer.adapter_down(x)).to(out.dtype)


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of a packed checkpoint."""

    def __init__(self, modules: dict[str, Any], version: int = 1, **_: Any) -> None:
        self.quant_method = FORMAT
        if version > VERSION:
            raise ValueError(
                f"a packed checkpoint of version {version}; this installation reads up to "
                f"{VERSION}: upgrade compression-harness"
            )
        self.modules, self.version = modules, version


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the packed modules into a model's skeleton before transformers fills in the weights."""

    requires_calibration = True  # a plain model is packed by a method, not while it is opened

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Open in bf16 what is asked for in fp16.

        fp16 holds neither small scales nor large activations, and the kernels take bf16.
        """
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        dtype = model.dtype
        specs = self.quantization_config.modules
        # A head that reads the table comes after it, second factors after the first.
        for name in sorted(specs, key=lambda name: (specs[name]["kind"] == "tied", name)):
            spec = specs[name]
            try:
                model.get_submodule(name)
            except AttributeError as problem:
                raise ValueError(
                    f"config.json packs {name}, which {type(model).__name__} does not have"
                ) from problem
            with torch.device("meta"):
                if spec["kind"] == "tied":
                    module = TiedHead(model.get_submodule(spec["table"]))
                else:
                    module = packed_module(spec, dtype)
            model.set_submodule(name, module)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, spec in self.quantization_config.modules.items():
            if spec["kind"] == "int8":  # tensors mapped from a file begin at any byte
                model.get_submodule(name).align()
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Tell whether `save_pretrained` may save the model: all its packed layers hold floats.

        Packed integers may be laid out for a kernel by then; copy the folder instead.
        """
        return all(spec["kind"] == "float" for spec in self.quantization_config.modules.values())

    @property
    def is_trainable(self) -> bool:
        """Tell whether every weight takes a gradient."""
        return self.is_serializable()


if FORMAT not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # this module may be reloaded
    register_quantization_config(FORMAT)(PackedConfig)
    register_quantizer(FORMAT)(PackedQuantizer)


def packed_modules(model: Any) -> dict[str, Any]:
    """Return the entries of an opened model's packed modules, none for a plain model."""
    config = getattr(model.config, "quantization_config", None)
    return dict(config.modules) if isinstance(config, PackedConfig) else {}


def save_packed(
    opened: "LanguageModel",
    folder: Path,
    *,
    specs: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    config: Any = None,
    method: str = "",
) -> None:
    """Write a checkpoint with packed modules; everything else is the opened model's.

    `specs` describes the packed modules, `tensors` holds theirs by full name. Floats are stored in
    `dtype`, integers and scales as they are given. Entries of a model that was packed already stay
    where no new one replaces them. `state` and `config` replace the model's own.
    """
    from huggingface_hub import save_torch_state_dict

    model = opened.model
    replaced_names = tuple(f"{name}.{leaf}" for name in specs for leaf in ("weight", "bias"))
    tied = tied_names(model)
    state = {
        name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).cpu()
        for name, tensor in (state or model.state_dict()).items()
        if name not in replaced_names and name not in tied
    }
    state |= {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    save_packed_config(opened, folder, specs=specs, dtype=dtype, config=config)
    refuse_changed_by_saving(
        folder, state, name=method or type(model).__name__, dtype=dtype, tied=is_tied(model)
    )


def save_packed_config(
    opened: "LanguageModel",
    folder: Path,
    *,
    specs: dict[str, Any],
    dtype: torch.dtype,
    config: Any = None,
) -> None:
    """Write all files of a packed checkpoint but its weights."""
    model = opened.model
    config = config or model.config
    config = config.__class__.from_dict(
        {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    )
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    modules = {**packed_modules(model), **specs}
    has_adapters = any("adapter" in spec for spec in modules.values())
    config.quantization_config = {
        "quant_method": FORMAT,
        "version": VERSION if has_adapters else _VERSION_WITHOUT_ADAPTERS,
        "modules": modules,
    }
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", None) and not is_tied(model):
            part.tie_word_embeddings = False  # the opened file held a separate head
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def tied_names(model: Any) -> set[str]:
    """Return the names of tensors that the opened model also holds under an earlier name."""
    candidates = set(getattr(model, "all_tied_weights_keys", None) or {})
    ids = {
        name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    untied_ids = {ids[name] for name in ids if name not in candidates}
    return {name for name in ids if name in candidates and ids[name] in untied_ids}


def is_plain(model: Any) -> bool:
    """Tell whether `save_pretrained` can save an opened model: it holds floats, of any shapes."""
    specs = packed_modules(model)
    is_packed_by_others = getattr(model, "hf_quantizer", None) is not None and not specs
    return not is_packed_by_others and all(spec["kind"] == "float" for spec in specs.values())


def refuse_wrong_codes(
    name: str, spec: dict[str, Any], tensors: Mapping[str, Tensor], w_hat: Tensor
) -> None:
    """Raise `CellFailed` where packed tensors do not stand for their float weight (O, I).

    Tensors and weight may be some rows of the module's.
    """
    shape = [int(w_hat.shape[0]), spec["shape"][1]]
    with torch.device("meta"):
        module = packed_module({**spec, "shape": shape, "factors": False}, torch.float32)
    for full_name, tensor in tensors.items():
        leaf = full_name.removeprefix(f"{name}.")
        setattr(module, leaf, nn.Parameter(tensor.detach().cpu(), requires_grad=False))
    if not torch.equal(module.dequantized(), w_hat.cpu()):
        raise CellFailed(f"{name}: what was packed does not stand for its codes")


def refuse_changed_by_saving(
    folder: Path, state: Mapping[str, Tensor], *, name: str, dtype: torch.dtype, tied: bool
) -> None:
    """Open what was saved, and raise `CellFailed` where it differs from what was in memory.

    Compared are all tensors and the tie of head and table. Zeros that a kernel appends are left
    out; floats are compared by their value, whatever their type.
    """
    from transformers import AutoModelForCausalLM

    # Asked for fp16, a packed model would be opened in bf16, which rounds what is compared.
    open_dtype = torch.float32 if dtype == torch.float16 else dtype
    try:
        reopened = AutoModelForCausalLM.from_pretrained(folder, dtype=open_dtype)
    except Exception as problem:  # whatever its class raises
        raise CellFailed(
            f"{name}: the saved student cannot be opened again ({in_one_line(problem)})"
        ) from problem
    reopened_state = reopened.state_dict()
    for key in state:
        if key not in reopened_state:
            raise CellFailed(f"{name}: {key} is lost when the saved student is opened again")
    for key, tensor in state.items():
        if not equal_as_saved(reopened_state[key], tensor):
            raise CellFailed(
                f"{name}: {key} holds other numbers when the saved student is opened again"
            )
    if is_tied(reopened) != tied:
        raise CellFailed(
            f"{name}: head and table are {'one matrix' if tied else 'two'}, and not so when the "
            "saved student is opened again"
        )
    non_finite = first_non_finite(reopened.state_dict().items())
    if non_finite:
        raise CellFailed(
            f"{name}: the saved student holds a number that is not finite: {non_finite}"
        )
    if packed_modules(reopened):
        refuse_wrong_layers(reopened.eval(), name)


def refuse_wrong_layers(model: Any, name: str) -> None:
    """Raise `CellFailed` where a packed student cannot run or a layer computes something else.

    An architecture's code may read a packed weight itself, or cast a layer's input to the type of
    its weight.
    """
    cast_layers: list[str] = []
    wrong_layers: list[str] = []
    packed = {
        layer_name: layer
        for layer_name, layer in model.named_modules()
        if isinstance(layer, Int8Linear | Int4Linear | TiedHead)
    }
    handles = [
        layer.register_forward_pre_hook(_checking_hook(layer_name, cast_layers, wrong_layers))
        for layer_name, layer in packed.items()
        if not isinstance(layer, Int8Embedding)
    ]
    try:
        with temporary_hooks(handles), torch.no_grad():
            logits = model(input_ids=probe_ids(model), use_cache=False).logits
    except Exception as problem:  # whatever a class raises
        raise CellFailed(
            f"{name}: a packed {type(model).__name__} cannot be run ({in_one_line(problem)}); use "
            "prune-magnitude"
        ) from problem
    if cast_layers:
        head = model.get_output_embeddings()
        is_head_alone = len(cast_layers) == 1 and packed[cast_layers[0]] is head
        ignored = f"'{name}.ignore={json.dumps(cast_layers)}'"
        setting = f"{name}.embeddings=skip" if is_head_alone else ignored
        raise CellFailed(
            f"{name}: {type(model).__name__} casts what it hands {', '.join(cast_layers)} to the "
            f"integers of the packed weight; leave that as it is with --set {setting}"
        )
    if wrong_layers or not bool(torch.isfinite(logits).all()):
        wrong_layer = wrong_layers[0] if wrong_layers else "the head"
        raise CellFailed(
            f"{name}: {wrong_layer} does not compute what its codes stand for; leave it as it is "
            "with ignore"
        )


def _checking_hook(name: str, cast_layers: list[str], wrong_layers: list[str]) -> Any:
    """Return a hook that compares a layer's first product with that of its dequantized weight.

    It runs before a kernel lays the codes out.
    """
    is_checked = False

    def check(module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal is_checked
        x = inputs[0]
        if is_checked:
            return
        is_checked = True
        if not x.is_floating_point():
            cast_layers.append(name)
            return
        source = module.table[0] if isinstance(module, TiedHead) else module
        parts = row_parts(source.out_features, source.in_features)
        products = [F.linear(x.float(), source.dequantized(rows)) for rows in parts]
        expected = torch.cat(products, dim=-1)
        bias = getattr(module, "bias", None)
        product = type(module).forward(module, x).float() - (0 if bias is None else bias.float())
        if not float((product - expected).abs().max()) <= 0.1 * float(expected.abs().max()) + 1e-6:
            wrong_layers.append(name)

    return check


def equal_as_saved(reopened: Tensor, saved: Tensor) -> bool:
    """Compare a reopened tensor with the saved one, (O, I, ...) each.

    Further inputs of the reopened one are a kernel's zeros.
    """
    saved = saved.detach().cpu()
    if reopened.ndim == 3 and reopened.shape != saved.shape:
        reopened = reopened[:, : saved.shape[1]]
    if reopened.shape != saved.shape:
        return False
    if reopened.dtype != saved.dtype:
        reopened, saved = reopened.float(), saved.float()
    return bool(torch.equal(reopened, saved))


def is_packed(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint of this format."""
    quantization = read_object(folder / "config.json", MODEL_LIMITS).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == FORMAT
