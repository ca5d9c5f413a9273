"""Every backend against float64 autograd of the formula, on any shape, layout and labels."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from retina_plugin.losses import (
    CrossEntropy,
    DenseTargets,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    anchor_losses,
    dense_classification_loss,
    sampled_classification_loss,
)
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from tests.fuzz.counting import fuzz
from tests.losses.reference import each_backend

INF, NAN = math.inf, math.nan
# Relative error of the gradient that rounding of inputs and results allows.
RTOL = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def formula(loss, x_t):
    """The loss of Eq. 1, 4, 8 or of section 5.1, as it is written there."""
    if isinstance(loss, CrossEntropy):
        return -F.logsigmoid(x_t)
    if isinstance(loss, FocalLoss):
        return -(torch.sigmoid(-x_t) ** loss.gamma) * F.logsigmoid(x_t)
    if isinstance(loss, FocalLossStar):
        return -F.logsigmoid(loss.gamma * x_t + loss.beta) / loss.gamma
    return (loss.margin - torch.sigmoid(x_t)).clamp(min=0)


class Case:
    """Logits of a batch and their labels."""

    def __init__(self, draw, backend):
        self.N, self.A = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        self.K = draw(st.sampled_from([1, 1, 2, 3, 5, 16, 80]))
        side = st.sampled_from([1, 2, 3, 5, 7, 8, 13])
        self.sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))
        dtypes = KERNEL_DTYPES if backend == "native" else tuple(RTOL)
        self.dtype = draw(st.sampled_from(dtypes))
        self.loss = draw(losses(self.K, backend))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        spread, mean = draw(st.sampled_from([0.1, 1, 4, 15])), draw(st.sampled_from([-5, 0, 3]))
        layouts = (
            ["NCHW", "NHWC"] if backend == "native" else ["NCHW", "NHWC", "slice", "every 2nd"]
        )
        layout = draw(st.sampled_from(layouts))
        self.logits = []
        for h, w in self.sizes:
            x = torch.randn(self.N, self.A * self.K, h, w, generator=generator) * spread + mean
            self.logits.append(arranged(x.to(self.dtype), layout))
        R = sum(h * w for h, w in self.sizes) * self.A
        kind = draw(st.sampled_from(["any", "any", "rare", "background", "ignored", "positive"]))
        self.label_NR = torch.full((self.N, R), BACKGROUND)
        low, high = {
            "any": (IGNORED, self.K),
            "rare": (-40, self.K),
            "background": (BACKGROUND, 0),
            "ignored": (IGNORED, BACKGROUND),
            "positive": (0, self.K),
        }[kind]
        drawn = torch.randint(low, high, (self.N, R), generator=generator)
        self.label_NR = torch.where(drawn < IGNORED, BACKGROUND, drawn)
        self.targets = DenseTargets(
            self.label_NR.short(), torch.zeros(self.N, R).long(), torch.zeros(1, 4)
        )
        self.weight_N = torch.rand(self.N, generator=generator) + 0.1

    def rtol(self):
        """Relative error of the sums; float32 also if each class has an alpha, of float32."""
        exact = self.dtype == torch.float64 and not isinstance(self.loss.alpha, tuple)
        return 1e-10 if exact else 1e-5

    def expected(self, weight_N, logits=None):
        """Sums by image, the part with label 1, and the gradient of the weighted sum; float64."""
        leaves = [x.detach().double().requires_grad_() for x in logits or self.logits]
        rows = [
            x.reshape(self.N, self.A, self.K, -1).permute(0, 3, 1, 2).reshape(self.N, -1, self.K)
            for x in leaves
        ]
        x_NRK = torch.cat(rows, dim=1)
        is_one = self.label_NR[:, :, None] == torch.arange(self.K)
        alpha = self.loss.alpha
        alpha = None if alpha is None else torch.as_tensor(alpha, dtype=torch.float64)
        value = formula(self.loss, torch.where(is_one, x_NRK, -x_NRK))
        if alpha is not None:
            value = torch.where(is_one, alpha, 1 - alpha) * value
        counted = (self.label_NR != IGNORED)[:, :, None]
        value = torch.where(counted, value, 0.0)
        self.per_anchor = value.detach().sum(2)
        total_N = value.sum(dim=(1, 2))
        gradients = torch.autograd.grad((total_N * weight_N.double()).sum(), leaves)
        return total_N.detach(), torch.where(is_one, value, 0.0).sum((1, 2)).detach(), gradients


def losses(num_classes, backend):
    """A loss with any alpha and parameters."""
    share = st.floats(0, 1, width=32)
    alpha = st.none() | share | st.tuples(*[share] * num_classes)
    known = [
        st.builds(CrossEntropy, alpha),
        st.builds(FocalLoss, alpha, st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 2.5, 5.0])),
        st.builds(FocalLossStar, alpha, st.floats(0.5, 4), st.floats(-2, 2)),
    ]
    if backend != "native":
        known.append(st.builds(HingeLoss, alpha, st.sampled_from([0.3, 0.5, 0.9])))
    return st.one_of(known)


def arranged(x, layout):
    """The same numbers in another memory layout."""
    if layout == "NHWC":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":  # of a larger map
        larger = F.pad(x, (1, 2, 3, 0))
        return larger[:, :, 3:, 1:-2]
    if layout == "every 2nd":
        return x.repeat_interleave(2, dim=3)[:, :, :, ::2]
    return x


def assert_near(got, expected, rtol, atol):
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


@each_backend
@fuzz(12, data=st.data())
def test_sums_and_gradients_are_those_of_the_formula(backend, data):
    """For each image, with and without a hint of the gradient, in place or not."""
    case = Case(data.draw, backend)
    in_place = case.dtype != torch.float16 and data.draw(st.booleans())
    hint = data.draw(st.sampled_from([None, case.weight_N, case.weight_N * 3]))
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in case.logits]
    strided = [arranged_like(leaf, x) for leaf, x in zip(leaves, case.logits)]
    out = dense_classification_loss(
        strided,
        case.targets,
        case.loss,
        case.K,
        backend=backend,
        expected_grad_N=hint,
        in_place=in_place,
    )
    (out.total * case.weight_N).sum().backward()
    total_N, foreground_N, gradients = case.expected(case.weight_N)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert out.total.dtype == wide
    rtol = case.rtol()
    assert_near(out.total.detach(), total_N, rtol, 1e-10)
    assert_near(out.foreground, foreground_N, rtol, 1e-10)
    assert_near(out.foreground + out.background, total_N, rtol, 1e-10)
    for leaf, gradient in zip(leaves, gradients):
        smallest = 6e-8 if case.dtype == torch.float16 else 1e-30
        assert_near(leaf.grad, gradient, max(rtol / 10, RTOL[case.dtype]), smallest)


def arranged_like(leaf, x):
    """Not a leaf, because the gradient may replace it; with the strides of ``x``."""
    copy = leaf * 1
    if copy.stride() == x.stride():
        return copy
    storage = copy.new_zeros(x.untyped_storage().nbytes() // x.element_size())
    view = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return view.copy_(copy)


@each_backend
@fuzz(10, data=st.data())
def test_not_finite_logits_give_not_finite_sums(backend, data):
    """Of their image alone, if the formula is not finite there; ignored anchors do not count."""
    case = Case(data.draw, backend)
    logits = [x.clone() for x in case.logits]
    special = [NAN, INF, -INF] + ([] if case.dtype == torch.float16 else [1e37, -1e37, 1e5, -1e5])
    for _ in range(data.draw(st.integers(1, 3))):
        x = data.draw(st.sampled_from(logits))
        place = tuple(data.draw(st.integers(0, size - 1)) for size in x.shape)
        x[place] = data.draw(st.sampled_from(special))
    leaves = [x.requires_grad_() for x in logits]
    out = dense_classification_loss(leaves, case.targets, case.loss, case.K, backend=backend)
    out.total.sum().backward()
    total_N, _, _ = case.expected(torch.ones(case.N), logits)
    if case.dtype != torch.float64:
        total_N = total_N.float()
    ours_N = out.total.detach()
    assert torch.equal(ours_N.isfinite(), total_N.isfinite())
    finite_N = total_N.isfinite()
    assert_near(ours_N[finite_N], total_N[finite_N].double(), 1e-5, 1e-10)


@fuzz(8, data=st.data())
def test_loss_of_each_anchor_is_that_of_the_formula(data):
    """For the samplers: summed over classes, -inf where ignored."""
    case = Case(data.draw, "eager")
    case.expected(case.weight_N)
    got_NR = anchor_losses(case.logits, case.targets, case.loss, case.K)
    ignored_NR = case.label_NR == IGNORED
    assert (got_NR[ignored_NR] == -INF).all()
    # the margin minus p_t loses its digits where they are near
    smallest = 1e-6 if isinstance(case.loss, HingeLoss) else 1e-30
    assert_near(got_NR[~ignored_NR], case.per_anchor[~ignored_NR], case.rtol(), smallest)


@fuzz(8, data=st.data())
def test_sampled_loss_is_the_loss_of_its_anchors(data):
    """In any order; images may have none."""
    case = Case(data.draw, "eager")
    candidates = (case.label_NR != IGNORED).nonzero().tolist()
    chosen = (
        data.draw(st.lists(st.sampled_from(candidates), unique_by=tuple, max_size=20))
        if (candidates)
        else []
    )
    image, anchor = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2).unbind(1)
    rows = [
        x.reshape(case.N, case.A, case.K, -1).permute(0, 3, 1, 2).reshape(case.N, -1, case.K)
        for x in case.logits
    ]
    rows_SK = torch.cat(rows, dim=1)[image, anchor].requires_grad_()
    out = sampled_classification_loss(rows_SK, image, anchor, case.targets, case.loss)
    (out.total * case.weight_N.to(out.total.dtype)).sum().backward()
    case.expected(case.weight_N)
    expected_N = torch.zeros(case.N, dtype=torch.float64)
    expected_N.index_add_(0, image, case.per_anchor[image, anchor])
    rtol = case.rtol()
    assert_near(out.total.detach(), expected_N, rtol, 1e-6)
    _, _, gradients = case.expected(case.weight_N)
    levels = [
        g.reshape(case.N, case.A, case.K, -1).permute(0, 3, 1, 2).reshape(case.N, -1, case.K)
        for g in gradients
    ]
    expected_SK = torch.cat(levels, dim=1)[image, anchor]
    smallest = 6e-8 if case.dtype == torch.float16 else 1e-30
    assert_near(rows_SK.grad, expected_SK, max(rtol / 10, RTOL[case.dtype]), smallest)
