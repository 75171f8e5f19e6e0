"""A teacher's distributions over its training rows, computed once for all methods, seeds and runs.

For every trained position the cache keeps the complete distribution where the vocabulary is small,
else the k likeliest tokens: always at temperature 1, as fp16 log-probabilities, in memory-mapped
shards. Rows are found by a hash of their own token ids, never by their place in a shuffle; a lookup
by place is how other projects trained rows on another row's teacher. A cache is checked against a
live forward pass when it is written, and by its digests whenever it is opened; a damaged one is
reported and computed again.

CACHE/teachers/KEY/   meta.json, index.npz, log_p-000.npy and, for the k likeliest, ids-000.npy
"""

import hashlib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from methods.training.positions import Distribution
from methods.training.rows import Batch, TokenRow

# of log-probabilities in one file; writing it takes twice that in memory
SHARD_BYTES = 2**28
CHECKED_ROWS = 20
TOLERANCE = 0.02  # nats: fp16 keeps a log-probability of -16 to 0.008
# nats: a bf16 logit between 32 and 64 has steps of 0.25, and rounds differently in another batch
BF16_TOLERANCE = 0.5


class RowPlace(NamedTuple):
    """Where the distributions of a row are."""

    shard: int
    start: int  # first position in the shard
    positions: int


@dataclass(frozen=True)
class CachedTeacher:
    """An open cache, which finds distributions by row."""

    key: str
    k: int
    dense: bool
    index: dict[bytes, RowPlace]  # by `row_key`
    log_p: tuple[Any, ...]  # memory maps (tokens, k), fp16
    ids: tuple[Any, ...]
    meta: dict[str, Any]

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return the teacher's distributions at the batch's trained positions."""
        if self.dense:
            return Distribution(self.logits(batch.rows, batch.ids.device))
        return Distribution(None, self.top(batch.rows, batch.ids.device))

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
        log_p = np.concatenate([self._slice(self.log_p, row) for row in rows])
        return torch.from_numpy(log_p).to(device).float()

    def top(self, rows: Sequence[TokenRow], device: Any) -> TopK:
        """Return the likeliest tokens (N, k) of the rows' trained positions."""
        ids = np.concatenate([self._slice(self.ids, row) for row in rows]).astype(np.int64)
        return TopK(torch.from_numpy(ids).to(device), self.logits(rows, device))

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
    width: int  # of the vocabulary that both models share
    k: int | None  # tokens kept of a position; None: all

    @property
    def meta(self) -> dict[str, Any]:
        """Return the fields of `meta.json` that say the same."""
        return {
            "teacher": self.teacher.digest,
            "dtype": self.dtype,
            "vocabulary": self.width,
            "k": self.k or self.width,
        }

    def key(self, device: str, row_keys: Sequence[bytes]) -> str:
        """Return a digest of all that the cache's content depends on."""
        return digest_of(
            "teacher",
            code_digest(__name__),
            self.teacher.digest,
            self.dtype,
            device_label(device),
            "all" if self.k is None else self.k,
            self.width,
            [name.hex() for name in row_keys],
        )


def teacher_cache(
    job: Job, teacher: Checkpoint, rows: Sequence[TokenRow], *, k: int, width: int
) -> CachedTeacher:
    """Open the cache of a teacher over these rows; build it where there is none or it is damaged.

    `width` is the vocabulary that both models share: logits are cut to it before any softmax.
    Raises `CellFailed` when what was written does not agree with a live forward pass.
    """
    distinct = {row_key(row): row for row in rows}
    spec = _CacheSpec(teacher, job.dtype, width, None if width <= MAX_DENSE_VOCABULARY else k)
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
    return CachedTeacher(folder.name, meta["k"], meta["dense"], index, log_p, ids, meta)


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
            "code": code_digest(__name__),
            "teacher": spec.teacher.digest,
            "name": spec.teacher.name,
            "dtype": spec.dtype,
            "vocabulary": spec.width,
            "dense": spec.k is None,
            "k": spec.k or spec.width,
            "kept_mass": round(shards.mass / positions, 6),
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
        _check_against_live(cache, reader, opened, longest_first, spec.width)

    try:
        save_atomically(folder, write)
    except CellFailed:
        for part_folder in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(part_folder, ignore_errors=True)
        raise


def teacher_reader(opened: LanguageModel) -> Reader:
    """Return what reads a teacher for a cache; the size of its batches follows from the memory."""
    return Reader(opened)


@dataclass
class _ShardWriter:
    """Writes log-probabilities into files, a new one when the next row would make it too long."""

    folder: Path
    k: int | None  # tokens kept of a position; None: all, in the order of their ids
    width: int  # of the vocabulary
    places: list[RowPlace] = field(default_factory=list)  # one per row
    number: int = 0  # of shards written
    mass: float = 0.0  # kept probability, summed over positions
    _log_p: list[Any] = field(default_factory=list)
    _ids: list[Any] = field(default_factory=list)
    _waiting: int = 0  # positions not yet written

    def add(self, top: TopK) -> None:
        """Take the distributions of the next row."""
        count, tokens = top.log_p_NK.shape
        if self._waiting + count > max(1, SHARD_BYTES // (2 * tokens)):
            self.flush()
        self.places.append(RowPlace(self.number, self._waiting, count))
        self.mass += count if self.k is None else float(top.log_p_NK.exp().sum())
        self._log_p.append(top.log_p_NK.to(torch.float16).cpu().numpy())
        if self.k is not None:
            kind = np.uint16 if self.width <= 2**16 else np.int32
            self._ids.append(top.ids_NK.to(torch.int32).cpu().numpy().astype(kind))
        self._waiting += count

    def flush(self) -> None:
        """Write the rows that wait as one shard."""
        if not self._waiting:
            return
        for name, arrays in (("log_p", self._log_p), ("ids", self._ids)):
            if arrays:
                np.save(self.folder / f"{name}-{self.number:03}.npy", np.concatenate(arrays))
                arrays.clear()
        self.number, self._waiting = self.number + 1, 0


def _write_shards(
    folder: Path, job: Job, spec: _CacheSpec, reader: CanRead, rows: Sequence[TokenRow]
) -> _ShardWriter:
    """Let the teacher read the rows; write its distributions, and an index of where each row is."""
    shards = _ShardWriter(folder, spec.k, spec.width)
    detail = f"read by {spec.teacher.name}"
    requests = [likelihood_request(row) for row in rows]
    for done, top in enumerate(reader.top_k(requests, k=spec.k, width=spec.width), 1):
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

    For bf16 the 99.9th percentile and the mean of the differences are judged, not the largest one:
    among so many values, one or two always round far away.
    """
    sample = random.Random(0).sample(list(rows), min(CHECKED_ROWS, len(rows)))
    differences = np.concatenate(
        [_differences_from_live(cache, reader, opened, row, width) for row in sample]
    )
    if not len(differences):
        return
    is_bf16 = opened.model.dtype == torch.bfloat16
    gap = float(np.quantile(differences, 0.999 if is_bf16 else 1.0))
    mean = float(differences.mean())
    agrees = gap <= TOLERANCE
    if is_bf16:
        agrees = gap <= BF16_TOLERANCE and mean <= BF16_TOLERANCE / 10
    if not agrees:
        raise CellFailed(
            f"the teacher's cache differs from a live forward pass by {gap:.3f} nats at "
            f"{'the 99.9th percentile' if is_bf16 else 'most'} "
            f"and by {mean:.3f} on average; it was not kept"
        )


def _differences_from_live(
    cache: CachedTeacher, reader: CanRead, opened: LanguageModel, row: TokenRow, width: int
) -> Any:
    """Return how far a row's cached log-probabilities are from those of a live pass, in nats.

    Only tokens of a log-probability above -12 count: fp16 is coarse below, where the loss hardly
    reads it.
    """
    [live] = reader.top_k([likelihood_request(row)], k=None, width=width)
    if cache.dense:
        cached_log_p, live_log_p = cache.logits([row], opened.device), live.log_p_NK
    else:
        top = cache.top([row], opened.device)
        cached_log_p, live_log_p = top.log_p_NK, live.log_p_NK.gather(1, top.ids_NK)
    is_likely = live_log_p > -12
    return (cached_log_p - live_log_p)[is_likely].abs().cpu().numpy()
