"""Our losses against trl's, where it is installed (`pytest -m peer`; trl 1.16).

Equal where it follows the formula; where it does not, the difference is written down. `theirs` is
the loss of its experimental trainer, of logits held whole; the last test asks its stable one, which
works in tiles from hidden states.
"""

import pytest
import torch

from methods.training.losses import forward_kl, jensen_shannon, reverse_kl

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def theirs():
    trainer = pytest.importorskip(
        "trl.experimental.gkd", reason="trl is not installed here; type: pip install trl==1.16"
    ).GKDTrainer
    return trainer.generalized_jsd_loss


@pytest.fixture(scope="module")
def logits():
    torch.manual_seed(0)
    return (
        torch.randn(2, 7, 50),
        2 * torch.randn(2, 7, 50),
        torch.tensor([[-100, -100, 3, 4, 5, 6, 7], [-100, 3, 4, 5, -100, -100, -100]]),
    )


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_forward_and_reverse_kl_equal_trl_but_for_the_square_of_the_temperature(
    theirs, logits, tau
):
    student, teacher, labels = logits
    mask = labels != -100
    for ours, beta in ((forward_kl, 0), (reverse_kl, 1)):
        expected = theirs(student, teacher, labels, beta=beta, temperature=tau, reduction="sum")
        divergence = ours(student[mask], teacher[mask], temperature=tau).sum()
        # trl leaves tau^2 out (Hinton et al., 2015, section 2): its gradient shrinks by tau^2 when
        # the temperature rises.
        assert float(divergence) == pytest.approx(float(expected) * tau**2, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_inner_jensen_shannon_divergences_equal_trl(theirs, logits, beta):
    student, teacher, labels = logits
    mask = labels != -100
    expected = theirs(student, teacher, labels, beta=beta, reduction="sum")
    assert float(jensen_shannon(student[mask], teacher[mask], beta=beta).sum()) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_at_its_ends_trl_jumps_from_the_divergence_to_a_kl_and_ours_goes_to_zero(theirs, logits):
    student, teacher, labels = logits
    mask = labels != -100
    near, end = (
        float(theirs(student, teacher, labels, beta=beta, reduction="sum")) for beta in (1e-3, 0)
    )
    assert end > 50 * near  # so a sweep of beta through 0 at one learning rate compares two scales
    assert float(jensen_shannon(student[mask], teacher[mask], beta=1e-3).sum()) == pytest.approx(
        near, rel=1e-3
    )


@pytest.mark.parametrize(("beta", "tau"), [(0.0, 1.0), (0.0, 2.0), (1.0, 1.0), (0.3, 1.0)])
def test_the_stable_trainer_has_our_divergence_and_our_gradient(beta, tau):
    kernel = pytest.importorskip(
        "trl.kernels.chunked_divergence", reason="trl is not installed; type: pip install trl==1.16"
    ).ChunkedDivergenceFunction
    torch.manual_seed(0)
    weights = {"student": torch.randn(50, 8), "teacher": torch.randn(50, 12)}
    hidden = {"student": torch.randn(9, 8), "teacher": torch.randn(9, 12)}
    theirs, ours = ((hidden["student"].clone().requires_grad_()) for _ in range(2))
    divergence, _ = kernel.apply(
        theirs, weights["student"], None, hidden["teacher"], weights["teacher"], None, beta, tau
    )
    divergence.sum().backward()
    logits = ours @ weights["student"].T, hidden["teacher"] @ weights["teacher"].T
    if beta in (0.0, 1.0):
        expected = (forward_kl if beta == 0.0 else reverse_kl)(*logits, temperature=tau) / tau**2
    else:
        expected = jensen_shannon(*logits, beta=beta)
    expected.sum().backward()
    assert torch.allclose(divergence, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5)
