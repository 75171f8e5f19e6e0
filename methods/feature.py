"""Feature (hidden-state) distillation: match the outputs of mapped blocks, beside the logits.

Loss: that of `response` plus `w * mean over pairs of d(W h_s, h_t)` at the trained positions. d is
the squared error after each state is divided by its root mean square, which equals 2 (1 - cos) and
ignores scale; W (no bias) only where widths differ, started by least squares and left out of the
student. Weight `auto` follows the logit terms. After Romero et al. (2015, FitNets) and Sun et al.
(2019, PKD).

Cost: the teacher runs beside the student at every step (no cache holds its hidden states). Fails
when the blocks are mapped badly, or when the student is so narrow that its states cannot carry the
teacher's.
"""

from typing import ClassVar

from methods.base import Weight, settings
from methods.training.distilled import Distilled


@settings
class FeatureDistillation(Distilled):
    """Match the teacher's hidden states behind mapped blocks, beside its logits."""

    controls: ClassVar[tuple[str, ...]] = ("response", "sft", "untouched")

    feature_weight: Weight = "auto"
