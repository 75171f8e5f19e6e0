"""A teacher's distributions over its training rows, computed once for all methods, seeds and runs.

For every trained position the cache keeps the complete distribution where the vocabulary is small,
else the k likeliest tokens: always at temperature 1, in memory-mapped shards. `cache_forms` says
how ids and log-probabilities are kept: exactly (`float32`), as fp16, or in 8 bits. Rows are found
by a hash of their own token ids, never by their place in a shuffle; a lookup by place is how other
projects trained rows on another row's teacher. A cache is checked against a live forward pass when
it is written, and by its digests whenever it is opened; a damaged one is reported and computed
again.

CACHE/teachers/KEY/   meta.json, index.npz, log_p-000.npy, for the k likeliest ids-000.npy, and for
                      8 bits range-000.npy
"""

import hashlib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from harness.contract import Checkpoint, Job, Progress
from harness.errors import CellFailed
from harness.files.closure import code_digest
from harness.files.digests import digest_of, file_digest
from harness.files.writing import save_atomically, write_atomically
from harness.machine.gpu import device_label
from harness.machine.memory import release_memory
from harness.models.artefacts import folder_damage, read_description, signed_description
from harness.models.language_model import LanguageModel, open_model
from harness.models.shape import MAX_DENSE_VOCABULARY, forward_flops_per_token
from harness.scoring.backend import CanRead, LikelihoodRequest, TopK
from harness.scoring.reading import Reader
from methods.training.cache_check import Differences, differences, verdict
from methods.training.cache_dtype import CacheDtype
from methods.training.cache_forms import (
    id_bits,
    position_bytes,
    rounding_steps,
    unpack_ids,
    unpack_log_p,
)
from methods.training.cache_shards import KeptForm, RowPlace, ShardWriter
from methods.training.positions import Distribution
from methods.training.rows import Batch, TokenRow
from methods.training.transfers import to_device

# of log-probabilities of 2 bytes in one file; writing it takes twice that in memory
SHARD_BYTES = 2**28
CHECKED_ROWS = 20


@dataclass(frozen=True)
class CachedTeacher:
    """An open cache, which finds distributions by row."""

    key: str
    k: int
    dense: bool
    index: dict[bytes, RowPlace]  # by `row_key`
    log_p: tuple[Any, ...]  # memory maps (tokens, k)
    ids: tuple[Any, ...]  # memory maps (tokens, bytes), of packed ids
    meta: dict[str, Any]
    ranges: tuple[Any, ...] = ()  # memory maps (tokens, 2), of log-probabilities in 8 bits

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return the teacher's distributions at the batch's trained positions."""
        if self.dense:
            return Distribution(self.logits(batch.rows, batch.device))
        return Distribution(None, self.top(batch.rows, batch.device))

    @property
    def reads_in_parts(self) -> bool:
        """Tell that it does: what a cache keeps of a position is small."""
        return True

    def read_parts(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return the same as `read`."""
        return self.read(batch, vocabulary)

    def logits(self, rows: Sequence[TokenRow], device: Any) -> Tensor:
        """Return the log-probabilities (N, V) of the rows' trained positions; they are logits.

        Where only likely tokens are kept, they are (N, k).
        """
        arrays = self._arrays(rows)
        log_p = arrays["log_p"] if not self.ranges else unpack_log_p(arrays, self.dtype)
        return to_device(torch.from_numpy(log_p), device).float()

    def top(self, rows: Sequence[TokenRow], device: Any) -> TopK:
        """Return the likeliest tokens (N, k) of the rows' trained positions."""
        packed = np.concatenate([self._slice(self.ids, row) for row in rows])
        ids = unpack_ids(packed, id_bits(self.meta["vocabulary"]), self.k)
        return TopK(to_device(torch.from_numpy(ids), device), self.logits(rows, device))

    @property
    def dtype(self) -> CacheDtype:
        """How log-probabilities are kept."""
        kept: CacheDtype = self.meta["cache_dtype"]
        return kept

    def steps(self, row: TokenRow) -> Tensor:
        """Return how far a kept log-probability of each position may be from the exact one."""
        return torch.from_numpy(rounding_steps(self._arrays([row]), self.dtype))

    def _arrays(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """Return what is kept of the rows' log-probabilities, by the names of its files."""
        shards = {"log_p": self.log_p, **({"range": self.ranges} if self.ranges else {})}
        return {
            name: np.concatenate([self._slice(maps, row) for row in rows])
            for name, maps in shards.items()
        }

    def _slice(self, shards: tuple[Any, ...], row: TokenRow) -> Any:
        try:
            place = self.index[row_key(row)]
        except KeyError:
            raise CellFailed(
                "a training row is not in the teacher's cache; it was made for other rows"
            ) from None
        return shards[place.shard][place.start : place.start + place.positions]

    def cost(self) -> dict[str, Any]:
        """Return what building the cache cost; every row that uses it records the same."""
        return {
            "key": self.key,
            "tokens": self.meta["read"],
            "seconds": self.meta["seconds"],
            "flops": self.meta["flops"],
        }


def row_key(row: TokenRow) -> bytes:
    """Return a row's name in the cache: a hash of its token ids and of where training starts."""
    content = np.asarray([row.trained_from, *row.ids], dtype=np.int64).tobytes()
    return hashlib.sha256(content).digest()[:16]


@dataclass(frozen=True)
class _CacheSpec:
    """What a cache must hold."""

    teacher: Checkpoint
    dtype: str
    form: KeptForm  # the width is that of the vocabulary that both models share

    @property
    def meta(self) -> dict[str, Any]:
        """Return the fields of `meta.json` that say the same."""
        return {
            "teacher": self.teacher.digest,
            "dtype": self.dtype,
            "vocabulary": self.form.width,
            "k": self.form.k or self.form.width,
            "cache_dtype": self.form.dtype,
        }

    def key(self, device: str, row_keys: Sequence[bytes]) -> str:
        """Return a digest of all that the cache's content depends on."""
        return digest_of(
            "teacher",
            code_digest(__name__),
            self.teacher.digest,
            self.dtype,
            device_label(device),
            "all" if self.form.k is None else self.form.k,
            self.form.width,
            self.form.dtype,
            [name.hex() for name in row_keys],
        )


def teacher_cache(
    job: Job,
    teacher: Checkpoint,
    rows: Sequence[TokenRow],
    *,
    k: int,
    width: int,
    dtype: CacheDtype = "float16",
) -> CachedTeacher:
    """Open the cache of a teacher over these rows; build it where there is none or it is damaged.

    `width` is the vocabulary that both models share: logits are cut to it before any softmax.
    `dtype` is how log-probabilities are kept.
    Raises `CellFailed` when what was written does not agree with a live forward pass.
    """
    distinct = {row_key(row): row for row in rows}
    form = KeptForm(None if width <= MAX_DENSE_VOCABULARY else k, width, dtype)
    spec = _CacheSpec(teacher, job.dtype, form)
    folder = job.cache / "teachers" / spec.key(job.device, sorted(distinct))[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        cache = _open_cache(folder, job, spec.meta)
        if cache is not None:
            return cache
        _build_cache(folder, job, spec, list(distinct.values()))
        release_memory(job.device)
        cache = _open_cache(folder, job, spec.meta)
    assert cache is not None, f"the cache {folder.name} cannot be read back"
    return cache


def damage_of(folder: Path) -> str:
    """Return why a cache cannot be used, "" where it can.

    Its files are compared with their digests, and the code that wrote it with the current code.
    """
    damage = folder_damage(folder)
    if damage:
        return damage
    has_current_code = read_description(folder).get("code") == code_digest(__name__)
    return "" if has_current_code else "written by other code"


def mismatch_of(meta: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the first field in which a cache is not as expected, "" where there is none."""
    for name, value in expected.items():
        if meta.get(name) != value:
            return f"its {name} is {meta.get(name)}, not {value}"
    return ""


def _open_cache(folder: Path, job: Job, expected: Mapping[str, Any]) -> CachedTeacher | None:
    """Open a complete cache with the expected meta data; report any other, and return None.

    The meta data are compared because a folder may have been copied from elsewhere.
    """
    if not folder.exists():
        return None
    damage = damage_of(folder) or mismatch_of(read_description(folder), expected)
    if damage:
        detail = f"the teacher's cache {folder.name} is damaged ({damage}); it is computed again"
        job.progress(Progress(stage="teacher", done=0, total=1, detail=detail))
        return None
    meta = read_description(folder)
    with np.load(folder / "index.npz") as arrays:
        places = zip(arrays["rows"], arrays["places"].tolist(), strict=True)
        index = {bytes(name): RowPlace(*place[:3]) for name, place in places}
    log_p = _memory_maps(folder, "log_p", meta["shards"])
    ids = () if meta["dense"] else _memory_maps(folder, "ids", meta["shards"])
    ranges = _memory_maps(folder, "range", meta["shards"] if meta["cache_dtype"] == "int8" else 0)
    return CachedTeacher(folder.name, meta["k"], meta["dense"], index, log_p, ids, meta, ranges)


def _memory_maps(folder: Path, name: str, shards: int) -> tuple[Any, ...]:
    paths = [folder / f"{name}-{shard:03}.npy" for shard in range(shards)]
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def _build_cache(folder: Path, job: Job, spec: _CacheSpec, rows: list[TokenRow]) -> None:
    """Run the teacher over every row once, write shards, check them, and name the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    opened = open_model(spec.teacher, device=job.device, dtype=job.dtype)
    reader = teacher_reader(opened)
    longest_first = sorted(rows, key=lambda row: len(row.ids), reverse=True)

    def write(part_folder: Path) -> None:
        began = time.monotonic()
        shards = _write_shards(part_folder, job, spec, reader, longest_first)
        tokens = sum(len(row.ids) for row in longest_first)
        positions = sum(place.positions for place in shards.places)
        mean_length = tokens / len(longest_first)
        meta = {
            **spec.meta,
            "code": code_digest(__name__),
            "name": spec.teacher.name,
            "dense": spec.form.k is None,
            "kept_mass": round(shards.mass / positions, 6),
            # mean KL, in nats, of the kept distributions from those that were computed
            "rounding_kl": float(f"{shards.kl / positions:.3g}"),
            "position_bytes": position_bytes(spec.form.width, spec.form.k, spec.form.dtype),
            "rows": len(longest_first),
            "positions": positions,
            "read": tokens,
            "shards": shards.number,
            "seconds": round(time.monotonic() - began, 3),
            "flops": forward_flops_per_token(opened.model, mean_length) * tokens,
            "files": {path.name: file_digest(path) for path in sorted(part_folder.iterdir())},
        }
        write_atomically(part_folder / "meta.json", signed_description(meta))
        cache = _open_cache(part_folder, job, {})
        assert cache is not None
        # before the folder gets its name: no other run finds an unchecked cache
        _check_against_live(cache, reader, opened, longest_first, spec.form.width)

    try:
        save_atomically(folder, write)
    except CellFailed:
        for part_folder in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(part_folder, ignore_errors=True)
        raise


def teacher_reader(opened: LanguageModel) -> Reader:
    """Return what reads a teacher for a cache; the size of its batches follows from the memory."""
    return Reader(opened)


def _write_shards(
    folder: Path, job: Job, spec: _CacheSpec, reader: CanRead, rows: Sequence[TokenRow]
) -> ShardWriter:
    """Let the teacher read the rows; write its distributions, and an index of where each row is."""
    shards = ShardWriter(folder, spec.form, SHARD_BYTES)
    detail, form = f"read by {spec.teacher.name}", spec.form
    requests = [likelihood_request(row) for row in rows]
    for done, top in enumerate(reader.top_k(requests, k=form.k, width=form.width), 1):
        shards.add(top)
        job.progress(
            Progress(stage="teacher", done=done, total=len(rows), unit="rows", detail=detail)
        )
    shards.flush()
    names = np.frombuffer(b"".join(row_key(row) for row in rows), dtype="V16")
    places = np.asarray(shards.places, dtype=np.int64)
    np.savez(folder / "index.npz", rows=names, places=places)
    return shards


def likelihood_request(row: TokenRow) -> LikelihoodRequest:
    """Return a request for the likelihood of a row's trained tokens, which are its last ones."""
    return LikelihoodRequest(row.ids, row.trained_tokens)


def _check_against_live(
    cache: CachedTeacher,
    reader: CanRead,
    opened: LanguageModel,
    rows: Sequence[TokenRow],
    width: int,
) -> None:
    """Compare twenty rows with a live forward pass of each alone, not in the batch it was read in.

    Raises `CellFailed` where they differ by more than the teacher's own rounding.
    """
    sample = random.Random(0).sample(list(rows), min(CHECKED_ROWS, len(rows)))
    compared = [_differences_from_live(cache, reader, opened, row, width) for row in sample]
    judged = verdict(compared, is_bf16=opened.model.dtype == torch.bfloat16)
    if not judged.agrees:
        raise CellFailed(
            f"the teacher's cache differs from a live forward pass {judged.text}; it was not kept"
        )


def _differences_from_live(
    cache: CachedTeacher, reader: CanRead, opened: LanguageModel, row: TokenRow, width: int
) -> Differences:
    """Return how far a row's cached log-probabilities are from those of a live pass."""
    [live] = reader.top_k([likelihood_request(row)], k=None, width=width)
    steps_N1 = cache.steps(row).to(opened.device)
    if cache.dense:
        return differences(cache.logits([row], opened.device), live.log_p_NK, live, steps_N1)
    top = cache.top([row], opened.device)
    return differences(top.log_p_NK, live.log_p_NK.gather(1, top.ids_NK), live, steps_N1)
