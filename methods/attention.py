"""Attention distillation: match the attention of the last blocks, beside the logits.

Loss: that of `response` plus `w * KL(a_T || a_S)` over the attention of mapped blocks at the
trained queries, mean over heads (Jiao et al., 2020, TinyBERT). Where the numbers of heads differ it
is over the self-relations of queries, keys and values (Wang et al., 2021, MiniLMv2). Queries and
keys are taken after rotary embedding on both sides, from the models' own kernels.

Cost: the teacher beside the student, and a T x T map per head of the mapped blocks. Refuses models
that attend to a window, cap their scores, or do not use transformers' attention interface.
"""

from typing import ClassVar

from methods.base import Weight, settings
from methods.training.distilled import Distilled


@settings
class AttentionDistillation(Distilled):
    """Match the teacher's attention (maps, or relations of unequal heads), beside its logits."""

    controls: ClassVar[tuple[str, ...]] = ("response", "sft", "untouched")

    attention_weight: Weight = "auto"
