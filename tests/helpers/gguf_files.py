"""Small GGUF files of a Llama of two blocks, in all tensor kinds that the gguf package reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, INNER, HEADS, LAYERS = 256, 512, 4, 1  # a K kind packs blocks of 256


def packed(values: "np.ndarray", kind: str, *, seed: int) -> "np.ndarray":
    """Return a matrix packed in a kind, rounded by gguf's own code.

    For kinds that gguf only reads, the codes are random and the scales small.
    """
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(values, quantization)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    codes = np.random.default_rng(seed).integers(
        0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8
    )
    # Scales are halves among the codes; which ones, each kind has of its own: bytes whose value is
    # no small number are drawn again.
    for place in _scales(kind, size):
        codes[..., place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    return codes.reshape(values.shape[0], -1)


def _scales(kind: str, size: int) -> tuple[int, ...]:
    return {
        "Q2_K": (size - 4, size - 2),
        "Q3_K": (size - 2,),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (size - 2,),
    }.get(kind, (0,))


def write_llama(
    path: Path, kinds: dict[str, str], tokenizer: Path, *, seed: int = 0
) -> dict[str, Any]:
    """Write a Llama file; return each tensor's packed data and kind, by its GGUF name.

    `kinds` maps a tensor's name to its kind; "" is the kind of the other matrices.
    """
    import gguf

    bpe = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]]
    )
    writer.add_eos_token_id(0)
    draw, tensors = np.random.default_rng(seed), {}
    shapes = {
        "token_embd.weight": (len(tokens), WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (len(tokens), WIDTH),
    }
    for block in range(LAYERS):
        shapes |= {f"blk.{block}.{name}.weight": shape for name, shape in _BLOCK.items()}
    for number, (name, shape) in enumerate(shapes.items()):
        values = draw.normal(0, 0.02, shape).astype(np.float32)
        # norms stand in float32 in every file, with numbers that bf16 and fp16 hold, as a model in
        # those has
        if len(shape) == 1:
            values = 1 + np.round(64 * values) / 64
        kind = "F32" if len(shape) == 1 else kinds.get(name, kinds[""])
        data = values.astype({"F32": np.float32, "F16": np.float16}.get(kind, np.float32))
        if kind not in ("F32", "F16"):
            data = packed(values, kind, seed=number)
        writer.add_tensor(
            name,
            data,
            raw_dtype=None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind],
        )
        tensors[name] = (data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def exact(data: "np.ndarray", kind: str) -> "np.ndarray":
    """Return a tensor's numbers in float32, as gguf's own code reads them."""
    import gguf

    return (
        data.astype(np.float32)
        if kind in ("F32", "F16")
        else gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    )


_BLOCK = {
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}
