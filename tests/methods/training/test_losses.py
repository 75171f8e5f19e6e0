"""The golden numbers and laws of the distillation losses."""

import math

import pytest
import torch

from harness.errors import HarnessError
from harness.models.vocabulary import common_vocabulary
from methods.training import losses
from methods.training.losses import attention_kl, ensemble, entropy, hidden_distance


def summed(function):
    """Return the sum over positions: what the loop makes of a loss."""
    return lambda *arguments, **settings: function(*arguments, **settings).sum()


cross_entropy, forward_kl, jensen_shannon, reverse_kl, skew_kl, top_k_kl, universal_logit = map(
    summed,
    (
        losses.cross_entropy,
        losses.forward_kl,
        losses.jensen_shannon,
        losses.reverse_kl,
        losses.skew_kl,
        losses.top_k_kl,
        losses.universal_logit,
    ),
)
TEACHER = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
STUDENT = torch.tensor([[1.0, 2.0, 0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, 0.788242), (2.0, 0.959710), (4.0, 1.037031)]
)
def test_forward_kl_gives_the_golden_numbers(temperature, expected):
    assert float(forward_kl(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(
        expected, abs=1e-5
    )


def test_forward_kl_by_hand():
    p = [math.exp(z) / sum(math.exp(k) for k in (3, 2, 1, 0)) for z in (3, 2, 1, 0)]
    q = [math.exp(z) / sum(math.exp(k) for k in (1, 2, 0, 2)) for z in (1, 2, 0, 2)]
    assert float(forward_kl(STUDENT, TEACHER)) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-6
    )


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, 0.973596), (2.0, 1.070948), (4.0, 1.095100)]
)
def test_reverse_kl_gives_the_golden_numbers(temperature, expected):
    assert float(reverse_kl(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.069057), (0.5, 0.189173), (0.9, 0.078983)])
def test_jensen_shannon_gives_the_golden_numbers(beta, expected):
    assert float(jensen_shannon(STUDENT, TEACHER, beta=beta)) == pytest.approx(expected, abs=1e-5)


def test_skew_and_universal_logit_give_the_golden_numbers():
    assert float(skew_kl(STUDENT, TEACHER, alpha=0.1)) == pytest.approx(0.608440, abs=1e-5)
    assert float(universal_logit(STUDENT, TEACHER)) == pytest.approx(0.488856, abs=1e-5)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.640222), (2, 0.668223), (3, 0.788242)])
def test_top_k_with_a_tail_gives_the_golden_numbers(k, expected):
    log_p, ids = torch.log_softmax(TEACHER, -1).topk(k)
    assert float(top_k_kl(STUDENT, ids, log_p)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_top_k_of_equal_models_is_zero_with_no_gradient_at_any_temperature(temperature):
    torch.manual_seed(9)
    logits = (3 * torch.randn(3, 5000)).requires_grad_()
    log_p, ids = torch.log_softmax(logits.detach(), -1).topk(8)
    loss = top_k_kl(logits, ids, log_p, temperature=temperature)
    [gradient] = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5) and gradient.abs().max() < 1e-5
    if temperature > 1:  # equal to the dense one where the k tokens are all but one
        ranked, order = torch.log_softmax(TEACHER, -1).sort(descending=True)
        dense = float(forward_kl(STUDENT, TEACHER, temperature=temperature))
        assert float(
            top_k_kl(STUDENT, order[:, :3], ranked[:, :3], temperature=temperature)
        ) == pytest.approx(dense, abs=1e-5)


def test_top_k_grows_with_k_up_to_the_dense_divergence_and_its_gradient_agrees():
    torch.manual_seed(2)
    student, teacher = torch.randn(4, 30, requires_grad=True), 2 * torch.randn(4, 30)
    ranked, order = torch.log_softmax(teacher, -1).sort(descending=True)
    values = [float(top_k_kl(student.detach(), order[:, :k], ranked[:, :k])) for k in range(1, 30)]
    assert values == sorted(values) and values[-1] == pytest.approx(
        float(forward_kl(student, teacher)), rel=1e-5
    )
    [dense] = torch.autograd.grad(forward_kl(student, teacher), student)
    [cached] = torch.autograd.grad(top_k_kl(student, order[:, :29], ranked[:, :29]), student)
    assert torch.allclose(dense, cached, atol=1e-5)
    shuffled = float(top_k_kl(student, order[[1, 2, 3, 0], :8], ranked[:, :8]))
    assert abs(shuffled - values[7]) > 0.1  # another position's tokens are not this one's


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_two_teachers_give_the_golden_numbers_and_their_law(temperature):
    other = torch.tensor([[0.0, 1.0, 3.0, 0.0]], dtype=torch.float64)
    mean = ensemble([TEACHER, other], torch.tensor([1, 1]), temperature=temperature)
    single = [
        float(forward_kl(STUDENT, teacher, temperature=temperature)) for teacher in (TEACHER, other)
    ]
    mixed = float(forward_kl(STUDENT, mean, temperature=temperature))
    if temperature == 1:
        assert torch.softmax(mean, -1)[0].tolist() == pytest.approx(
            [0.342115, 0.173237, 0.448460, 0.036187], abs=1e-5
        )
        assert mixed == pytest.approx(1.006211, abs=1e-5) and sum(single) / 2 == pytest.approx(
            1.346804, abs=1e-5
        )
    # the difference is a constant: it does not know the student
    student = torch.randn(1, 4, dtype=torch.float64)
    of_another_student = [
        float(forward_kl(student, teacher, temperature=temperature)) for teacher in (TEACHER, other)
    ]
    assert sum(single) / 2 - mixed == pytest.approx(
        sum(of_another_student) / 2 - float(forward_kl(student, mean, temperature=temperature)),
        abs=1e-5,
    )
    assert torch.allclose(
        torch.softmax(ensemble([TEACHER], torch.tensor([0.3])), -1),
        torch.softmax(TEACHER, -1).float(),
    )
    assert torch.allclose(
        torch.softmax(ensemble([TEACHER, TEACHER], torch.tensor([1.0, 3.0])), -1),
        torch.softmax(TEACHER, -1).float(),
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda q, p: reverse_kl(q, p, temperature=2.0),
        lambda q, p: jensen_shannon(q, p, beta=0.3, temperature=2.0),
        lambda q, p: skew_kl(q, p, alpha=0.1, temperature=2.0),
        universal_logit,
    ],
    ids=["reverse", "jsd", "skew", "uld"],
)
def test_a_divergence_is_flat_and_zero_at_the_teacher_sums_over_positions_and_ignores_shifts(loss):
    torch.manual_seed(3)
    teacher = torch.randn(3, 11)
    student = teacher.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert float(value) == pytest.approx(0, abs=1e-5)
    if loss is not universal_logit:  # a sum of absolute values has a corner there
        assert student.grad.abs().max() < 1e-5
    other = torch.randn(3, 11)
    apart = sum(float(loss(other[i : i + 1], teacher[i : i + 1])) for i in range(3))
    assert float(loss(other, teacher)) == pytest.approx(apart, rel=1e-5) and apart > 0
    assert float(loss(other + 5, teacher - 3)) == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        reverse_kl,
        lambda q, p: jensen_shannon(q, p, beta=0.5),
        lambda q, p: skew_kl(q, p, alpha=0.1),
    ],
)
def test_every_gradient_is_that_of_finite_differences(loss):
    torch.manual_seed(4)
    student, teacher = (
        torch.randn(2, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 5, dtype=torch.float64),
    )
    [gradient] = torch.autograd.grad(loss(student, teacher), student)
    for row, column in ((0, 0), (1, 3)):
        step = torch.zeros_like(student)
        step[row, column] = 1e-2
        slope = (loss(student + step, teacher) - loss(student - step, teacher)) / 2e-2
        assert float(slope) == pytest.approx(float(gradient[row, column]), abs=1e-3)


def test_masked_entries_and_far_tails_stay_finite():
    masked_q = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    masked_p = torch.tensor([[2.0, 1.0, -math.inf]])
    far = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
    for loss in (
        reverse_kl,
        lambda q, p: jensen_shannon(q, p, beta=0.5),
        lambda q, p: skew_kl(q, p, alpha=0.1),
    ):
        for student, teacher in ((masked_q, masked_p), (far, torch.tensor([[-80.0, 80.0, 0.0]]))):
            [gradient] = torch.autograd.grad(loss(student, teacher), student)
            assert torch.isfinite(loss(student, teacher)) and torch.isfinite(gradient).all()


@pytest.mark.parametrize(("label", "expected"), [(0, 1.917576), (1, 0.917576)])
def test_cross_entropy_gives_the_golden_numbers(label, expected):
    assert float(cross_entropy(STUDENT, torch.tensor([label]))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [-0.496951, 0.162603, -0.033080, 0.367428]),
        (2.0, [-0.502276, 0.120394, -0.087447, 0.469330]),
    ],
)
def test_gradient_gives_the_golden_numbers(temperature, expected):
    student = STUDENT.clone().requires_grad_()
    forward_kl(student, TEACHER, temperature=temperature).backward()
    assert student.grad[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_gradient_tends_to_the_difference_of_centred_logits_as_the_temperature_grows():
    student = STUDENT.clone().double().requires_grad_()
    forward_kl(student, TEACHER, temperature=1000.0).backward()
    assert student.grad[0].tolist() == pytest.approx([-0.4375, 0.0625, -0.1875, 0.5625], abs=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_gradient_is_tau_times_the_difference_of_softened_distributions(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    forward_kl(student, teacher, temperature=temperature).backward()
    formula = temperature * (
        torch.softmax(student.detach() / temperature, -1) - torch.softmax(teacher / temperature, -1)
    )
    assert torch.allclose(student.grad, formula, atol=1e-6)
    step = 1e-2  # the same by finite differences, which know nothing of the formula
    for row, column in ((0, 0), (3, 5)):
        above = student.detach().clone()
        above[row, column] += step
        below = student.detach().clone()
        below[row, column] -= step
        slope = (
            forward_kl(above, teacher, temperature=temperature)
            - forward_kl(below, teacher, temperature=temperature)
        ) / (2 * step)
        assert float(slope) == pytest.approx(float(student.grad[row, column]), abs=2e-3)


def test_kl_of_a_distribution_to_itself_is_zero_with_zero_gradient():
    student = torch.randn(3, 11, requires_grad=True)
    loss = forward_kl(student, student.detach(), temperature=2.0)
    loss.backward()
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_kl_agrees_with_torch_distributions():
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 50), torch.randn(6, 50)
    independent = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher),
        torch.distributions.Categorical(logits=student),
    )
    assert float(forward_kl(student, teacher)) == pytest.approx(float(independent.sum()), rel=1e-5)


def test_masked_vocabulary_entries_give_no_nan():
    student = torch.tensor([[1.0, 2.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, -math.inf]])
    loss = forward_kl(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all() and float(student.grad[0, 2]) == 0


def test_half_precision_logits_are_summed_in_fp32():
    torch.manual_seed(2)
    student, teacher = torch.randn(64, 100), torch.randn(64, 100)
    half = forward_kl(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(forward_kl(student, teacher)), rel=1e-2)


def test_padded_vocabularies_share_their_tokens():
    tokens = {"a": 0, "b": 1, "c": 2}
    assert common_vocabulary(tokens, dict(tokens)) == 3


def test_weights_of_an_ensemble_may_differ_by_position():
    torch.manual_seed(5)
    first, second = torch.randn(2, 6), torch.randn(2, 6)
    mixed = torch.softmax(ensemble([first, second], torch.tensor([[1.0, 0.0], [1.0, 3.0]])), -1)
    assert torch.allclose(mixed[0], torch.softmax(first[0], -1), atol=1e-6)
    assert torch.allclose(
        mixed[1],
        0.25 * torch.softmax(first[1], -1) + 0.75 * torch.softmax(second[1], -1),
        atol=1e-6,
    )


def test_entropy_agrees_with_torch_distributions_and_with_its_kept_part():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        entropy(logits), torch.distributions.Categorical(logits=logits).entropy(), atol=1e-6
    )
    top_log_p = torch.log_softmax(logits, -1).topk(8).values
    assert torch.allclose(losses.top_k_entropy(top_log_p), entropy(logits), atol=1e-4)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden_distance_is_zero_for_equal_states_ignores_scale_and_keeps_its_identity(kind):
    torch.manual_seed(6)
    student, teacher = torch.randn(5, 16), torch.randn(5, 16)
    assert hidden_distance(teacher, teacher, kind=kind).abs().max() < 1e-6
    assert torch.allclose(
        hidden_distance(3 * student, teacher, kind=kind),
        hidden_distance(student, teacher, kind=kind),
        atol=1e-6,
    )
    assert torch.allclose(
        hidden_distance(student, teacher, kind="mse"),
        2 * hidden_distance(student, teacher, kind="cosine"),
        atol=1e-5,
    )
    by_hand = ((student - teacher) ** 2).mean(-1)
    assert torch.allclose(hidden_distance(student, teacher, kind="plain-mse"), by_hand)


def attention_by_hand(student, teacher, allowed):
    """Return the same by plain loops over heads, queries and keys."""
    batch, heads, queries, _ = student.shape
    divergence = torch.zeros(batch, queries)
    for b in range(batch):
        for i in range(queries):
            keys = [j for j in range(queries) if bool(allowed[b, 0, i, j])]
            for h in range(heads):
                p, q = (torch.softmax(scores[b, h, i, keys], 0) for scores in (teacher, student))
                divergence[b, i] += float((p * (p / q).log()).sum()) / heads
    return divergence


def test_attention_kl_agrees_with_loops_is_zero_for_equal_models_and_finite_with_padding():
    torch.manual_seed(7)
    student, teacher = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 5, 5)
    allowed = torch.tril(torch.ones(5, 5, dtype=torch.bool)).expand(2, 1, 5, 5).clone()
    allowed[1, :, :, 3:] = False  # two padded keys
    allowed[1, :, 3:, 0] = True
    divergence = attention_kl(student, teacher, allowed)
    assert torch.allclose(divergence, attention_by_hand(student, teacher, allowed), atol=1e-5)
    assert attention_kl(teacher, teacher, allowed).abs().max() < 1e-6 and float(
        divergence[0, 0]
    ) == pytest.approx(0, abs=1e-6)
    divergence.sum().backward()
    assert (
        torch.isfinite(student.grad).all() and student.grad.masked_select(~allowed).abs().max() == 0
    )


def test_attention_of_unequal_heads_compares_means():
    torch.manual_seed(8)
    allowed = torch.tril(torch.ones(4, 4, dtype=torch.bool))[None, None]
    teacher = torch.randn(1, 2, 4, 4)
    assert attention_kl(teacher.repeat(1, 2, 1, 1), teacher, allowed).abs().max() < 1e-6


@pytest.mark.parametrize(
    "teacher", [{"a": 0, "b": 1}, {"a": 1, "b": 0, "c": 2}, {"a": 0, "b": 1, "x": 2}]
)
def test_different_vocabularies_are_refused_with_the_way_out(teacher):
    with pytest.raises(HarnessError, match=r"different vocabularies.*--methods cot"):
        common_vocabulary({"a": 0, "b": 1, "c": 2}, teacher)
