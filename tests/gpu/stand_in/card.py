"""A stand-in for a GPU: tensors that say `cuda:0`, compute on the CPU and refuse CPU tensors.

`install()` gives this process such a card: `torch.cuda` answers, `device="cuda"` works in every
factory and `.to`, an operation over tensors of both places raises as CUDA would, and a tensor must
be brought back before numpy or the disk sees it. What runs on it has met every line that a GPU
would run, in order, with real numbers; it proves nothing about kernels, speed, memory or rounding
there.

How: a wrapper tensor holds the CPU's tensor, and a dispatch mode sees every operation. To C++ the
wrapper is a CPU tensor (autograd needs no streams so); only Python sees `cuda:0`. The mode takes
the place of fake tensors' mode, for which torch skips starting CUDA.
"""

import os
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

if __package__:  # the kit's own process imports it as `stand_in.card`
    from stand_in.tape import Tape
else:  # another process finds both files on its path
    from tape import Tape

PLACE = torch.device("cuda:0")
NAME = "stand-in card"
# as CUDA's do
_TAKES_BOTH = (
    "aten::copy_",
    "aten::_foreach_copy_",
    "aten::index_put",
    "aten::_index_put_impl_",
    "aten::index.Tensor",
)


class OnCard(torch.Tensor):
    """A tensor that says it lies on the card; `inner` is the CPU's tensor behind it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnCard":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("cpu"),
        )
        wrapper.inner = inner
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: PLACE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        """The same tensor outside autograd; setting it changes what lies there."""
        return self.detach()

    @data.setter
    def data(self, value: "OnCard") -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function, args, kwargs or {})

    # modules then swap parameters in place, so that tied ones stay tied
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any
    ) -> "OnCard":
        return OnCard(inner["inner"])

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        """Move or convert; C++ would take a move to the CPU for nothing to do."""
        if args and isinstance(args[0], torch.Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = torch.device(device or PLACE), dtype or self.dtype
        if device.type == "cuda" and dtype == self.dtype and not copy:
            return self
        # Memory of its own kind says that Python asks: autograd's own copies name the CPU too,
        # where C++ thinks that this tensor is.
        away = {"pin_memory": False} if device.type == "cpu" else {}
        return torch.ops.aten._to_copy.default(self, dtype=dtype, device=device, **away)

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        """Bring it back."""
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> torch.Tensor:
        """It is there."""
        return self

    def get_device(self) -> int:
        """Return the card's index."""
        return 0

    def tolist(self) -> Any:
        """Return its values, which a GPU would send."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU's tensor does."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        """Return the storage behind it: what weighing counts."""
        return self.inner.untyped_storage()

    def storage(self) -> Any:
        """Return the storage behind it."""
        return self.inner.storage()

    def data_ptr(self) -> int:
        """Return where it lies."""
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _loaded, (self.inner,)

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.inner!r})"


_LOAD_TO = {"place": "cuda"}  # where `torch.load` puts what was saved from the card


def _loaded(inner: torch.Tensor) -> torch.Tensor:
    return OnCard(inner) if _LOAD_TO["place"] == "cuda" else inner


class Card(TorchDispatchMode):
    """Sees the factories: `torch.empty(device="cuda")` has no argument that is on the card."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation on the CPU's tensors.

    Its results lie on the card where its arguments do, or where `device` says.
    """
    name, device = function.name(), kwargs.get("device")
    on_card: list[OnCard] = []
    on_host: list[torch.Tensor] = []

    def sort(value: Any) -> None:
        if isinstance(value, OnCard):
            on_card.append(value)
        elif isinstance(value, torch.Tensor) and value.dim() > 0:  # CUDA takes the CPU's scalars
            on_host.append(value)

    tree_map(sort, (args, kwargs))
    if on_card and on_host and not name.startswith(_TAKES_BOTH):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({name})"
        )
    away = kwargs.get("pin_memory") is not None or not on_card
    to_card = (
        torch.device(device).type == "cuda" or not away if device is not None else bool(on_card)
    )
    if device is not None and torch.device(device).type == "meta":
        to_card = False  # shapes alone lie on no card
    elif device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(
        lambda value: value.inner if isinstance(value, OnCard) else value, (args, kwargs)
    )
    with no_dispatch():
        result = _KERNELS.get(name, function)(*inner_args, **inner_kwargs)
    if name.startswith("aten::copy_"):
        return args[0]
    # in-place operations return what they were given
    wrappers = {id(value.inner): value for value in on_card}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnCard):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        return OnCard(value) if to_card else value

    return tree_map(wrap, result)


def _pack_int4(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    """Lay bytes of two codes (N, K / 2) into the shape of CUDA's tiles.

    The tiles have the shape (N / 8, K / 16 tiles, 32, tiles / 2), each of 8 rows, and are read back
    by our kernel. Within a tile codes stay in their order, which is not so on a card.
    """
    rows, half = codes.shape
    in_tiles = codes.reshape(rows // 8, 8, half // (8 * tiles), 8 * tiles).transpose(1, 2)
    return in_tiles.contiguous().view(torch.int32).reshape(*in_tiles.shape[:2], 32, tiles // 2)


def _int4_product(
    x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor
) -> torch.Tensor:
    """Multiply as CUDA's kernel does: (code - 8) times the group's scale, plus its shift.

    Scales and shifts have the shape (groups, N, 2).
    """
    in_tiles = packed.contiguous().view(torch.uint8).reshape(*packed.shape[:2], 8, -1)
    pairs = in_tiles.transpose(1, 2).reshape(scales.shape[1], -1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten(1).float() - 8
    scale, shift = (scales[..., at].float().T.repeat_interleave(group, dim=1) for at in (0, 1))
    return (x.float() @ (codes * scale + shift).T).to(x.dtype)


# the CPU has none of that name
_KERNELS = {
    "aten::_convert_weight_to_int4pack": _pack_int4,
    "aten::_weight_int4pack_mm": _int4_product,
    # memory that a card reads by itself: the same numbers, where there is no card to read them
    "aten::pin_memory": lambda tensor, *_: tensor.clone(),
    "aten::_pin_memory": lambda tensor, *_: tensor.clone(),
    "aten::is_pinned": lambda *_: False,
}


class _Event:
    """A time stamp, as `torch.cuda.Event`."""

    def __init__(self, **_: Any) -> None:
        self.stamp = 0.0

    def record(self, *_: Any) -> None:
        """Take the time."""
        self.stamp = time.perf_counter()

    def synchronize(self) -> None:
        """Everything here is done when it returns."""

    def elapsed_time(self, later: "_Event") -> float:
        """Return milliseconds."""
        return 1e3 * (later.stamp - self.stamp)


_MEMORY = 8 * 2**30


def install() -> None:
    """Give this process the card. There is no way back: for processes of their own."""
    properties = SimpleNamespace(
        name=NAME, total_memory=_MEMORY, major=9, minor=0, multi_processor_count=1
    )
    nothing = lambda *_, **__: None  # noqa: E731
    zero = lambda *_, **__: 0  # noqa: E731
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": zero,
        "is_initialized": lambda: True,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_arch_list": lambda: ["sm_90"],
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "init": nothing,
        "_lazy_init": nothing,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "reset_peak_memory_stats": nothing,
        "memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_allocated": zero,
        "max_memory_reserved": zero,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "seed_all": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": nothing,
        "set_rng_state_all": nothing,
        "Event": _Event,
        "CUDAGraph": Tape,
        "graph": lambda graph, **_: graph,  # a tape records in its own block
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer if isinstance(answer, type) else _own(answer))
    torch.version.cuda = torch.version.cuda or "0.0"
    # transformers reads weights in threads, and a mode is of the thread that entered it
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    _on_cpu_instead()
    torch._C._ensureCUDADeviceGuardSet()  # autograd asks the device of a move for its stream
    # torch.tensor(..., device="cuda") makes on the CPU and moves: the move is seen here
    torch._C._set_only_lift_cpu_tensors(True)
    Card().__enter__()


def _own(answer: Any) -> Any:
    """Return a copy of a function: torch keeps rules by object, and two names may not share one."""
    return lambda *args, **kwargs: answer(*args, **kwargs)


def _on_cpu_instead() -> None:
    """Send random streams, autocast and profiles to the CPU; make inference tensors plain tensors.

    C++ keeps streams and autocast by device; no wrapper can be an inference tensor.
    """
    generator, autocast, load = torch.Generator, torch.autocast, torch.load
    profile = torch.profiler.profile

    class Generator:  # a class, since annotations join it with `|`
        def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
            return generator("cpu")

    class Autocast(autocast):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    class Profile(profile):  # type: ignore[misc,valid-type]
        # asked for the kernels of a card that is not there, CUPTI prints a page for each operation
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "activities": [torch.profiler.ProfilerActivity.CPU]})

    def load_to(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        _LOAD_TO["place"] = "cuda" if map_location is None else torch.device(map_location).type
        return load(*args, map_location="cpu", **kwargs)

    torch.serialization.add_safe_globals([_loaded])
    torch.load = torch.serialization.load = load_to
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]
    torch.profiler.profile = Profile  # type: ignore[misc]
    torch.Generator = Generator  # type: ignore[misc,assignment]
    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = Autocast  # type: ignore[misc]


if os.environ.get("HARNESS_STAND_IN_CARD"):
    install()
