"""The weights of a saved student by the names that a plain architecture gives them.

A packed student (`harness/models/packed.py`) is read one tensor at a time; nothing is opened by
transformers, so that what is exported is what the files hold. Legend: O outputs, I inputs, G groups
of inputs, R rank.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models.checkpoint import (
    OWN_FORMAT,
    header_entries,
    model_class,
    read_model_json,
    weight_files,
)
from harness.models.formats import quantization_of
from harness.models.packed import packed_module, tied_names, unpack_nibbles
from harness.models.packed_bits import INT4_KINDS, INT8_KINDS

_EXACT_DTYPES = (torch.bfloat16, torch.float16)  # tried in this order; else fp32
_WEIGHTS_AT_ONCE = 2**24  # of a tensor that is compared


class PackedMatrix(NamedTuple):
    """A matrix in integers: `w_hat = scale * (codes - zero)`, by groups of inputs."""

    codes: Tensor  # (O, I) in int16: -127..127 of int8, 0..15 of int4
    scale: Tensor  # (O, G), as stored: numbers of bf16
    zero: Tensor  # (O, G) in int16: 0 of int8, 8 of symmetric int4
    group: int  # inputs that share a scale; I where a row has one
    bits: int
    symmetric: bool

    def values(self) -> Tensor:
        """Return w_hat, (O, I) in fp32."""
        width = self.codes.shape[1]
        scale, zero = (
            part.float().repeat_interleave(self.group, dim=1)[:, :width]
            for part in (self.scale, self.zero)
        )
        return scale * (self.codes.float() - zero)


class StoredStudent:
    """A saved student: floats, or packed modules that stand for floats."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.config = read_model_json(folder / "config.json")
        quantization = quantization_of(folder)
        self.format = str(quantization.get("quant_method") or "")
        self.specs: dict[str, dict[str, Any]] = (
            dict(quantization["modules"]) if self.format == OWN_FORMAT else {}
        )
        self._paths = {name: path for path in weight_files(folder) for name in header_entries(path)}

    @property
    def is_packed(self) -> bool:
        """Tell whether any module holds something else than its float weight."""
        return any(spec["kind"] != "float" for spec in self.specs.values()) or any(
            spec.get("factors") or spec.get("adapter") for spec in self.specs.values()
        )

    def raw(self, name: str) -> Tensor:
        """Return a tensor as its file holds it."""
        from safetensors import safe_open

        with safe_open(self._paths[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def refuse_library_format(self, form: str) -> None:
        """Raise `HarnessError` where another library packed the weights."""
        if self.format not in ("", OWN_FORMAT):
            raise HarnessError(
                f"{self.label} is stored as {self.format}, which only that library unpacks, and "
                f"not as {form}; serve its folder {self.folder}, or export a row of int8 or int4"
            )

    def merged(self, module: str) -> str:
        """Return what a plain matrix cannot hold beside its weight: factors, an adapter; or ""."""
        spec = self.specs.get(module, {})
        if spec.get("factors"):
            return "two low-rank factors"
        return f"an adapter of rank {spec['adapter']}" if spec.get("adapter") else ""

    def names(self) -> Iterator[str]:
        """Yield the names of the plain architecture's weights that the student has."""
        inner = {
            name for name in self._paths for module in self.specs if name.startswith(f"{module}.")
        }
        yield from (name for name in self._paths if name not in inner)
        for module, spec in self.specs.items():
            is_second = module.removesuffix(".up") in self.specs and module.endswith(".up")
            if spec["kind"] == "tied" or is_second:
                continue
            yield f"{module}.weight"
            if self._bias(module) is not None:
                yield f"{module}.bias"

    def plain(self, name: str) -> Tensor:
        """Return a weight as the plain architecture has it; of a packed module in fp32.

        Factors and adapters are multiplied in fp64, and the result is rounded to fp32.
        """
        module, _, leaf = name.rpartition(".")
        if module not in self.specs:
            return self.raw(name)
        if leaf == "bias":
            bias = self._bias(module)
            assert bias is not None
            return bias
        weight = self._values(module)
        spec = self.specs[module]
        if spec.get("factors"):
            weight = (self._values(f"{module}.up").double() @ weight.double()).float()
        if spec.get("adapter"):
            down, up = (
                self.raw(f"{module}.adapter_{part}.weight").double() for part in ("down", "up")
            )
            weight = (weight.double() + up @ down).float()
        return weight

    def matrix(self, module: str) -> PackedMatrix | None:
        """Return the integers of a packed module; None for floats, and what has more than them."""
        spec = self.specs.get(module)
        if spec is None or self.merged(module):
            return None
        codes, scale = f"{module}.weight", f"{module}.scale"
        if spec["kind"] in INT8_KINDS:
            values = self.raw(codes).squeeze(-1).short()
            scales = self.raw(scale)[:, None]
            zero = torch.zeros(scales.shape, dtype=torch.int16)
            return PackedMatrix(values, scales, zero, values.shape[1], 8, True)
        if spec["kind"] not in INT4_KINDS:
            return None
        scales = self.raw(scale)
        zero = torch.full(scales.shape, 8, dtype=torch.int16)
        if spec.get("zeros"):
            zero = unpack_nibbles(self.raw(f"{module}.zero"), scales.shape[1]).short()
        unpacked = unpack_nibbles(self.raw(codes), spec["shape"][1]).short()
        return PackedMatrix(
            unpacked, scales, zero, int(spec["group"]), 4, not spec.get("zeros", False)
        )

    def _values(self, module: str) -> Tensor:
        """Return the fp32 weight of one entry of `config.json`, without what stands beside it."""
        spec = self.specs.get(module)
        if spec is None or spec["kind"] == "float":
            return self.raw(f"{module}.weight").float()
        with torch.device("meta"):
            layer = packed_module({**spec, "factors": False, "adapter": 0}, torch.float32)
        for leaf, _ in list(layer.named_parameters(recurse=False)):
            tensor = self.raw(f"{module}.{leaf}")
            setattr(layer, leaf, nn.Parameter(tensor, requires_grad=False))
        values: Tensor = layer.dequantized()
        return values

    def _bias(self, module: str) -> Tensor | None:
        """Return the bias of a module; that of factors is the second one's."""
        own = f"{module}.up.bias" if self.specs[module].get("factors") else f"{module}.bias"
        return self.raw(own) if own in self._paths else None

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as its file holds it."""
        return tuple(header_entries(self._paths[name])[name]["shape"])


def empty_plain_model(student: StoredStudent) -> Any:
    """Return the plain architecture of the student without memory for its weights.

    Raises `HarnessError` where that has other weights than the student, or other shapes of
    them: layers of odd widths.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(student.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = model_class(student.folder).from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in tied_names(model):
        expected.pop(name, None)
    own = {name: _plain_shape(student, name) for name in student.names()}
    for name in sorted(expected.keys() | own.keys()):
        if expected.get(name) != own.get(name):
            raise HarnessError(
                f"{student.label}: {name} is {_shape_text(own.get(name))}, and the plain "
                f"architecture has {_shape_text(expected.get(name))} there; only our own "
                f"format holds such layers: serve {student.folder} with import methods.packed "
                "(docs/deploy.md), or export a row whose layers have one width"
            )
    return model


def _plain_shape(student: StoredStudent, name: str) -> tuple[int, ...]:
    module, _, leaf = name.rpartition(".")
    spec = student.specs.get(module)
    if spec is None or leaf == "bias":
        return tuple(student.plain(name).shape) if spec else student.stored_shape(name)
    if spec.get("factors"):
        up = student.specs.get(f"{module}.up", {}).get("shape")
        outputs = up[0] if up else student.stored_shape(f"{module}.up.weight")[0]
        return (int(outputs), int(spec["shape"][1]))
    return tuple(map(int, spec["shape"]))


def exact_dtype(student: StoredStudent) -> torch.dtype:
    """Return the smallest float type that holds every weight: bf16, fp16, else fp32."""
    candidates = list(_EXACT_DTYPES)
    for name in student.names():
        tensor = student.plain(name)
        if tensor.is_floating_point():
            candidates = [dtype for dtype in candidates if largest_change(tensor, dtype) == 0]
        if not candidates:
            return torch.float32
    return candidates[0]


def largest_change(tensor: Tensor, dtype: torch.dtype) -> float:
    """Return the largest change of a weight that a float type makes, 0 for none.

    It is relative to the largest weight of the tensor.
    """
    gap = largest = 0.0
    for part in tensor.reshape(-1).split(_WEIGHTS_AT_ONCE):
        values = part.double()
        gap = max(gap, float((part.to(dtype).double() - values).abs().max()))
        largest = max(largest, float(values.abs().max()))
    return gap / largest if gap else 0.0


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
