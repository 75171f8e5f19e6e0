"""Weights of a model that stay in its safetensors files until they are asked for, and go again.

The model is built without memory for its weights, as transformers builds it: on the device `meta`.
`FileWeights` reads tensors by the names that the model gives them, wherever the files hold them and
however they name them, puts them into the model, and takes them out again.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.machine.memory import return_freed_memory
from harness.models.checkpoint import model_class, weight_files
from harness.models.stored_attention import attend_to_stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def empty_model(folder: Path, dtype: "torch.dtype") -> Any:
    """Return the model of a folder as `from_pretrained` opens it, all its weights on `meta`.

    Tensors that no file holds (of rotary positions) are on the CPU, with their numbers.
    """
    import harness.models.packed  # noqa: F401  the formats of our own students

    model = model_class(folder).from_pretrained(folder, dtype=dtype, device_map="meta").eval()
    attend_to_stored(model)
    _rebuild_unsaved_buffers(model)
    return model


def _rebuild_unsaved_buffers(model: Any) -> None:
    """Compute the buffers that no file holds, as transformers does after it has read a file.

    A module's `_init_weights` fills them; weights are marked as read and stay as they are.
    """
    import torch
    from transformers import PreTrainedModel

    saved_names = model.state_dict(keep_vars=True).keys()
    for name, module in list(model.named_modules()):
        path = f"{name}." if name else ""
        unsaved = [
            key
            for key, buffer in module._buffers.items()
            if buffer is not None and f"{path}{key}" not in saved_names
        ]
        if not unsaved:
            continue
        for key in unsaved:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        parents = [model.get_submodule(parent) for parent in _paths_above(name)]
        owner = next(parent for parent in parents if isinstance(parent, PreTrainedModel))
        with torch.no_grad():
            owner._init_weights(module)


def _paths_above(name: str) -> Iterator[str]:
    """Yield a module's path and those of the modules around it, the nearest first."""
    parts = name.split(".") if name else []
    for count in range(len(parts), -1, -1):
        yield ".".join(parts[:count])


class _Place(NamedTuple):
    """Where a model keeps a tensor: a module's parameter or buffer."""

    module: Any
    leaf: str

    def put(self, tensor: "Tensor") -> None:
        """Make the module hold this tensor."""
        holder = self.module._parameters if self.leaf in self.module._parameters else None
        (self.module._buffers if holder is None else holder)[self.leaf] = tensor


@dataclass
class _Weight:
    """A weight of the model: the tensor on `meta` that stands for it, and its places."""

    empty: "Tensor"
    places: list[_Place] = field(default_factory=list)  # several where weights are tied


class _Source(NamedTuple):
    """Where a file holds a tensor."""

    path: Path
    key: str


class FileWeights:
    """The weights of an empty model: read from its files by name, put into it, taken out again."""

    def __init__(self, model: Any, folder: Path, device: str) -> None:
        self.model, self.folder, self.device = model, folder, device
        self.weights = _weights_of(model)
        self._plain: dict[str, _Source] = {}  # tensors that a file holds as the model wants them
        self._converted: dict[str, list[_Source]] = {}  # by the first weight that is made of them
        self._find_sources()
        self._tie_equal_weights()

    def _find_sources(self) -> None:
        """Find what the model calls each tensor of the files, by transformers' own rules."""
        from safetensors import safe_open
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        model = self.model
        self.mapping = get_model_conversion_mapping(
            model, None, getattr(model, "hf_quantizer", None)
        )
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        state, prefix = model.state_dict(), model.base_model_prefix
        for path in weight_files(self.folder):
            with safe_open(path, framework="pt") as opened:
                keys = list(opened.keys())
            for key in keys:
                name, pattern = rename_source_key(key, renamings, converters, prefix, state)
                if name not in state and key in state:
                    name, pattern = rename_source_key(key, [], [], prefix, state)
                if name in state and pattern is None:
                    self._plain[name] = _Source(path, key)
                elif name in state:
                    self._converted.setdefault(name, []).append(_Source(path, key))

    def _tie_equal_weights(self) -> None:
        """Tie what the model wants tied and a file holds twice, where both hold equal numbers.

        transformers compares them when it opens a model, and cannot compare empty ones.
        """
        import torch

        tied = self.model.all_tied_weights_keys
        for target, source in list(tied.items()):
            if not (target in self._plain and source in self._plain):
                continue
            weights = [self.weights[name] for name in (target, source)]
            if weights[0] is weights[1]:
                continue
            numbers = [self._read(name) for name in (target, source)]
            if numbers[0].shape == numbers[1].shape and torch.equal(*numbers):
                for place in weights[0].places:
                    place.put(weights[1].empty)
                weights[1].places += weights[0].places
                self.weights[target] = weights[1]
            else:
                tied.pop(target)

    def _read(self, name: str) -> "Tensor":
        with self._files([self._plain[name]]) as files:
            source, dtype = self._plain[name], self.weights[name].empty.dtype
            return files[source.path].get_tensor(source.key).to(dtype)

    def names_below(self, module: str) -> list[str]:
        """Return the names of the weights of a module and of all below it, as in the state."""
        return [name for name in self.weights if name.startswith(f"{module}.")]

    def missing(self) -> set[str]:
        """Return the names of weights that cannot be read tensor by tensor from the files."""
        known = {id(self.weights[name]) for name in (*self._plain, *self._converted)}
        with_source = {name for name, weight in self.weights.items() if id(weight) in known}
        owners = {name.rpartition(".")[0] for name in self._converted}
        return {
            name
            for name in self.weights.keys() - with_source
            if name.rpartition(".")[0] not in owners
        }

    def has_converted(self, names: Collection[str]) -> bool:
        """Tell whether some of these weights are made of several tensors of the files."""
        return any(name in self._converted for name in names)

    @contextmanager
    def _files(self, sources: Iterable[_Source]) -> Iterator[Mapping[Path, Any]]:
        """Open the files of these tensors; nothing of them stays mapped into memory."""
        from safetensors import safe_open

        with ExitStack() as stack:
            yield {
                path: stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                for path in {source.path for source in sources}
            }

    def load(self, names: Collection[str]) -> None:
        """Read these weights, in the types of the empty model, and put them into the model."""
        import torch

        plain = [name for name in names if name in self._plain]
        with self._files([self._plain[name] for name in plain]) as files:
            for name in plain:
                source, weight = self._plain[name], self.weights[name]
                tensor = _read_by_rows(
                    files[source.path], source.key, weight.empty.dtype, self.device
                )
                if isinstance(weight.empty, torch.nn.Parameter):
                    tensor = torch.nn.Parameter(tensor, requires_grad=False)
                for place in weight.places:
                    place.put(tensor)
        self._load_converted([name for name in names if name in self._converted])
        for module in {place.module for name in names for place in self.weights[name].places}:
            if hasattr(module, "align"):
                module.align()

    def _load_converted(self, names: Collection[str]) -> None:
        """Let transformers make weights of several tensors, such as the experts of a mixture."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        sources = [source for name in names for source in self._converted[name]]
        if not sources:
            return
        model = self.model
        conversions = getattr(model, "_weight_conversions", None)
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=next(iter(self.weights.values())).empty.dtype,
            weight_mapping=self.mapping,
            hf_quantizer=getattr(model, "hf_quantizer", None),
        )
        with self._files(sources) as files, _without_progress_bars():
            slices = {source.key: files[source.path].get_slice(source.key) for source in sources}
            convert_and_load_state_dict_in_model(model, slices, config)
        model._weight_conversions = conversions  # of the whole model, not of this part
        model.requires_grad_(False)

    def drop(self, names: Collection[str]) -> None:
        """Take these weights out of the model; changes to them are lost, their memory goes back."""
        for name in names:
            for place in self.weights[name].places:
                place.put(self.weights[name].empty)
                if hasattr(place.module, "forget_layout"):
                    place.module.forget_layout()
        return_freed_memory()


def _read_by_rows(file: Any, key: str, dtype: "torch.dtype", device: str) -> "Tensor":
    """Read a tensor into one of another type, some rows at a time.

    A copy of a whole matrix in the file's type costs memory, which is seldom given back.
    """
    import torch

    from harness.models.packed import row_parts

    stored = file.get_slice(key)
    shape = stored.get_shape()
    if len(shape) != 2:
        return file.get_tensor(key).to(device=device, dtype=dtype)
    tensor = torch.empty(shape, dtype=dtype, device=device)
    for part in row_parts(*shape):
        tensor[part] = stored[part]
    return tensor


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off: one for each block says nothing."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _weights_of(model: Any) -> dict[str, _Weight]:
    """Return the weights of a model by name, in the order of its state; tied ones are one."""
    by_id: dict[int, _Weight] = {}
    weights: dict[str, _Weight] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        weight = by_id.setdefault(id(tensor), _Weight(tensor))
        owner, _, leaf = name.rpartition(".")
        weight.places.append(_Place(model.get_submodule(owner), leaf))
        weights[name] = weight
    return weights
