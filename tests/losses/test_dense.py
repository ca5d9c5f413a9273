"""The loss engine against float64 autograd over one-hot targets."""

import pytest
import torch
import torch.nn.functional as F

from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    ClassificationLoss,
    CrossEntropy,
    DenseTargets,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    anchor_losses,
    check_backend,
    dense,
    dense_classification_loss,
    sampled_classification_loss,
)
from retina_plugin.losses.backends import eager, native
from retina_plugin.losses.backends import triton as triton_kernels
from retina_plugin.losses.targets import BACKGROUND, IGNORED
from retina_plugin.modeling.shapes import gather_anchors

N, A, K = 3, 2, 5
LEVELS = [(7, 9), (4, 5), (1, 2)]
R = sum(h * w * A for h, w in LEVELS)
GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]

# "triton" has a file of its own: it needs CUDA, or an interpreter
needs_compiler = pytest.mark.skipif(
    native.unavailable() is not None, reason=f"no native kernel: {native.unavailable()}"
)
BACKENDS = ["eager", pytest.param("native", marks=needs_compiler)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def random_logits(dtype=torch.float32, spread=4.0, channels_last=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.randn(N, A * K, h, w, generator=generator) * spread - 2 for h, w in LEVELS]
    if channels_last:
        levels = [x.contiguous(memory_format=torch.channels_last) for x in levels]
    return [x.to(dtype).requires_grad_() for x in levels]


def random_targets(num_positive=14, num_ignored=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    # image 2 has neither: it is background only
    chosen = torch.randperm(2 * R, generator=generator)[: num_positive + num_ignored]
    positive, ignored = chosen[:num_positive], chosen[num_positive:]
    label_NR = torch.full((N, R), BACKGROUND)
    label_NR.view(-1)[positive] = torch.randint(K, (num_positive,), generator=generator)
    label_NR.view(-1)[ignored] = IGNORED
    return targets_of(label_NR)


def targets_of(label_NR):
    """Targets of a classification loss: boxes do not matter."""
    return DenseTargets(label_NR.short(), torch.zeros_like(label_NR).long(), torch.zeros(1, 4))


def background(num_anchors):
    return targets_of(torch.full((1, num_anchors), BACKGROUND))


def focal(x_t, gamma):
    return -(torch.sigmoid(-x_t) ** gamma) * F.logsigmoid(x_t)


def textbook(logits, targets, alpha, gamma, elementwise=None):
    """Permuted, concatenated, one-hot, in float64: sums (N,) of Eq. 5 and their gradients."""
    leaves = [x.detach().double().requires_grad_() for x in logits]
    flat = torch.cat(
        [x.view(N, A, K, *x.shape[2:]).permute(0, 3, 4, 1, 2).reshape(N, -1, K) for x in leaves], 1
    )
    onehot = torch.zeros_like(flat)
    onehot[targets.positive_image, targets.positive_anchor, targets.positive_class] = 1
    counted = torch.ones(N, R, 1, dtype=torch.float64)
    counted[targets.ignored_image, targets.ignored_anchor] = 0
    x_t = torch.where(onehot == 1, flat, -flat)
    loss = (elementwise or (lambda x_t: focal(x_t, gamma)))(x_t) * counted
    if alpha is not None:
        alpha = torch.as_tensor(alpha, dtype=torch.float64)  # one, or (K,)
        loss = loss * torch.where(onehot == 1, alpha, 1 - alpha)
    sums = loss.sum(dim=(1, 2))
    grads = torch.autograd.grad(sums.sum(), leaves)
    return sums.detach(), grads


@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("spread", [4.0, 40.0])  # the latter reaches |x| = 100
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


PER_CLASS = (0.1, 0.9, 0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    "loss, elementwise",
    [
        (FocalLoss(PER_CLASS), lambda x_t: focal(x_t, 2.0)),
        (CrossEntropy(PER_CLASS), lambda x_t: focal(x_t, 0.0)),
        (FocalLossStar(0.25, 2.0, 1.0), lambda x_t: -F.logsigmoid(2 * x_t + 1) / 2),
        (FocalLossStar(0.25, 4.0, 0.0), lambda x_t: -F.logsigmoid(4 * x_t) / 4),
        (HingeLoss(None, 0.9), lambda x_t: (0.9 - torch.sigmoid(x_t)).clamp(min=0)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("channels_last", [False, True])
@each_backend
def test_every_loss_and_alpha_by_class(loss, elementwise, channels_last, backend):
    if backend == "native" and isinstance(loss, HingeLoss):
        pytest.skip("the kernels leave the hinge to eager")
    logits, targets = random_logits(channels_last=channels_last), random_targets()
    out = dense_classification_loss(logits, targets, loss, K, backend=backend)
    out.total.sum().backward()
    sums, grads = textbook(logits, targets, loss.alpha, None, elementwise)
    torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
    for x, expected in zip(logits, grads):
        torch.testing.assert_close(x.grad.double(), expected, rtol=4e-6, atol=1e-30)


@pytest.mark.parametrize("loss", [FocalLoss(), CrossEntropy(PER_CLASS)], ids=repr)
def test_anchor_losses_add_up_to_the_dense_loss(loss):
    logits, targets = random_logits(), random_targets()
    losses_NR = anchor_losses(logits, targets, loss, K)
    assert losses_NR.shape == (N, R) and not losses_NR.requires_grad
    ignored = losses_NR == -torch.inf
    assert ignored.sum() == 11 and ignored[targets.ignored_image, targets.ignored_anchor].all()
    total = dense_classification_loss(logits, targets, loss, K).total.detach()
    torch.testing.assert_close(losses_NR.masked_fill(ignored, 0).sum(dim=1), total)


@pytest.mark.parametrize("loss", [FocalLoss(), CrossEntropy(PER_CLASS), HingeLoss()], ids=repr)
def test_sampled_loss_of_all_anchors_is_the_dense_loss(loss):
    """In another order, with everything that is not ignored chosen; value, parts and gradient."""
    logits, targets = random_logits(), random_targets()
    dense_out = dense_classification_loss(logits, targets, loss, K)
    dense_out.total.sum().backward()
    expected = [x.grad for x in logits]

    image, anchor = torch.where(anchor_losses(logits, targets, loss, K) > -torch.inf)
    shuffled = torch.randperm(len(image))
    image, anchor = image[shuffled], anchor[shuffled]
    again = [x.detach().requires_grad_() for x in logits]
    rows = gather_anchors(again, image, anchor, K)
    out = sampled_classification_loss(rows, image, anchor, targets, loss)
    out.total.sum().backward()
    for ours, theirs in zip(out, dense_out):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for x, grad in zip(again, expected):
        torch.testing.assert_close(x.grad, grad, rtol=1e-6, atol=1e-30)


def test_sampled_loss_of_nothing_is_exactly_zero_with_a_graph():
    none = torch.zeros(0, dtype=torch.int64)
    rows = torch.zeros(0, K, requires_grad=True)
    out = sampled_classification_loss(rows, none, none, random_targets(), FocalLoss())
    out.total.sum().backward()
    assert torch.equal(out.total.detach(), torch.zeros(N)) and rows.grad.shape == (0, K)


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
    """GradScaler's factor comes in backward: what it lifts into float16's range must be there."""
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


@pytest.mark.parametrize("piece", [1, 7, 40, 1000, 1 << 17])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 1, 0)])
def test_pieces_and_memory_layout_change_nothing(monkeypatch, piece, order):
    """``order``: of the dimensions in memory, contiguous and channels_last first."""
    monkeypatch.setattr(eager, "_PIECE", piece)
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
    """To PyTorch these are contiguous, whatever that stride is: ``contiguous`` copies nothing."""
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


@needs_compiler
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00001, 0x7FC00000, -1])
@pytest.mark.parametrize("loss", [FocalLoss(), CrossEntropy(), FocalLossStar()], ids=repr)
def test_native_gives_every_nan_a_nan(bits, loss):
    """CUDA's own has other bits than the CPU's."""
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32).expand(40).clone()
    x = x.view(1, 1, 5, 8).requires_grad_()
    total = dense_classification_loss([x], background(40), loss, 1, backend="native").total
    total.sum().backward()
    assert total.isnan() and x.grad.isnan().all()


@each_backend
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_many_classes_keep_their_digits(backend, ignored, channels_last):
    """LVIS has 1203 classes: as many equal terms are added for each anchor."""
    x = torch.full((1, 1203, 8, 8), -4.595)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    targets = background(64)
    targets.label_NR[0, :ignored] = IGNORED
    total = dense_classification_loss([x], targets, FocalLoss(), 1203, backend=backend).total
    leaf = torch.tensor(-4.595).double()
    exact = 0.75 * (64 - ignored) * 1203 * torch.sigmoid(leaf) ** 2 * F.softplus(leaf)
    assert abs(total.item() / exact.item() - 1) <= 1e-6


@pytest.mark.parametrize(
    "loss, elementwise",
    [
        *((FocalLoss(0.25, gamma), lambda x_t, g=gamma: focal(x_t, g)) for gamma in GAMMAS),
        (CrossEntropy(), lambda x_t: focal(x_t, 0.0)),
        (FocalLossStar(0.25, 2.0, 1.0), lambda x_t: -F.logsigmoid(2 * x_t + 1) / 2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eager_takes_its_short_way_while_the_background_is_low(
    monkeypatch, loss, elementwise, dtype
):
    """Positives and ignored anchors may be high; one high logit of the background ends it."""
    took_it = []
    short_way = eager._low_background
    monkeypatch.setattr(
        eager, "_low_background", lambda *args: took_it.append(short_way(*args)) or took_it[-1]
    )
    targets = random_targets()
    logits = [x.detach().clamp(max=1.49).requires_grad_() for x in random_logits(dtype)]
    h, w = LEVELS[0]
    view = logits[0].detach().view(N, A, K, h * w)
    for image, anchor, k in zip(
        targets.positive_image, targets.positive_anchor, targets.positive_class
    ):
        if anchor < h * w * A:
            view[image, anchor % A, k, anchor // A] = 9.0
    for image, anchor in zip(targets.ignored_image, targets.ignored_anchor):
        if anchor < h * w * A:
            view[image, anchor % A, :, anchor // A] = 9.0

    def check(way):
        took_it.clear()
        out = dense_classification_loss(logits, targets, loss, K, backend="eager")
        sums, grads = textbook(logits, targets, loss.alpha, None, elementwise)
        rtol = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(out.total.double(), sums, rtol=rtol, atol=0)
        # FL*'s gamma x - beta is rounded before its exponential
        grad_rtol = rtol * (4 if isinstance(loss, FocalLossStar) else 1)
        for x, expected in zip(torch.autograd.grad(out.total.sum(), logits), grads):
            torch.testing.assert_close(x.double(), expected, rtol=grad_rtol, atol=1e-30)
        with torch.no_grad():
            value = dense_classification_loss(logits, targets, loss, K, backend="eager").total
        torch.testing.assert_close(value, out.total.detach(), rtol=rtol, atol=0)
        assert way(x is not None for x in took_it)

    check(all)
    view[N - 1, 0, 0, 0] = 9.0  # of the image that is background only
    check(lambda taken: not all(taken))


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
def test_without_grad_the_value_is_the_same_and_no_gradient_is_made(monkeypatch, backend):
    logits, targets = random_logits(), random_targets()
    with_grad = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend).total
    monkeypatch.setattr(dense, "_gradient_of", None)  # what allocates it
    with torch.no_grad():
        without = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend).total
    assert not without.requires_grad
    torch.testing.assert_close(without, with_grad.detach(), rtol=1e-7, atol=0)


@each_backend
def test_second_backward_says_why_not(backend):
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


def test_loss_with_a_value_only_gets_the_engine_for_nothing():
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


@pytest.mark.parametrize("in_place, times", [(False, 1.0), (True, 0.0)])
@each_backend
def test_extra_memory_is_one_gradient_or_none(in_place, times, backend):
    """What is allocated at a time never exceeds the gradient and a few small temporaries."""
    small = 0.2  # an eager piece's temporaries, beside these logits
    x = torch.randn(1, 9 * 80, 128, 128).requires_grad_()
    targets = background(9 * 128 * 128)
    logits = [x * 1]
    with torch.profiler.profile(profile_memory=True) as profile:
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
def test_gradient_is_right_whatever_was_expected(backend):
    """The factor that the forward pass applies is corrected by the one that comes."""
    targets = random_targets()
    expected_N, came_N = torch.tensor([0.5, 0.25, 3.0]), torch.tensor([0.5, 2.0, 0.0])
    for coming_N in (expected_N, came_N):
        logits = random_logits()
        out = dense_classification_loss(
            logits, targets, FocalLoss(), K, backend=backend, expected_grad_N=expected_N
        )
        (out.total * coming_N).sum().backward()
        sums, grads = textbook(logits, targets, 0.25, 2.0)
        torch.testing.assert_close(out.total.double(), sums, rtol=1e-6, atol=0)
        for x, expected in zip(logits, grads):
            expected = expected * coming_N.view(-1, 1, 1, 1)
            torch.testing.assert_close(x.grad.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_backend
def test_in_place_gives_the_same_gradient(channels_last, dtype, backend):
    """And the same sums, with logits that the network computed."""
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
def test_logits_that_were_overwritten_are_not_used(backend):
    """Another gradient that needs them is autograd's error, not a wrong number."""
    leaves, targets = random_logits(), random_targets()
    logits = [x * 1 for x in leaves]
    other = logits[0].square().sum()
    out = dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.total.sum() + other).backward()


def test_what_cannot_be_done_in_place():
    """Leaves would be lost, and float16 has no room for a gradient before it is scaled."""
    targets = random_targets()
    with pytest.raises(ValueError, match="leaves"):
        dense_classification_loss(random_logits(), targets, FocalLoss(), K, in_place=True)
    half = [x * 1 for x in random_logits(torch.float16)]
    with pytest.raises(ConfigError, match=r"SOLVER\.AMP\.PRECISION bfloat16"):
        dense_classification_loss(half, targets, FocalLoss(), K, in_place=True)


def test_backends_that_do_not_exist_or_cannot(monkeypatch):
    """One line each, with what is known or what to set."""
    monkeypatch.setattr(triton_kernels, "unavailable", lambda: "no device")
    forget_kernels()
    logits, targets = random_logits(torch.float64), random_targets()
    with pytest.raises(ConfigError, match="no 'cuda'; known: auto, eager, native, triton"):
        check_backend("cuda")
    with pytest.raises(ConfigError, match="LOSS_BACKEND triton is not available: .*set it to auto"):
        dense_classification_loss(logits, targets, FocalLoss(), K, backend="triton")
    check_backend("triton", here=False)  # elsewhere it may be
    forget_kernels()


@needs_compiler
def test_native_says_what_it_cannot_do():
    """float64 logits, and a loss that is not one of the three."""
    targets = random_targets()
    with pytest.raises(ConfigError, match="native cannot do .* of torch.float64 logits on cpu"):
        dense_classification_loss(
            random_logits(torch.float64), targets, FocalLoss(), K, backend="native"
        )
    with pytest.raises(ConfigError, match="native cannot do HingeLoss"):
        dense_classification_loss(random_logits(), targets, HingeLoss(), K, backend="native")


def forget_kernels():
    dense._missing.cache_clear()
    dense._obstacle.cache_clear()


@needs_compiler
@pytest.mark.parametrize("what", ["sums", "gradient", "crash"])
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, what):
    """A compiler's or driver's mistake is found before the first training step."""
    right = native.dense_sums

    def wrong(x, grad, *rest):
        if what == "crash":
            raise OSError("no kernel image\nfor this device")
        sums = right(x, grad, *rest)
        if what == "gradient":
            grad *= 1.001
        return sums * 1.001 if what == "sums" else sums

    monkeypatch.setattr(native, "dense_sums", wrong)
    forget_kernels()
    said = "it fails on this machine: no kernel" if what == "crash" else "is wrong on this"
    with pytest.raises(ConfigError, match=f"native is not available: .*{said}"):
        check_backend("native")
    logits, targets = random_logits(), random_targets()
    total = dense_classification_loss(logits, targets, FocalLoss(), K).total
    forget_kernels()
    torch.testing.assert_close(total.double(), textbook(logits, targets, 0.25, 2.0)[0])


def test_no_compiler_is_said_once_and_eager_does_it(monkeypatch, caplog):
    """Without a kernel "auto" gives the same numbers, and the log tells why it is slower."""
    reason = "no C++ compiler (c++ or g++ on PATH, or CXX)"
    monkeypatch.setattr(native, "unavailable", lambda: reason)
    monkeypatch.setattr(native, "dense_sums", None)
    forget_kernels()
    logits, targets = random_logits(), random_targets()
    for _ in range(2):
        total = dense_classification_loss(logits, targets, FocalLoss(), K).total
    forget_kernels()
    torch.testing.assert_close(total.double(), textbook(logits, targets, 0.25, 2.0)[0])
    assert [r.getMessage() for r in caplog.records] == [
        f"No native kernel for the loss, so it is slower: {reason}"
    ]


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("threads", [2, 7, 16])  # planes to share: 10
def test_native_does_not_depend_on_the_threads(set_threads, threads, channels_last):
    """The sums to their last digits, the gradient to the bit."""
    torch.manual_seed(0)
    targets = background(A * 400 * 300)
    x = torch.randn(1, A * K, 400, 300) - 2  # each thread wants 65,536 entries at least
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for number in (1, threads):
        set_threads(number)
        leaf = x.clone().requires_grad_()
        total = dense_classification_loss([leaf], targets, FocalLoss(), K, backend="native").total
        total.sum().backward()
        results.append((total.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-7, atol=0)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("wrong", [-3, K, 32767])
@each_backend
def test_a_class_that_does_not_exist_is_refused(channels_last, wrong, backend):
    """Before anything is written where another class is, or nothing."""
    logits, targets = random_logits(channels_last=channels_last), random_targets()
    targets.label_NR[1, 3] = wrong
    with pytest.raises(ValueError, match=r"neither in \[0, 5\), MODEL.RETINANET.NUM_CLASSES"):
        dense_classification_loss(logits, targets, FocalLoss(), K, backend=backend)


def test_targets_of_other_anchors_are_refused():
    with pytest.raises(ValueError, match=f"logits of {R} anchors, but targets of 7"):
        dense_classification_loss(
            random_logits(), targets_of(torch.full((N, 7), BACKGROUND)), FocalLoss(), K
        )


@each_backend
def test_16_bit_gradients_are_not_scaled_by_a_rounded_factor(backend):
    """1/3 in bfloat16 is .2 % off, and so would the sum of the gradients be."""
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
    """Minus infinity is background without loss, an ignored logit counts nothing, NaN is seen."""
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
    """Relative error of the sum of 3 million terms and of each gradient, with |x| up to 25."""
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
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"not \(N, A\*K, H, W\)"):
        dense_classification_loss([torch.zeros(shape)], random_targets(0, 0), FocalLoss(), K)
