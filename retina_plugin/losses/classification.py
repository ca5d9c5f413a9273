"""Classification losses of the dense detector, chosen by ``MODEL.RETINANET.CLS_LOSS``.

A loss is a class with ``value(x_t)`` and, where there is a closed form, ``derivative(x_t)``;
otherwise autograd computes the derivative. A loss is elementwise and knows neither anchors nor
batches: :mod:`retina_plugin.losses.dense` sums it, and
:mod:`retina_plugin.modeling.normalizer` divides.

    @CLS_LOSS_REGISTRY.register()
    class MyLoss(ClassificationLoss):
        def value(self, x_t):
            return torch.nn.functional.softplus(-x_t) ** 2

A loss that the compiled kernels know describes itself to them with ``formula``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from retina_plugin.errors import ConfigError
from retina_plugin.registry import ComponentRegistry

from . import functional

__all__ = [
    "CLS_LOSS_REGISTRY",
    "ClassificationLoss",
    "CrossEntropy",
    "FocalLoss",
    "FocalLossStar",
    "Formula",
    "FormulaKind",
    "HingeLoss",
]

# Entries are subclasses of ClassificationLoss.
CLS_LOSS_REGISTRY = ComponentRegistry("MODEL.RETINANET.CLS_LOSS")


class FormulaKind(enum.IntEnum):
    """The elementwise losses that compiled kernels may know."""

    FOCAL = 0  # Eq. 4; gamma 0 is the cross entropy
    FOCAL_STAR = 1  # Eq. 8


class Formula(NamedTuple):
    """All that a kernel has to know of an elementwise loss without alpha."""

    kind: FormulaKind
    gamma: float
    beta: float = 0.0


class ClassificationLoss:
    """An elementwise loss of x_t = y x with alpha balancing.

    The loss of a logit x is ``alpha l(x)`` if the anchor has that class (y = 1), otherwise
    ``(1 - alpha) l(-x)`` (alpha_t of Eq. 3 and 5). Without alpha, both weigh 1.

    Args:
        alpha: weight of label 1 in [0, 1], one for all classes or a sequence of K; None for no
            balancing.

    Attributes:
        formula: how compiled kernels compute ``value`` and ``derivative``; None (the default): they
            cannot, plain PyTorch does. Not inherited, because an override may break it: every class
            declares it itself.
        self_test_arguments: constructor arguments of the instances with which a kernel is compared
            with plain PyTorch before it is used. Read for classes with a ``formula``; by default
            one instance without arguments.

    Raises:
        ConfigError: alpha outside [0, 1].
    """

    self_test_arguments: ClassVar[Sequence[Mapping[str, Any]]] = ({},)

    def __init__(self, alpha: float | Sequence[float] | None = None) -> None:
        values = alpha if isinstance(alpha, Sequence) else [] if alpha is None else [alpha]
        if not all(0.0 <= a <= 1.0 for a in values):
            key = "ALPHA_PER_CLASS" if isinstance(alpha, Sequence) else "FOCAL_LOSS_ALPHA"
            raise ConfigError(f"MODEL.RETINANET.{key} must be in [0, 1] or None, got {alpha}")
        self.alpha = alpha

    @property
    def formula(self) -> Formula | None:
        return None

    def kernel_formula(self) -> Formula | None:
        """``formula`` if this very class declares it, else None."""
        return self.formula if "formula" in vars(type(self)) else None

    @property
    def positive_weight(self) -> float | Tensor:
        """alpha_t of the entries with label 1: a number, or (K,), one for each class."""
        if self.alpha is None:
            return 1.0
        return torch.tensor(self.alpha) if isinstance(self.alpha, Sequence) else self.alpha

    @property
    def negative_weight(self) -> float | Tensor:
        """alpha_t of the entries with label 0: a number, or (K,), one for each class."""
        return 1.0 if self.alpha is None else 1.0 - self.positive_weight

    def value(self, x_t: Tensor) -> Tensor:
        """The loss of each entry without alpha. Shape of ``x_t``, which must not be modified."""
        raise NotImplementedError  # abstract: every loss defines it

    def derivative(self, x_t: Tensor) -> Tensor:
        """d value / d x_t of each entry; by autograd unless a subclass has a closed form."""
        with torch.enable_grad():
            leaf = x_t.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.value(leaf).sum(), leaf)
        return grad

    def value_and_derivative(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once, as new tensors. Override it where they share work."""
        return self.value(x_t), self.derivative(x_t)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """``FOCAL_LOSS_ALPHA`` (negative: no alpha, as in Detectron2) or ``ALPHA_PER_CLASS``.

        Raises:
            ConfigError: ``ALPHA_PER_CLASS`` does not have ``NUM_CLASSES`` numbers.
        """
        retinanet = cfg.MODEL.RETINANET
        alpha = retinanet.FOCAL_LOSS_ALPHA
        if not retinanet.ALPHA_PER_CLASS:
            return {"alpha": None if alpha is None or alpha < 0 else alpha}
        if len(retinanet.ALPHA_PER_CLASS) != retinanet.NUM_CLASSES:
            raise ConfigError(
                f"MODEL.RETINANET.ALPHA_PER_CLASS has {len(retinanet.ALPHA_PER_CLASS)} numbers "
                f"for {retinanet.NUM_CLASSES} classes (MODEL.RETINANET.NUM_CLASSES)"
            )
        return {"alpha": tuple(retinanet.ALPHA_PER_CLASS)}

    def __repr__(self) -> str:
        args = ", ".join(f"{k}={v}" for k, v in vars(self).items())
        return f"{type(self).__name__}({args})"


@CLS_LOSS_REGISTRY.register()
class CrossEntropy(ClassificationLoss):
    """CE(p_t) = -log(p_t) (Eq. 1), or -alpha_t log(p_t) with alpha (Eq. 3, Table 1a)."""

    @property
    def formula(self) -> Formula:
        return Formula(FormulaKind.FOCAL, gamma=0.0)

    def value(self, x_t: Tensor) -> Tensor:
        return functional.cross_entropy(x_t)

    def derivative(self, x_t: Tensor) -> Tensor:
        return functional.cross_entropy_derivative(x_t)


@CLS_LOSS_REGISTRY.register()
class FocalLoss(ClassificationLoss):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t) (Eq. 5, Table 1b; Eq. 4 without alpha).

    Args:
        alpha: see :class:`ClassificationLoss`; the paper's is .25 for gamma 2.
        gamma: the focusing parameter, >= 0 (``FOCAL_LOSS_GAMMA``).

    Raises:
        ConfigError: negative gamma.
    """

    self_test_arguments = ({}, {"gamma": 0.5})  # kernels compute a square and other powers apart

    def __init__(self, alpha: float | Sequence[float] | None = 0.25, gamma: float = 2.0) -> None:
        super().__init__(alpha)
        if gamma < 0:
            raise ConfigError(f"MODEL.RETINANET.FOCAL_LOSS_GAMMA must be >= 0, got {gamma}")
        self.gamma = float(gamma)

    @property
    def formula(self) -> Formula:
        return Formula(FormulaKind.FOCAL, self.gamma)

    def value(self, x_t: Tensor) -> Tensor:
        return functional.focal(x_t, self.gamma)

    def derivative(self, x_t: Tensor) -> Tensor:
        return functional.focal_derivative(x_t, self.gamma)

    def value_and_derivative(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        return functional.focal_value_and_derivative(x_t, self.gamma)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """``FOCAL_LOSS_ALPHA`` and ``FOCAL_LOSS_GAMMA``, with Detectron2's meaning."""
        return {**super().from_config(cfg), "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA}


@CLS_LOSS_REGISTRY.register()
class FocalLossStar(ClassificationLoss):
    """FL* = -alpha_t log(sigmoid(gamma x_t + beta)) / gamma (Appendix A, Eq. 7, 8; Table 3).

    Args:
        alpha: see :class:`ClassificationLoss`; Appendix A uses .25 in all experiments.
        gamma: steepness, > 0 (``FOCAL_STAR_GAMMA``).
        beta: shift (``FOCAL_STAR_BETA``).

    Raises:
        ConfigError: gamma not positive.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        beta: float = 1.0,
    ) -> None:
        super().__init__(alpha)
        if gamma <= 0:
            raise ConfigError(f"MODEL.RETINANET.FOCAL_STAR_GAMMA must be > 0, got {gamma}")
        self.gamma, self.beta = float(gamma), float(beta)

    @property
    def formula(self) -> Formula:
        return Formula(FormulaKind.FOCAL_STAR, self.gamma, self.beta)

    def value(self, x_t: Tensor) -> Tensor:
        return functional.focal_star(x_t, self.gamma, self.beta)

    def derivative(self, x_t: Tensor) -> Tensor:
        return functional.focal_star_derivative(x_t, self.gamma, self.beta)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """``FOCAL_STAR_GAMMA`` and ``FOCAL_STAR_BETA``."""
        retinanet = cfg.MODEL.RETINANET
        return {
            **super().from_config(cfg),
            "gamma": retinanet.FOCAL_STAR_GAMMA,
            "beta": retinanet.FOCAL_STAR_BETA,
        }


@CLS_LOSS_REGISTRY.register()
class HingeLoss(ClassificationLoss):
    """alpha_t max(0, margin - p_t) (section 5.1, "Hinge Loss"; the paper found it unstable).

    Args:
        alpha: see :class:`ClassificationLoss`.
        margin: p_t above which the loss is 0, in (0, 1] (``HINGE_MARGIN``); not in the paper.

    Raises:
        ConfigError: a margin outside (0, 1].
    """

    def __init__(self, alpha: float | Sequence[float] | None = None, margin: float = 0.9) -> None:
        super().__init__(alpha)
        if not 0.0 < margin <= 1.0:
            raise ConfigError(f"MODEL.RETINANET.HINGE_MARGIN must be in (0, 1], got {margin}")
        self.margin = float(margin)

    def value(self, x_t: Tensor) -> Tensor:
        return functional.hinge(x_t, self.margin)

    def derivative(self, x_t: Tensor) -> Tensor:
        return functional.hinge_derivative(x_t, self.margin)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """``HINGE_MARGIN``."""
        return {**super().from_config(cfg), "margin": cfg.MODEL.RETINANET.HINGE_MARGIN}
