"""What stands behind a model's head, found by asking it: over every family."""

import pytest
import torch
from families import FAMILIES, random_family

from harness.models.logit_tail import LogitTail, logit_tail_of

KNOWN = {"Gemma 2": "cap", "RecurrentGemma": "cap", "xLSTM": "cap", "Cohere": "scale", "Llama": ""}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tail_gives_the_models_own_logits_at_other_tokens(family):
    model = random_family(family).eval()
    tail = logit_tail_of(model)
    assert tail is not None, "what does this family do behind its head?"
    outputs = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    ids = torch.randint(3, 900, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    hook.remove()
    assert torch.allclose(tail(outputs[-1]), logits, rtol=1e-5, atol=1e-5)
    kind = "cap" if tail.soft_cap else "scale" if tail.scale != 1 else ""
    assert kind == KNOWN.get(family, kind)


def test_a_tail_of_another_form_is_none():
    model = random_family("Llama").eval()
    forward = type(model).forward

    class Odd(type(model)):
        def forward(self, *arguments, **named):
            output = forward(self, *arguments, **named)
            output.logits = output.logits.abs().sqrt()
            return output

    model.__class__ = Odd
    assert logit_tail_of(model) is None


def test_the_three_forms_by_hand():
    output = torch.tensor([-3.0, 0.0, 6.0])
    assert LogitTail()(output) is output
    assert LogitTail(scale=0.5)(output).tolist() == [-1.5, 0.0, 3.0]
    capped = LogitTail(soft_cap=2.0)(output)
    assert capped.tolist() == pytest.approx([2 * -0.905148, 0.0, 2 * 0.995055], abs=1e-5)
