"""Models on disk and in memory: found by name, opened, cut to students, packed, saved.

`resolve.resolve` finds a model by name, `language_model.open_model` opens it, `shaping` cuts and
saves students, `checkpoint` is a model's identity, `shape` its bytes and FLOPs by formula, `packed`
the format of compressed students. `blockwise` opens a model with its blocks in their files, and
`student_writers` saves what a method makes of them, block by block. torch is imported inside
functions, except by `packed`, which registers its format with transformers when it is imported, by
`int4_tiles`, by what codes of keys and values are made of (`cache_codes`, `quantized_cache`), and
by what writes students: `reopening`, `student_writers`, `tensor_spool`.
"""

__all__ = [
    "adapters",
    "artefacts",
    "blocks",
    "blockwise",
    "bounded",
    "cache_codes",
    "cache_format",
    "checkpoint",
    "depth",
    "dimensions",
    "encoding",
    "file_weights",
    "foreign",
    "formats",
    "int4_tiles",
    "language_model",
    "llama_cpp",
    "logit_tail",
    "outside",
    "packed",
    "packed_bits",
    "packed_training",
    "position_head",
    "quantized_cache",
    "rendering",
    "reopening",
    "resolve",
    "served_model",
    "shape",
    "shaping",
    "states",
    "stored_attention",
    "student_writers",
    "tensor_spool",
    "unpacked",
    "vocabulary",
    "width",
]
