"""What quantising methods share: which matrices are packed how, and the checkpoint that results. No torch at import."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from methods.base import Patterns, settings
from methods.compression.base import Compressed, Making

if TYPE_CHECKING:
    from torch import nn

    from methods.compression.layers import Layers
    from methods.compression.rounding import Codes


@settings
class Quantized(Compressed):
    """Packs the matrices of the blocks to few bits, and table and head to int8: in small models those are most of the bytes."""

    family: ClassVar[Family] = "quantization"

    embeddings: Literal["int8", "skip"] = "int8"  # token table and head; skip: as they are
    ignore: Patterns = ()  # layers to leave as they are, and all below them: ["*.down_proj"]


def scaled(table: Any, method: str) -> dict[str, float]:
    """Return what a table multiplies its vectors with, as its class says; refuses tables that do anything else with them."""
    from torch import nn

    from harness.errors import CellFailed

    if type(table) is nn.Embedding:
        return {}
    factor = getattr(table, "embed_scale", None)
    if factor is None:
        raise CellFailed(f"{method} does not know the token table {type(table).__name__}; leave it with --set {method}.embeddings=skip")
    return {"times": float(factor)}


def pack(
    job: Job,
    making: Making,
    method: Quantized,
    layers: "Layers",
    code: "Callable[[str, nn.Linear], Codes]",
    *,
    kind: str,
    notes: dict[str, Any],
    flops: float = 0.0,
) -> Checkpoint:
    """Pack every layer by `code`, and table and head to int8 where the method does; save it, and say how many bits that took."""
    from harness.contract import Progress
    from harness.errors import CellFailed
    from harness.models.checkpoint import weight_files
    from harness.models.language_model import stored_dtype
    from harness.models.packed import refuse_other_codes, save_packed
    from methods.compression.rounding import packed, round_to_nearest

    specs: dict[str, Any] = {}
    tensors: dict[str, Any] = {}

    def add(name: str, found: "Codes", bias: Any, **more: Any) -> None:
        specs[name], own = packed(name, found, bias, **more)
        refuse_other_codes(name, specs[name], own, found.dequantized())
        tensors.update(own)

    def whole_row(weight: Any) -> "Codes":
        return round_to_nearest(weight, bits=8)

    count = 0
    for at, (name, layer) in enumerate(layers.linear.items()):
        factors = {"factors": True} if hasattr(layer, "up") else {}
        add(name, code(name, layer), layer.bias, kind=kind, **factors)
        count += layer.weight.numel()
        job.progress(Progress(stage="pack", done=at + 1, total=len(layers.linear), unit="layers"))
    inside = sum(one.numel() * one.element_size() for one in tensors.values())
    if method.embeddings == "int8":
        table, embedding = layers.table
        if layers.tied and layers.head is not None and (layers.head[0] in layers.left) != (table in layers.left):
            raise CellFailed(
                f"{making.method}: {layers.head[0]} and {table} are one matrix here, and ignore names one of the two; name both, or type "
                f"--set {making.method}.embeddings=skip"
            )
        if table not in layers.left:
            add(table, whole_row(embedding.weight), None, kind="int8", embedding=True, **scaled(embedding, making.method))
        if layers.head is not None and layers.tied and table not in layers.left:
            if layers.head[1].bias is not None:
                raise CellFailed(f"{making.method}: a tied head with a bias is not known here; type --set {making.method}.embeddings=skip")
            specs[layers.head[0]] = {"kind": "tied", "table": table}
        elif layers.head is not None and not layers.tied and layers.head[0] not in layers.left:
            add(layers.head[0], whole_row(layers.head[1].weight), layers.head[1].bias, kind="int8")
    told = {
        **notes, "packed_layers": len(layers.linear), "packed_weights": count, "bits_of_a_packed_weight": round(8 * inside / count, 3),
        "table_and_head": method.embeddings, "skipped": list(method.ignore), **layers.told,
    }  # fmt: skip
    dtype = stored_dtype(making.base)

    def write(fresh: Any) -> None:
        save_packed(making.model, making.opened.tokenizer, fresh, specs=specs, tensors=tensors, dtype=dtype, method=making.method)
        written = sum(path.stat().st_size for path in weight_files(fresh))
        told["bits_per_weight"] = making.bits(written)

    return making.save_as(write, notes=told, flops=flops)
