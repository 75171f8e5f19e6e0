"""Import this to open students with plain transformers: it registers their format
(harness/models/packed.py). No method of its own.

import methods.packed
model = AutoModelForCausalLM.from_pretrained("results/runs/students/.../student")
"""

from harness.models.packed import FORMAT

__all__ = ["FORMAT"]
