"""Where a record was made: machine, versions and commit of the process that computes it."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from harness.machine.gpu import gpu_of
from harness.machine.processor import machine_label
from harness.records.record import Environment

_PACKAGES = (
    "compression-harness",
    "torch",
    "transformers",
    "lm-eval",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
)
# packages that are named where they are loaded, to open a model: by their modules
_OPENERS = {
    "auto_round": "auto-round",
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "gptqmodel": "gptqmodel",
    "optimum.quanto": "optimum-quanto",
    "peft": "peft",
    "torchao": "torchao",
}


def current_environment(
    *, device: str, dtype: str, threads: int, waiting: str = "", cores_in_use: float | None = None
) -> Environment:
    """Describe this process's machine and versions. The machine is its kind, never its name."""
    versions = {}
    openers = [package for module, package in _OPENERS.items() if module in sys.modules]
    for name in (*_PACKAGES, *openers):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit, dirty = _commit()
    return Environment(
        device=device,
        dtype=dtype,
        threads=threads,
        waiting=waiting,
        cores_in_use=cores_in_use,
        machine=machine_label(),
        gpu=gpu_of(device),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
        commit=commit,
        dirty=dirty,
    )


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the source tree that runs, and whether tracked files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [
                "git",
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                "harness",
                "methods",
                "suites",
            ],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return head, bool(changed)
