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
    from torch import Tensor, nn

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

    @property
    def bits_per_table_weight(self) -> float | None:
        """Return the bits of a weight of embedding and head: 8 in int8, with a scale a row."""
        return 8.0 if self.embeddings == "int8" else None

    @property
    def takes_adapters(self) -> bool:
        """Tell whether the student is packed, in our own format: floats would take no pair."""
        return not self.simulated


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
    packer = Packer(builder, layers, kind=kind)
    for name, layer in layers.linear.items():
        with builder.writer.holding(name):
            packer.add_layer(name, layer, quantize(name, layer))
    return packer.finish(method, notes, flops=flops)


def simulate_student(
    job: Job,
    method: Quantized,
    values_of: "Callable[[nn.Linear], Tensor]",
    *,
    name: str,
    notes: dict[str, Any],
) -> Checkpoint:
    """Save a student whose floats stand for a format: what `values_of(layer)` returns, (O, I).

    Table and head become int8's rounded values where the settings say so. `name` is the row's.
    """
    import torch

    from methods.compression.layers import blocks_of, layers_of
    from methods.compression.rounding import round_to_nearest

    # bf16 cannot hold a scale times a code
    builder = StudentBuilder(job, name, blockwise=True, saved_dtype="float32")
    layers = layers_of(builder.model, ignore=method.ignore, method=name)
    with torch.no_grad():
        for block, names in blocks_of(layers.linear, builder.writer):
            with builder.writer.changing(block):
                for layer in (layers.linear[name] for name in names):
                    layer.weight.copy_(values_of(layer))
        if method.embeddings == "int8":
            head = [layers.head] if layers.head and not layers.tied else []
            for module_name, module in (layers.table, *head):
                if module_name not in layers.ignored:
                    module.weight.copy_(round_to_nearest(module.weight, bits=8).dequantized())
    all_notes = {
        **notes,
        "simulated": True,
        "packed_layers": len(layers.linear),
        "table_and_head": method.embeddings,
        "skipped": list(method.ignore),
        **layers.notes,
    }
    return builder.save(notes=all_notes)


class Packer:
    """Packs the matrices of a model one after another, and keeps their entries of `config.json`."""

    def __init__(self, builder: StudentBuilder, layers: "Layers", *, kind: str) -> None:
        self.builder, self.layers, self.kind = builder, layers, kind
        self.specs: dict[str, Any] = {}
        self.packed_layers = 0

    def _add(self, name: str, matrix: "QuantizedMatrix", bias: Any, **spec_entries: Any) -> None:
        """Add one packed module; refuse it where the packed form stands for other numbers."""
        from harness.models.packed import refuse_wrong_codes, row_parts
        from methods.compression.rounding import packed_layer

        self.specs[name], tensors = packed_layer(name, matrix, bias, **spec_entries)
        for part in row_parts(*matrix.codes.shape):
            rows = {key: tensor[part] for key, tensor in tensors.items()}
            refuse_wrong_codes(name, self.specs[name], rows, matrix.rows(part).dequantized())
        self.builder.writer.add(name, tensors)

    def add_layer(self, name: str, layer: "nn.Linear", matrix: "QuantizedMatrix") -> None:
        """Pack a layer of the blocks."""
        factors = {"factors": True} if hasattr(layer, "up") else {}
        self._add(name, matrix, layer.bias, kind=self.kind, **factors)
        self.packed_layers += 1
        self.builder.job.progress(
            Progress(
                stage="pack",
                done=self.packed_layers,
                total=len(self.layers.linear),
                unit="layers",
            )
        )

    def finish(self, method: Quantized, notes: dict[str, Any], *, flops: float = 0.0) -> Checkpoint:
        """Pack table and head where the settings say so, and save the student."""
        packed_bytes = self.builder.writer.packed_bytes  # of the blocks' layers alone
        if method.embeddings == "int8":
            self.add_table_and_head()
        weights = sum(layer.weight.numel() for layer in self.layers.linear.values())
        packing_notes = {
            **notes,
            "packed_layers": len(self.layers.linear),
            "packed_weights": weights,
            "bits_of_a_packed_weight": round(8 * packed_bytes / weights, 3),
            "table_and_head": method.embeddings,
            "skipped": list(method.ignore),
            **self.layers.notes,
        }
        return self._save(packing_notes, flops=flops)

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

    def _save(self, notes: dict[str, Any], *, flops: float) -> Checkpoint:
        """Save the packed model; add to the notes the bits on disk of each of its weights."""
        from harness.models.checkpoint import weight_files

        builder = self.builder

        def write(folder: Path) -> None:
            builder.writer.save_packed(folder, self.specs, method=builder.method)
            size = sum(path.stat().st_size for path in weight_files(folder))
            notes["bits_per_weight"] = builder.bits(size)

        return builder.save_as(write, notes=notes, flops=flops)


def _int8_rows(weight: Any) -> "QuantizedMatrix":
    """Round a matrix to int8, one scale for each row."""
    from methods.compression.rounding import round_to_nearest

    return round_to_nearest(weight, bits=8)
