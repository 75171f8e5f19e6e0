"""A teacher's distributions over its training rows, computed once and shared by methods, seeds and runs.

Kept for every trained position: the whole distribution where the vocabulary is small, else the k likeliest tokens. Always at
temperature 1, as fp16 log-probabilities, in memory-mapped shards. Rows are found by a hash of their own token ids, never by
their place in a shuffle: that is how others have trained on another row's teacher. A cache is checked against a
live forward pass when it is made, and by its digests whenever it is opened; a torn or changed one is said so and made again.

CACHE/teachers/KEY/   meta.json, index.npz, log_p-000.npy and, for the k likeliest, ids-000.npy
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
from harness.files.closure import digest_of_code
from harness.files.digests import digest_of, file_digest
from harness.files.writing import save_atomically, write_whole
from harness.machine.gpu import device_label
from harness.machine.memory import release_memory
from harness.models.artefacts import described, described_damage, description_of
from harness.models.language_model import LanguageModel, open_model
from harness.models.shape import DENSE, forward_flops_per_token
from methods.training.positions import Distribution, TopK
from methods.training.rows import Batch, Row, batch_of
from methods.training.teachers import Head

SHARD_BYTES = 2**28  # of log-probabilities in one file, and twice that in memory while it is written
CHECKED_ROWS = 20
TOLERANCE = 0.02  # nats: fp16 keeps a log-probability of -16 to 0.008
BF16_TOLERANCE = 0.5  # a logit between 32 and 64 has steps of 0.25, and another company of rows another rounding
_LOGIT_BYTES = 2**28  # of one forward pass
_CPU_TOKENS = 2_048


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

    def logits(self, rows: Sequence[Row], device: Any) -> Tensor:
        """Return the log-probabilities (N, V) of the rows' trained positions, row by row; they serve as logits."""
        return torch.from_numpy(np.concatenate([self._slice(self.log_p, row) for row in rows])).to(device).float()

    def top(self, rows: Sequence[Row], device: Any) -> TopK:
        """Return the likeliest tokens of the rows' trained positions: ids and log-probabilities (N, k)."""
        ids = np.concatenate([self._slice(self.ids, row) for row in rows]).astype(np.int64)
        return TopK(torch.from_numpy(ids).to(device), self.logits(rows, device))

    def _slice(self, parts: tuple[Any, ...], row: Row) -> Any:
        try:
            shard, start, count = self.index[key_of(row)]
        except KeyError:
            raise CellFailed("a training row is not in the teacher's cache; it was made for other rows") from None
        return parts[shard][start : start + count]

    def cost(self) -> dict[str, Any]:
        """Return what making the cache took, for every row that uses it to share."""
        return {"key": self.key, "tokens": self.meta["read"], "seconds": self.meta["seconds"], "flops": self.meta["flops"]}


def key_of(row: Row) -> bytes:
    """Return a row's name: a hash of its token ids and of where training starts."""
    return hashlib.sha256(np.asarray([row.trained_from, *row.ids], dtype=np.int64).tobytes()).digest()[:16]


def teacher_cache(job: Job, teacher: Checkpoint, rows: Sequence[Row], *, k: int, width: int) -> CachedTeacher:
    """Open the cache of a teacher over these rows, making it where there is none or where it is damaged.

    `width` is the vocabulary that both models share: logits are cut to it before any softmax. Raises `CellFailed` when what was
    written does not agree with a live forward pass.
    """
    distinct = {key_of(row): row for row in rows}
    kept = "all" if width <= DENSE else k
    key = digest_of(
        "teacher", digest_of_code(__name__), teacher.digest, job.dtype, device_label(job.device), kept, width,
        [name.hex() for name in sorted(distinct)],
    )  # fmt: skip
    folder = job.cache / "teachers" / key[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = {"teacher": teacher.digest, "dtype": job.dtype, "vocabulary": width, "k": width if width <= DENSE else k}
    with FileLock(folder.with_suffix(".lock")):
        held = _opened(folder, job, wanted)
        if held is not None:
            return held
        _build(folder, job, teacher, list(distinct.values()), k=k, width=width)
        release_memory(job.device)
        made = _opened(folder, job, wanted)
    assert made is not None, f"the cache {folder.name} cannot be read back"
    return made


def damage_of(folder: Path) -> str:
    """Return why a cache cannot be used, "" where it can: its files against their digests, the code that made it against ours."""
    wrong = described_damage(folder)
    if wrong:
        return wrong
    return "" if description_of(folder).get("code") == digest_of_code(__name__) else "made by other code"


def foreign(meta: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return what a cache was made for when that is not what is wanted, "" where it is."""
    other = next((name for name, value in wanted.items() if meta.get(name) != value), None)
    return f"its {other} is {meta.get(other)}, not {wanted[other]}" if other else ""


def _opened(folder: Path, job: Job, wanted: Mapping[str, Any]) -> CachedTeacher | None:
    """Open a cache that is whole and of the teacher, dtype, vocabulary and k that are wanted, wherever its folder came from."""
    if not folder.exists():
        return None
    wrong = damage_of(folder) or foreign(description_of(folder), wanted)
    if wrong:
        told = f"the teacher's cache {folder.name} is damaged ({wrong}); made again"
        job.progress(Progress(stage="teacher", done=0, total=1, detail=told))
        return None
    meta = description_of(folder)
    with np.load(folder / "index.npz") as held:
        places = zip(held["rows"], held["places"].tolist(), strict=True)
        index = {bytes(name): (place[0], place[1], place[2]) for name, place in places}
    shards = range(meta["shards"])
    log_p = tuple(np.load(folder / f"log_p-{shard:03}.npy", mmap_mode="r") for shard in shards)
    ids = () if meta["dense"] else tuple(np.load(folder / f"ids-{shard:03}.npy", mmap_mode="r") for shard in shards)
    return CachedTeacher(folder.name, meta["k"], meta["dense"], index, log_p, ids, meta)


def _build(folder: Path, job: Job, checkpoint: Checkpoint, rows: list[Row], *, k: int, width: int) -> None:
    """Run the teacher over every row once, write shards, check them, and put the whole folder in place."""
    shutil.rmtree(folder, ignore_errors=True)
    teacher = open_model(checkpoint, device=job.device, dtype=job.dtype)
    head = Head(teacher.model)
    dense = width <= DENSE
    kept = width if dense else k
    most = max(1, SHARD_BYTES // (2 * kept))
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    began = time.monotonic()

    def write(fresh: Path) -> None:
        places: list[tuple[int, int, int]] = []
        shard, held, read = 0, 0, 0
        waiting_p: list[Any] = []
        waiting_ids: list[Any] = []
        mass = 0.0

        def flush() -> None:
            nonlocal shard, held
            if held:
                np.save(fresh / f"log_p-{shard:03}.npy", np.concatenate(waiting_p))
                if not dense:
                    np.save(fresh / f"ids-{shard:03}.npy", np.concatenate(waiting_ids))
                shard, held = shard + 1, 0
                waiting_p.clear()
                waiting_ids.clear()

        for batch in _batches(ordered, width, job.device):
            for row, log_p in zip(batch, _live(head, batch, teacher.pad_id, width), strict=True):
                if held + len(log_p) > most:
                    flush()
                places.append((shard, held, len(log_p)))
                values, ids = (log_p, None) if dense else log_p.topk(kept, dim=-1)
                mass += len(log_p) if dense else float(values.exp().sum())
                waiting_p.append(values.to(torch.float16).cpu().numpy())
                if ids is not None:
                    waiting_ids.append(ids.to(torch.int32).cpu().numpy().astype(np.uint16 if width <= 2**16 else np.int32))
                held += len(log_p)
                read += len(row.ids)
            job.progress(Progress(stage="teacher", done=len(places), total=len(ordered), unit="rows", detail=f"read by {checkpoint.name}"))
        flush()
        names = np.frombuffer(b"".join(key_of(row) for row in ordered), dtype="V16")
        np.savez(fresh / "index.npz", rows=names, places=np.asarray(places, dtype=np.int64))
        files = {path.name: file_digest(path) for path in sorted(fresh.iterdir())}
        length, positions = read / len(ordered), sum(count for _, _, count in places)
        meta = {
            "code": digest_of_code(__name__),
            "teacher": checkpoint.digest, "name": checkpoint.name, "dtype": job.dtype, "vocabulary": width,
            "dense": dense, "k": kept, "kept_mass": round(mass / positions, 6), "rows": len(ordered), "positions": positions,
            "read": read, "shards": shard,
            "seconds": round(time.monotonic() - began, 3), "flops": forward_flops_per_token(teacher.model, length) * read, "files": files,
        }  # fmt: skip
        write_whole(fresh / "meta.json", described(meta))
        made = _opened(fresh, job, {})
        assert made is not None
        _check(made, teacher, head, ordered, width)  # before it has its name: an unchecked cache is never found

    try:
        save_atomically(folder, write)
    except CellFailed:
        for torn in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(torn, ignore_errors=True)
        raise


def _batches(ordered: Sequence[Row], width: int, device: str) -> Any:
    """Cut rows (longest first) into batches whose logits stay within 256 MiB; on a CPU also into what its caches hold."""
    tokens = 64 * len(ordered[0].ids) if device.startswith("cuda") else _CPU_TOKENS
    start = 0
    while start < len(ordered):
        longest = len(ordered[start].ids)
        size = max(1, min(64, tokens // longest, _LOGIT_BYTES // (4 * width * longest)))  # more than it needs: prompts have no logits
        yield ordered[start : start + size]
        start += size


def _live(head: Head, rows: Sequence[Row], pad: int, width: int) -> list[Tensor]:
    """Return the teacher's log-probabilities (trained positions, width) of each row, fp32, from a forward pass now."""
    with torch.inference_mode():
        logits = head(batch_of(rows, pad, head.model.device))[:, :width]
        return list(torch.log_softmax(logits.float(), dim=-1).split([row.trained for row in rows]))


def _check(made: CachedTeacher, teacher: LanguageModel, head: Head, rows: Sequence[Row], width: int) -> None:
    """Compare twenty rows with a live forward pass, each alone: other company than when they were written.

    bf16 is judged by what all but a thousandth of its values keep, and by their mean: among so many, one or two always round far away.
    """
    gaps = []
    for row in random.Random(0).sample(list(rows), min(CHECKED_ROWS, len(rows))):
        [live] = _live(head, [row], teacher.pad_id, width)
        if made.dense:
            held, there = made.logits([row], teacher.device), live
        else:
            top = made.top([row], teacher.device)
            held, there = top.log_p_NK, live.gather(1, top.ids_NK)
        likely = there > -12  # fp16 is coarse far out, where nothing is trained
        gaps.append((held - there)[likely].abs().cpu().numpy())
    together = np.concatenate(gaps)
    if not len(together):
        return
    coarse = teacher.model.dtype == torch.bfloat16
    gap, mean = float(np.quantile(together, 0.999 if coarse else 1.0)), float(together.mean())
    if not (gap <= BF16_TOLERANCE and mean <= BF16_TOLERANCE / 10 if coarse else gap <= TOLERANCE):
        raise CellFailed(
            f"the teacher's cache differs from a live forward pass by {gap:.3f} nats at {'the 99.9th percentile' if coarse else 'most'} "
            f"and by {mean:.3f} on average; it was not kept"
        )
