"""Feature (hidden-state) distillation: match the outputs of mapped blocks, beside the logits.

Loss: that of `response` plus `w * mean over pairs of d(W h_s, h_t)` at the trained positions. d is
the squared error after each state is divided by its root mean square, which equals 2 (1 - cos) and
ignores scale. W (no bias) is there only where widths differ; it starts from least squares and is
not saved with the student. Weight `auto` follows the logit terms. After Romero et al. (2015,
FitNets) and Sun et al. (2019, PKD).

Cost: the teacher runs beside the student at every step (no cache holds its hidden states). Fails
when the blocks are mapped badly, or when the student is too narrow to carry the teacher's states.
"""

from typing import ClassVar

from methods.base import Weight, settings
from methods.training.distilled import Distilled


@settings
class FeatureDistillation(Distilled):
    """Match the teacher's hidden states after mapped blocks, beside its logits."""

    controls: ClassVar[tuple[str, ...]] = ("response", "sft", "untouched")

    feature_weight: Weight = "auto"
