"""What methods without training share: layers, calibration, rounding, sparsity.

A method derives from `base.Compressed`, or from one of its kinds in `quantized`, `sparsity` or
`external` (all load without torch), and asks inside `compress` for `layers`, `calibration` or
`rounding`.
"""

__all__ = [
    "base",
    "calibrated",
    "calibration",
    "external",
    "layers",
    "narrowing",
    "quantized",
    "rounding",
    "sizes",
    "sparsity",
]
