"""The GPU of this machine: which one it is, and whether and why not torch can use it.

A planning process asks NVML first, since a CUDA context of its own would stay on the GPU for hours
and be counted as another process in every timing. Where NVML's package is missing, torch is asked.
torch is imported inside functions.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness.errors import HarnessError
from harness.machine.energy import NvmlReader

# compute capability of the first NVIDIA GPUs that multiply bf16 in hardware (Ampere)
BF16_SINCE = (8, 0)


class Gpu(BaseModel):
    """The GPU that a record was made on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str  # "NVIDIA H100 80GB HBM3"
    driver: str  # of the system: "580.159.04"; "" where nothing says it
    cuda: str  # of torch's build: "13.0", or "rocm 6.4"
    capability: str = ""  # "9.0"; "" where nothing says it

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        return (
            f"{self.name}{driver}, "
            f"{self.cuda if self.cuda.startswith('rocm') else f'CUDA {self.cuda}'}"
        )


def gpu_of(device: str) -> Gpu | None:
    """Return the GPU behind a device name, None for the CPU."""
    return _first_gpu() if device.startswith("cuda") else None


def device_label(device: str) -> str:
    """Return the device's kind and, of a GPU, its name, as it stands in keys.

    So the work of an A100 is not taken for an H100's.
    """
    gpu = gpu_of(device)
    return f"{device.partition(':')[0]} {gpu.name}" if gpu else device.partition(":")[0]


@lru_cache(maxsize=1)
def _first_gpu() -> Gpu:
    import torch

    library = NvmlReader.open()
    identity = library.identity() if library else {}
    if not identity.get("name"):
        properties = torch.cuda.get_device_properties(0)
        identity = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            **identity,
        }
    hip = getattr(torch.version, "hip", None)
    return Gpu(
        name=identity["name"],
        driver=identity.get("driver") or _driver_of_kernel(),
        cuda=f"rocm {hip}" if hip else str(torch.version.cuda),
        capability=identity.get("capability", ""),
    )


def _driver_of_kernel(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of the loaded NVIDIA kernel module, "" without one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    version = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return version[1] if version else ""


def choose_device(requested: str, *, say: Callable[[str], None] = lambda line: None) -> str:
    """Turn `auto` into cuda where torch can use a GPU, else into cpu.

    `say` is told of a GPU that is there and cannot be used. Raises `HarnessError` with the reason
    where the user asks for a GPU that cannot be used. torch is imported only where there may be a
    GPU.
    """
    signs = signs_of_gpu()
    if requested == "cpu" or (requested == "auto" and not signs and sys.platform != "win32"):
        return "cpu"
    reason = gpu_problem(signs)
    if not reason:
        return "cuda"
    if requested == "cuda":
        raise HarnessError(
            f"--device cuda: torch sees no GPU here: {reason}; mend that, or type --device cpu"
        )
    if signs:
        say(
            f"running on the CPU, though a GPU is here ({signs[0]}): {reason} (--device cpu says "
            "that this is meant)"
        )
    return "cpu"


def signs_of_gpu(root: Path = Path("/")) -> list[str]:
    """Return the device files that show that a GPU is there.

    NVIDIA's (a Jetson's too), WSL's with its CUDA library, AMD's.
    """
    signs = sorted(
        str(path)
        for pattern in ("nvidia[0-9]*", "nvhost-gpu")
        for path in (root / "dev").glob(pattern)
    )
    wsl = root / "dev/dxg"
    if wsl.exists() and any((root / "usr/lib/wsl/lib").glob("libcuda.so*")):
        signs.append(str(wsl))
    amd = root / "dev/kfd"
    return [*signs, str(amd)] if amd.exists() else signs


def gpu_problem(signs: Iterable[str] = ()) -> str:
    """Return why torch cannot use a GPU here, "" where it can."""
    import torch

    built_for = (
        "rocm" if getattr(torch.version, "hip", None) else "cuda" if torch.version.cuda else ""
    )
    if not built_for:
        return (
            f"torch {torch.__version__} is built for the CPU alone; install a build for your GPU "
            "(https://pytorch.org/get-started/locally)"
        )
    amd_alone = bool(signs) and all(sign.endswith("kfd") for sign in signs)
    if amd_alone and built_for == "cuda":
        return (
            f"torch {torch.__version__} is built for CUDA and the GPU is AMD's; install torch's "
            "ROCm build"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU"
    if not torch.cuda.is_available():
        return _start_problem(torch)
    return _missing_kernels(torch)


def _start_problem(torch: Any) -> str:
    """Return what torch says of a GPU that it cannot start: an old driver, no driver, a fault."""
    reason = "it names no reason"
    # a build without these functions keeps the plain reason
    with contextlib.suppress(AttributeError):
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as problem:
            reason = (
                str(problem).strip().split(". ")[0].splitlines()[0]
                if str(problem).strip()
                else reason
            )
    driver = _driver_of_kernel()
    return (
        f"{reason.rstrip('.')} (torch {torch.__version__}{f', driver {driver}' if driver else ''})"
    )


def _missing_kernels(torch: Any) -> str:
    """Return why torch's build has no kernels for this GPU, "" where it has them.

    The card may be too old for it, or newer than the build.
    """
    gpu = _first_gpu()
    if gpu.cuda.startswith("rocm") or not gpu.capability:
        return ""
    architectures = [str(arch) for arch in torch.cuda.get_arch_list()]
    if not architectures or any(_runs_on(arch, gpu.capability) for arch in architectures):
        return ""
    return (
        f"torch {torch.__version__} has no kernels for {gpu.name} (capability {gpu.capability}; "
        f"built for {' '.join(architectures)})"
    )


def _runs_on(arch: str, capability: str) -> bool:
    """Tell whether code built for `sm_80` or `compute_90` runs on a GPU of this capability.

    It does on the same major version, and by PTX (`compute`) on later ones.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)
    if not match:
        return False
    built_capability, gpu_capability = (
        (int(match[2]), int(match[3])),
        tuple(int(part) for part in capability.split(".")),
    )
    return gpu_capability >= built_capability and (
        match[1] == "compute" or gpu_capability[0] == built_capability[0]
    )


def default_dtype(device: str, *, say: Callable[[str], None] = lambda line: None) -> str:
    """Return the dtype for `auto`: bfloat16 on a GPU with bf16 hardware, else float32."""
    gpu = gpu_of(device)
    if gpu is None:
        return "float32"
    if not has_bf16(gpu):
        say(
            f"{gpu.name} (capability {gpu.capability}) has no bf16 arithmetic: --dtype auto takes "
            "float32"
        )
        return "float32"
    return "bfloat16"


def refuse_missing_bf16(device: str, dtype: str) -> None:
    """Raise `HarnessError` where bfloat16 is typed for a GPU without bf16 arithmetic."""
    gpu = gpu_of(device)
    if dtype == "bfloat16" and gpu is not None and not has_bf16(gpu):
        raise HarnessError(
            f"--dtype bfloat16: {gpu.name} (capability {gpu.capability}) has no bf16 arithmetic, "
            f"which begins at {'.'.join(map(str, BF16_SINCE))}; type --dtype float32"
        )


def has_bf16(gpu: Gpu) -> bool:
    """Tell whether a GPU multiplies bf16 in hardware; AMD's and unknown ones are assumed to."""
    if gpu.cuda.startswith("rocm") or not gpu.capability:
        return True
    return tuple(int(part) for part in gpu.capability.split(".")) >= BF16_SINCE
