"""Which library opens a checkpoint's weights, and whether it and its device are here.

transformers opens packed weights through a quantizer of each format; the quantizer needs the
format's own library. A row whose library is missing is skipped, with what to install. No torch at
import.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, Skipped, in_one_line
from harness.models.checkpoint import OWN_FORMAT, read_model_json

# format, as configurations name it -> what is imported, and what is installed for that
_LIBRARIES = {
    "aqlm": ("aqlm", "aqlm[gpu,cpu]"),
    "auto-round": ("auto_round", "auto-round"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("kernels", "kernels"),
    "fbgemm_fp8": ("fbgemm_gpu", "fbgemm-gpu"),
    "fp_quant": ("fp_quant", "fp_quant"),
    "fouroversix": ("fouroversix", "fouroversix"),
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "sinq": ("sinq", "sinq"),
    "spqr": ("spqr_quant", "spqr_quant[gpu]"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}


def quantization_of(folder: Path) -> dict[str, Any]:
    """Return what a model folder's configuration says of packed weights; empty for plain floats."""
    quantization = read_model_json(folder / "config.json").get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise HarnessError(
            f"{folder / 'config.json'}: quantization_config is no object; download or save the "
            "model again"
        )
    return quantization


def packing_library(folder: Path) -> str:
    """Return the name of the format that a model folder's weights are in, "" for plain floats."""
    return str(quantization_of(folder).get("quant_method") or "")


def require_format(folder: Path, name: str, *, device: str) -> None:
    """Raise `Skipped` where a model's format cannot be opened here: a library or a device lacks.

    A format that transformers itself does not know raises `HarnessError`.
    """
    packed = packing_library(folder)
    if packed in ("", OWN_FORMAT):
        return
    if problem := library_problem(packed):
        raise Skipped(f"{name} is stored as {packed}, and {problem}")
    _ask_transformers(folder, name, packed, device)


def library_problem(packed: str) -> str:
    """Return that the library of a format is missing and what to install; "" where it is here."""
    module, packages = _LIBRARIES.get(packed, ("", ""))
    if not module or _is_installed(module):
        return ""
    return f"{module} is not installed here; type: pip install {packages}"


def require_peft(name: str) -> None:
    """Raise `Skipped` where peft, which lays adapters on models, is not installed."""
    if not _is_installed("peft"):
        raise Skipped(
            f"{name} is an adapter, and peft is not installed here; type: pip install peft"
        )


def require_llama_cpp(name: str) -> None:
    """Raise `Skipped` where llama-cpp-python is not installed."""
    if not _is_installed("llama_cpp"):
        raise Skipped(
            f"{name} is to be opened by llama.cpp, and llama_cpp is not installed here; type: pip "
            "install llama-cpp-python"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is a part of
        return False


def _ask_transformers(folder: Path, name: str, packed: str, device: str) -> None:
    """Let the quantizer that transformers has for a format look at this machine."""
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    try:
        settings = AutoConfig.from_pretrained(folder).quantization_config
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except (ImportError, RuntimeError) as problem:  # `NotImplementedError` is one of the latter
        raise Skipped(
            f"{name} is stored as {packed}, which cannot be opened here ({in_one_line(problem)}); "
            "install what it names, or use a machine that has it"
        ) from problem
    except ValueError as problem:
        if "nknown quantization type" not in str(problem):
            raise
        raise HarnessError(
            f"{name} is stored as {packed}, a format that transformers does not open; save it as "
            "plain safetensors, or as compressed-tensors"
        ) from problem


def unreadable_kinds(kinds: Sequence[Any]) -> list[str]:
    """Return the names of those GGUF kinds of tensors that the gguf package cannot unpack.

    `kinds` are members of `gguf.GGMLQuantizationType`. One block of zeros of each is tried.
    """
    import gguf
    import numpy as np

    unreadable = []
    for kind in dict.fromkeys(kinds):
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
        except NotImplementedError:
            unreadable.append(str(kind.name))
    return unreadable
