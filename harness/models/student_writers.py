"""How a compressed student reaches its files: from a model in memory, or block by block.

Both writers do the same for a method. It asks for a module's weights while it reads or changes
them, hands over what it packed, and lets the student be saved. `WholeWriter` has all in memory.
`BlockwiseWriter` has one block in memory, keeps what is done on the disk, and writes the bytes that
the other would write.
"""

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from harness.contract import Checkpoint
from harness.files.writing import save_atomically
from harness.machine.memory import return_freed_memory
from harness.models.blocks import is_tied
from harness.models.blockwise import BlockwiseModel, refuse_non_finite_tensors
from harness.models.checkpoint import describe, weight_files
from harness.models.packed import save_packed, save_packed_config, tied_names
from harness.models.reopening import refuse_changed_blocks
from harness.models.shaping import agree_on_tie, save_student
from harness.models.tensor_spool import TensorSpool

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel

PACKED_SHARD = "5GB"  # the largest file of a packed student


class StudentWriter(Protocol):
    """What a method needs of a writer; modules and weights go by their names in the model."""

    dtype: torch.dtype  # of the floats that are saved
    packed_bytes: int  # of the tensors that were handed over

    def block_of(self, name: str) -> str:
        """Return the block that a module stands in and is read with, "" where all is in memory."""
        ...

    def holding(self, name: str) -> AbstractContextManager[None]:
        """Have the weights of a module in memory, to read them."""
        ...

    def changing(self, block: str) -> AbstractContextManager[None]:
        """Have the weights of a block in memory, to change them; the changes are kept."""
        ...

    def add(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Take what the student holds in place of a module's weight and bias, by full names."""
        ...

    def save_floats(self, folder: Path, *, name: str, parents: tuple[str, ...]) -> Checkpoint:
        """Save the changed model with its tokenizer, completely or not at all."""
        ...

    def save_packed(self, folder: Path, specs: dict[str, Any], *, method: str) -> None:
        """Write a packed student into a folder; `specs` are its entries of `config.json`."""
        ...


class WholeWriter:
    """Saves a student from the model in memory."""

    def __init__(self, opened: "LanguageModel", dtype: torch.dtype) -> None:
        self.opened, self.dtype = opened, dtype
        self.tensors: dict[str, Tensor] = {}
        self.packed_bytes = 0

    def block_of(self, name: str) -> str:
        """Return "": all is in memory."""
        return ""

    def holding(self, name: str) -> AbstractContextManager[None]:
        """Do nothing: all is in memory."""
        return nullcontext()

    def changing(self, block: str) -> AbstractContextManager[None]:
        """Do nothing: changes stay in the model."""
        return nullcontext()

    def add(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep packed tensors in memory."""
        self.tensors.update(tensors)
        self.packed_bytes += _bytes_of(tensors.values())

    def save_floats(self, folder: Path, *, name: str, parents: tuple[str, ...]) -> Checkpoint:
        """Save the changed model with its tokenizer, completely or not at all."""
        return save_student(self.opened, folder, name=name, dtype=self.dtype, parents=parents)

    def save_packed(self, folder: Path, specs: dict[str, Any], *, method: str) -> None:
        """Write a packed student into a folder."""
        save_packed(
            self.opened,
            folder,
            specs=specs,
            tensors=self.tensors,
            dtype=self.dtype,
            method=method,
        )


class BlockwiseWriter:
    """Saves a student block by block; what is done waits in one file in the work folder."""

    def __init__(
        self,
        opened: "LanguageModel",
        blockwise: BlockwiseModel,
        dtype: torch.dtype,
        workdir: Path,
    ) -> None:
        self.opened, self.blockwise, self.dtype = opened, blockwise, dtype
        self.spool = TensorSpool(workdir / f".tensors.{os.getpid()}.part")
        self.packed_bytes = 0
        self._packed: dict[str, None] = {}  # names of packed tensors, in order
        self._replaced: set[str] = set()  # names of the weights that they stand for
        self._finished: set[str] = set()  # blocks

    def block_of(self, name: str) -> str:
        """Return the name of the block that a module stands in, "" for one outside the blocks."""
        return self.blockwise.block_of(name)

    def holding(self, name: str) -> AbstractContextManager[None]:
        """Read the weights of a module; they are dropped behind the `with` block."""
        return self.blockwise.holding(name)

    @contextmanager
    def changing(self, block: str) -> Iterator[None]:
        """Read the weights of a block; behind the `with` block they go to the disk as they are."""
        with self.blockwise.holding(block):
            yield
            if block:
                self._finish(block)

    def add(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Write packed tensors to the disk."""
        for name, tensor in tensors.items():
            self.spool.add(name, tensor)
        self._packed |= dict.fromkeys(tensors)
        self._replaced |= {f"{module}.{leaf}" for leaf in ("weight", "bias")}
        self.packed_bytes += _bytes_of(tensors.values())

    def _finish(self, block: str) -> None:
        """Write a block's own weights to the disk, in the type that they are saved in."""
        self._spool(self.blockwise.weights.names_below(block))
        self._finished.add(block)

    def _own_weights(self, names: Iterable[str]) -> list[str]:
        """Return those of these weights that are saved as they are: neither packed nor tied."""
        skipped = self._replaced | tied_names(self.opened.model)
        return [name for name in names if name not in skipped]

    def _spool(self, names: Iterable[str]) -> None:
        for name, tensor in self.blockwise.state_of(self._own_weights(names)).items():
            self.spool.add(name, tensor.to(self.dtype) if tensor.is_floating_point() else tensor)

    def _finish_all(self) -> None:
        """Write to the disk whatever no method changed."""
        for block in self.blockwise.block_names():
            if block not in self._finished:
                own_weights = self._own_weights(self.blockwise.weights.names_below(block))
                with self.blockwise.holding(block, own_weights):
                    self._spool(own_weights)
        self.blockwise.drop_resting()
        rest = self.blockwise.rest()
        self._spool(rest)
        self.blockwise.weights.drop(rest)
        return_freed_memory()

    def save_floats(self, folder: Path, *, name: str, parents: tuple[str, ...]) -> Checkpoint:
        """Save the changed model with its tokenizer, completely or not at all."""
        model = self.opened.model
        self._finish_all()
        refuse_non_finite_tensors(self.spool, name)
        model.to(self.dtype)
        model.config.dtype = self.dtype
        agree_on_tie(model)

        def write(part: Path) -> None:
            _save_all_but_weights(model, part)
            self._write_as_transformers(part)
            self.opened.tokenizer.save_pretrained(part)
            refuse_changed_blocks(
                part, self.spool, name=name, dtype=self.dtype, tied=is_tied(model)
            )

        save_atomically(folder, write)
        return describe(folder, name=name, parents=parents)

    def _write_as_transformers(self, folder: Path) -> None:
        """Write the weight files that `save_pretrained` writes."""
        from transformers.core_model_loading import revert_weight_conversion

        model, spool = self.opened.model, self.spool
        ignored = set(model._keys_to_ignore_on_save or ())
        state = {name: spool.empty(name) for name in model.state_dict() if name in spool}
        state = {name: tensor for name, tensor in state.items() if name not in ignored}
        names = list(revert_weight_conversion(model, state))
        if getattr(model, "_weight_conversions", None):
            spool = TensorSpool(spool.path.with_name(f".renamed{spool.path.name}"))
            for block in (*self.blockwise.block_names(), ""):
                own = {key: self.spool[key] for key in state if self.block_of(key) == block}
                for key, tensor in revert_weight_conversion(model, own).items():
                    spool.add(key, tensor)
        size = inspect.signature(model.save_pretrained).parameters["max_shard_size"].default
        metadata = {"total_parameters": model.num_parameters()}
        write_shards(folder, spool, names, str(size), metadata, end="\n", sort_keys=True)

    def save_packed(self, folder: Path, specs: dict[str, Any], *, method: str) -> None:
        """Write a packed student into a folder."""
        model = self.opened.model
        self._finish_all()
        own_weights = self.spool.keys() - self._packed.keys()
        names = [key for key in model.state_dict() if key in own_weights]
        names += self._packed
        write_shards(folder, self.spool, names, PACKED_SHARD, {"format": "pt"})
        save_packed_config(self.opened, folder, specs=specs, dtype=self.dtype)
        refuse_changed_blocks(
            folder, self.spool, name=method, dtype=self.dtype, tied=is_tied(model)
        )


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _save_all_but_weights(model: Any, folder: Path) -> None:
    """Let `save_pretrained` write configuration, generation settings and code."""
    quantizer = getattr(model, "hf_quantizer", None)
    model.hf_quantizer = None  # it would put the model's weights in place of none
    try:
        model.save_pretrained(folder, state_dict={})
    finally:
        model.hf_quantizer = quantizer


def write_shards(
    folder: Path,
    spool: TensorSpool,
    names: list[str],
    max_size: str,
    metadata: Mapping[str, Any],
    *,
    end: str = "",
    sort_keys: bool = False,
) -> None:
    """Write tensors as safetensors files of at most `max_size`, and the index of several.

    `metadata` stands in the index; `end` and `sort_keys` say how its JSON is written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: spool.empty(name) for name in names}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_size
    )
    for file_name, names_of_file in split.filename_to_tensors.items():
        spool.write_file(folder / file_name, names_of_file)
    if split.is_sharded:
        index = {
            "metadata": {**split.metadata, **metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=sort_keys) + end
        (folder / "model.safetensors.index.json").write_text(text)
    for path in weight_files(folder):
        path.chmod(0o644)
