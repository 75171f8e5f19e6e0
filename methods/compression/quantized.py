"""What quantising methods share: which matrices are packed how, and the checkpoint that results. No
torch at import.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.contract import Checkpoint, Family, Job, Progress
from harness.errors import CellFailed
from methods.base import Patterns, settings
from methods.compression.base import Compressed, StudentBuilder

if TYPE_CHECKING:
    from torch import nn

    from methods.compression.layers import Layers
    from methods.compression.rounding import QuantizedMatrix


@settings
class Quantized(Compressed):
    """Packs the matrices of the blocks to few bits, and table and head to int8: in small models
    those are most of the bytes.
    """

    family: ClassVar[Family] = "quantization"

    embeddings: Literal["int8", "skip"] = "int8"  # token table and head; skip: as they are
    ignore: Patterns = ()  # layers to leave as they are, and all below them: ["*.down_proj"]


def embedding_scale(table: Any, method: str) -> dict[str, float]:
    """Return what a table multiplies its vectors with, as its class says; refuses tables that do
    anything else with them.
    """
    from torch import nn

    if type(table) is nn.Embedding:
        return {}
    factor = getattr(table, "embed_scale", None)
    if factor is None:
        raise CellFailed(
            f"{method} does not know the token table {type(table).__name__}; leave it with --set "
            f"{method}.embeddings=skip"
        )
    return {"times": float(factor)}


def pack_student(
    job: Job,
    making: StudentBuilder,
    method: Quantized,
    layers: "Layers",
    code: "Callable[[str, nn.Linear], QuantizedMatrix]",
    *,
    kind: str,
    notes: dict[str, Any],
    flops: float = 0.0,
) -> Checkpoint:
    """Pack every layer by `code`, and table and head to int8 where the method does; save it, and
    say how many bits that took.
    """
    packing = _Packer(making, layers)
    packing.add_layers(code, kind=kind, progress=job.progress)
    packed_bytes = packing.bytes  # of the blocks' layers: table and head are not among them
    if method.embeddings == "int8":
        packing.add_table_and_head()
    weights = sum(layer.weight.numel() for layer in layers.linear.values())
    told = {
        **notes,
        "packed_layers": len(layers.linear),
        "packed_weights": weights,
        "bits_of_a_packed_weight": round(8 * packed_bytes / weights, 3),
        "table_and_head": method.embeddings,
        "skipped": list(method.ignore),
        **layers.told,
    }
    return packing.saved(told, flops=flops)


class _Packer:
    """A model whose matrices are packed one after another: what `config.json` will say of each, and
    their tensors.
    """

    def __init__(self, making: StudentBuilder, layers: "Layers") -> None:
        self.making, self.layers = making, layers
        self.specs: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        """The bytes of the tensors so far."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def _add(self, name: str, codes: "QuantizedMatrix", bias: Any, **more: Any) -> None:
        from harness.models.packed import refuse_wrong_codes
        from methods.compression.rounding import packed_layer

        self.specs[name], own = packed_layer(name, codes, bias, **more)
        refuse_wrong_codes(name, self.specs[name], own, codes.dequantized())
        self.tensors.update(own)

    def add_layers(
        self,
        code: "Callable[[str, nn.Linear], QuantizedMatrix]",
        *,
        kind: str,
        progress: "Callable[[Progress], None]",
    ) -> None:
        """Pack the layers of the blocks."""
        linear = self.layers.linear
        for at, (name, layer) in enumerate(linear.items()):
            factors = {"factors": True} if hasattr(layer, "up") else {}
            self._add(name, code(name, layer), layer.bias, kind=kind, **factors)
            progress(Progress(stage="pack", done=at + 1, total=len(linear), unit="layers"))

    def add_table_and_head(self) -> None:
        """Pack token table and head to int8, but those that the patterns leave as they are."""
        self._refuse_half_a_tie()
        layers, method = self.layers, self.making.method
        table, embedding = layers.table
        if table not in layers.left:
            factor = embedding_scale(embedding, method)
            self._add(
                table, _int8_rows(embedding.weight), None, kind="int8", embedding=True, **factor
            )
        if layers.head is None:
            return
        name, head = layers.head
        if layers.tied and table not in layers.left:
            self._tie(name, head)
        elif not layers.tied and name not in layers.left:
            self._add(name, _int8_rows(head.weight), head.bias, kind="int8")

    def _refuse_half_a_tie(self) -> None:
        layers, method, table = self.layers, self.making.method, self.layers.table[0]
        if layers.head is None or not layers.tied:
            return
        name = layers.head[0]
        if (name in layers.left) != (table in layers.left):
            raise CellFailed(
                f"{method}: {name} and {table} are one matrix here, and ignore names one of the "
                "two; name both, or type "
                f"--set {method}.embeddings=skip"
            )

    def _tie(self, name: str, head: "nn.Linear") -> None:
        if head.bias is not None:
            method = self.making.method
            raise CellFailed(
                f"{method}: a tied head with a bias is not known here; type --set "
                f"{method}.embeddings=skip"
            )
        self.specs[name] = {"kind": "tied", "table": self.layers.table[0]}

    def saved(self, told: dict[str, Any], *, flops: float) -> Checkpoint:
        """Save the packed model, and note the bits that each of its weights takes on disk."""
        from harness.models.checkpoint import weight_files
        from harness.models.language_model import stored_dtype
        from harness.models.packed import save_packed

        making, dtype = self.making, stored_dtype(self.making.base)

        def write(fresh: Any) -> None:
            save_packed(
                making.opened,
                fresh,
                specs=self.specs,
                tensors=self.tensors,
                dtype=dtype,
                method=making.method,
            )
            written = sum(path.stat().st_size for path in weight_files(fresh))
            told["bits_per_weight"] = making.bits(written)

        return making.save_as(write, notes=told, flops=flops)


def _int8_rows(weight: Any) -> "QuantizedMatrix":
    from methods.compression.rounding import round_to_nearest

    return round_to_nearest(weight, bits=8)
