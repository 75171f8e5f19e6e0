"""Step 0: versions, the card and its users, attention kernels by mask, tests marked `gpu`."""

import re
import warnings
from typing import Any

from kit import Figures, Kit, last_lines, seconds_of


def run(kit: Kit) -> None:
    """Run the step's parts."""
    kit.part("card", card)
    kit.part("attention", lambda: attention(kit))
    kit.part("pytest", lambda: marked_tests(kit))


def card() -> Figures:
    """Return the card, its memory, the libraries behind torch, and the processes that share it."""
    import torch

    from harness.machine.energy import NvmlReader
    from harness.machine.gpu import gpu_of, has_bf16

    gpu = gpu_of("cuda")
    assert gpu is not None
    free, total = torch.cuda.mem_get_info()
    library = NvmlReader.open()
    others = len(library.sample()[1]) if library else None
    return {
        **gpu.model_dump(),
        "bf16": has_bf16(gpu),
        "memory": total,
        "free": free,
        "processes on it, ours among them": others,
        "busy": free < 0.9 * total,
        "cudnn": torch.backends.cudnn.version(),
        "nvml": library is not None,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def attention(kit: Kit) -> Figures:
    """Return, for each mask in use, the kernels that accept it, their ms, and torch's choice."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, width, tokens = (4, 16, 64) if kit.dry else (28, 128, 2048)
    shape = (1, heads, tokens, width)
    query, key, value = (
        torch.randn(shape, device=kit.device, dtype=getattr(torch, kit.dtype)) for _ in range(3)
    )
    mask = torch.zeros((tokens, tokens), device=kit.device, dtype=query.dtype).masked_fill(
        torch.ones((tokens, tokens), device=kit.device, dtype=torch.bool).triu(1), float("-inf")
    )
    masks: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "explicit mask": {"attn_mask": mask},
        "one query": {},
    }
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    figures: Figures = {}
    for name, options in masks.items():
        queries = query[:, :, :1] if name == "one query" else query

        def attend(queries: Any = queries, options: dict[str, Any] = options) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(queries, key, value, **options)

        figures[name] = {"by default": round(1e3 * min(seconds_of(attend)), 4)}
        for backend in backends:
            with sdpa_kernel([getattr(SDPBackend, backend)]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    figures[name][backend] = round(1e3 * min(seconds_of(attend)), 4)
                except RuntimeError as problem:
                    figures[name][backend] = f"refused: {str(problem).splitlines()[0][:80]}"
    return figures


def marked_tests(kit: Kit) -> Figures:
    """Run the tests marked `gpu`; all must pass.

    The stand-in card has no allocator that counts.
    """
    done = kit.python(
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        *(["-k", "not allocat"] if kit.dry else []),
        "tests",
    )
    counts = {
        word: int(count)
        for count, word in re.findall(
            r"(\d+) (passed|failed|skipped|errors?|deselected)", done.stdout
        )
    }
    if done.returncode or not counts.get("passed"):
        raise RuntimeError(f"pytest exited with {done.returncode}: {last_lines(done, 40)}")
    return {"counts": counts, "end": last_lines(done, 12)}
