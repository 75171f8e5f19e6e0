"""A model opened block by block: the weights of its blocks stay in their files while nothing runs.

What stands outside the blocks (token table, last norm, head, encoders of images) is in memory. A
block reads its weights when it is called and drops them behind the call, so that the model runs as
it is, in the room of one block. A method that changes a block holds it meanwhile.

Not every model can be opened so: a weight may belong to two blocks, or be made of tensors of
several; code outside a block may read its weights. `open_blockwise` asks the model itself: it
builds it empty, finds a source for each weight, and runs it once.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError
from harness.models.blocks import named_blocks, probe_ids, temporary_hooks
from harness.models.checkpoint import first_non_finite
from harness.models.file_weights import FileWeights, empty_model
from harness.models.language_model import LanguageModel, tokenizer_of

if TYPE_CHECKING:
    import torch


@dataclass
class BlockwiseModel:
    """A model with its blocks in their files. `held` is the block that is in memory to stay."""

    model: Any
    weights: FileWeights
    prefix: str  # of the blocks' names
    blocks: Any
    held: str = ""
    _resting: list[str] = field(default_factory=list)  # the block that a call has read, if any

    @classmethod
    def of_folder(cls, folder: Path, *, device: str, dtype: "torch.dtype") -> "BlockwiseModel":
        """Open a folder's model; raises `NotBlockwise` where its weights do not lie in blocks."""
        model = empty_model(folder, dtype)
        try:
            prefix, blocks = named_blocks(model)
        except CellFailed as problem:
            raise NotBlockwise(str(problem)) from problem
        blockwise = cls(model, FileWeights(model, folder, device), prefix, blocks)
        blockwise._refuse_weights_of_no_block()
        blockwise._refuse_conversion_across_blocks()
        model.requires_grad_(False)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[key] = buffer.to(device)
        blockwise.weights.load(blockwise.rest())
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(blockwise._reader(f"{prefix}.{number}"))
        return blockwise

    def block_names(self) -> list[str]:
        """Return the names of the blocks, in order."""
        return [f"{self.prefix}.{number}" for number in range(len(self.blocks))]

    def block_of(self, name: str) -> str:
        """Return the name of the block that a module or a weight stands in, "" for none."""
        if not name.startswith(f"{self.prefix}."):
            return ""
        return f"{self.prefix}.{name.removeprefix(f'{self.prefix}.').partition('.')[0]}"

    def rest(self) -> list[str]:
        """Return the names of the weights outside the blocks."""
        return [name for name in self.weights.weights if not self.block_of(name)]

    def _refuse_weights_of_no_block(self) -> None:
        """Raise `NotBlockwise` for weights without a source, or of several blocks."""
        missing = sorted(self.weights.missing())
        if missing:
            raise NotBlockwise(f"no file holds {missing[0]}")
        blocks_of_weight: dict[int, str] = {}
        for name, weight in self.weights.weights.items():
            block = self.block_of(name)
            if blocks_of_weight.setdefault(id(weight), block) != block:
                raise NotBlockwise(f"{name} belongs to several blocks")

    def _refuse_conversion_across_blocks(self) -> None:
        """Raise `NotBlockwise` where tensors of a saved file are made of weights of two blocks."""
        from transformers.core_model_loading import revert_weight_conversion

        state = {name: weight.empty for name, weight in self.weights.weights.items()}
        expected = revert_weight_conversion(self.model, dict(state))
        parts: dict[str, Any] = {}
        for block in (*self.block_names(), ""):
            own = {name: state[name] for name in state if self.block_of(name) == block}
            parts |= revert_weight_conversion(self.model, own)
        if {name: tensor.shape for name, tensor in parts.items()} != {
            name: tensor.shape for name, tensor in expected.items()
        }:
            raise NotBlockwise("its files mix weights of several blocks")

    def _reader(self, name: str) -> Any:
        """Return a hook before a block: it reads the block's weights and drops another's."""

        def read(*_: Any) -> None:
            if name not in (self.held, *self._resting):
                self.drop_resting()
                self.weights.load(self.weights.names_below(name))
                self._resting.append(name)

        return read

    def drop_resting(self) -> None:
        """Drop the weights of the block that was called last, unless it is held."""
        for name in self._resting:
            self.weights.drop(self.weights.names_below(name))
        self._resting.clear()

    @contextmanager
    def holding(self, name: str, weights: Collection[str] | None = None) -> Iterator[None]:
        """Keep a module's weights in memory while the `with` block lasts: a block's, or a layer's.

        With `weights`, only those of these names. Changes are lost behind it. What stands outside
        the blocks is in memory anyway.
        """
        block = self.block_of(name)
        if not block or block == self.held:
            yield
            return
        names = self.weights.names_below(name) if weights is None else list(weights)
        if self.weights.has_converted(self.weights.names_below(block)):
            names = self.weights.names_below(block)
        self.drop_resting()
        self.weights.load(names)
        self.held = block
        try:
            yield
        finally:
            self.held = ""
            self.weights.drop(names)

    def state_of(self, names: Collection[str]) -> "dict[str, torch.Tensor]":
        """Return the weights of these names that are in memory, without their history."""
        state = self.model.state_dict()
        return {name: state[name] for name in names}


class NotBlockwise(Exception):
    """A model cannot be opened block by block; it is opened whole."""


def open_blockwise(
    checkpoint: Checkpoint, *, device: str, dtype: str
) -> tuple[LanguageModel, BlockwiseModel] | None:
    """Open a checkpoint block by block, None for a model that can only be opened whole.

    The model runs once: that shows whether its blocks alone read their weights, and reads each
    weight. Raises `CellFailed` for a number that is not finite.
    """
    import torch

    try:
        blockwise = BlockwiseModel.of_folder(
            checkpoint.path, device=device, dtype=getattr(torch, dtype)
        )
        tokenizer = tokenizer_of(checkpoint.path)
        refuse_non_finite_tensors(blockwise.state_of(blockwise.rest()), checkpoint.name)
        checks = [
            block.register_forward_pre_hook(_check_of(blockwise, name, checkpoint.name))
            for name, block in zip(blockwise.block_names(), blockwise.blocks, strict=True)
        ]
        with temporary_hooks(checks), torch.no_grad():
            output = blockwise.model(input_ids=probe_ids(blockwise.model), use_cache=False)
        if output.logits.device.type == "meta":
            return None
    except (CellFailed, HarnessError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # noqa: BLE001  whatever a class raises that cannot be built or run so
        return None
    blockwise.drop_resting()
    return LanguageModel(blockwise.model, tokenizer, device, checkpoint), blockwise


def _check_of(blockwise: BlockwiseModel, block: str, name: str) -> Any:
    """Return a hook before a block, which refuses weights that are not finite."""

    def check(*_: Any) -> None:
        names = blockwise.weights.names_below(block)
        refuse_non_finite_tensors(blockwise.state_of(names), name)

    return check


def refuse_non_finite_tensors(tensors: "Mapping[str, torch.Tensor]", name: str) -> None:
    """Raise `CellFailed` for a NaN or an infinity among the weights of the model `name`."""
    place = first_non_finite(tensors.items())
    if place:
        raise CellFailed(
            f"{name} holds numbers that are not finite: {place}; train, save or download it again"
        )
