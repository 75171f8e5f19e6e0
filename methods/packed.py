"""Import this to open students with plain transformers: it registers their format.

The format is harness/models/packed.py. This module holds no method.

    import methods.packed
    model = AutoModelForCausalLM.from_pretrained("results/runs/students/.../student")
"""

from harness.models.packed import FORMAT

__all__ = ["FORMAT"]
