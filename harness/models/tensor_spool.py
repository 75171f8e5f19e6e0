"""Tensors that wait on the disk until a student's files are written, and writing those files.

The files are the bytes that `safetensors.torch.save_file` writes, without all tensors in memory at
once. Format: 8 bytes with the header's length, the header (JSON), the tensors' bytes.
"""

import json
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

_CHUNK_BYTES = 2**22  # of a tensor that is copied from file to file
_ALIGNMENT = 8  # bytes: the header is filled up with spaces to a multiple of it


class SpooledTensor(NamedTuple):
    """A tensor in the spool's file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte
    bytes: int


class TensorSpool(Mapping[str, Tensor]):
    """Named tensors in one file, in the order in which they were added; read one at a time.

    The file goes with the object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, SpooledTensor] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        weakref.finalize(self, path.unlink, missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to the disk."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        with self.path.open("ab") as stream:
            offset = stream.tell()
            flat.view(torch.uint8).numpy().tofile(stream)
        self.entries[name] = SpooledTensor(
            tensor.dtype, tuple(tensor.shape), offset, flat.numel() * flat.element_size()
        )

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.bytes:
            with self.path.open("rb") as stream:
                stream.seek(entry.offset)
                count = stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
            if count != entry.bytes:
                raise OSError(f"{self.path} ends too early")
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Yield the tensors' names."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.entries)

    def empty(self, name: str) -> Tensor:
        """Return a tensor of the same type and shape without numbers."""
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def copy(self, name: str, stream: BinaryIO) -> None:
        """Copy a tensor's bytes to the end of another file."""
        entry = self.entries[name]
        with self.path.open("rb") as source:
            source.seek(entry.offset)
            remaining = entry.bytes
            while remaining:
                chunk = source.read(min(remaining, _CHUNK_BYTES))
                if not chunk:
                    raise OSError(f"{self.path} ends too early")
                stream.write(chunk)
                remaining -= len(chunk)

    def write_file(self, path: Path, names: Sequence[str]) -> None:
        """Write these tensors as a safetensors file."""
        order, dtypes = _written_order([(name, self.entries[name].dtype) for name in names])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            entry = self.entries[name]
            begin, end = end, end + entry.bytes
            header[name] = {
                "dtype": dtypes[name],
                "shape": list(entry.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT)
        with path.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            for name in order:
                self.copy(name, stream)


def _written_order(
    tensors: Sequence[tuple[str, torch.dtype]],
) -> tuple[list[str], dict[str, str]]:
    """Return the order in which safetensors writes tensors, and what it calls the type of each.

    The library is asked with tensors of the same names and types that hold nothing.
    """
    from safetensors.torch import save

    written = save({name: torch.empty(0, dtype=dtype) for name, dtype in tensors})
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    return list(header), {name: entry["dtype"] for name, entry in header.items()}
