"""Elementwise losses against float64 autograd of the textbook formulas."""

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retina_plugin.losses import functional

GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]  # Table 1b
# densely where logits of a network are, then up to |x| = 100
X_T = torch.cat([torch.linspace(-30, 30, 6001), torch.linspace(-100, 100, 2001)])


def textbook(x_t, gamma):
    """-(1 - p_t)^gamma log(p_t) (Eq. 4) in float64, and its derivative by autograd."""
    x_t = x_t.double().requires_grad_()
    loss = -(torch.sigmoid(-x_t) ** gamma) * F.logsigmoid(x_t)
    (derivative,) = torch.autograd.grad(loss.sum(), x_t)
    return loss.detach(), derivative


def assert_relatively_close(actual, expected):
    # near 1e-38 float32 has no relative precision left: its denormals begin there
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_and_its_derivative_agree_with_float64_autograd(gamma):
    value, derivative = functional.focal_value_and_derivative(X_T, gamma)
    expected_value, expected_derivative = textbook(X_T, gamma)
    assert_relatively_close(value, expected_value)
    assert_relatively_close(derivative, expected_derivative)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_separate_functions_equal_the_fused_one(gamma):
    value, derivative = functional.focal_value_and_derivative(X_T, gamma)
    torch.testing.assert_close(functional.focal(X_T, gamma), value)
    torch.testing.assert_close(functional.focal_derivative(X_T, gamma), derivative)


def test_cross_entropy_agrees_with_float64_autograd():
    value, derivative = textbook(X_T, 0.0)
    assert_relatively_close(functional.cross_entropy(X_T), value)
    assert_relatively_close(functional.cross_entropy_derivative(X_T), derivative)


@pytest.mark.parametrize(
    "ours, expected",
    [
        (functional.cross_entropy, lambda x_t: -F.logsigmoid(x_t)),
        (lambda x_t: functional.focal(x_t, 2.0), lambda x_t: textbook(x_t, 2.0)[0]),
        (
            lambda x_t: functional.focal_value_and_derivative(x_t, 0.5)[0],
            lambda x_t: textbook(x_t, 0.5)[0],
        ),
        (
            lambda x_t: functional.focal_star(x_t, 3.0, 0.5),
            lambda x_t: -F.logsigmoid(3 * x_t + 0.5) / 3,
        ),
    ],
)
def test_float64_has_its_digits(ours, expected):
    """Also at logits where PyTorch's softplus is the identity, by default from 20 on."""
    x_t = X_T.double()
    torch.testing.assert_close(ours(x_t), expected(x_t), rtol=1e-13, atol=1e-36)


def test_focal_with_gamma_0_is_cross_entropy():
    assert torch.equal(functional.focal(X_T, 0.0), functional.cross_entropy(X_T))


def test_focal_derivative_is_equation_10():
    """(1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1) as printed in the paper, in float64."""
    x_t = torch.linspace(-8, 8, 101, dtype=torch.float64)
    p_t = torch.sigmoid(x_t)
    printed = (1 - p_t) ** 2 * (2 * p_t * p_t.log() + p_t - 1)
    torch.testing.assert_close(functional.focal_derivative(x_t, 2.0), printed)


def test_focal_discounts_easy_examples_as_section_3_2_says():
    """p_t = .9: 100x less than CE with gamma 2; p_t = .968: about 1000x; p_t <= .5: at most 4x."""
    x_t = torch.logit(torch.tensor([0.9, 0.968, 0.5], dtype=torch.float64))
    ratio = functional.cross_entropy(x_t) / functional.focal(x_t, 2.0)
    torch.testing.assert_close(ratio, torch.tensor([100, 976.5625, 4.0], dtype=torch.float64))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_derivative_tends_to_0_and_minus_1(gamma):
    """Appendix B: 0 for confident right predictions, -1 for confident wrong ones."""
    derivative = functional.focal_derivative(torch.tensor([-100.0, 100.0]), gamma)
    torch.testing.assert_close(derivative[0].item(), -1.0)
    assert abs(derivative[1]) < 1e-4


@pytest.mark.parametrize("gamma", [g for g in GAMMAS if 0 < g < 1])
@pytest.mark.parametrize("peer", [fvcore_focal_loss, torchvision_focal_loss])
def test_finite_where_fvcore_and_torchvision_give_nan(gamma, peer):
    """p_t = 1 in float32: autograd through (1 - p_t) ** gamma is inf * 0 for gamma < 1."""
    x = torch.tensor([[100.0, -100.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0]])
    peer(x, target, alpha=0.75, gamma=gamma, reduction="sum").backward()
    assert x.grad.isnan().all()

    value, derivative = functional.focal_value_and_derivative(torch.tensor([100.0, -100.0]), gamma)
    assert value.isfinite().all() and derivative.isfinite().all()


# Table 3 and the range of Figure 7
STAR = [(1.0, 0.0), (2.0, 1.0), (4.0, 0.0), (2.0, -2.0), (3.0, 1.5), (0.5, 0.5), (5.0, 2.0)]


@pytest.mark.parametrize("gamma, beta", STAR)
def test_focal_star_agrees_with_float64_autograd(gamma, beta):
    x_t = X_T.double().requires_grad_()
    loss = -F.logsigmoid(gamma * x_t + beta) / gamma
    (derivative,) = torch.autograd.grad(loss.sum(), x_t)
    # gamma x_t + beta is rounded: an exponent of 60 has an absolute error of 4e-6
    for ours, expected in (
        (functional.focal_star(X_T, gamma, beta), loss.detach()),
        (functional.focal_star_derivative(X_T, gamma, beta), derivative),
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=4e-6, atol=1e-30)
    near = X_T.abs() <= 10  # logits of a network; the exponent is up to 50
    ours = functional.focal_star_derivative(X_T, gamma, beta)
    torch.testing.assert_close(ours[near].double(), derivative[near], rtol=3e-6, atol=1e-12)


def test_focal_star_with_gamma_1_and_beta_0_is_cross_entropy():
    ours = functional.focal_star(X_T, 1.0, 0.0)
    torch.testing.assert_close(ours, functional.cross_entropy(X_T))


def test_focal_star_derivative_is_equation_11():
    x_t = torch.linspace(-8, 8, 101, dtype=torch.float64)
    printed = torch.sigmoid(2 * x_t + 1) - 1
    torch.testing.assert_close(functional.focal_star_derivative(x_t, 2.0, 1.0), printed)


@pytest.mark.parametrize("margin", [0.5, 0.9, 1.0])
def test_hinge_agrees_with_float64_autograd_and_is_zero_above_the_margin(margin):
    x_t = X_T.double().requires_grad_()
    p_t = torch.sigmoid(x_t)
    away = (p_t - margin).abs() > 1e-6  # from the kink, where there is no derivative
    loss = (margin - p_t).clamp(min=0)
    (derivative,) = torch.autograd.grad(loss.sum(), x_t)
    value = functional.hinge(X_T, margin)
    torch.testing.assert_close(value.double(), loss.detach(), rtol=1e-6, atol=1e-7)
    ours = functional.hinge_derivative(X_T, margin)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[away].double(), derivative[away], rtol=1e-6, atol=1e-7)
    assert not value[X_T > torch.logit(torch.tensor(margin)) + 1e-3].any() or margin == 1.0
