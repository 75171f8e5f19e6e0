"""What methods without training share: layers, calibration, rounding, sparsity."""
