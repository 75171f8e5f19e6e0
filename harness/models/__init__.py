"""Models on disk and in memory: names resolved, opened, shaped, packed, saved. torch inside
functions, but for `packed`.

`resolve.resolve` finds a model by name, `language_model.open_model` opens it, `shaping` cuts and
saves students, `checkpoint` is a model's identity, `shape` its bytes and FLOPs by formula, `packed`
the format of compressed students (importing it imports torch and registers the format).
"""

__all__ = [
    "artefacts",
    "blocks",
    "bounded",
    "checkpoint",
    "depth",
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
