"""Response (logit) distillation: match the teacher's softened next-token distribution.

Hinton et al., 2015. Loss per trained token:
`lambda * tau^2 * D(p^tau, q^tau) + (1 - lambda) * CE(label, q)`, summed and divided once by the
trained tokens of the whole step. D is the forward KL unless another divergence is set. Rows are the
worked answers of the training split.

Cost: one teacher forward per distinct row, cached for every seed and setting; without the cache one
per token seen. Of a large vocabulary the k likeliest tokens are cached and the rest as one (a tail
bucket), which only the forward KL can use. Needs the teacher's tokenizer. Fails when the teacher is
not better than the labels on this data: where every next token is determined, logits add little to
the text.
"""

from typing import ClassVar

from methods.base import settings
from methods.training.distilled import Distilled


@settings
class ResponseDistillation(Distilled):
    """Match the teacher's softened next-token distribution on the gold answers."""

    controls: ClassVar[tuple[str, ...]] = ("sft", "untouched")
