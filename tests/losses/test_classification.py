"""The registered losses: how a config builds them, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg

from retina_plugin import add_retina_config
from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    CLS_LOSS_REGISTRY,
    ClassificationLoss,
    CrossEntropy,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
)
from retina_plugin.losses.classification import Formula, FormulaKind


def cfg_with(**retinanet):
    cfg = add_retina_config(get_cfg())
    for key, value in retinanet.items():
        cfg.MODEL.RETINANET[key] = value
    return cfg


def test_default_is_focal_loss_of_detectron2():
    loss = CLS_LOSS_REGISTRY.build(cfg_with())
    assert repr(loss) == "FocalLoss(alpha=0.25, gamma=2.0)"


@pytest.mark.parametrize("alpha", [None, -1.0])
def test_without_alpha_both_labels_weigh_1(alpha):
    """None, or a negative number as in fvcore and Detectron2."""
    loss = CLS_LOSS_REGISTRY.build(cfg_with(CLS_LOSS="CrossEntropy", FOCAL_LOSS_ALPHA=alpha))
    assert isinstance(loss, CrossEntropy)
    assert (loss.positive_weight, loss.negative_weight) == (1.0, 1.0)


def test_alpha_weighs_label_1_and_its_complement_label_0():
    loss = CLS_LOSS_REGISTRY.build(cfg_with(CLS_LOSS="CrossEntropy", FOCAL_LOSS_ALPHA=0.75))
    assert (loss.positive_weight, loss.negative_weight) == (0.75, 0.25)


def test_alpha_per_class():
    loss = CLS_LOSS_REGISTRY.build(cfg_with(NUM_CLASSES=3, ALPHA_PER_CLASS=[0.1, 0.5, 1.0]))
    assert torch.equal(loss.positive_weight, torch.tensor([0.1, 0.5, 1.0]))
    assert torch.equal(loss.negative_weight, torch.tensor([0.9, 0.5, 0.0]))


def test_wrong_number_of_alphas_raises():
    with pytest.raises(ConfigError, match="ALPHA_PER_CLASS has 2 numbers for 80 classes"):
        CLS_LOSS_REGISTRY.build(cfg_with(ALPHA_PER_CLASS=[0.1, 0.5]))


def test_star_and_hinge_read_their_keys():
    cfg = cfg_with(CLS_LOSS="FocalLossStar", FOCAL_STAR_GAMMA=4.0, FOCAL_STAR_BETA=0.0)
    assert repr(CLS_LOSS_REGISTRY.build(cfg)) == "FocalLossStar(alpha=0.25, gamma=4.0, beta=0.0)"
    cfg = cfg_with(CLS_LOSS="HingeLoss", HINGE_MARGIN=0.5)
    assert repr(CLS_LOSS_REGISTRY.build(cfg)) == "HingeLoss(alpha=0.25, margin=0.5)"


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        FocalLoss(gamma=0.5),
        FocalLoss(gamma=2.0),
        FocalLossStar(gamma=2.0, beta=1.0),
        HingeLoss(margin=0.7),
    ],
    ids=repr,
)
def test_closed_form_derivative_equals_autograd(loss):
    x_t = torch.linspace(-12, 12, 241, dtype=torch.float64)
    by_autograd = ClassificationLoss.derivative(loss, x_t)
    torch.testing.assert_close(loss.derivative(x_t), by_autograd)


def test_unknown_loss_raises_and_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"CLS_LOSS.*'Fokal'.*CrossEntropy, FocalLoss, FocalLossStar, HingeLoss"
    ):
        CLS_LOSS_REGISTRY.build(cfg_with(CLS_LOSS="Fokal"))


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: FocalLoss(alpha=1.5), "FOCAL_LOSS_ALPHA"),
        (lambda: FocalLoss(alpha=(0.5, -0.1)), "ALPHA_PER_CLASS"),
        (lambda: FocalLoss(gamma=-1.0), "FOCAL_LOSS_GAMMA"),
        (lambda: FocalLossStar(gamma=0.0), "FOCAL_STAR_GAMMA"),
        (lambda: HingeLoss(margin=0.0), "HINGE_MARGIN"),
    ],
)
def test_value_out_of_range_raises_with_its_key(make, key):
    with pytest.raises(ConfigError, match=rf"^MODEL\.RETINANET\.{key} must be"):
        make()


def test_formula_of_the_losses_that_kernels_know():
    focal, star = FormulaKind.FOCAL, FormulaKind.FOCAL_STAR
    assert CrossEntropy(0.3).kernel_formula() == Formula(focal, 0.0, 0.0)
    assert FocalLoss(0.3, 0.5).kernel_formula() == Formula(focal, 0.5, 0.0)
    assert FocalLossStar(0.3, 2.0, 1.0).kernel_formula() == Formula(star, 2.0, 1.0)
    assert HingeLoss().kernel_formula() is None


def test_formula_is_not_inherited():
    """A subclass may override ``value``, so it has to declare its own formula."""

    class Derived(FocalLoss):
        pass

    class Declared(Derived):
        @property
        def formula(self):
            return Formula(FormulaKind.FOCAL, self.gamma)

    assert Derived().kernel_formula() is None
    assert Declared(gamma=3.0).kernel_formula() == Formula(FormulaKind.FOCAL, 3.0)


def test_user_loss_needs_only_a_value():
    """The README's example: a class with ``value`` alone."""

    class SquaredCrossEntropy(ClassificationLoss):
        def value(self, x_t):
            return F.softplus(-x_t) ** 2

    x_t = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    expected = -2 * F.softplus(-x_t) * torch.sigmoid(-x_t)
    torch.testing.assert_close(SquaredCrossEntropy().derivative(x_t), expected)
