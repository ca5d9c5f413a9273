"""The dense loss against float64 autograd over one-hot targets."""

import pytest
import torch
import torch.nn.functional as F

from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    ClassificationLoss,
    CrossEntropy,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    anchor_losses,
    dense_classification_loss,
)
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from tests.losses.reference import (
    ALPHA_PER_CLASS,
    GAMMAS,
    A,
    K,
    N,
    R,
    background,
    each_backend,
    focal,
    needs_compiler,
    random_logits,
    random_targets,
    targets_of,
    textbook,
)


@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("spread", [4.0, 40.0])  # 40 reaches |x| = 100
@each_backend
def test_float32_agrees_with_float64_autograd(alpha, gamma, spread, backend):
    logits, targets = random_logits(spread=spread), random_targets()
    loss = FocalLoss(alpha, gamma)
    out = dense_classification_loss(logits, targets, loss, K, backend=backend)
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, alpha, gamma)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    for x, expected in zip(logits, grads):
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    "loss, elementwise",
    [
        (FocalLoss(ALPHA_PER_CLASS), lambda x_t: focal(x_t, 2.0)),
        (CrossEntropy(ALPHA_PER_CLASS), lambda x_t: focal(x_t, 0.0)),
        (FocalLossStar(0.25, 2.0, 1.0), lambda x_t: -F.logsigmoid(2 * x_t + 1) / 2),
        (FocalLossStar(0.25, 4.0, 0.0), lambda x_t: -F.logsigmoid(4 * x_t) / 4),
        (HingeLoss(None, 0.9), lambda x_t: (0.9 - torch.sigmoid(x_t)).clamp(min=0)),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),  # without an address
)
@pytest.mark.parametrize("channels_last", [False, True])
@each_backend
def test_every_loss_and_alpha_by_class(loss, elementwise, channels_last, backend):
    if backend == "native" and isinstance(loss, HingeLoss):
        pytest.skip("kernels do not know the hinge loss")
    logits, targets = random_logits(channels_last=channels_last), random_targets()
    out = dense_classification_loss(logits, targets, loss, K, backend=backend)
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, loss.alpha, None, elementwise)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    for x, expected in zip(logits, grads):
        torch.testing.assert_close(x.grad.double(), expected, rtol=4e-6, atol=1e-30)


@pytest.mark.parametrize("loss", [FocalLoss(), CrossEntropy(ALPHA_PER_CLASS)], ids=repr)
def test_anchor_losses_add_up_to_the_dense_loss(loss):
    logits, targets = random_logits(), random_targets()
    losses_NR = anchor_losses(logits, targets, loss, K)
    assert losses_NR.shape == (N, R) and not losses_NR.requires_grad
    ignored = losses_NR == -torch.inf
    assert ignored.sum() == 11 and ignored[targets.ignored_image, targets.ignored_anchor].all()
    total = dense_classification_loss(logits, targets, loss, K).total.detach()
    torch.testing.assert_close(losses_NR.masked_fill(ignored, 0).sum(dim=1), total)


@pytest.mark.parametrize(
    "dtype, backend",
    [
        (torch.float16, "eager"),
        (torch.bfloat16, "eager"),
        pytest.param(torch.bfloat16, "native", marks=needs_compiler),
    ],
)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_16_bit_logits_lose_only_their_own_rounding(dtype, gamma, backend):
    logits, targets = random_logits(dtype), random_targets()
    out = dense_classification_loss(logits, targets, FocalLoss(0.25, gamma), K, backend=backend)
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, 0.25, gamma)
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    half_ulp = torch.finfo(dtype).eps / 2
    smallest = 6e-8 if dtype == torch.float16 else 1e-30  # float16's denormals
    for x, expected in zip(logits, grads):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), expected, rtol=1.01 * half_ulp, atol=smallest)


def test_float16_gradients_survive_a_loss_scale():
    """A GradScaler lifts small gradients into the range of float16; they must not be 0 before."""
    x = torch.tensor([-4.0, -5.0, -6.0], dtype=torch.float16).view(1, 3, 1, 1).requires_grad_()
    targets = background(1)
    scale = 2.0**17  # more than float16 can hold
    (dense_classification_loss([x], targets, FocalLoss(), 3).total.sum() / 100 * scale).backward()
    leaf = x.detach().double().requires_grad_()
    (0.75 * focal(-leaf, 2.0).sum() / 100 * scale).backward()
    assert leaf.grad.min() > 1e-5
    torch.testing.assert_close(x.grad.double(), leaf.grad, rtol=1e-3, atol=6e-8)


def test_float64_is_computed_in_float64():
    logits, targets = random_logits(torch.float64), random_targets()
    out = dense_classification_loss(logits, targets, FocalLoss(), K)
    assert out.total.dtype == torch.float64
    sums, _ = textbook(logits, targets, 0.25, 2.0)
    torch.testing.assert_close(out.total, sums, rtol=1e-13, atol=0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 1, 0)])
def test_memory_order_changes_nothing(order):
    """``order``: the dimensions from the slowest in memory to the fastest; NCHW and NHWC first."""
    back = [order.index(i) for i in range(4)]
    logits = [x.detach().permute(order).contiguous().permute(back) for x in random_logits()]
    logits, targets = [x.requires_grad_() for x in logits], random_targets()
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend="eager")
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, 0.25, 2.0)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    for x, expected in zip(logits, grads):
        assert x.grad.stride() == x.stride()
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "A, K, H, W",
    [
        (3, 5, 1, 1),
        (1, 1, 4, 6),
        (1, 1, 1, 1),
        (3, 1, 4, 6),
        (1, 5, 4, 6),
        (2, 5, 1, 6),
        (2, 5, 6, 1),
    ],
)
@each_backend
def test_labels_are_in_memory_like_logits_of_one_position_or_one_channel(
    A, K, H, W, layout, backend
):
    """Such logits are both contiguous and channels_last, or nearly so."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, A * K, H, W, generator=generator).contiguous(memory_format=layout)
    logits = [x.requires_grad_()]
    targets = targets_of(torch.randint(IGNORED, K, (2, H * W * A), generator=generator))
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend)
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, 0.25, 2.0, num_classes=K)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), grads[0], rtol=1e-6, atol=1e-30)


@each_backend
def test_logits_may_be_a_slice_of_channels(backend):
    """A head may predict classes and boxes with one convolution: its logits are a view."""
    for layout in (torch.contiguous_format, torch.channels_last):
        wide = torch.randn(N, A * K + 3, 7, 9).contiguous(memory_format=layout).requires_grad_()
        targets = random_targets()
        targets.label_NR = targets.label_NR[:, : 7 * 9 * A]
        targets.gt_NR = targets.gt_NR[:, : 7 * 9 * A]
        name = "auto" if backend == "native" else backend  # the kernel refuses, "auto" does not
        logits = [wide[:, : A * K]]
        total = dense_classification_loss(logits, targets, FocalLoss(), K, backend=name).total
        total.sum().backward()
        sums, grads = textbook(logits, targets, 0.25, 2.0)
        torch.testing.assert_close(total.detach().double(), sums, rtol=1e-6, atol=0)
        torch.testing.assert_close(wide.grad[:, : A * K].double(), grads[0], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 1, 10, 6).transpose(1, 2),
        torch.randn(2, 1, 10, 6).permute(0, 2, 3, 1),
        torch.randn(2, 10, 1, 6).transpose(2, 3),
    ],
    ids=lambda x: str(x.stride()),
)
@each_backend
def test_the_stride_of_a_single_row_or_column_does_not_matter(x, backend):
    """PyTorch calls these contiguous whatever that stride is, so ``contiguous`` does not copy."""
    results = []
    for logits in (x.clone(), x.clone(memory_format=torch.contiguous_format)):
        assert logits.is_contiguous()
        logits.requires_grad_()
        total = dense_classification_loss(
            [logits], targets_of(torch.full((2, 12), BACKGROUND)), FocalLoss(), 5, backend=backend
        ).total
        total.sum().backward()
        results.append((total.detach(), logits.grad))
    assert x.clone().stride() != results[1][1].stride()
    torch.testing.assert_close(*results)


@each_backend
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_many_classes_keep_their_digits(backend, ignored, channels_last):
    """LVIS has 1203 classes: 1203 equal terms are added for each anchor."""
    x = torch.full((1, 1203, 8, 8), -4.595)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    targets = background(64)
    targets.label_NR[0, :ignored] = IGNORED
    total = dense_classification_loss([x], targets, FocalLoss(), 1203, backend=backend).total
    leaf = torch.tensor(-4.595).double()
    exact = 0.75 * (64 - ignored) * 1203 * torch.sigmoid(leaf) ** 2 * F.softplus(leaf)
    assert abs(total.item() / exact.item() - 1) <= 1e-6


@each_backend
def test_gradient_is_scaled_by_image(backend):
    logits, targets = random_logits(), random_targets()
    weight = torch.tensor([0.5, 2.0, 0.0])
    total = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend).total
    (total * weight).sum().backward()
    _, grads = textbook(logits, targets, 0.25, 2.0)
    for x, expected in zip(logits, grads):
        expected = expected * weight.view(-1, 1, 1, 1)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-30)


@each_backend
def test_parts_add_up_and_empty_images_have_no_foreground(backend):
    logits, targets = random_logits(), random_targets()
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend)
    torch.testing.assert_close(out.foreground + out.background, out.total.detach())
    assert out.foreground[2] == 0 and (out.foreground[:2] > 0).all()
    assert not out.foreground.requires_grad and not out.background.requires_grad


@each_backend
def test_everything_ignored_is_exactly_zero(backend):
    logits = random_logits()
    targets = targets_of(torch.full((N, R), IGNORED))
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend)
    out.total.sum().backward()
    assert torch.equal(out.total.detach(), torch.zeros(N))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in logits)


@each_backend
def test_one_class_and_no_targets(backend):
    x = torch.zeros(1, 1, 1, 1, requires_grad=True)
    targets = background(1)
    total = dense_classification_loss([x], targets, CrossEntropy(), 1, backend=backend).total
    total.sum().backward()
    torch.testing.assert_close(total.item(), 0.6931471805599453)
    assert x.grad.item() == 0.5


@each_backend
def test_without_grad_the_value_is_the_same(backend):
    logits, targets = random_logits(), random_targets()
    with_grad = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend).total
    with torch.no_grad():
        without = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend).total
    assert not without.requires_grad
    torch.testing.assert_close(without, with_grad.detach(), rtol=1e-7, atol=0)


@each_backend
def test_second_backward_raises(backend):
    logits, targets = random_logits(), random_targets()
    total = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend).total.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        total.backward()


@each_backend
def test_logits_are_not_modified(backend):
    logits, targets = random_logits(), random_targets()
    before = [x.detach().clone() for x in logits]
    dense_classification_loss(
        logits, targets, FocalLoss(), K, backend=backend
    ).total.sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(logits, before))


def test_user_loss_needs_only_a_value():
    class OwnFocal(ClassificationLoss):
        def value(self, x_t):
            return torch.sigmoid(-x_t) ** 2 * F.softplus(-x_t)

    logits, targets = random_logits(), random_targets()
    out = dense_classification_loss(logits, targets, OwnFocal(alpha=0.25), K)
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, 0.25, 2.0)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    for x, expected in zip(logits, grads):
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "grad, in_place, times", [(True, False, 1.0), (True, True, 0.0), (False, False, 0.0)]
)
@each_backend
def test_extra_memory_is_one_gradient_or_none(grad, in_place, times, backend):
    """The peak of allocated memory is the gradient and a few small temporaries."""
    small = 0.2  # eager's temporaries, relative to these logits
    x = torch.randn(1, 9 * 80, 128, 128).requires_grad_()
    targets = background(9 * 128 * 128)
    logits = [x * 1]
    with torch.profiler.profile(profile_memory=True) as profile, torch.set_grad_enabled(grad):
        dense_classification_loss(
            logits, targets, FocalLoss(), 80, backend=backend, in_place=in_place
        )
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    size = logits[0].untyped_storage().nbytes()
    assert times * size <= peak <= (times + small) * size


@each_backend
def test_gradient_is_right_if_another_one_was_expected(backend):
    """``expected_grad_N`` is only a hint: another gradient in ``backward`` gives a right result."""
    targets = random_targets()
    expected_N, other_N = torch.tensor([0.5, 0.25, 3.0]), torch.tensor([0.5, 2.0, 0.0])
    for grad_N in (expected_N, other_N):
        logits = random_logits()
        out = dense_classification_loss(
            logits, targets, FocalLoss(), K, backend=backend, expected_grad_N=expected_N
        )
        (out.total * grad_N).sum().backward()
        sums, grads = textbook(logits, targets, 0.25, 2.0)
        torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
        for x, expected in zip(logits, grads):
            expected = expected * grad_N.view(-1, 1, 1, 1)
            torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_backend
def test_in_place_gives_the_same_gradient(channels_last, dtype, backend):
    """And the same sums."""
    targets, results = random_targets(), []
    for in_place in (False, True):
        leaves = random_logits(dtype, channels_last=channels_last)
        out = dense_classification_loss(
            [x * 1 for x in leaves], targets, FocalLoss(), K, backend=backend, in_place=in_place
        )
        out.total.sum().backward()
        results.append([out.total.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results))


@each_backend
def test_overwritten_logits_raise_in_other_operations(backend):
    """An operation that saved the logits gets autograd's error, not a wrong gradient."""
    leaves, targets = random_logits(), random_targets()
    logits = [x * 1 for x in leaves]
    other = logits[0].square().sum()
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.total.sum() + other).backward()


def test_in_place_refuses_leaves_and_float16():
    """Leaves would be lost, and float16 underflows before the gradient is scaled."""
    targets = random_targets()
    with pytest.raises(ValueError, match="leaves"):
        dense_classification_loss(random_logits(), targets, FocalLoss(), K, in_place=True)
    half = [x * 1 for x in random_logits(torch.float16)]
    with pytest.raises(ConfigError, match=r"SOLVER\.AMP\.PRECISION bfloat16"):
        dense_classification_loss(half, targets, FocalLoss(), K, in_place=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("wrong", [-3, K, 32767])
@each_backend
def test_unknown_class_raises(channels_last, wrong, backend):
    """A kernel would write out of bounds."""
    logits, targets = random_logits(channels_last=channels_last), random_targets()
    targets.label_NR[1, 3] = wrong
    with pytest.raises(ValueError, match=r"neither in \[0, 5\), MODEL.RETINANET.NUM_CLASSES"):
        dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend)


def test_targets_of_other_anchors_raise():
    with pytest.raises(ValueError, match=f"logits of {R} anchors, but targets of 7"):
        dense_classification_loss(
            random_logits(), targets_of(torch.full((N, 7), BACKGROUND)), FocalLoss(), K
        )


@each_backend
def test_16_bit_gradients_are_not_scaled_by_a_rounded_factor(backend):
    """bfloat16 rounds 1/3 by .2 %, and all gradients would be wrong by as much."""
    torch.manual_seed(0)
    x = (torch.randn(1, 8, 50, 50) - 2).bfloat16().requires_grad_()
    targets = background(50 * 50)
    total = dense_classification_loss([x], targets, FocalLoss(), 8, backend=backend).total
    (total / 3).sum().backward()
    leaf = x.detach().double().requires_grad_()
    (0.75 * focal(-leaf, 2.0).sum() / 3).backward()
    assert abs(x.grad.double().sum() / leaf.grad.sum() - 1) < 3e-4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "loss",
    [CrossEntropy(), FocalLoss(), FocalLoss(0.25, 0.2), FocalLossStar(0.25, 0.3, 1.0)],
    ids=repr,
)
@each_backend
def test_logits_that_are_not_finite(loss, channels_last, backend):
    """Background of -inf has no loss, an ignored logit does not count, any other NaN gives NaN."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.full((1, A * K, 3, 5), -3.0)
    x[0, 0, 0] = torch.tensor([-torch.inf, -1e15, -3e38, -1e5, -2000.0])
    x[0, A * K - 1, 2, 4] = torch.nan  # of the last anchor
    x = x.contiguous(memory_format=layout).requires_grad_()
    targets = background(3 * 5 * A)
    targets.label_NR[0, -1] = IGNORED
    out = dense_classification_loss([x], targets, loss, K, backend=backend)
    out.total.sum().backward()
    counted = A * K * 15 - 5 - K  # the five logits, the ignored anchor's K
    one = loss.negative_weight * loss.value(torch.tensor(3.0))
    torch.testing.assert_close(out.total.item(), (counted * one).item(), rtol=1e-6, atol=0)
    assert x.grad.isfinite().all() and (x.grad[0, 0, 0].abs() < 1e-30).all()

    targets = background(3 * 5 * A)
    assert dense_classification_loss([x], targets, loss, K, backend=backend).total.isnan()


@each_backend
def test_large_sums_keep_their_digits(backend):
    """Relative error of a sum of 3 million terms and of each gradient, |x| up to 25."""
    torch.manual_seed(0)
    x = (torch.randn(1, 9 * 80, 64, 64) * 4 - 4).requires_grad_()
    targets = background(9 * 64 * 64)
    out = dense_classification_loss([x], targets, FocalLoss(), 80, backend=backend)
    out.total.sum().backward()
    leaf = x.detach().double().requires_grad_()
    exact = 0.75 * (torch.sigmoid(leaf) ** 2 * F.softplus(leaf)).sum()
    exact.backward()
    assert abs(out.total.item() / exact.item() - 1) <= 1e-7
    assert ((x.grad.double() - leaf.grad).abs() / leaf.grad).max() <= 1e-6


@pytest.mark.parametrize("shape", [(N, A * K + 1, 2, 2), (N + 1, A * K, 2, 2), (N, A * K, 4)])
def test_logits_of_another_shape_raise(shape):
    with pytest.raises(ValueError, match=r"not \(N, A\*K, H, W\)"):
        dense_classification_loss([torch.zeros(shape)], random_targets(0, 0), FocalLoss(), K)
