"""What quantising methods share: which matrices are packed how, and saving the packed student.

Importing this module imports no torch.
"""

from collections.abc import Callable
from pathlib import Path
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
    """Settings of a method that packs the matrices of the blocks to few bits.

    Token table and head become int8: in small models they are most of the bytes.
    """

    family: ClassVar[Family] = "quantization"

    embeddings: Literal["int8", "skip"] = "int8"  # token table and head; skip: as they are
    # layers to leave as they are, with all below them: ["*.down_proj"]
    ignore: Patterns = ()


def embedding_scale(table: Any, method: str) -> dict[str, float]:
    """Return the entry of a packed table that scales its vectors; {} where nothing does.

    Raises `CellFailed` for a table that does anything else with its vectors.
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
    builder: StudentBuilder,
    method: Quantized,
    layers: "Layers",
    quantize: "Callable[[str, nn.Linear], QuantizedMatrix]",
    *,
    kind: str,
    notes: dict[str, Any],
    flops: float = 0.0,
) -> Checkpoint:
    """Pack every layer by `quantize(name, layer)`, table and head to int8, and save the student.

    `kind` is the kind of packed layer that `config.json` names, such as `int4`.
    """
    packer = _Packer(builder, layers)
    packer.add_layers(quantize, kind=kind, progress=job.progress)
    packed_bytes = packer.bytes  # of the blocks' layers alone: table and head come next
    if method.embeddings == "int8":
        packer.add_table_and_head()
    weights = sum(layer.weight.numel() for layer in layers.linear.values())
    packing_notes = {
        **notes,
        "packed_layers": len(layers.linear),
        "packed_weights": weights,
        "bits_of_a_packed_weight": round(8 * packed_bytes / weights, 3),
        "table_and_head": method.embeddings,
        "skipped": list(method.ignore),
        **layers.notes,
    }
    return packer.save(packing_notes, flops=flops)


class _Packer:
    """Packs the matrices of a model, and keeps their entries of `config.json` and their tensors."""

    def __init__(self, builder: StudentBuilder, layers: "Layers") -> None:
        self.builder, self.layers = builder, layers
        self.specs: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}

    @property
    def bytes(self) -> int:
        """The bytes of the tensors so far."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def _add(self, name: str, matrix: "QuantizedMatrix", bias: Any, **spec_entries: Any) -> None:
        """Add one packed module; refuse it where the packed form stands for other numbers."""
        from harness.models.packed import refuse_wrong_codes
        from methods.compression.rounding import packed_layer

        self.specs[name], tensors = packed_layer(name, matrix, bias, **spec_entries)
        refuse_wrong_codes(name, self.specs[name], tensors, matrix.dequantized())
        self.tensors.update(tensors)

    def add_layers(
        self,
        quantize: "Callable[[str, nn.Linear], QuantizedMatrix]",
        *,
        kind: str,
        progress: "Callable[[Progress], None]",
    ) -> None:
        """Pack the layers of the blocks."""
        linear = self.layers.linear
        for count, (name, layer) in enumerate(linear.items(), start=1):
            factors = {"factors": True} if hasattr(layer, "up") else {}
            self._add(name, quantize(name, layer), layer.bias, kind=kind, **factors)
            progress(Progress(stage="pack", done=count, total=len(linear), unit="layers"))

    def add_table_and_head(self) -> None:
        """Pack token table and head to int8, except those that the `ignore` patterns match."""
        self._refuse_half_of_tied_pair()
        layers, method = self.layers, self.builder.method
        table, embedding = layers.table
        if table not in layers.ignored:
            scale = embedding_scale(embedding, method)
            self._add(
                table, _int8_rows(embedding.weight), None, kind="int8", embedding=True, **scale
            )
        if layers.head is None:
            return
        name, head = layers.head
        if layers.tied and table not in layers.ignored:
            self._add_tied_head(name, head)
        elif not layers.tied and name not in layers.ignored:
            self._add(name, _int8_rows(head.weight), head.bias, kind="int8")

    def _refuse_half_of_tied_pair(self) -> None:
        """Raise `CellFailed` where `ignore` matches one of a tied table and head, not both."""
        layers, method, table = self.layers, self.builder.method, self.layers.table[0]
        if layers.head is None or not layers.tied:
            return
        name = layers.head[0]
        if (name in layers.ignored) != (table in layers.ignored):
            raise CellFailed(
                f"{method}: {name} and {table} are one matrix in this model, and ignore names only "
                f"one of them; name both, or type --set {method}.embeddings=skip"
            )

    def _add_tied_head(self, name: str, head: "nn.Linear") -> None:
        """Add a head that reads the packed table."""
        if head.bias is not None:
            method = self.builder.method
            raise CellFailed(
                f"{method} cannot pack a tied head with a bias; type --set {method}.embeddings=skip"
            )
        self.specs[name] = {"kind": "tied", "table": self.layers.table[0]}

    def save(self, notes: dict[str, Any], *, flops: float) -> Checkpoint:
        """Save the packed model; add to the notes the bits on disk of each of its weights."""
        from harness.models.checkpoint import weight_files
        from harness.models.language_model import stored_dtype
        from harness.models.packed import save_packed

        builder, dtype = self.builder, stored_dtype(self.builder.base)

        def write(folder: Path) -> None:
            save_packed(
                builder.opened,
                folder,
                specs=self.specs,
                tensors=self.tensors,
                dtype=dtype,
                method=builder.method,
            )
            size = sum(path.stat().st_size for path in weight_files(folder))
            notes["bits_per_weight"] = builder.bits(size)

        return builder.save_as(write, notes=notes, flops=flops)


def _int8_rows(weight: Any) -> "QuantizedMatrix":
    """Round a matrix to int8, one scale for each row."""
    from methods.compression.rounding import round_to_nearest

    return round_to_nearest(weight, bits=8)
