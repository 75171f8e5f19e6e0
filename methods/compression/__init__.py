"""What methods without training share: layers, calibration, rounding, sparsity.

A method derives from `base.Compressed`, or from a class of `calibrated`, `quantized` or `sparsity`.
These load without torch. The method imports `layers`, `calibration`, `rounding` or `external`
inside `compress`.
"""

__all__ = [
    "base",
    "cached",
    "calibrated",
    "calibration",
    "external",
    "float_formats",
    "folding",
    "layers",
    "narrowing",
    "quantized",
    "refining",
    "rounding",
    "sizes",
    "sparsity",
]
