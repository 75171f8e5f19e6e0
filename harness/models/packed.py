"""Packed checkpoints, and how transformers opens them: int8 and int4 weights, low-rank factors,
layers of odd widths.

Importing this registers the format `compression-harness` with transformers; after that
`AutoModelForCausalLM.from_pretrained(folder)` needs nothing else. `config.json` names every module
that is not what the architecture says:

    "quantization_config": {"quant_method": "compression-harness", "version": 1,
                            "modules": {"model.layers.0.mlp.up_proj": {"kind": "int4", "shape":
                            [1536, 576], "group": 64}}}

Whatever is packed keeps the name `weight` in another shape than the architecture's: transformers
only warns about a format that it does not know, and would start with random weights where a name is
missing; a wrong shape it refuses.

Legend: O outputs, I inputs, G groups of inputs, R rank. `w_hat` is the float weight that a packed
one stands for. Kernels: PyTorch's own on both kinds of device, the ones that torchao calls. Few
rows (decoding) are multiplied with packed weights as they are; many rows (prompts) by a matrix
product with weights unpacked for that one call.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
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
from harness.models.checkpoint import first_non_finite

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel

FORMAT = "compression-harness"
VERSION = 1
# up to so many, decoding kernels on a CPU are faster than unpacking (measured: int8-smollm2)
MAX_KERNEL_ROWS = 8
# inputs of which the int8 kernel of few rows reads whole multiples only: on others it crashes
INPUT_MULTIPLE = 16
KERNEL_GROUP_SIZES = (32, 64, 128, 256)  # what the int4 kernels know
KERNEL_OUTPUT_MULTIPLES = {"cpu": 16, "cuda": 8}  # and whole multiples of how many outputs
HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # x86 alone
# of an activation in int8, to each side of 0
CPU_LEVELS = 127 if torch.cpu._is_vnni_supported() else 63


class WrongDevice(RuntimeError):
    """Packed weights laid out for one device were asked to run on another."""


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack integers 0..15 of shape (O, n) two to a byte, the even column in the low half; an odd n
    is filled up with 0. Returns uint8.
    """
    codes = F.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """Return the integers 0..15 again, (O, columns) as uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]


class Int8Linear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Weight-only int8, one scale an output channel: `w_hat = scale * weight`. Activations are
    rounded to bf16 for the kernels.
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

    def dequantized(self) -> Tensor:
        """Return w_hat, (O, I) in fp32."""
        return self.weight.squeeze(-1)[:, : self.in_features].float() * self.scale.float()[:, None]

    def align(self) -> None:
        """Lay a CPU's weights out as its kernel of few rows reads them: from a multiple of 64 bytes
        on, inputs filled up with zeros.
        """
        padding = -self.in_features % INPUT_MULTIPLE
        if self.weight.device.type == "cpu" and (padding or self.weight.data_ptr() % 64):
            self.weight.data = (
                F.pad(self.weight.data, (0, 0, 0, padding)) if padding else self.weight.data.clone()
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ w_hat^T + bias`."""
        return _with_bias(int8_product(x, self.weight, self.scale), self.bias)


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return `x @ (scale * weight)^T` for x (..., I), weight (O, I, 1) of int8 (or more inputs than
    I, filled up with 0), scale (O,).
    """
    codes = weight.squeeze(-1)
    rows = F.pad(x.reshape(-1, x.shape[-1]), (0, codes.shape[1] - x.shape[-1]))
    half = rows.to(torch.bfloat16).contiguous()
    readable = x.device.type != "cpu" or (
        codes.shape[1] % INPUT_MULTIPLE == 0 and codes.data_ptr() % 64 == 0
    )
    if rows.shape[0] <= MAX_KERNEL_ROWS and readable:
        out = torch._weight_int8pack_mm(half, codes, scale.to(torch.bfloat16)).to(x.dtype)
    else:  # int8 is exact in bf16; without bf16 instructions the same product is faster in fp32
        kind = (
            torch.bfloat16
            if x.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
            else torch.float32
        )
        # sums over codes are too large for fp16
        out = (F.linear(half.to(kind), codes.to(kind)).float() * scale.float()).to(x.dtype)
    return out.view(*x.shape[:-1], -1)


class Int8Embedding(Int8Linear):
    """An int8 table of token vectors, one scale a token; the head reads the same bytes where the
    two are tied.

    `times` is what the architecture multiplies its vectors with on the way in (Gemma: the square
    root of the width), and the head does not.
    """

    times = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of tokens, (..., I)."""
        vectors = self.weight.squeeze(-1)[ids][..., : self.in_features]
        return vectors.to(self.scale.dtype) * (self.scale[ids][..., None] * self.times)


class TiedHead(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A language-model head that multiplies with the packed embedding."""

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self.weight = table.weight
        self.table = (table,)  # in a tuple: not a child, whose tensors would be saved twice

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return int8_product(x, self.table[0].weight, self.table[0].scale)


class Int8DynamicLinear(Int8Linear):
    """Int8 weights and int8 activations, one activation scale a *token*: a row's answer does not
    depend on its neighbours.

    PyTorch's fbgemm product takes one scale for a whole tensor, so every row is first divided by
    its own largest magnitude. On a processor without VNNI instructions fbgemm adds pairs of
    products in 16 bits, which eight bits of activation would overflow: there an activation gets
    seven. Where there is no fbgemm (ARM) the same numbers come from a float product, which is not
    faster.
    """

    def dequantized(self) -> Tensor:
        """Return w_hat, (O, I) in fp32."""
        if hasattr(self, "prepared"):
            raise WrongDevice(
                "these weights were laid out for a kernel already; open the model again"
            )
        return super().dequantized()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x_hat @ w_hat^T + bias`."""
        if x.device.type != "cpu":
            return _with_bias(self._on_gpu(x), self.bias)
        if not HAS_FBGEMM:
            return _with_bias(
                self._by_floats(*_quantized_rows(x, CPU_LEVELS))
                .to(x.dtype)
                .view(*x.shape[:-1], -1),
                self.bias,
            )
        if not hasattr(self, "prepared"):
            with warnings.catch_warnings():
                # its tensors are said to go in a later release; the product has no other door
                warnings.simplefilter("ignore", UserWarning)
                codes = torch._make_per_channel_quantized_tensor(
                    self.weight.squeeze(-1),
                    self.scale.double(),
                    torch.zeros(self.out_features, dtype=torch.long),
                    0,
                )
            self.prepared = torch.ops.quantized.linear_prepack(codes, None)
            self.held_bytes = self.weight.numel()  # fbgemm's own copy, which no parameter counts
            self.weight.data = self.weight.data.new_empty(0)
        rows = x.reshape(-1, x.shape[-1]).float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / largest, 1.0 / CPU_LEVELS, CPU_LEVELS + 1, self.prepared
        )
        return _with_bias((product * largest).to(x.dtype).view(*x.shape[:-1], -1), self.bias)

    def _on_gpu(self, x: Tensor) -> Tensor:
        codes, step = _quantized_rows(x, 127)
        if self.in_features % 8 or self.out_features % 8:  # shapes that cuBLAS does not take
            return self._by_floats(codes, step).to(x.dtype).view(*x.shape[:-1], -1)
        few = codes.shape[0] <= 16  # cuBLAS wants more rows than that
        padded = F.pad(codes, (0, 0, 0, 17 - codes.shape[0])) if few else codes
        product = torch._int_mm(padded, self.weight.squeeze(-1).t())[: codes.shape[0]]
        return (product.float() * step * self.scale.float()).to(x.dtype).view(*x.shape[:-1], -1)

    def _by_floats(self, codes: Tensor, step: Tensor) -> Tensor:
        """Return the same numbers where no integer kernel takes the shapes or the processor:
        smaller, not faster.
        """
        return F.linear(codes.float() * step, self.dequantized())


def _quantized_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return an input's rows (N, I) as int8 and the size of one step of each, (N, 1): its largest
    magnitude is the last level.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    step = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) / levels
    return (rows / step).round_().to(torch.int8), step


class Int4Linear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Weight-only int4, two to a byte, a scale for each group of inputs: `w_hat = scale * (code -
    zero)`, zero 8 where symmetric.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        group: int,
        zeros: bool,
        bias: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.group = group
        groups = -(-shape[1] // group)
        self.weight = nn.Parameter(
            torch.empty((shape[0], -(-shape[1] // 2)), dtype=torch.uint8), requires_grad=False
        )
        self.scale = nn.Parameter(torch.empty((shape[0], groups), dtype=dtype), requires_grad=False)
        packed = torch.empty((shape[0], -(-groups // 2)), dtype=torch.uint8)
        self.zero = nn.Parameter(packed, requires_grad=False) if zeros else None
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=dtype), requires_grad=False) if bias else None
        )
        self.padding = 0  # inputs that the kernel's layout adds
        self.laid_out = ""  # the kind of device that the weight is laid out for; "" as it was saved

    def dequantized(self) -> Tensor:
        """Return w_hat, (O, I) in fp32."""
        if self.laid_out:
            raise WrongDevice(
                "these weights were laid out for a kernel already; open the model again"
            )
        codes = unpack_nibbles(self.weight, self.in_features).float()
        scale, zero = (
            one.repeat_interleave(self.group, dim=1)[:, : self.in_features]
            for one in (self.scale.float(), self._zeros())
        )
        return scale * (codes - zero)

    def _zeros(self) -> Tensor:
        if self.zero is None:
            return torch.full_like(self.scale, 8.0, dtype=torch.float32)
        return unpack_nibbles(self.zero, self.scale.shape[1]).float()

    def kernel_fits(self, device: str) -> bool:
        """Tell whether a kernel multiplies with the packed weights; else they are unpacked for
        every product. Odd shapes are padded.
        """
        return device in KERNEL_OUTPUT_MULTIPLES and self.group in KERNEL_GROUP_SIZES

    def _lay_out(self, device: str) -> None:
        """Reorder the codes for the device's kernel, in place of the saved ones; scales and zeros
        become (G, O, 2) of bf16.
        """
        # the kernels want whole groups, and on a GPU whole tiles
        whole = max(self.group, 128) if device == "cuda" else self.group
        self.padding = -self.in_features % whole
        below = -self.out_features % KERNEL_OUTPUT_MULTIPLES[device]
        codes = F.pad(
            unpack_nibbles(self.weight, self.in_features).int(),
            (0, self.padding, 0, below),
            value=8,
        )
        scale, zero = self.scale.float(), self._zeros()
        more = codes.shape[1] // self.group - scale.shape[1]
        both = (
            F.pad(torch.stack((scale, scale * (8 - zero)), dim=-1), (0, 0, 0, more, 0, below))
            .transpose(0, 1)
            .contiguous()
        )
        if device == "cuda":
            self.weight.data = torch._convert_weight_to_int4pack(
                (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8
            )
        else:
            self.weight.data = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scale.data = both.to(torch.bfloat16)
        self.laid_out = device

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ w_hat^T + bias`."""
        device = x.device.type
        if not self.laid_out and self.kernel_fits(device):
            self._lay_out(device)
        if not self.laid_out:
            return F.linear(x, self.dequantized().to(x.dtype), self.bias)
        if self.laid_out != device:
            raise WrongDevice(
                f"these weights are laid out for {self.laid_out} and the input is on {device}; "
                "open the model again"
            )
        rows = F.pad(x.reshape(-1, x.shape[-1]).to(torch.bfloat16), (0, self.padding)).contiguous()
        kernel = (
            torch._weight_int4pack_mm if device == "cuda" else torch._weight_int4pack_mm_for_cpu
        )
        out = kernel(rows, self.weight, self.group, self.scale)[:, : self.out_features]
        return _with_bias(out.to(x.dtype).reshape(*x.shape[:-1], -1), self.bias)


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(out.dtype)


def _apply_second_factor(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    """The second factor behind the first: `W' x = up (weight x)`."""
    found: Tensor = module.up(out)
    return found


def join_factors(first: nn.Module, up: nn.Module) -> nn.Module:
    """Return the first factor (R, I) with the second, (O, R), as its child `up` that its output
    goes through.
    """
    first.up = up
    first.register_forward_hook(_apply_second_factor)
    return first


def packed_module(spec: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """Build the module that a line of `config.json` describes, weights not filled in."""
    kind, shape, bias = spec["kind"], tuple(spec["shape"]), bool(spec.get("bias"))
    made: nn.Module
    if kind == "float":
        made = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    elif kind == "int8":
        made = (Int8Embedding if spec.get("embedding") else Int8Linear)(
            shape, bias=bias, dtype=dtype
        )
        if "times" in spec:
            made.times = float(spec["times"])
    elif kind == "int8-dynamic":
        made = Int8DynamicLinear(shape, bias=bias, dtype=dtype)
    elif kind == "int4":
        made = Int4Linear(
            shape, group=spec["group"], zeros=bool(spec.get("zeros")), bias=bias, dtype=dtype
        )
    else:
        raise ValueError(
            f"a packed module of kind {kind!r} is not known to this version; upgrade "
            "compression-harness"
        )
    return join_factors(made, nn.Identity()) if spec.get("factors") else made


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of a packed checkpoint."""

    def __init__(self, modules: dict[str, Any], version: int = VERSION, **_: Any) -> None:
        self.quant_method = FORMAT
        if version > VERSION:
            raise ValueError(
                f"a packed checkpoint of version {version}; this one reads up to {VERSION}: "
                "upgrade compression-harness"
            )
        self.modules, self.version = modules, version


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the packed modules into a model's skeleton before transformers fills in the weights."""

    requires_calibration = True  # a plain model is packed by a method, not while it is opened

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Open in bf16 what is asked for in fp16: that holds neither small scales nor large
        activations, and the kernels take bf16.
        """
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        dtype = model.dtype
        named = sorted(
            self.quantization_config.modules.items(),
            key=lambda one: (one[1]["kind"] == "tied", one[0]),
        )
        # a head that reads the table comes after it, second factors after the first
        for name, spec in named:
            try:
                model.get_submodule(name)
            except AttributeError as problem:
                raise ValueError(
                    f"config.json packs {name}, which {type(model).__name__} does not have"
                ) from problem
            with torch.device("meta"):
                made = (
                    TiedHead(model.get_submodule(spec["table"]))
                    if spec["kind"] == "tied"
                    else packed_module(spec, dtype)
                )
            model.set_submodule(name, made)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, spec in self.quantization_config.modules.items():
            if spec["kind"] == "int8":  # tensors mapped from a file begin at any byte
                model.get_submodule(name).align()
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Floats of odd shapes are saved as any model; packed weights are not: kernels lay them out
        anew (copy the folder).
        """
        return all(spec["kind"] == "float" for spec in self.quantization_config.modules.values())

    @property
    def is_trainable(self) -> bool:
        """Tell whether every weight takes a gradient."""
        return self.is_serializable()


if FORMAT not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a module reloaded registers nothing twice
    register_quantization_config(FORMAT)(PackedConfig)
    register_quantizer(FORMAT)(PackedQuantizer)


def packed_modules(model: Any) -> dict[str, Any]:
    """Return the packed modules of an opened model, as its configuration lists them; empty for a
    plain one.
    """
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
    """Write a checkpoint: `specs` of the modules that are packed, `tensors` of theirs by full name;
    all others are the opened model's.

    Floats are stored in `dtype`, integers and scales as they are given. The specs of an opened
    packed model go on where no new one replaces them. `state` and `config` stand in for the model's
    own.
    """
    from huggingface_hub import save_torch_state_dict

    model = opened.model
    replaced = tuple(f"{name}.{leaf}" for name in specs for leaf in ("weight", "bias"))
    tied = _tied_names(model)
    config = config or model.config
    state = {
        name: tensor.detach().to(dtype).cpu()
        if tensor.is_floating_point()
        else tensor.detach().cpu()
        for name, tensor in (state or model.state_dict()).items()
        if name not in replaced and name not in tied
    }
    state |= {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    config = config.__class__.from_dict(
        {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    )
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": FORMAT,
        "version": VERSION,
        "modules": {**packed_modules(model), **specs},
    }
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", None) and not is_tied(model):
            part.tie_word_embeddings = False  # the file that was opened held a head of its own
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    refuse_changed_by_saving(
        folder, state, name=method or type(model).__name__, dtype=dtype, tied=is_tied(model)
    )


def _tied_names(model: Any) -> set[str]:
    """Return the names under which the opened model holds a tensor that it holds under an earlier
    name too.
    """
    seen: set[int] = set()
    every = set(getattr(model, "all_tied_weights_keys", None) or {})
    named = list(model.named_parameters(remove_duplicate=False))
    seen = {id(one) for name, one in named if name not in every}
    return {name for name, one in named if name in every and id(one) in seen}


def is_plain(model: Any) -> bool:
    """Tell whether an opened model can be saved as it is: it holds floats, of whatever shapes."""
    return all(spec["kind"] == "float" for spec in packed_modules(model).values()) and not (
        getattr(model, "hf_quantizer", None) is not None and not packed_modules(model)
    )


def refuse_wrong_codes(
    name: str, spec: dict[str, Any], tensors: Mapping[str, Tensor], w_hat: Tensor
) -> None:
    """Raise `CellFailed` where a module filled with these packed tensors does not stand for the
    weight that its codes do, (O, I).
    """
    alone = packed_module({**spec, "factors": False}, torch.float32)
    own = dict(alone.named_parameters())
    for full, tensor in tensors.items():
        own[full.removeprefix(f"{name}.")].data = tensor.cpu()
    if not torch.equal(alone.dequantized(), w_hat.cpu()):
        raise CellFailed(f"{name}: what was packed does not stand for its codes")


def refuse_changed_by_saving(
    folder: Path, state: Mapping[str, Tensor], *, name: str, dtype: torch.dtype, tied: bool
) -> None:
    """Open what was saved again, and raise `CellFailed` where a tensor or the tie of head and table
    is not what was in memory.

    Weights that a kernel wants filled up with zeros are compared without them; floats as what they
    stand for, whatever their type.
    """
    from transformers import AutoModelForCausalLM

    # in fp16 a packed model is opened as bf16, which would round what is compared
    kind = torch.float32 if dtype == torch.float16 else dtype
    try:
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except Exception as problem:  # whatever its class raises
        raise CellFailed(
            f"{name}: the saved student cannot be opened again ({in_one_line(problem)})"
        ) from problem
    found = again.state_dict()
    missing = next((key for key in state if key not in found), None)
    if missing:
        raise CellFailed(f"{name}: {missing} is lost when the saved student is opened again")
    odd = next(
        (key for key, tensor in state.items() if not _equal_as_saved(found[key], tensor)), None
    )
    if odd:
        raise CellFailed(
            f"{name}: {odd} holds other numbers when the saved student is opened again"
        )
    if is_tied(again) != tied:
        raise CellFailed(
            f"{name}: head and table are {'one matrix' if tied else 'two'}, and not so when the "
            "saved student is opened again"
        )
    broken = first_non_finite(again.state_dict().items())
    if broken:
        raise CellFailed(f"{name}: the saved student holds a number that is not finite: {broken}")
    if packed_modules(again):
        _refuse_wrong_layers(again.eval(), name)


def _refuse_wrong_layers(model: Any, name: str) -> None:
    """Raise `CellFailed` where a packed student cannot be run, or a packed layer does not compute
    what its codes stand for inside it.

    An architecture's code may read a packed weight itself, or cast what it hands a layer to the
    type of the layer's weight.
    """
    cast: list[str] = []
    other: list[str] = []
    packed = {
        at: one
        for at, one in model.named_modules()
        if isinstance(one, Int8Linear | Int4Linear | TiedHead)
    }
    handles = [
        one.register_forward_pre_hook(_checking_hook(at, cast, other))
        for at, one in packed.items()
        if not isinstance(one, Int8Embedding)
    ]
    try:
        with temporary_hooks(handles), torch.no_grad():
            logits = model(input_ids=probe_ids(model), use_cache=False).logits
    except Exception as problem:  # whatever a class raises
        raise CellFailed(
            f"{name}: a packed {type(model).__name__} cannot be run ({in_one_line(problem)}); use "
            "prune-magnitude"
        ) from problem
    if cast:
        head = next((at for at, one in packed.items() if one is model.get_output_embeddings()), "")
        setting = (
            f"{name}.embeddings=skip" if cast == [head] else f"'{name}.ignore={json.dumps(cast)}'"
        )
        raise CellFailed(
            f"{name}: {type(model).__name__} casts what it hands {', '.join(cast)} to the integers "
            "of the packed weight; leave that as "
            f"it is with --set {setting}"
        )
    if other or not bool(torch.isfinite(logits).all()):
        raise CellFailed(
            f"{name}: {(other or ['the head'])[0]} does not compute what its codes stand for; "
            "leave it as it is with ignore"
        )


def _checking_hook(name: str, cast: list[str], other: list[str]) -> Any:
    """Return a hook that compares a layer's first product with that of its dequantized weight,
    before a kernel lays the codes out.
    """
    seen: list[str] = []

    def before(module: Any, given: tuple[Any, ...]) -> None:
        x = given[0]
        if seen:
            return
        seen.append(name)
        if not x.is_floating_point():
            cast.append(name)
            return
        source = module.table[0] if isinstance(module, TiedHead) else module
        expected = F.linear(x.float(), source.dequantized(), None)
        bias = getattr(module, "bias", None)
        ours = type(module).forward(module, x).float() - (0 if bias is None else bias.float())
        if not float((ours - expected).abs().max()) <= 0.1 * float(expected.abs().max()) + 1e-6:
            other.append(name)

    return before


def _equal_as_saved(found: Tensor, tensor: Tensor) -> bool:
    """Compare a tensor with what was saved, (O, I, ...) each; further inputs of the first are a
    kernel's zeros.
    """
    tensor = tensor.detach().cpu()
    if found.ndim == 3 and found.shape != tensor.shape:
        found = found[:, : tensor.shape[1]]
    if found.shape != tensor.shape:
        return False
    return bool(
        torch.equal(found, tensor)
        if found.dtype == tensor.dtype
        else torch.equal(found.float(), tensor.float())
    )


def is_packed(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint of this format."""
    told = read_object(folder / "config.json", MODEL_LIMITS).get("quantization_config")
    return isinstance(told, dict) and told.get("quant_method") == FORMAT
