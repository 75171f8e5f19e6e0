"""Checks in new processes: one imports a class, one opens a student with transformers."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.contract import Checkpoint
from harness.errors import Skipped

_TOKEN_IDS = list(range(3, 43))
_IMPORT = """
import sys, importlib
module, name = sys.argv[1:]
try:
    loaded = importlib.import_module(module)
except ModuleNotFoundError as problem:
    if problem.name != module.partition(".")[0] and problem.name != module:
        raise
    sys.exit(3)
getattr(loaded, name)()
print(",".join(sorted({"torch", "transformers"} & set(sys.modules))))
"""
_REOPEN = """
import json, sys
folder, module, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if module:
    __import__(module)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
cache = {}
if hasattr(model.config, "kv_cache_quantization"):
    from harness.models.quantized_cache import QuantizedCache
    cache = {"cache": QuantizedCache.of(model.config), "use_cache": True}
with torch.no_grad():
    print(json.dumps(model(torch.tensor([ids]), **cache).logits[0, -1].float().tolist()))
"""
_LOGIT_TOLERANCE = 1e-3  # of the largest logit: sums in another order differ between processes


def import_without_torch(method_class: type[Any]) -> None:
    """Check that importing and building a class imports neither torch nor transformers.

    Raises `AssertionError` if it does, `Skipped` if another process cannot import it by its name.
    """
    module_name, name = method_class.__module__, method_class.__qualname__
    is_nested = "." in name
    if is_nested or getattr(importlib.import_module(module_name), name, None) is not method_class:
        raise Skipped(f"{name} cannot be imported by its name in another process")
    process = _run(_IMPORT, module_name, name)
    if process.returncode == 3:
        raise Skipped(f"{module_name} is no module that another process can import")
    assert process.returncode == 0, (
        f"it cannot be imported and built in a fresh process: {_last_line(process.stderr)}"
    )
    libraries = process.stdout.strip()
    assert not libraries, f"importing {module_name} imports {libraries}; import it inside compress"


def reopen(student: Checkpoint, *, fresh: bool, imports_packed: bool) -> None:
    """Check that a student opens with transformers and has the same logits there.

    `fresh` opens it in a new process. With `imports_packed` it imports `methods.packed` first,
    which teaches transformers to read packed weights. A student that states a cache format is given
    a cache that stores it. Raises `AssertionError`.
    """
    import torch

    from harness.models.language_model import open_model

    with torch.no_grad():
        expected = open_model(student).model(torch.tensor([_TOKEN_IDS])).logits[0, -1].float()
    assert bool(torch.isfinite(expected).all()), "the student's logits are not finite"
    logits = (
        _logits_in_fresh_process(student.path, "methods.packed" if imports_packed else "")
        if fresh
        else _logits_in_this_process(student.path)
    )
    assert len(logits) == len(expected), (
        f"with transformers the student has {len(logits)} logits, here {len(expected)}"
    )
    gap = float((torch.tensor(logits) - expected).abs().max())
    assert gap <= _LOGIT_TOLERANCE * max(1.0, float(expected.abs().max())), (
        f"opened with transformers alone its logits differ by {gap:.3g}"
    )


def _logits_in_this_process(folder: Path) -> list[float]:
    """Return the last position's logits of a student, opened with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.models.quantized_cache import give_quantized_cache

    importlib.import_module("methods.packed")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    give_quantized_cache(model)
    with torch.no_grad():
        output = model(torch.tensor([_TOKEN_IDS]), use_cache=True)
    logits: list[float] = output.logits[0, -1].float().tolist()
    return logits


def _logits_in_fresh_process(folder: Path, module: str) -> list[float]:
    """Return the same from a new process, which first imports `module`, "" for none."""
    process = _run(_REOPEN, str(folder), module, json.dumps(_TOKEN_IDS))
    opener = f"transformers after import {module}" if module else "transformers alone"
    assert process.returncode == 0, (
        f"a fresh process with {opener} cannot open the student: {_last_line(process.stderr)}"
    )
    logits: list[float] = json.loads(process.stdout.strip().splitlines()[-1])
    return logits


def _run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a program of Python in a new process, without a network and with our import path."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def _last_line(text: str) -> str:
    """Return the last line that is not blank, in 300 characters at most."""
    return next(
        (line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output"
    )[:300]
