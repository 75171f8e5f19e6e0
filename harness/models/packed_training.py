"""Training beside packed weights: a gradient through them, and adapters that are saved beside them.

Packed weights stay as they are. The product with them is made of their float values, unpacked for
one layer at a time, forwards and backwards (QLoRA, Dettmers et al., 2023), because the kernels of
packed weights have no gradient. What is trained is a pair of thin matrices beside each packed one.
Adding their product into the packed matrix would mean to round it again, so both are kept: the
student is the packed model with the pairs beside it, and nothing of it was rounded a second time.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.contract import Checkpoint
from harness.files.writing import save_atomically
from harness.models.checkpoint import describe, weight_files
from harness.models.packed import (
    CPU_LEVELS,
    Int4Linear,
    Int8DynamicLinear,
    Int8Embedding,
    Int8Linear,
    TiedHead,
    packed_modules,
    quantized_rows,
    save_packed,
)

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel


class Adapter(NamedTuple):
    """What is added to a matrix W (O, I): `up @ down`."""

    down: Tensor  # (R, I)
    up: Tensor  # (O, R), with the scale of the product in it


class _FrozenProduct(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """`x @ w_hat^T` with a gradient for x alone; w_hat is unpacked twice in place of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    # one output, hence one gradient
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient] = gradients
        return gradient @ ctx.layer.dequantized().to(gradient.dtype), None


def frozen_product(layer: Any, x: Tensor) -> Tensor:
    """Return a packed layer's output for x (..., I), differentiable by x: (..., O).

    A layer that rounds its activations to int8 rounds them here too; the gradient passes the
    rounding by (straight-through, Bengio et al., 2013).
    """
    source = layer.table[0] if isinstance(layer, TiedHead) else layer
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if isinstance(source, Int8DynamicLinear):
        rounded = quantized_rows(x.detach(), 127 if x.is_cuda else CPU_LEVELS)
        x = x + ((rounded.codes * rounded.step).view(x.shape).to(x.dtype) - x.detach())
    product: Tensor = _FrozenProduct.apply(x, source)
    bias = getattr(layer, "bias", None)
    return product if bias is None else product + bias.to(product.dtype)


def adaptable_layers(model: Any) -> dict[str, nn.Module]:
    """Return the layers of a packed model that an adapter may stand beside, by name.

    They are all packed and all float matrices but the head. Of a pair of low-rank factors it is
    the second, (O, R): the first one's output goes into the second and nowhere else. There are none
    in a model whose layers are all as its architecture says.
    """
    specs = packed_modules(model)
    if not specs:
        return {}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Int8Linear | Int4Linear)
        and not isinstance(module, Int8Embedding)
        and module is not head
        and not specs.get(name, {}).get("factors")
        and name.rpartition(".")[2] not in ("adapter_down", "adapter_up")
    }


def _packed_layers(model: Any) -> Iterator[nn.Module]:
    for module in model.modules():
        is_layer = isinstance(module, Int8Linear | Int4Linear | TiedHead)
        if is_layer and not isinstance(module, Int8Embedding):
            yield module


def make_differentiable(model: Any) -> None:
    """Let every packed layer compute `frozen_product`, which no kernel's layout is needed for."""
    for layer in _packed_layers(model):
        layer.forward = partial(frozen_product, layer)


def use_kernels_again(model: Any) -> None:
    """Undo `make_differentiable`."""
    for layer in _packed_layers(model):
        vars(layer).pop("forward", None)


def save_with_adapters(
    opened: "LanguageModel",
    folder: Path,
    adapters: Mapping[str, Adapter],
    *,
    name: str,
    dtype: torch.dtype,
    parents: tuple[str, ...],
) -> Checkpoint:
    """Save a packed model with adapters beside its layers, completely or not at all.

    `opened.checkpoint` is the packed model: its tensors are written again as its files hold them.
    Adapters are stored in `dtype`. One beside a layer that has one already makes a pair of their
    ranks together. What was saved is opened again and compared.
    """
    specs, tensors = _with_adapters(opened, adapters, dtype)

    def write(part: Path) -> None:
        save_packed(
            opened, part, specs=specs, tensors=tensors, dtype=dtype, state=tensors, method=name
        )

    save_atomically(folder, write)
    return describe(folder, name=name, parents=parents)


def _with_adapters(
    opened: "LanguageModel", adapters: Mapping[str, Adapter], dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the entries of the adapted layers, and all tensors of the model."""
    from safetensors.torch import load_file

    tensors = {
        key: tensor
        for path in weight_files(opened.checkpoint.path)
        for key, tensor in load_file(path).items()
    }
    specs, known_specs = {}, packed_modules(opened.model)
    for name, adapter in adapters.items():
        down, up = (matrix.detach().to(dtype).cpu() for matrix in adapter)
        spec = known_specs.get(name) or _float_entry(opened.model.get_submodule(name))
        if "adapter" in spec:
            down = torch.cat([tensors[f"{name}.adapter_down.weight"], down])
            up = torch.cat([tensors[f"{name}.adapter_up.weight"], up], dim=1)
        specs[name] = {**spec, "adapter": down.shape[0]}
        tensors[f"{name}.adapter_down.weight"] = down.contiguous()
        tensors[f"{name}.adapter_up.weight"] = up.contiguous()
    return specs, tensors


def _float_entry(layer: Any) -> dict[str, Any]:
    """Return the entry of `config.json` for a float matrix of a packed model."""
    bias = {"bias": True} if layer.bias is not None else {}
    return {"kind": "float", "shape": [layer.out_features, layer.in_features], **bias}
