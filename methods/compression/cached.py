"""Makes a student that stores keys and values in few bits, and shows that it computes as stored.

Importing this module imports no torch.
"""

import json
import time
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint, Job
from harness.errors import CellFailed

if TYPE_CHECKING:
    import torch

    from harness.models.cache_format import CacheFormat

_PROBE_TOKENS = 24
_TOLERANCE = 0.01  # of the spread of the logits


def student_with_cache(job: Job, method: str, cache_format: "CacheFormat") -> Checkpoint:
    """Copy the model that the method starts from, with a cache format in its configuration.

    Raises `CellFailed` for an adapter, a GGUF file that llama.cpp holds, a format that is there
    already, and a model whose cache is of another kind or computes something else.
    """
    from harness.files.writing import write_atomically
    from harness.machine.memory import process_bytes
    from harness.models.cache_format import stored_cache_format
    from harness.models.shaping import copy_student

    start, base = time.perf_counter(), job.student_base
    if base.base is not None or not base.path.is_dir():
        raise CellFailed(
            f"{method}: {base.name} is an adapter or a file that another program opens; start from "
            "a model folder"
        )
    if (before := stored_cache_format(base.path)) is not None:
        raise CellFailed(f"{method}: {base.name} has a quantized cache already ({before.label})")
    student = copy_student(base, job.workdir / "student", name=method, cache_format=cache_format)
    gap = _refuse_other_numbers(student, job, method)
    seconds = time.perf_counter() - start
    notes: dict[str, Any] = {
        "cache": cache_format.label,
        "probe_gap": gap,
        "bytes_before": base.bytes_on_disk,
        "bytes_after": student.bytes_on_disk,
    }
    cost = {
        "seconds": seconds,
        "device_seconds": seconds,
        "peak_bytes": process_bytes("VmHWM"),
        "flops": 0.0,
        "notes": {method: notes},
    }
    write_atomically(job.workdir / "cost.json", json.dumps(cost, indent=1))
    return student


def _refuse_other_numbers(student: Checkpoint, job: Job, method: str) -> float:
    """Refuse a model that does not decode from the real cache what the scorer computes without it.

    A text is read token by token, with the rounding attention behind a cache of floats and with the
    model's own attention behind a cache of codes: the same kernels, so the same sums. Returns the
    widest gap of logits, as a share of their spread.
    """
    import torch
    from transformers import DynamicCache

    from harness.models.blocks import probe_ids
    from harness.models.language_model import open_model
    from harness.models.quantized_cache import QuantizedCache

    dtype = "float32" if job.device == "cpu" else job.dtype
    model = open_model(student, device=job.device, dtype=dtype).model
    ids = probe_ids(model)[:, :_PROBE_TOKENS].to(job.device)
    codes = QuantizedCache.of(model.config)
    with torch.inference_mode():
        expected = _steps(model, ids, DynamicCache(config=model.config), method)
        model.set_attn_implementation("sdpa")
        decoded = _steps(model, ids, codes, method)
    gap = float((decoded - expected).abs().max() / expected.std())
    if codes.get_seq_length() != ids.shape[1]:
        raise CellFailed(f"{method}: the model does not store its tokens in the cache it is given")
    if not gap <= _TOLERANCE:
        raise CellFailed(
            f"{method}: decoding from the quantized cache moves logits by {gap:.2g} of their "
            f"spread against the attention that scores, and {_TOLERANCE:g} is rounding"
        )
    return gap


def _steps(model: Any, ids_1T: "torch.Tensor", cache: Any, method: str) -> "torch.Tensor":
    """Return the logits (T, V) of a text that is read token by token from a cache."""
    import torch

    from harness.models.states import CACHE_NAMES, forward_arguments

    accepted = forward_arguments(model) or frozenset()
    argument = next((name for name in CACHE_NAMES if name in accepted), "")
    if not argument:
        raise CellFailed(f"{method}: the model's forward takes no cache from outside")
    steps = [
        model(input_ids=token_11, use_cache=True, **{argument: cache}).logits[0, -1]
        for token_11 in ids_1T.split(1, dim=1)
    ]
    return torch.stack(steps).float()
