"""A student as plain safetensors: floats that transformers opens without anything of ours.

A student of floats is copied, byte for byte. Packed weights are unpacked to the smallest float type
that holds every one of them, or to the type that is asked for.
"""

import json
import shutil
from pathlib import Path

import torch

from harness.deploying.stored import StoredStudent, empty_plain_model, exact_dtype, largest_change
from harness.deploying.written import Written
from harness.models.checkpoint import is_model_file


def write_plain(student: StoredStudent, folder: Path, *, dtype: str = "auto") -> Written:
    """Write a student into a new folder.

    `dtype` is float32, bfloat16, float16 or auto: as it is stored, and for packed weights the
    smallest type that changes none.
    """
    student.refuse_library_format("plain safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    if not student.specs and dtype == "auto":
        copy_model_files(student.folder, folder, weights=True)
        return Written(folder, 0.0, ("copied as it is stored",))
    model = empty_plain_model(student)
    target = exact_dtype(student) if dtype == "auto" else getattr(torch, dtype)
    largest, state = 0.0, {}
    for name in student.names():
        tensor = student.plain(name)
        if tensor.is_floating_point():
            largest = max(largest, largest_change(tensor, target))
            tensor = tensor.to(target)
        state[name] = tensor
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = target
    model.save_pretrained(folder)
    copy_model_files(student.folder, folder, weights=False)
    return Written(folder, largest, (*merging_notes(student), dtype_note(target, largest)))


def merging_notes(student: StoredStudent) -> tuple[str, ...]:
    """Return the note on factors and adapters that were multiplied into their matrix."""
    kinds = {student.merged(module) for module in student.specs} - {""}
    return tuple(
        f"{kind} of a layer are multiplied out to one matrix (in fp64, rounded to fp32), so the "
        "export is larger than the row"
        if "factors" in kind
        else f"{kind} is added to its matrix (in fp64, rounded to fp32)"
        for kind in sorted(kinds)
    )


def dtype_note(dtype: torch.dtype, largest: float) -> str:
    """Say in which type weights are stored, and by how much the largest change moves one."""
    name = str(dtype).removeprefix("torch.")
    if not largest:
        return f"floats are stored in {name}, which holds every one of them exactly"
    return (
        f"rounded to {name}: a weight moves by at most {100 * largest:.2g} % of the largest in its "
        "matrix"
    )


def copy_model_files(source: Path, folder: Path, *, weights: bool) -> None:
    """Copy tokenizer, template, generation settings and code; with `weights` all of a model."""
    for path in sorted(source.iterdir()):
        is_weight = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        is_config = path.name == "config.json"
        if is_model_file(path) and (weights or not (is_weight or is_config)):
            shutil.copyfile(path, folder / path.name)


def write_config(student: StoredStudent, folder: Path, changes: dict[str, object]) -> None:
    """Write the student's configuration with changes in place of our own format's entry."""
    config = {key: value for key, value in student.config.items() if key != "quantization_config"}
    text = json.dumps({**config, **changes}, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
