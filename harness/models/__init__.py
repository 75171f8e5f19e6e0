"""Models on disk and in memory: found by name, opened, cut to students, packed, saved.

`resolve.resolve` finds a model by name, `language_model.open_model` opens it, `shaping` cuts and
saves students, `checkpoint` is a model's identity, `shape` its bytes and FLOPs by formula, `packed`
the format of compressed students. torch is imported inside functions, except by `packed`, which
registers its format with transformers when it is imported.
"""

__all__ = [
    "artefacts",
    "blocks",
    "bounded",
    "checkpoint",
    "depth",
    "dimensions",
    "encoding",
    "foreign",
    "language_model",
    "logit_tail",
    "packed",
    "packed_bits",
    "position_head",
    "rendering",
    "resolve",
    "shape",
    "shaping",
    "states",
    "vocabulary",
    "width",
]
