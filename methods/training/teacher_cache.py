"""A teacher's distributions over its training rows, computed once and shared by methods, seeds and
runs.

Kept for every trained position: the whole distribution where the vocabulary is small, else the k
likeliest tokens. Always at temperature 1, as fp16 log-probabilities, in memory-mapped shards. Rows
are found by a hash of their own token ids, never by their place in a shuffle: that is how others
have trained on another row's teacher. A cache is checked against a live forward pass when it is
made, and by its digests whenever it is opened; a torn or changed one is said so and made again.

CACHE/teachers/KEY/   meta.json, index.npz, log_p-000.npy and, for the k likeliest, ids-000.npy
"""

import hashlib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from harness.scoring.backend import CanRead, Scored, TopK
from harness.scoring.reading import Reader
from methods.training.positions import Distribution
from methods.training.rows import Batch, TokenRow

# of log-probabilities in one file, and twice that in memory while it is written
SHARD_BYTES = 2**28
CHECKED_ROWS = 20
TOLERANCE = 0.02  # nats: fp16 keeps a log-probability of -16 to 0.008
# a logit between 32 and 64 has steps of 0.25, and another company of rows another rounding
BF16_TOLERANCE = 0.5


@dataclass(frozen=True)
class CachedTeacher:
    """An opened cache: looks distributions up by row."""

    key: str
    k: int
    dense: bool
    index: dict[bytes, tuple[int, int, int]]  # row -> shard, first position, positions
    log_p: tuple[Any, ...]  # memory maps (tokens, k), fp16
    ids: tuple[Any, ...]
    meta: dict[str, Any]

    def read(self, batch: Batch, vocabulary: int | None) -> Distribution:
        """Return what the teacher thinks at the batch's trained positions."""
        if self.dense:
            return Distribution(self.logits(batch.rows, batch.ids.device))
        return Distribution(None, self.top(batch.rows, batch.ids.device))

    def logits(self, rows: Sequence[TokenRow], device: Any) -> Tensor:
        """Return the log-probabilities (N, V) of the rows' trained positions, row by row; they
        serve as logits.
        """
        return (
            torch.from_numpy(np.concatenate([self._slice(self.log_p, row) for row in rows]))
            .to(device)
            .float()
        )

    def top(self, rows: Sequence[TokenRow], device: Any) -> TopK:
        """Return the likeliest tokens of the rows' trained positions: ids and log-probabilities (N,
        k).
        """
        ids = np.concatenate([self._slice(self.ids, row) for row in rows]).astype(np.int64)
        return TopK(torch.from_numpy(ids).to(device), self.logits(rows, device))

    def _slice(self, parts: tuple[Any, ...], row: TokenRow) -> Any:
        try:
            shard, start, count = self.index[row_key(row)]
        except KeyError:
            raise CellFailed(
                "a training row is not in the teacher's cache; it was made for other rows"
            ) from None
        return parts[shard][start : start + count]

    def cost(self) -> dict[str, Any]:
        """Return what making the cache took, for every row that uses it to share."""
        return {
            "key": self.key,
            "tokens": self.meta["read"],
            "seconds": self.meta["seconds"],
            "flops": self.meta["flops"],
        }


def row_key(row: TokenRow) -> bytes:
    """Return a row's name: a hash of its token ids and of where training starts."""
    return hashlib.sha256(
        np.asarray([row.trained_from, *row.ids], dtype=np.int64).tobytes()
    ).digest()[:16]


def teacher_cache(
    job: Job, teacher: Checkpoint, rows: Sequence[TokenRow], *, k: int, width: int
) -> CachedTeacher:
    """Open the cache of a teacher over these rows, making it where there is none or where it is
    damaged.

    `width` is the vocabulary that both models share: logits are cut to it before any softmax.
    Raises `CellFailed` when what was written does not agree with a live forward pass.
    """
    distinct = {row_key(row): row for row in rows}
    kept = "all" if width <= MAX_DENSE_VOCABULARY else k
    key = digest_of(
        "teacher",
        code_digest(__name__),
        teacher.digest,
        job.dtype,
        device_label(job.device),
        kept,
        width,
        [name.hex() for name in sorted(distinct)],
    )
    folder = job.cache / "teachers" / key[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = {
        "teacher": teacher.digest,
        "dtype": job.dtype,
        "vocabulary": width,
        "k": width if width <= MAX_DENSE_VOCABULARY else k,
    }
    with FileLock(folder.with_suffix(".lock")):
        held = _open_cache(folder, job, wanted)
        if held is not None:
            return held
        _build_cache(folder, job, teacher, list(distinct.values()), k=k, width=width)
        release_memory(job.device)
        made = _open_cache(folder, job, wanted)
    assert made is not None, f"the cache {folder.name} cannot be read back"
    return made


def damage_of(folder: Path) -> str:
    """Return why a cache cannot be used, "" where it can: its files against their digests, the code
    that made it against ours.
    """
    wrong = folder_damage(folder)
    if wrong:
        return wrong
    return (
        ""
        if read_description(folder).get("code") == code_digest(__name__)
        else "made by other code"
    )


def mismatch_of(meta: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return what a cache was made for when that is not what is wanted, "" where it is."""
    other = next((name for name, value in wanted.items() if meta.get(name) != value), None)
    return f"its {other} is {meta.get(other)}, not {wanted[other]}" if other else ""


def _open_cache(folder: Path, job: Job, wanted: Mapping[str, Any]) -> CachedTeacher | None:
    """Open a cache that is whole and of the teacher, dtype, vocabulary and k that are wanted,
    wherever its folder came from.
    """
    if not folder.exists():
        return None
    wrong = damage_of(folder) or mismatch_of(read_description(folder), wanted)
    if wrong:
        told = f"the teacher's cache {folder.name} is damaged ({wrong}); made again"
        job.progress(Progress(stage="teacher", done=0, total=1, detail=told))
        return None
    meta = read_description(folder)
    with np.load(folder / "index.npz") as held:
        places = zip(held["rows"], held["places"].tolist(), strict=True)
        index = {bytes(name): (place[0], place[1], place[2]) for name, place in places}
    shards = range(meta["shards"])
    log_p = tuple(np.load(folder / f"log_p-{shard:03}.npy", mmap_mode="r") for shard in shards)
    ids = (
        ()
        if meta["dense"]
        else tuple(np.load(folder / f"ids-{shard:03}.npy", mmap_mode="r") for shard in shards)
    )
    return CachedTeacher(folder.name, meta["k"], meta["dense"], index, log_p, ids, meta)


def _build_cache(
    folder: Path, job: Job, checkpoint: Checkpoint, rows: list[TokenRow], *, k: int, width: int
) -> None:
    """Run the teacher over every row once, write shards, check them, and put the whole folder in
    place.
    """
    shutil.rmtree(folder, ignore_errors=True)
    opened = open_model(checkpoint, device=job.device, dtype=job.dtype)
    teacher = teacher_reader(opened)
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    kept = None if width <= MAX_DENSE_VOCABULARY else k

    def write(fresh: Path) -> None:
        began = time.monotonic()
        shards = _write_shards(fresh, job, teacher, ordered, kept, width, checkpoint.name)
        read, positions = (
            sum(len(row.ids) for row in ordered),
            sum(count for _, _, count in shards.places),
        )
        meta = {
            "code": code_digest(__name__),
            "teacher": checkpoint.digest,
            "name": checkpoint.name,
            "dtype": job.dtype,
            "vocabulary": width,
            "dense": kept is None,
            "k": kept or width,
            "kept_mass": round(shards.mass / positions, 6),
            "rows": len(ordered),
            "positions": positions,
            "read": read,
            "shards": shards.number,
            "seconds": round(time.monotonic() - began, 3),
            "flops": forward_flops_per_token(opened.model, read / len(ordered)) * read,
            "files": {path.name: file_digest(path) for path in sorted(fresh.iterdir())},
        }
        write_atomically(fresh / "meta.json", signed_description(meta))
        written = _open_cache(fresh, job, {})
        assert written is not None
        # before it has its name: an unchecked cache is never found
        _check_against_live(written, teacher, opened, ordered, width)

    try:
        save_atomically(folder, write)
    except CellFailed:
        for torn in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(torn, ignore_errors=True)
        raise


def teacher_reader(opened: LanguageModel) -> Reader:
    """Return what reads a teacher for a cache, its batches by memory."""
    return Reader(opened)


@dataclass
class _ShardWriter:
    """Files of log-probabilities, each written when the next row would make it too long."""

    folder: Path
    kept: int | None  # tokens of a position; None: all, in the order of their ids
    width: int  # of the vocabulary
    # of each row: shard, first position, positions
    places: list[tuple[int, int, int]] = field(default_factory=list)
    number: int = 0  # of shards written
    mass: float = 0.0  # of probability kept, in positions
    _log_p: list[Any] = field(default_factory=list)
    _ids: list[Any] = field(default_factory=list)
    _held: int = 0  # positions that wait

    def add(self, top: TopK) -> None:
        """Take the distributions of the next row."""
        count, tokens = top.log_p_NK.shape
        if self._held + count > max(1, SHARD_BYTES // (2 * tokens)):
            self.flush()
        self.places.append((self.number, self._held, count))
        self.mass += count if self.kept is None else float(top.log_p_NK.exp().sum())
        self._log_p.append(top.log_p_NK.to(torch.float16).cpu().numpy())
        if self.kept is not None:
            kind = np.uint16 if self.width <= 2**16 else np.int32
            self._ids.append(top.ids_NK.to(torch.int32).cpu().numpy().astype(kind))
        self._held += count

    def flush(self) -> None:
        """Write what waits."""
        if not self._held:
            return
        for name, waiting in (("log_p", self._log_p), ("ids", self._ids)):
            if waiting:
                np.save(self.folder / f"{name}-{self.number:03}.npy", np.concatenate(waiting))
                waiting.clear()
        self.number, self._held = self.number + 1, 0


def _write_shards(
    fresh: Path,
    job: Job,
    teacher: CanRead,
    rows: Sequence[TokenRow],
    kept: int | None,
    width: int,
    name: str,
) -> _ShardWriter:
    """Let the teacher read rows, longest first, and write what it thinks and where each row's
    stands.
    """
    shards = _ShardWriter(fresh, kept, width)
    for top in teacher.top_k([scored_tokens_of(row) for row in rows], k=kept, width=width):
        shards.add(top)
        done = len(shards.places)
        job.progress(
            Progress(
                stage="teacher", done=done, total=len(rows), unit="rows", detail=f"read by {name}"
            )
        )
    shards.flush()
    names = np.frombuffer(b"".join(row_key(row) for row in rows), dtype="V16")
    np.savez(fresh / "index.npz", rows=names, places=np.asarray(shards.places, dtype=np.int64))
    return shards


def scored_tokens_of(row: TokenRow) -> Scored:
    """Return a training row as a backend is asked: its trained tokens stand at its end."""
    return Scored(row.ids, row.trained)


def _check_against_live(
    written: CachedTeacher,
    teacher: CanRead,
    opened: LanguageModel,
    rows: Sequence[TokenRow],
    width: int,
) -> None:
    """Compare twenty rows with a live forward pass, each alone: other company than when they were
    written.

    bf16 is judged by what all but a thousandth of its values keep, and by their mean: among so
    many, one or two always round far away.
    """
    sample = random.Random(0).sample(list(rows), min(CHECKED_ROWS, len(rows)))
    together = np.concatenate(
        [_differences_from_live(written, teacher, opened, row, width) for row in sample]
    )
    if not len(together):
        return
    coarse = opened.model.dtype == torch.bfloat16
    gap, mean = float(np.quantile(together, 0.999 if coarse else 1.0)), float(together.mean())
    if not (gap <= BF16_TOLERANCE and mean <= BF16_TOLERANCE / 10 if coarse else gap <= TOLERANCE):
        raise CellFailed(
            f"the teacher's cache differs from a live forward pass by {gap:.3f} nats at "
            f"{'the 99.9th percentile' if coarse else 'most'} "
            f"and by {mean:.3f} on average; it was not kept"
        )


def _differences_from_live(
    written: CachedTeacher, teacher: CanRead, opened: LanguageModel, row: TokenRow, width: int
) -> Any:
    """Return how far kept log-probabilities of a row lie from those of a live pass, in nats, where
    anything is trained.
    """
    [live] = teacher.top_k([scored_tokens_of(row)], k=None, width=width)
    if written.dense:
        held, there = written.logits([row], opened.device), live.log_p_NK
    else:
        top = written.top([row], opened.device)
        held, there = top.log_p_NK, live.log_p_NK.gather(1, top.ids_NK)
    likely = there > -12  # fp16 is coarse far out, where nothing is trained
    return (held - there)[likely].abs().cpu().numpy()
