"""Writes a teacher's distributions into the shards of its cache.

Distributions wait on the teacher's device until they are worth a transfer; then those of all
waiting rows come to the host as one block. Shapes: N positions, K tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.scoring.backend import TopK
from methods.training.cache_dtype import CacheDtype
from methods.training.cache_forms import (
    id_bits,
    pack_ids,
    pack_log_p,
    rounding_kl,
    unpack_log_p,
)

_TRANSFER_BYTES = 2**24  # that wait on the device at most, but for one row


class RowPlace(NamedTuple):
    """Where the distributions of a row are."""

    shard: int
    start: int  # first position in the shard
    positions: int


@dataclass(frozen=True)
class KeptForm:
    """What is kept of each distribution."""

    k: int | None  # tokens kept of a position; None: all, in the order of their ids
    width: int  # of the vocabulary
    dtype: CacheDtype


class HostTop(NamedTuple):
    """Distributions in the host's memory."""

    ids_NK: Any  # int32; empty columns where all tokens are kept
    log_p_NK: Any  # float32


def host_words(tops: list[TopK], *, dense: bool) -> torch.Tensor:
    """Return ids and log-probabilities of several rows as 32-bit words (N, 2K), on the host.

    They travel as one block: one transfer, however many rows there are. Where all tokens are kept,
    there are no ids among them, (N, K).
    """
    words = torch.cat([top.log_p_NK.float() for top in tops]).view(torch.int32)
    if not dense:
        ids = torch.cat([top.ids_NK.to(torch.int32) for top in tops])
        words = torch.cat([ids, words], dim=1)
    return words.cpu()


def to_host(tops: list[TopK], *, dense: bool) -> HostTop:
    """Return the distributions of several rows, one behind the other, by one transfer."""
    host = host_words(tops, dense=dense).numpy()
    columns = 0 if dense else host.shape[1] // 2
    return HostTop(host[:, :columns], np.ascontiguousarray(host[:, columns:]).view(np.float32))


@dataclass
class ShardWriter:
    """Writes distributions into files, a new one when the next row would make it too long."""

    folder: Path
    form: KeptForm
    shard_bytes: int  # of log-probabilities of 2 bytes in one file
    places: list[RowPlace] = field(default_factory=list)  # one per row
    number: int = 0  # of shards written
    mass: float = 0.0  # kept probability, summed over positions
    kl: float = 0.0  # of what is kept from what was computed, summed over positions
    _on_device: list[TopK] = field(default_factory=list)
    _arrays: dict[str, list[Any]] = field(default_factory=dict)  # by the name of their file
    _waiting: int = 0  # positions that are packed and not yet written

    def add(self, top: TopK) -> None:
        """Take the distributions of the next row."""
        self._on_device.append(top)
        values = sum(waiting.log_p_NK.numel() for waiting in self._on_device)
        if 8 * values >= _TRANSFER_BYTES:
            self._fetch()

    def flush(self) -> None:
        """Write all rows that wait."""
        self._fetch()
        self._write_shard()

    def _fetch(self) -> None:
        """Bring the rows that wait on the device to the host, and pack them."""
        if not self._on_device:
            return
        counts = [len(top.log_p_NK) for top in self._on_device]
        host = to_host(self._on_device, dense=self.form.k is None)
        self._on_device.clear()
        start = 0
        for count in counts:
            rows = slice(start, start + count)
            self._pack(HostTop(host.ids_NK[rows], host.log_p_NK[rows]))
            start += count

    def _pack(self, row: HostTop) -> None:
        count, tokens = row.log_p_NK.shape
        if self._waiting + count > max(1, self.shard_bytes // (2 * tokens)):
            self._write_shard()
        self.places.append(RowPlace(self.number, self._waiting, count))
        self._waiting += count
        arrays = pack_log_p(row.log_p_NK, self.form.dtype)
        dense = self.form.k is None
        self.mass += count if dense else float(np.exp(row.log_p_NK).sum(dtype=np.float64))
        if self.form.dtype != "float32":
            kept_NK = unpack_log_p(arrays, self.form.dtype)
            self.kl += float(rounding_kl(row.log_p_NK, kept_NK, dense=dense).sum())
        if not dense:
            arrays["ids"] = pack_ids(row.ids_NK, id_bits(self.form.width))
        for name, array in arrays.items():
            self._arrays.setdefault(name, []).append(array)

    def _write_shard(self) -> None:
        """Write the rows that are packed as one shard."""
        if not self._waiting:
            return
        for name, arrays in self._arrays.items():
            np.save(self.folder / f"{name}-{self.number:03}.npy", np.concatenate(arrays))
        self._arrays.clear()
        self.number, self._waiting = self.number + 1, 0
