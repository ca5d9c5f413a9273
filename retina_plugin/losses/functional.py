"""Elementwise classification losses and their derivatives as functions of x_t = y x.

Symbols are the paper's: x is a logit (any shape), y in {+1, -1} the label, ``x_t = y x`` (Eq. 6)
and ``p_t = sigmoid(x_t)`` (Eq. 2). Derivatives are taken with respect to x_t; the derivative with
respect to x is y times as much, which is how Appendix B prints it.

Everything is written in terms of ``1 - p_t = sigmoid(-x_t)`` and ``-log p_t = softplus(-x_t)``:
no difference of nearly equal numbers and no division by ``1 - p_t`` occurs, so value and
derivative are accurate and finite for every finite x_t. (Differentiating ``(1 - p_t) ** gamma``
by autograd, as fvcore and torchvision do, gives inf * 0 = NaN for 0 < gamma < 1.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cross_entropy",
    "cross_entropy_derivative",
    "focal",
    "focal_derivative",
    "focal_star",
    "focal_star_derivative",
    "focal_value_and_derivative",
    "hinge",
    "hinge_derivative",
]


def _softplus(x: Tensor) -> Tensor:
    # PyTorch gives x above its threshold of 20, where log(1 + exp(x)) is 2e-9 more: 1e-10 of it
    # is too much for float64. Above 40 the two are the same number.
    return F.softplus(x, threshold=40.0)


def cross_entropy(x_t: Tensor) -> Tensor:
    """CE(p_t) = -log(p_t) (Eq. 1 in the form of Eq. 6). Shape and dtype of ``x_t``."""
    return _softplus(-x_t)


def cross_entropy_derivative(x_t: Tensor) -> Tensor:
    """dCE/dx_t = p_t - 1 (Eq. 9 without the factor y)."""
    return (-x_t).sigmoid_().neg_()


def _power(q: Tensor, gamma: float) -> Tensor:
    # 2 and 1 are the settings in use: a product is several times cheaper than pow.
    if gamma == 1.0:
        return q
    if gamma == 2.0:
        return q * q
    return q.pow(gamma)


def focal(x_t: Tensor, gamma: float) -> Tensor:
    """FL(p_t) = -(1 - p_t)^gamma log(p_t) (Eq. 4).

    Args:
        x_t: logits times labels, any shape.
        gamma: the focusing parameter, >= 0; 0 is the cross entropy.
    """
    if gamma == 0.0:
        return cross_entropy(x_t)
    q = (-x_t).sigmoid_()
    return _power(q, gamma) * _softplus(-x_t)


def focal_derivative(x_t: Tensor, gamma: float) -> Tensor:
    """dFL/dx_t = (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1) (Eq. 10 without the factor y)."""
    return focal_value_and_derivative(x_t, gamma)[1]


def focal_value_and_derivative(x_t: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """:func:`focal` and :func:`focal_derivative` in one go, sharing the transcendentals."""
    neg = -x_t
    ce = _softplus(neg)
    q = neg.sigmoid_()  # 1 - p_t
    if gamma == 0.0:
        return ce, q.neg_()
    modulating = _power(q, gamma)
    # gamma p_t log(p_t) + p_t - 1 = -(gamma p_t ce + q): both terms >= 0, nothing cancels.
    # p_t is computed by itself: as 1 - q it would have lost its digits where ce is large.
    derivative = torch.addcmul(q, x_t.sigmoid(), ce, value=gamma).mul_(modulating).neg_()
    return ce.mul_(modulating), derivative


def focal_star(x_t: Tensor, gamma: float, beta: float) -> Tensor:
    """FL* = -log(p_t*) / gamma with p_t* = sigmoid(gamma x_t + beta) (Eq. 7, 8).

    Args:
        x_t: logits times labels, any shape.
        gamma: steepness, > 0.
        beta: shift of the curve; gamma 1 and beta 0 is the cross entropy.
    """
    return _softplus(x_t.mul(-gamma).sub_(beta)).div_(gamma)


def focal_star_derivative(x_t: Tensor, gamma: float, beta: float) -> Tensor:
    """dFL*/dx_t = p_t* - 1 (Eq. 11 without the factor y)."""
    return x_t.mul(-gamma).sub_(beta).sigmoid_().neg_()


def hinge(x_t: Tensor, margin: float) -> Tensor:
    """max(0, margin - p_t): a hinge on p_t, 0 above ``margin`` (section 5.1, "Hinge Loss").

    Args:
        x_t: logits times labels, any shape.
        margin: in (0, 1]; the paper does not give it.
    """
    return (margin - x_t.sigmoid()).clamp_(min=0)


def hinge_derivative(x_t: Tensor, margin: float) -> Tensor:
    """-p_t (1 - p_t) where p_t < margin, else 0."""
    p_t = x_t.sigmoid()
    # 1 - p_t as a sigmoid of its own: where p_t is near 1, the difference has lost its digits
    return torch.where(p_t < margin, -p_t * (-x_t).sigmoid(), 0.0)
