"""Losses and gradients part by part are those of the whole, for every divergence, and hold less."""

import copy

import pytest
import torch
from families import random_family

from harness.models.logit_tail import logit_tail_of
from methods.training import losses
from methods.training.chunked_logits import ChunkedLoss, adds_in_place, parts, positions_of_a_part

N, V = 23, 1024
IDS = torch.randint(3, V - 1, (2, N), generator=torch.Generator().manual_seed(3))
WANTED = 2 * N


def teacher_logits(seed=5):
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(WANTED, V, generator=draw)


TEACHER = teacher_logits()
LABELS = torch.randint(0, V, (WANTED,), generator=torch.Generator().manual_seed(7))
TOP = torch.log_softmax(TEACHER, -1).topk(50)

VALUES = {
    "ce": lambda part, logits: losses.cross_entropy(logits, LABELS[part]),
    "forward-kl": lambda part, logits: losses.forward_kl(logits, TEACHER[part], temperature=2.0),
    "reverse-kl": lambda part, logits: losses.reverse_kl(logits, TEACHER[part]),
    "jsd": lambda part, logits: losses.jensen_shannon(logits, TEACHER[part], beta=0.3),
    "skew-kl": lambda part, logits: losses.skew_kl(logits, TEACHER[part], alpha=0.1),
    "top-k": lambda part, logits: losses.top_k_kl(logits, TOP.indices[part], TOP.values[part]),
    "uld": lambda part, logits: losses.universal_logit(logits, TEACHER[part]),
}


def hidden_of(model):
    """Return what goes into the head at every position, (N, H), with its graph."""
    kept = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: kept.append(inputs[0])
    )
    model(input_ids=IDS, use_cache=False)
    hook.remove()
    return kept[0].flatten(0, 1)


def loss_of(names):
    def loss(part, logits):
        return {name: VALUES[name](part, logits).sum() / WANTED for name in names}

    return loss


def whole_gradient(model, names, weights):
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    sums = loss_of(names)(slice(0, WANTED), logits)
    sum(weights[name] * value for name, value in sums.items()).backward()
    return sums


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def squares(model):
    return sum(float(gradient.square().sum()) for gradient in gradients(model).values())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma 2", "Cohere", "GPT-2", "Phi"])
@pytest.mark.parametrize("names", [("ce", "forward-kl"), ("jsd",), ("skew-kl",), ("top-k", "ce")])
def test_the_gradient_is_that_of_the_whole(family, names):
    model = random_family(family)
    other = copy.deepcopy(model)
    weights = {name: 0.3 + index for index, name in enumerate(names)}
    sums = whole_gradient(model, names, weights)
    chunked = ChunkedLoss(other.get_output_embeddings(), logit_tail_of(other), size=7)
    totals = chunked.backward(hidden_of(other), loss_of(names), weights)
    for name, value in sums.items():
        assert totals[name].item() == pytest.approx(value.item(), rel=1e-6)
    mine = gradients(other)
    for name, gradient in gradients(model).items():
        size = gradient.abs().max()
        assert torch.allclose(mine[name], gradient, rtol=0, atol=1e-6 * max(1.0, float(size))), name


@pytest.mark.parametrize("name", VALUES)
def test_every_divergence_has_the_same_value_in_parts(name):
    model = random_family("Llama")
    tail = logit_tail_of(model)
    hidden = hidden_of(model).detach()
    values = [
        ChunkedLoss(model.get_output_embeddings(), tail, size).values(hidden, loss_of([name]))
        for size in (1, 16, WANTED, 10 * WANTED)
    ]
    whole = values[-1][name].item()
    assert all(value[name].item() == pytest.approx(whole, rel=1e-6) for value in values)


@pytest.mark.parametrize("tied", [True, False])
def test_a_terms_own_gradient_is_that_of_the_whole_and_the_graph_is_kept(tied):
    model = random_family("Llama")
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    other = copy.deepcopy(model)
    if tied:
        other.get_output_embeddings().weight = other.get_input_embeddings().weight
    whole_gradient(model, ["jsd"], {"jsd": 1.0})
    chunked = ChunkedLoss(other.get_output_embeddings(), logit_tail_of(other), size=5)
    hidden = hidden_of(other)
    parameters = [weight for weight in other.parameters() if weight.requires_grad]
    found = chunked.term_gradients(hidden, loss_of(["ce", "jsd"]), "jsd", parameters)
    for mine, weight in zip(found, model.parameters(), strict=True):
        assert torch.allclose(mine, weight.grad, rtol=0, atol=1e-6)
    totals = chunked.backward(hidden, loss_of(["ce", "jsd"]), {"ce": 0.0, "jsd": 1.0})
    assert set(totals) == {"ce", "jsd"}
    norms = [
        sum(float(g.square().sum()) for g in gradients(each).values()) for each in (model, other)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_losses_are_given_the_shared_vocabulary_alone():
    model = random_family("Llama")
    widths = []

    def loss(part, logits):
        widths.append(logits.shape[1])
        return {"ce": losses.cross_entropy(logits, LABELS[part] % 900).sum()}

    chunked = ChunkedLoss(model.get_output_embeddings(), logit_tail_of(model), 20, vocabulary=900)
    chunked.backward(hidden_of(model), loss, {"ce": 1.0})
    assert set(widths) == {900} and len(widths) == 3


def test_a_frozen_model_gets_no_gradient_and_its_losses_are_computed():
    model = random_family("Llama").requires_grad_(False)
    chunked = ChunkedLoss(model.get_output_embeddings(), logit_tail_of(model), size=9)
    totals = chunked.backward(hidden_of(model), loss_of(["ce"]), {"ce": 1.0})
    assert totals["ce"] > 0 and not any(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_scale_multiplies_every_gradient(scale):
    model = random_family("Llama")
    chunked = ChunkedLoss(model.get_output_embeddings(), logit_tail_of(model), size=9)
    chunked.backward(hidden_of(model), loss_of(["ce"]), {"ce": 1.0}, scale=scale)
    plain = random_family("Llama")
    whole_gradient(plain, ["ce"], {"ce": scale})
    assert squares(model) == pytest.approx(squares(plain), rel=1e-4)


def test_parts_cover_every_position_once():
    assert [*parts(7, 3)] == [slice(0, 3), slice(3, 6), slice(6, 7)] and not [*parts(0, 3)]
    assert positions_of_a_part(152_000) == 55 and positions_of_a_part(2**30) == 16
    assert positions_of_a_part(1_024) > 8_000  # small vocabularies are held whole


@pytest.mark.parametrize("who", ["plain", "frozen", "masked", "quantized"])
def test_the_heads_gradient_is_added_in_place_only_where_nobody_waits_for_it(who):
    head = random_family("Llama").get_output_embeddings()
    if who == "frozen":
        head.requires_grad_(False)
    if who == "masked":
        head.weight.register_post_accumulate_grad_hook(lambda weight: None)
    if who == "quantized":
        head.__class__ = type("Packed", (torch.nn.Linear,), {})
    assert adds_in_place(head) == (who == "plain")


def test_a_masks_hook_on_the_head_is_called():
    model = random_family("Llama")
    weight = model.get_output_embeddings().weight

    def mask(weight):
        weight.grad.zero_()

    weight.register_post_accumulate_grad_hook(mask)
    chunked = ChunkedLoss(model.get_output_embeddings(), logit_tail_of(model), size=9)
    chunked.backward(hidden_of(model), loss_of(["ce"]), {"ce": 1.0})
    assert not weight.grad.any() and squares(model) > 0


def test_under_autocast_the_gradient_is_that_of_the_whole_to_bf16():
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    model = random_family("Llama")
    other = copy.deepcopy(model)
    with autocast():
        logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    loss_of(["ce"])(slice(0, WANTED), logits)["ce"].backward()
    chunked = ChunkedLoss(
        other.get_output_embeddings(), logit_tail_of(other), size=7, autocast=autocast
    )
    with autocast():
        hidden = hidden_of(other)
    chunked.backward(hidden, loss_of(["ce"]), {"ce": 1.0})
    mine = gradients(other)
    for name, gradient in gradients(model).items():
        assert mine[name].dtype == torch.float32
        gap = (mine[name] - gradient).norm() / gradient.norm()
        assert gap < 0.02, (name, gap)
