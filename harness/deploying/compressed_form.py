"""A packed student as compressed-tensors, the format of vLLM, SGLang and llm-compressor.

The student's own integers and scales are laid out anew: nothing is rounded again. int4 in groups
and int8 by channel become `pack-quantized` (weights alone, for vLLM takes `int-quantized` weights
only beside quantized activations), int8 with int8 activations becomes `int-quantized`. Table and
head stay floats: serving engines read no packed table. The format's library is not needed to write.

Legend: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.deploying.plain_form import copy_model_files, dtype_note, write_config
from harness.deploying.stored import StoredStudent, empty_plain_model, largest_change
from harness.deploying.written import Written
from harness.errors import HarnessError
from harness.models.packed_bits import INT8_KINDS, WITH_INT8_ACTIVATIONS
from harness.models.student_writers import write_shards
from harness.models.tensor_spool import TensorSpool

PACKED, WITH_ACTIVATIONS = "pack-quantized", "int-quantized"
# layers of one parent that serving engines compute as one matrix
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SERVED_GROUPS = (32, 64, 128)  # of vLLM's kernels for int4
_LAYERS = ("int4", *INT8_KINDS)
_FIRST_VERSION = "0.9.0"  # of compressed-tensors: the settings below are those of that version


def write_compressed(student: StoredStudent, folder: Path, *, dtype: str = "auto") -> Written:
    """Write a packed student into a new folder.

    `dtype` is that of what is not packed: auto is the smallest type that changes nothing. Raises
    `HarnessError` for a student that the format cannot express.
    """
    student.refuse_library_format("compressed-tensors")
    model = empty_plain_model(student)
    layers = _packed_layers(student, model)
    refuse_renamed(student, model)
    folder.mkdir(parents=True, exist_ok=True)
    spool = TensorSpool(folder / ".tensors.part")
    target = _float_dtype(student, layers) if dtype == "auto" else getattr(torch, dtype)
    largest = 0.0
    for name in student.names():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in layers:
            for key, tensor in compressed_tensors(module, student).items():
                spool.add(f"{module}.{key}", tensor)
            continue
        tensor = student.plain(name)
        if tensor.is_floating_point():
            largest = max(largest, largest_change(tensor, target))
            tensor = tensor.to(target)
        spool.add(name, tensor)
    write_shards(folder, spool, list(spool), "5GB", {"format": "pt"})
    settings = quantization_config(layers, student, model)
    write_config(
        student,
        folder,
        {"quantization_config": settings, "dtype": str(target).removeprefix("torch.")},
    )
    copy_model_files(student.folder, folder, weights=False)
    notes = (*_notes(student, layers, settings), dtype_note(target, largest))
    return Written(folder, largest, notes)


def _packed_layers(student: StoredStudent, model: Any) -> list[str]:
    """Return the names of the linear layers that stay packed.

    Table and head are left out. Raises `HarnessError` for a layer that the format cannot hold.
    """
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    layers = []
    for module, spec in student.specs.items():
        if beside := student.merged(module):
            raise HarnessError(
                f"{student.label}: {module} holds {beside}, which compressed-tensors cannot "
                "express; type --form safetensors, which multiplies them out, or export a row "
                "without them"
            )
        if spec["kind"] not in _LAYERS or id(model.get_submodule(module)) in outside:
            continue
        inputs, group = int(spec["shape"][1]), int(spec.get("group", 0))
        if group and inputs % group:
            raise HarnessError(
                f"{student.label}: {module} has {inputs:,} inputs in groups of {group}, the last "
                "of which is not full, and compressed-tensors has full groups only; type --form "
                f"safetensors, or make a row of groups that divide {inputs:,}: "
                f"{_dividing_groups(inputs)}"
            )
        layers.append(module)
    if not layers:
        raise HarnessError(
            f"{student.label} holds no layer in int8 or int4, so compressed-tensors has nothing "
            "to express; type --form safetensors"
        )
    return layers


def _dividing_groups(inputs: int) -> str:
    fitting = [f"'int4[group_size={group}]'" for group in (32, 64, 128, 256) if not inputs % group]
    return " or ".join(fitting) or "int8"


def refuse_renamed(student: StoredStudent, model: Any) -> None:
    """Raise `HarnessError` where files of the architecture name weights otherwise than its model.

    Such weights (experts, joined matrices) would be looked for under other names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict())
    if set(revert_weight_conversion(model, state)) != set(state):
        raise HarnessError(
            f"{student.label}: {type(model).__name__} stores its weights by other names than it "
            "computes with, and only --form safetensors writes those"
        )


def _float_dtype(student: StoredStudent, layers: Sequence[str]) -> torch.dtype:
    """Return the smallest float type that holds all that is not packed."""
    fitting = [torch.bfloat16, torch.float16]
    for name in student.names():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in layers:
            continue
        tensor = student.plain(name)
        if tensor.is_floating_point():
            fitting = [dtype for dtype in fitting if not largest_change(tensor, dtype)]
    return next(iter(fitting), torch.float32)


def compressed_tensors(module: str, student: StoredStudent) -> dict[str, Tensor]:
    """Return what the format holds of a packed layer, by the names that it gives it."""
    matrix = student.matrix(module)
    assert matrix is not None
    scale = matrix.scale.contiguous()
    if student.specs[module]["kind"] in WITH_INT8_ACTIVATIONS:
        return {"weight": matrix.codes.to(torch.int8), "weight_scale": scale}
    low = 0 if matrix.bits == 4 else 128  # codes of int8 are signed: packed ones count from 0
    tensors = {
        "weight_packed": pack_words(matrix.codes.int() + low, matrix.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.codes.shape, dtype=torch.int64),
    }
    if not matrix.symmetric:
        # unpacked while it is read, in the type of the scales: bf16 would round the product
        tensors["weight_scale"] = scale.float()
        # packed along the outputs
        tensors["weight_zero_point"] = pack_words(matrix.zero.int().T, matrix.bits).T.contiguous()
    return tensors


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack integers 0..2^bits - 1 of shape (O, n) into int32, the first in the lowest bits.

    The last word of a row is filled up with 0.
    """
    per_word = 32 // bits
    padded = nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    words = padded.unflatten(1, (-1, per_word)) << (torch.arange(per_word) * bits)
    total = words.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def quantization_config(
    layers: Sequence[str], student: StoredStudent, model: Any
) -> dict[str, Any]:
    """Return the entry of `config.json` that the format's readers look for.

    Layers that are packed alike are one group: all linear layers but those that are listed as left
    out, or the layers by name where there are several groups.
    """
    groups: dict[tuple[str, int, bool], list[str]] = {}
    for module in layers:
        groups.setdefault(_packing(student.specs[module]), []).append(module)
    formats = {WITH_ACTIVATIONS if kind[0] in WITH_INT8_ACTIVATIONS else PACKED for kind in groups}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    entries: dict[str, dict[str, Any]] = {}
    for number, (kind, modules) in enumerate(groups.items()):
        entries[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else modules,
            "weights": _weight_settings(*kind),
            "input_activations": _activation_settings()
            if kind[0] in WITH_INT8_ACTIVATIONS
            else None,
            "output_activations": None,
        }
        if len(formats) > 1:
            own = WITH_ACTIVATIONS if kind[0] in WITH_INT8_ACTIVATIONS else PACKED
            entries[f"group_{number}"]["format"] = own
    # The layout that transformers makes for packed layers has no packed zero points (5.24 with
    # compressed-tensors 0.20), so that it opens them only where they are unpacked while read.
    unpack = {"dequantize": True} if any(kind[2] for kind in groups) else {}
    return {
        **unpack,
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": entries,
        "ignore": [name for name in linear if name not in layers],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _FIRST_VERSION,
    }


def _weight_settings(kind: str, group: int, zeros: bool) -> dict[str, Any]:
    return {
        "num_bits": 8 if kind in INT8_KINDS else 4,
        "type": "int",
        "symmetric": not zeros,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _activation_settings() -> dict[str, Any]:
    """Return int8 activations with a scale a token, computed as they come."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "observer": None,
        "observer_kwargs": {},
    }


def _notes(
    student: StoredStudent, layers: Sequence[str], settings: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return what was packed how, and what a server should know of it."""
    notes = [f"{len(layers)} layers keep their integers and scales, as {settings['format']}"]
    unpacked = [name for name, spec in student.specs.items() if spec["kind"] in INT8_KINDS]
    if floats := [name for name in unpacked if name not in layers]:
        notes.append(
            f"{', '.join(floats)} is unpacked to floats: servers read no packed table or head "
            "(embeddings=skip makes a row that leaves them as they were)"
        )
    groups = {student.specs[name].get("group", 0) for name in layers} - {0}
    if odd := sorted(groups - set(SERVED_GROUPS)):
        notes.append(
            f"groups of {odd[0]}: vLLM's kernels have {', '.join(map(str, SERVED_GROUPS))}"
        )
    if joined := _joined_unlike(student, layers):
        notes.append(
            f"{joined} are packed in different ways, and vLLM and SGLang join them: serve this "
            "with transformers, or make a row that packs them alike"
        )
    if any(student.specs[name].get("zeros") for name in layers):
        notes.append(
            "zero points: scales are stored in float32, transformers unpacks while it reads, and "
            "older vLLM takes symmetric weights only"
        )
    return tuple(notes)


def _joined_unlike(student: StoredStudent, layers: Sequence[str]) -> str:
    """Return the first layers that engines join and that are not packed alike; "" for none."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for leaves in JOINED:
            names = [f"{parent}.{leaf}" for leaf in leaves]
            if not set(names) & set(layers):
                continue
            kinds = {
                _packing(student.specs[name]) if name in layers else ("float", 0, False)
                for name in names
            }
            if len(kinds) > 1:
                return ", ".join(names)
    return ""


def _packing(spec: Mapping[str, Any]) -> tuple[str, int, bool]:
    """Return what layers that are packed alike have in common."""
    return str(spec["kind"]), int(spec.get("group", 0)), bool(spec.get("zeros"))
