"""Response (logit) distillation: match the teacher's softened next-token distribution (Hinton et
al., 2015).

Loss per trained token: `lambda * tau^2 * D(p^tau, q^tau) + (1 - lambda) * CE(label, q)`, summed and
divided once by the trained tokens of the whole step. D is the forward KL unless another divergence
is set. Rows are the training split's worked answers.

Cost: one teacher forward per distinct row, kept for every seed and setting; per seen token where
the cache is off. Of a large vocabulary the k likeliest tokens are kept and the rest as one (a tail
bucket), which only the forward KL can use. Needs the teacher's tokenizer. Fails when the teacher is
not better than the labels on this data: where every next token is determined, logits hold little
that the text does not.
"""

from typing import ClassVar

from methods.base import settings
from methods.training.distilled import Distilled


@settings
class ResponseDistillation(Distilled):
    """Match the teacher's softened next-token distribution on the gold answers."""

    controls: ClassVar[tuple[str, ...]] = ("sft", "untouched")
