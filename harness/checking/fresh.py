"""Processes of their own that know nothing of this one: one that imports a class, one that opens a
student with transformers.
"""

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
    found = importlib.import_module(module)
except ModuleNotFoundError as problem:
    if problem.name != module.partition(".")[0] and problem.name != module:
        raise
    sys.exit(3)
getattr(found, name)()
print(",".join(sorted({"torch", "transformers"} & set(sys.modules))))
"""
_REOPEN = """
import json, sys
folder, door, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if door:
    __import__(door)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor([ids])).logits[0, -1].float().tolist()))
"""
_LOGIT_TOLERANCE = 1e-3  # of the largest logit: another order of sums, seen between processes


def import_without_torch(found: type[Any]) -> None:
    """Raise `AssertionError` where importing and building a class imports torch; `Skipped` where it
    cannot be imported by name.
    """
    if (
        "." in found.__qualname__
        or getattr(importlib.import_module(found.__module__), found.__qualname__, None) is not found
    ):
        raise Skipped(f"{found.__qualname__} cannot be imported by its name in another process")
    done = _run(_IMPORT, found.__module__, found.__qualname__)
    if done.returncode == 3:
        raise Skipped(f"{found.__module__} is no module that another process can import")
    assert done.returncode == 0, (
        f"it cannot be imported and built in a fresh process: {_last_line(done.stderr)}"
    )
    brought = done.stdout.strip()
    assert not brought, f"importing {found.__module__} imports {brought}; import it inside compress"


def reopen(made: Checkpoint, *, fresh: bool, door: bool) -> None:
    """Raise `AssertionError` where a student does not open with transformers, or says something
    else there than here.
    """
    import torch

    from harness.models.language_model import open_model

    with torch.no_grad():
        here = open_model(made).model(torch.tensor([_TOKEN_IDS])).logits[0, -1].float()
    assert bool(torch.isfinite(here).all()), "the student's logits are not finite"
    there = (
        _logits_in_fresh_process(made.path, "methods.packed" if door else "")
        if fresh
        else _logits_in_this_process(made.path)
    )
    assert len(there) == len(here), f"the student has {len(there)} logits there, {len(here)} here"
    gap = float((torch.tensor(there) - here).abs().max())
    assert gap <= _LOGIT_TOLERANCE * max(1.0, float(here.abs().max())), (
        f"opened with transformers alone its logits differ by {gap:.3g}"
    )


def _logits_in_this_process(folder: Path) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    importlib.import_module("methods.packed")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: list[float] = model(torch.tensor([_TOKEN_IDS])).logits[0, -1].float().tolist()
    return logits


def _logits_in_fresh_process(folder: Path, door: str) -> list[float]:
    done = _run(_REOPEN, str(folder), door, json.dumps(_TOKEN_IDS))
    how = f"transformers after import {door}" if door else "transformers alone"
    assert done.returncode == 0, (
        f"a fresh process with {how} cannot open the student: {_last_line(done.stderr)}"
    )
    logits: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return logits


def _run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
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
    return next(
        (line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output"
    )[:300]
