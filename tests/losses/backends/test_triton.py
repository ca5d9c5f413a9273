"""The Triton kernels: run by Triton's interpreter on the CPU, and compiled for CUDA."""

import functools
import importlib.util
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from retina_plugin.losses import (
    CrossEntropy,
    DenseTargets,
    FocalLoss,
    FocalLossStar,
    HingeLoss,
    dense_classification_loss,
)
from retina_plugin.losses.backends import triton as backend
from retina_plugin.losses.backends.interface import AlphaWeights
from retina_plugin.losses.targets import BACKGROUND, IGNORED

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]  # Table 1b
STARS = [FocalLossStar(None, g, b) for g, b in [(2.0, 1.0), (4.0, 0.0), (0.5, -2.0), (3.0, 1.5)]]
LOSSES = [CrossEntropy(), *(FocalLoss(None, g) for g in GAMMAS), *STARS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def fma_is_fused():
    """Whether the interpreter rounds ``tl.fma`` once, like a GPU. That of Triton 3.8 does not."""

    @triton.jit
    def residual(x_ptr, out_ptr):
        x = tl.load(x_ptr)
        tl.store(out_ptr, tl.fma(x, x, -(x * x)))

    x, out = torch.tensor([1 + 2**-12]), torch.zeros(1)
    residual[(1,)](x, out)
    return out.item() == 2**-24  # the last bit of x * x, which a float32 does not hold


def gradient_rtol(dtype):
    if dtype == torch.bfloat16:
        return 2**-7  # the interpreter truncates to bfloat16, a GPU rounds
    # unfused, an exponent of up to 90 is rounded to 24 bits
    return 1e-6 if fma_is_fused() else 1e-5


def default_sum_rtol(fused=4e-7):
    return fused if fma_is_fused() else 2e-6


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function of this module in a process where Triton interprets kernels.

    Triton reads the environment variable when it is imported.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()


def level(A, K, H, W, channels_last=False, dtype=torch.float32, positives=0.2, spread=4.0, N=2):
    """The arguments of ``dense_sums`` without the loss; alpha by class."""
    generator = torch.Generator().manual_seed(A * K + H * W)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(N, A * K, H, W, generator=generator) * spread - 2
    x = x.to(dtype).contiguous(memory_format=layout)
    kinds = torch.rand(N, A, H, W, generator=generator)
    labels = torch.randint(K, kinds.shape, generator=generator)
    labels[kinds > positives] = BACKGROUND
    labels[kinds > 0.9] = IGNORED
    labels = labels.short().contiguous(memory_format=layout)
    alpha = AlphaWeights(torch.rand(2, K, generator=generator), None)
    scale = torch.linspace(0.5, 3, N)
    grad_dtype = torch.float32 if dtype == torch.float16 else dtype
    return x, torch.full_like(x, 7, dtype=grad_dtype), labels, channels_last, alpha, scale


def textbook(x, labels, loss, weights, scale):
    """One-hot, float64, autograd: sums (N, 2) and gradient."""
    x = x.detach().double().requires_grad_()
    K = weights.shape[1]
    z = x.unflatten(1, (-1, K))  # (N, A, K, H, W)
    labels = labels.unsqueeze(2)
    positive = labels == torch.arange(K, device=x.device).view(-1, 1, 1)
    x_t = torch.where(positive, z, -z)
    if isinstance(loss, FocalLossStar):
        value = -F.logsigmoid(loss.gamma * x_t + loss.beta) / loss.gamma
    else:
        value = -(torch.sigmoid(-x_t) ** getattr(loss, "gamma", 0.0)) * F.logsigmoid(x_t)
    w_neg, w_pos = weights.double().view(2, K, 1, 1)
    background = torch.where(positive | (labels == IGNORED), 0, value * w_neg).sum((1, 2, 3, 4))
    foreground = torch.where(positive, value * w_pos, 0).sum((1, 2, 3, 4))
    (grad,) = torch.autograd.grad(((background + foreground) * scale).sum(), x)
    return torch.stack([background, foreground], dim=1).detach(), grad


def check(case, loss, sum_rtol=None, grad_rtol=None):
    """Sums and gradient against the textbook; in place and without a gradient bit for bit."""
    x, grad, labels, channels_last, alpha, scale = case
    expected_sums, expected_grad = textbook(x, labels, loss, alpha.by_class_2K, scale)
    rest = labels, channels_last, loss, alpha, scale
    sums = backend.dense_sums(x, grad, *rest)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected_sums, rtol=sum_rtol or default_sum_rtol(), atol=0)
    rtol = grad_rtol or gradient_rtol(x.dtype)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-36)
    K = alpha.by_class_2K.shape[1]
    ignored = (labels == IGNORED).unsqueeze(2).expand(-1, -1, K, -1, -1)
    assert not grad.unflatten(1, (labels.shape[1], -1))[ignored].any()  # exactly 0

    assert torch.equal(backend.dense_sums(x, None, *rest), sums)
    again = torch.zeros_like(grad)
    assert torch.equal(backend.dense_sums(x, again, *rest), sums)
    assert torch.equal(again, grad)
    if x.dtype != torch.float16:
        assert torch.equal(backend.dense_sums(x, x, *rest), sums)
        assert torch.equal(x, grad)


def check_levels(shapes, channels_last, dtype, losses):
    for shape in shapes:
        for loss in losses:
            check(level(*shape, channels_last, dtype), loss)


RAGGED = [(3, 5, 7, 9), (2, 16, 4, 6), (1, 1, 13, 11)]  # sizes that no block divides
LARGE = (1, 35, 20, 30)  # several programs of several steps
TINY = [(1, 1, 1, 1), (2, 80, 1, 1), (3, 4, 1, 2), (1, 1, 2, 1), (2, 1, 1, 1)]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_several_programs(interpreted, channels_last):
    A, K, H, W = LARGE
    assert backend.plan(channels_last, A, K, H * W, 4).blocks > 1
    interpreted(check_levels, [LARGE], channels_last, torch.float32, [FocalLoss()])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_agrees_with_float64_autograd(interpreted, channels_last, dtype):
    """Alpha by class, both layouts, ragged sizes."""
    interpreted(check_levels, RAGGED, channels_last, dtype, [FocalLoss()])
    interpreted(check_levels, RAGGED[:1], channels_last, dtype, [FocalLossStar()])


@needs_triton
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiny_levels(interpreted, channels_last):
    """One position or one channel is in both memory orders."""
    interpreted(check_levels, TINY, channels_last, torch.float32, [FocalLoss()])


def check_labels():
    for channels_last in (False, True):
        for labels in (IGNORED, BACKGROUND, 4):
            case = level(2, 5, 4, 5, channels_last)
            case[2].fill_(labels)
            check(case, FocalLoss())


@needs_triton
def test_all_ignored_all_background_all_positive(interpreted):
    """A sum that should be 0 is exactly 0."""
    interpreted(check_labels)


def check_grid(loss):
    x = torch.cat([torch.linspace(-30, 30, 3001), torch.linspace(-100, 100, 1001)])
    labels = torch.tensor([BACKGROUND, 0], dtype=torch.int16).view(2, 1, 1, 1)
    labels = labels.expand(-1, 1, 1, len(x)).contiguous()
    x = x.expand(2, 1, 1, -1).contiguous()
    alpha = AlphaWeights(torch.ones(2, 1), None)
    check((x, x.clone(), labels, False, alpha, torch.ones(2)), loss)


@needs_triton
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_loss_up_to_a_logit_of_100(interpreted, loss):
    """Each derivative to 1e-6, of background and positive entries."""
    interpreted(check_grid, loss)


def check_long_sum(loss):
    case = level(2, 20, 40, 40, positives=0.05, spread=2.0, N=1)
    check(case, loss, sum_rtol=default_sum_rtol(1e-7))


@needs_triton
@pytest.mark.parametrize("loss", [CrossEntropy(), FocalLoss(), FocalLossStar()], ids=repr)
def test_sum_of_many_entries(interpreted, loss):
    interpreted(check_long_sum, loss)


def check_not_finite():
    for loss in (CrossEntropy(), FocalLoss(None, 2.0), FocalLoss(None, 0.5), FocalLossStar()):
        x, grad, labels, channels_last, alpha, scale = level(1, 2, 4, 4)
        labels.fill_(BACKGROUND)
        labels[0, 0, 0, 0] = IGNORED
        x[0, :, 0, 0] = torch.tensor([torch.nan, torch.inf])  # ignored
        x[0, 0, 1, 1] = -torch.inf
        rest = labels, channels_last, loss, alpha, scale
        sums = backend.dense_sums(x, grad, *rest)
        assert sums.isfinite().all() and grad.isfinite().all()
        assert not grad[0, :, 0, 0].any() and grad[0, 0, 1, 1] == 0
        x[1, 0, 2, 2] = torch.nan
        sums = backend.dense_sums(x, grad, *rest)
        assert sums[0].isfinite().all() and sums[1, 0].isnan() and grad[1, 0, 2, 2].isnan()


@needs_triton
def test_nan_gives_nan_unless_ignored(interpreted):
    """Background of -inf has no loss."""
    interpreted(check_not_finite)


def check_refusals():
    class Derived(FocalLoss):
        pass

    x, grad, labels, _, alpha, scale = case = level(3, 5, 7, 9)
    assert backend.unavailable() is None
    assert all(backend.supports(x.to(dtype), loss) for dtype in DTYPES for loss in LOSSES)
    assert not any(backend.supports(x, loss) for loss in (Derived(), HingeLoss()))
    assert not backend.supports(x.double(), FocalLoss())
    assert not backend.supports(x[..., 1:], FocalLoss())
    four_classes = AlphaWeights(alpha.by_class_2K[:, :4], None)
    nhwc = torch.channels_last
    for index, wrong, message in [
        (0, x[..., 1:], "logits must be contiguous or channels_last"),
        (0, x.contiguous(memory_format=nhwc), "logits must be in the memory layout"),
        (1, grad[:1], "grad must be"),
        (1, grad.contiguous(memory_format=nhwc), "grad must be in the memory layout"),
        (2, labels.long(), "labels must be"),
        (2, labels[:, :2].contiguous(), "labels must be"),
        (3, True, "must be in the memory layout"),
        (4, four_classes, "15 channels are not a multiple of 4 classes"),
        (5, scale.double(), "scale_N must be"),
    ]:
        args = [*case[:index], wrong, *case[index + 1 :]]
        with pytest.raises(ValueError, match=message):
            backend.dense_sums(*args[:4], FocalLoss(), *args[4:])


@needs_triton
def test_arguments_that_do_not_fit_raise(interpreted):
    interpreted(check_refusals)


def check_scale():
    ratio = torch.tensor([2.5, 1.0, -3.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for channels_last in (False, True):
            grad = level(2, 5, 47, 43, channels_last, N=3)[0].to(dtype)  # two programs an image
            if channels_last:
                assert grad.stride(1) == 1
            expected = grad * ratio.to(dtype).view(-1, 1, 1, 1)
            backend.scale_in_place(grad, ratio)
            torch.testing.assert_close(
                grad, expected, rtol=2**-7 if dtype == DTYPES[1] else 1e-6, atol=0
            )
    strided = torch.ones(3, 2, 4, 8)[..., ::2]
    backend.scale_in_place(strided, ratio)
    assert torch.equal(strided, ratio.view(-1, 1, 1, 1).expand(-1, 2, 4, 4))
    grad = torch.full((1, 2, 3, 3), torch.inf)
    backend.scale_in_place(grad, torch.ones(1))
    assert grad.isinf().all()


@needs_triton
def test_scale_in_place(interpreted):
    interpreted(check_scale)


def check_dense_loss():
    x = level(2, 5, 6, 4)[0]
    image, anchor = torch.arange(4) % 2, torch.arange(4) * 7
    label = torch.full((2, x[0].numel() // 5), BACKGROUND, dtype=torch.int16)
    label[image, anchor] = torch.arange(4).short()
    label[image, anchor + 3] = IGNORED
    targets = DenseTargets(label, torch.zeros_like(label).long(), torch.zeros(1, 4))
    found = {}
    for name in ("eager", "triton"):
        logits = x.clone().requires_grad_()
        out = dense_classification_loss([logits], targets, FocalLoss(), 5, backend=name)
        (out.total * torch.tensor([0.1, 0.7])).sum().backward()
        found[name] = [*out, logits.grad]
    for ours, eager in zip(found["triton"], found["eager"]):
        torch.testing.assert_close(ours, eager, rtol=2 * gradient_rtol(ours.dtype), atol=1e-9)


@needs_triton
def test_dense_loss_agrees_with_eager(interpreted):
    """Through the choice of the backend and its self-test."""
    interpreted(check_dense_loss)


@pytest.mark.slow
def test_without_triton_the_module_imports_and_says_why():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from retina_plugin.losses import FocalLoss
from retina_plugin.losses.backends import triton as backend
print(backend.unavailable(), backend.supports(torch.zeros(1, 1, 1, 1), FocalLoss()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.match("Triton cannot be imported: .* False$", result.stdout), result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_reason_is_given():
    """In this process, where Triton does not interpret."""
    assert "Triton" in backend.unavailable()
    assert not backend.supports(torch.zeros(1, 1, 1, 1), FocalLoss())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype, channels_last):
    """A GPU's exp2 and quotient are less exact than the interpreter's."""
    grad_rtol = 2**-8 if dtype == torch.bfloat16 else 2e-6
    for shape in [*RAGGED, *TINY, (9, 80, 25, 38)]:
        for loss in LOSSES:
            x, grad, labels, _, alpha, scale = level(*shape, channels_last, dtype)
            alpha = AlphaWeights(alpha.by_class_2K.cuda(), None)
            case = x.cuda(), grad.cuda(), labels.cuda(), channels_last, alpha, scale.cuda()
            check(case, loss, sum_rtol=1e-6, grad_rtol=grad_rtol)


def compiled(channels_last, pointer, capability):
    """FL of gamma 2 on a level of 50x84: a multiple of 8, not of the 16 that Triton looks for."""
    pytest.importorskip("triton")
    kernel, _, sizes = backend.plan(channels_last, 9, 80, 50 * 84, 2 if pointer == "*bf16" else 4)
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    kind, gamma, beta = FocalLoss().kernel_formula()
    values = {**sizes, "KIND": int(kind), "GAMMA": gamma, "BETA": beta, "WRITE": True}
    types = {"x_ptr": pointer, "grad_ptr": pointer, "label_ptr": "*i16"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", values[name]
            continue
        signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or values[name] % 16 == 0:  # as a launch would find out
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS},
    )


WARPS, ENTRIES_AT_A_TIME = 4, 2048  # of a program


@needs_triton
@pytest.mark.parametrize(
    "channels_last, pointer, capability",
    [(False, "*bf16", 80), (True, "*fp32", 80), (False, "*fp32", 90), (True, "*bf16", 90)],
)
def test_compiles_to_wide_loads_without_spills(
    channels_last, pointer, capability, tmp_path, monkeypatch
):
    """Loads and stores of 128 bits, and nothing in local memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled(channels_last, pointer, capability)
    ptx = code.asm["ptx"]
    wide = ENTRIES_AT_A_TIME * (2 if pointer == "*bf16" else 4) // (16 * 32 * WARPS)
    assert ptx.count("ld.global.v4.b32") >= wide
    assert ptx.count("st.global.v4.b32") == wide
    assert "ld.local" not in ptx and "st.local" not in ptx

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton comes without cuobjdump: registers are not known")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    assert registers <= 128  # four programs of a multiprocessor at least
    assert stack <= 16  # one or two values may be stored outside the loop
