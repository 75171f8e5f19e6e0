"""A student of the Llama architecture as a GGUF file, for llama.cpp and Ollama.

The student's own integers are laid out as GGUF's blocks of 32 weights: symmetric int4 as Q4_0, int4
with zero points as Q4_1, int8 as Q8_0. Nothing is rounded to other codes; scales become fp16, which
holds most of them exactly. Legend: O outputs, I inputs, B blocks of 32 inputs.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from harness.deploying.gguf_tokenizer import add_tokenizer
from harness.deploying.plain_form import merging_notes
from harness.deploying.stored import (
    PackedMatrix,
    StoredStudent,
    empty_plain_model,
    largest_change,
)
from harness.deploying.written import GGUF_KINDS, Written
from harness.errors import HarnessError, unknown

BLOCK = 32  # inputs that share a scale in Q4_0, Q4_1 and Q8_0
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Encoded(NamedTuple):
    """A tensor as the file holds it."""

    kind: str  # GGUF's name: Q4_0
    data: NDArray[Any]


def write_gguf(student: StoredStudent, folder: Path, *, kind: str = "auto") -> Written:
    """Write a student as one GGUF file into a new folder.

    `kind` is one of `GGUF_KINDS`: auto takes of each matrix the smallest that holds its codes.
    Raises `HarnessError` for an architecture, a tokenizer or a kind that cannot hold the student.
    """
    import gguf

    if kind not in GGUF_KINDS:
        raise unknown("GGUF kind", kind, GGUF_KINDS, hint="(in --kind)")
    student.refuse_library_format("GGUF")
    model = empty_plain_model(student)
    config = _llama_config(student, model)
    _refuse_kind(student, kind)
    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_file_stem(student)}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _add_settings(writer, config, student.label)
    add_tokenizer(writer, student.folder, student.label, int(config.vocab_size))
    largest, kinds = 0.0, dict[str, int]()
    for name in student.names():
        target = name_of.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise HarnessError(f"{student.label}: GGUF's Llama has no place for {name}")
        encoded = encode(student, name, kind, rows=_row_order(name, config))
        largest = max(largest, _change(student, name, encoded, _row_order(name, config)))
        kinds[encoded.kind] = kinds.get(encoded.kind, 0) + 1
        quantization = gguf.GGMLQuantizationType[encoded.kind]
        writer.add_tensor(target, encoded.data, raw_dtype=quantization)
    writer.add_file_type(_file_type(gguf, kinds))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, largest, (*merging_notes(student), *_notes(kinds, largest)))


def _file_stem(student: StoredStudent) -> str:
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in student.label).strip("-.")


def _llama_config(student: StoredStudent, model: Any) -> Any:
    """Return the configuration of a Llama. Raises `HarnessError` for another architecture."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    problem = ""
    if config.model_type != "llama":
        problem = f"the architecture {config.model_type}"
    elif rope.get("rope_type", "default") != "default":
        problem = f"rotary positions of the type {rope['rope_type']}"
    elif config.hidden_act != "silu":
        problem = f"the activation {config.hidden_act}"
    if problem:
        raise HarnessError(
            f"{student.label} has {problem}, and --form gguf writes the Llama architecture with "
            "its usual parts; type --form safetensors, and convert that with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    return config


def fitting_kinds(matrix: PackedMatrix | None) -> tuple[str, ...]:
    """Return the kinds that hold a matrix's codes; of floats and others those that round it."""
    if matrix is None or matrix.codes.shape[1] % BLOCK:
        return ("f32", "f16", "bf16") if matrix is not None else ("f32", "f16", "bf16", "q8_0")
    is_whole_row = matrix.group >= matrix.codes.shape[1]
    if not is_whole_row and matrix.group % BLOCK:
        return ("f32", "f16", "bf16")
    if matrix.bits == 8:
        return ("f32", "f16", "bf16", "q8_0")
    fitting = ("f32", "f16", "bf16", "q8_0", "q4_1")
    return (*fitting, "q4_0") if matrix.symmetric else fitting


def _refuse_kind(student: StoredStudent, kind: str) -> None:
    """Raise `HarnessError` for a kind of blocks that a packed layer's codes do not fit."""
    if not kind.startswith("q"):
        return
    has_int4 = False
    for module in student.specs:
        matrix = student.matrix(module)
        if matrix is None:
            continue
        fitting = fitting_kinds(matrix)
        is_asked = matrix.bits == 4 or kind == "q8_0"
        has_int4 = has_int4 or matrix.bits == 4
        if is_asked and kind not in fitting:
            zeros = "" if matrix.symmetric else " with zero points"
            raise HarnessError(
                f"{student.label}: {module} is int{matrix.bits} in groups of {matrix.group}{zeros} "
                f"over {matrix.codes.shape[1]:,} inputs, which {kind} cannot express; type --kind "
                f"{' or '.join(reversed(fitting))}, or auto"
            )
    if kind in ("q4_0", "q4_1") and not has_int4:
        raise HarnessError(
            f"{student.label} holds no layer in int4, so {kind} would round it anew; type --kind "
            "q8_0, f16, bf16 or f32, or export a row of 'int4[group_size=32]'"
        )


def encode(
    student: StoredStudent, name: str, kind: str, *, rows: "NDArray[np.int64] | None" = None
) -> Encoded:
    """Return a weight in a kind, its rows in the order of `rows`; vectors stay float32."""
    import gguf

    module, _, leaf = name.rpartition(".")
    matrix = student.matrix(module) if leaf == "weight" else None
    values = student.plain(name).float()
    chosen = "f32" if values.ndim < 2 else _chosen_kind(student, name, kind, matrix, values)
    order = slice(None) if rows is None else torch.from_numpy(rows)
    if chosen.startswith("q") and matrix is not None:
        return Encoded(chosen.upper(), _blocks(matrix, order, chosen))
    upper, array = chosen.upper(), values[order].contiguous().numpy()
    if upper == "F32":
        return Encoded(upper, array)
    if upper == "F16":
        return Encoded(upper, array.astype(np.float16))
    return Encoded(upper, gguf.quantize(array, gguf.GGMLQuantizationType[upper]))


def _chosen_kind(
    student: StoredStudent, name: str, kind: str, matrix: PackedMatrix | None, values: torch.Tensor
) -> str:
    """Return the kind of one matrix: the one that is asked for where it is meant for it."""
    fitting = fitting_kinds(matrix)
    is_block = kind.startswith("q") and values.shape[1] % BLOCK == 0
    if is_block and kind in fitting and (kind == "q8_0" or matrix is not None):
        return kind
    if kind.startswith("f") or kind == "bf16":
        return kind
    if matrix is not None:  # the smallest that holds its codes
        return next((block for block in ("q4_0", "q4_1", "q8_0") if block in fitting), "f32")
    if student.merged(name.rpartition(".")[0]):
        return "f16"
    exact = (part for part, dtype in _FLOATS.items() if part != "F32" and not _moves(values, dtype))
    return next(iter(sorted(exact, reverse=True)), "F32").lower()


def _moves(values: torch.Tensor, dtype: torch.dtype) -> bool:
    return largest_change(values, dtype) > 0


def _blocks(matrix: PackedMatrix, order: Any, kind: str) -> NDArray[np.uint8]:
    """Return a packed matrix as GGUF's blocks, (O, bytes of a row).

    A block of Q4_0 is its scale and its codes, the first 16 in the low halves of 16 bytes; Q4_1 has
    what a code of 0 stands for behind the scale; Q8_0 has signed codes.
    """
    codes = matrix.codes[order]
    outputs, inputs = codes.shape
    group_of_block = (torch.arange(inputs // BLOCK) * BLOCK) // matrix.group
    scale = matrix.scale[order].float()[:, group_of_block]  # (O, B)
    zero = matrix.zero[order].float()[:, group_of_block]
    head = [_half(scale)]
    blocks = codes.reshape(outputs, -1, BLOCK)
    if kind == "q8_0":
        signed = (blocks - zero[..., None].short()).to(torch.int8)
        body = signed.numpy().view(np.uint8)
    else:
        if kind == "q4_1":
            head.append(_half(-scale * zero))
        nibbles = blocks.to(torch.uint8)
        body = (nibbles[..., :16] | (nibbles[..., 16:] << 4)).numpy()
    return np.concatenate([*head, body], axis=-1).reshape(outputs, -1)


def _half(values: torch.Tensor) -> NDArray[np.uint8]:
    """Return numbers (O, B) as the bytes of fp16, (O, B, 2)."""
    halves: NDArray[np.uint8] = values.to(torch.float16).numpy()[..., None].view(np.uint8)
    return halves


def _row_order(name: str, config: Any) -> "NDArray[np.int64] | None":
    """Return the order of rows in GGUF, whose rotary pairs stand side by side; None as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2] if "." in name else "")
    if count is None:
        return None
    rows = np.arange(count * config.head_dim)
    return rows.reshape(count, 2, config.head_dim // 2).swapaxes(1, 2).reshape(-1)


def _change(
    student: StoredStudent, name: str, encoded: Encoded, rows: "NDArray[np.int64] | None"
) -> float:
    """Return how far an encoded tensor's numbers are from the student's, by gguf's own reading."""
    import gguf

    values = student.plain(name).float()
    ordered = values if rows is None else values[torch.from_numpy(rows)]
    kind = gguf.GGMLQuantizationType[encoded.kind]
    decoded = gguf.dequantize(encoded.data, kind).reshape(ordered.shape)
    gap = float((torch.from_numpy(decoded).double() - ordered.double()).abs().max())
    return gap / max(float(ordered.double().abs().max()), 1e-300)


def _add_settings(writer: Any, config: Any, label: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(label)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(int(config.num_attention_heads))
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_rope_dimension_count(int(config.head_dim))
    writer.add_key_length(int(config.head_dim))
    writer.add_value_length(int(config.head_dim))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(int(config.vocab_size))


def _file_type(gguf: Any, kinds: dict[str, int]) -> int:
    """Return the number of the commonest kind of matrices, as llama.cpp counts file types."""
    names = {"F32": "ALL_F32"}
    matrices = {kind: count for kind, count in kinds.items() if kind != "F32"} or kinds
    commonest = max(matrices, key=lambda kind: matrices[kind])
    return int(gguf.LlamaFileType[names.get(commonest, f"MOSTLY_{commonest}")])


def _notes(kinds: dict[str, int], largest: float) -> tuple[str, ...]:
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    moved = (
        "every number is the student's own"
        if not largest
        else f"a number moves by at most {100 * largest:.2g} % of the largest in its matrix"
    )
    return (f"tensors: {listed}; {moved}",)
