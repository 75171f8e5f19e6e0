"""What a model does behind its head: nothing, a scale (Cohere), or a soft cap (Gemma 2).

It is found by asking the model, so that logits can be made of a few positions at a time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PROBE_TOKENS = 8
# how families' configurations call it: Gemma 2, RecurrentGemma, xLSTM
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_TOLERANCE = 1e-5  # relative; in float32 the candidates differ from each other by far more


@dataclass(frozen=True)
class LogitTail:
    """What turns the head's output into the model's logits: scale * x, or cap * tanh(x / cap)."""

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, head_output: "torch.Tensor") -> "torch.Tensor":
        """Return the logits that the model itself would give, of any shape."""
        if self.soft_cap is not None:
            return (head_output / self.soft_cap).tanh() * self.soft_cap
        return head_output if self.scale == 1.0 else head_output * self.scale


def logit_tail_of(model: Any) -> LogitTail | None:
    """Return what a model does behind its head; None where it is none of the known forms.

    The model reads eight tokens once. Then what came out of the head is compared with its logits.
    """
    import torch

    head = model.get_output_embeddings()
    if head is None:
        return None
    outputs: list[torch.Tensor] = []
    watching = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    vocabulary = head.weight.shape[0]
    ids = torch.arange(1, 1 + _PROBE_TOKENS, device=head.weight.device)[None] % vocabulary
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        watching.remove()
        model.train(was_training)
    if len(outputs) != 1 or outputs[0].shape != logits.shape:
        return None
    coarse = logits.dtype in (torch.bfloat16, torch.float16)
    tolerance = 4 * torch.finfo(logits.dtype).eps if coarse else _TOLERANCE
    return _fitting(outputs[0].float(), logits.float(), model.config, tolerance)


def _fitting(
    output: "torch.Tensor", logits: "torch.Tensor", config: Any, tolerance: float
) -> LogitTail | None:
    """Return the first form that gives the logits of the head's output."""
    import torch

    large = output.abs() > 0.1 * output.abs().max()
    ratio = float((logits[large] / output[large]).median())
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    caps = [getattr(text_config, name, None) for name in _SOFT_CAPS]
    # a cap is tried first: it changes small logits by less than the tolerance
    forms = [*(LogitTail(soft_cap=float(cap)) for cap in caps if cap), LogitTail()]
    forms.append(LogitTail(scale=ratio))
    scale = float(logits.abs().max())
    for form in forms:
        if torch.allclose(form(output), logits, rtol=tolerance, atol=tolerance * scale):
            return form
    return None
