"""The Triton kernels: run by Triton's interpreter on the CPU, and compiled for CUDA without one."""

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

from retina_plugin.losses import CrossEntropy, FocalLoss, FocalLossStar, HingeLoss, dense
from retina_plugin.losses.backends import triton as tk

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
GAMMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]  # Table 1b
STARS = [FocalLossStar(None, g, b) for g, b in [(2.0, 1.0), (4.0, 0.0), (0.5, -2.0), (3.0, 1.5)]]
LOSSES = [CrossEntropy(), *(FocalLoss(None, g) for g in GAMMAS), *STARS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts bfloat16 off where hardware rounds it, so an error may be a whole digit.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 1e-6}


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function of this module where Triton interprets: it decides so when imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()


def level(A, K, H, W, channels_last=False, dtype=torch.float32, positives=0.2, spread=4.0, N=2):
    """Logits, gradient to be filled, labels, weights and scales."""
    generator = torch.Generator().manual_seed(A * K + H * W)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(N, A * K, H, W, generator=generator) * spread - 2
    x = x.to(dtype).contiguous(memory_format=layout)
    kinds = torch.rand(N, A, H, W, generator=generator)
    labels = torch.randint(K, kinds.shape, generator=generator)
    labels[kinds > positives] = -1
    labels[kinds > 0.9] = -2
    labels = labels.short().contiguous(memory_format=layout)
    weights = torch.rand(2, K, generator=generator)
    scale = torch.linspace(0.5, 3, N)
    grad_dtype = torch.float32 if dtype == torch.float16 else dtype
    return x, torch.full_like(x, 7, dtype=grad_dtype), labels, weights, scale


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
    background = torch.where(positive | (labels == -2), 0, value * w_neg).sum((1, 2, 3, 4))
    foreground = torch.where(positive, value * w_pos, 0).sum((1, 2, 3, 4))
    (grad,) = torch.autograd.grad(((background + foreground) * scale).sum(), x)
    return torch.stack([background, foreground], dim=1).detach(), grad


def check(case, loss, sum_rtol=4e-7, grad_rtol=None, small_programs=False):
    """Sums and gradient against the textbook; in place and without a gradient bit for bit."""
    sizes = (256, 512) if small_programs else (2048, 16384)
    tk._TILE, tk._RUN = sizes  # small: several programs and steps, and a ragged end
    x, grad, labels, weights, scale = case
    expected_sums, expected_grad = textbook(x, labels, loss, weights, scale)
    sums = tk.dense_sums(x, grad, labels, loss, weights, scale)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected_sums, rtol=sum_rtol, atol=0)
    rtol = grad_rtol or RTOL[x.dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=1e-36)
    ignored = (labels == -2).unsqueeze(2).expand(-1, -1, weights.shape[1], -1, -1)
    assert not grad.unflatten(1, (labels.shape[1], -1))[ignored].any()  # exactly 0

    assert torch.equal(tk.dense_sums(x, None, labels, loss, weights, scale), sums)
    again = torch.zeros_like(grad)
    assert torch.equal(tk.dense_sums(x, again, labels, loss, weights, scale), sums)
    assert torch.equal(again, grad)
    if x.dtype != torch.float16:
        assert torch.equal(tk.dense_sums(x, x, labels, loss, weights, scale), sums)
        assert torch.equal(x, grad)


def check_levels(shapes, channels_last, dtype, losses, small_programs, **level_args):
    for shape in shapes:
        for loss in losses:
            case = level(*shape, channels_last, dtype, **level_args)
            check(case, loss, small_programs=small_programs)


RAGGED = [(3, 5, 7, 9), (2, 16, 4, 6), (1, 1, 13, 11)]
TINY = [(1, 1, 1, 1), (2, 80, 1, 1), (3, 4, 1, 2), (1, 1, 2, 1)]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_agrees_with_float64_autograd(interpreted, channels_last, dtype):
    """Alpha by class, both layouts, sizes that divide nothing, few programs and many."""
    interpreted(check_levels, RAGGED, channels_last, dtype, [FocalLoss()], True)
    interpreted(check_levels, RAGGED[:1], channels_last, dtype, [FocalLossStar()], False)


@needs_triton
@pytest.mark.parametrize("channels_last", [False, True])
def test_tiny_levels(interpreted, channels_last):
    interpreted(check_levels, TINY, channels_last, torch.float32, [FocalLoss()], False)


def check_labels():
    for channels_last in (False, True):
        for labels in (-2, -1, 4):
            case = level(2, 5, 4, 5, channels_last)
            case[2].fill_(labels)
            check(case, FocalLoss(), small_programs=True)


@needs_triton
def test_all_ignored_all_background_all_positive(interpreted):
    """Sums that are exactly 0 are compared with an absolute tolerance of 0."""
    interpreted(check_labels)


def check_grid(loss):
    x = torch.cat([torch.linspace(-30, 30, 3001), torch.linspace(-100, 100, 1001)])
    labels = torch.tensor([-1, 0], dtype=torch.int16).view(2, 1, 1, 1).expand(-1, 1, 1, len(x))
    x = x.expand(2, 1, 1, -1).contiguous()
    ones = torch.ones(2)
    check((x, x.clone(), labels.contiguous(), ones.view(2, 1), ones), loss)


@needs_triton
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_loss_up_to_a_logit_of_100(interpreted, loss):
    """1e-6 of each derivative, for background and for positives."""
    interpreted(check_grid, loss)


def check_long_sum(loss):
    case = level(2, 20, 40, 40, positives=0.05, spread=2.0, N=1)
    check(case, loss, sum_rtol=1e-7)


@needs_triton
@pytest.mark.parametrize("loss", [CrossEntropy(), FocalLoss(), FocalLossStar()], ids=repr)
def test_sum_of_many_entries(interpreted, loss):
    interpreted(check_long_sum, loss)


def check_not_finite():
    for loss in (CrossEntropy(), FocalLoss(None, 2.0), FocalLoss(None, 0.5), FocalLossStar()):
        x, grad, labels, weights, scale = level(1, 2, 4, 4)
        labels.fill_(-1)
        labels[0, 0, 0, 0] = -2
        x[0, :, 0, 0] = torch.tensor([torch.nan, torch.inf])  # ignored
        x[0, 0, 1, 1] = -torch.inf
        sums = tk.dense_sums(x, grad, labels, loss, weights, scale)
        assert sums.isfinite().all() and grad.isfinite().all()
        assert not grad[0, :, 0, 0].any() and grad[0, 0, 1, 1] == 0
        x[1, 0, 2, 2] = torch.nan
        sums = tk.dense_sums(x, grad, labels, loss, weights, scale)
        assert sums[0].isfinite().all() and sums[1, 0].isnan() and grad[1, 0, 2, 2].isnan()


@needs_triton
def test_nan_is_seen_unless_ignored(interpreted):
    """A logit of -inf is a background entry without loss."""
    interpreted(check_not_finite)


def check_refusals():
    class Mine(FocalLoss):
        pass

    x, grad, labels, weights, scale = case = level(3, 5, 7, 9)
    assert tk.unavailable() is None
    assert all(tk.supports(x.to(dtype), loss) for dtype in DTYPES for loss in LOSSES)
    assert not any(tk.supports(x, loss) for loss in (Mine(), HingeLoss()))
    assert not tk.supports(x.double(), FocalLoss()) and not tk.supports(x[..., 1:], FocalLoss())
    for index, wrong, message in [
        (0, x[..., 1:], "logits must be contiguous or channels_last"),
        (1, grad[:1], "grad must be"),
        (1, grad.contiguous(memory_format=torch.channels_last), "grad must be in the layout"),
        (2, labels.long(), "labels must be"),
        (2, labels[:, :2].contiguous(), "labels must be"),
        (3, weights[:, :4], "15 channels are not a multiple of 4 classes"),
        (4, scale.double(), "scale_N must be"),
    ]:
        args = [*case[:index], wrong, *case[index + 1 :]]
        with pytest.raises(ValueError, match=message):
            tk.dense_sums(*args[:3], FocalLoss(), *args[3:])


@needs_triton
def test_what_is_refused(interpreted):
    interpreted(check_refusals)


def check_scale():
    tk._TILE, tk._RUN = 64, 256
    ratio = torch.tensor([2.5, 1.0, -3.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for channels_last in (False, True):
            grad = level(2, 5, 7, 9, channels_last, N=3)[0].to(dtype)
            if channels_last:
                assert grad.stride(1) == 1
            expected = grad * ratio.to(dtype).view(-1, 1, 1, 1)
            tk.scale_in_place(grad, ratio)
            torch.testing.assert_close(
                grad, expected, rtol=2**-7 if dtype == DTYPES[1] else 1e-6, atol=0
            )
    strided = torch.ones(3, 2, 4, 8)[..., ::2]
    tk.scale_in_place(strided, ratio)
    assert torch.equal(strided, ratio.view(-1, 1, 1, 1).expand(-1, 2, 4, 4))
    grad = torch.full((1, 2, 3, 3), torch.inf)
    tk.scale_in_place(grad, torch.ones(1))
    assert grad.isinf().all()


@needs_triton
def test_scale_in_place(interpreted):
    interpreted(check_scale)


def check_engine():
    x = level(2, 5, 6, 4)[0]
    image, anchor = torch.arange(4) % 2, torch.arange(4) * 7
    label = torch.full((2, x[0].numel() // 5), dense.BACKGROUND, dtype=torch.int16)
    label[image, anchor] = torch.arange(4).short()
    label[image, anchor + 3] = dense.IGNORED
    targets = dense.DenseTargets(label, torch.zeros_like(label).long(), torch.zeros(1, 4))
    found = {}
    for backend in ("eager", "triton"):
        logits = x.clone().requires_grad_()
        out = dense.dense_classification_loss([logits], targets, FocalLoss(), 5, backend=backend)
        (out.total * torch.tensor([0.1, 0.7])).sum().backward()
        found[backend] = [*out, logits.grad]
    for ours, eager in zip(found["triton"], found["eager"]):
        torch.testing.assert_close(ours, eager, rtol=2e-6, atol=1e-9)


@needs_triton
def test_engine_with_the_triton_backend_is_the_engine_with_eager(interpreted):
    interpreted(check_engine)


def test_without_triton_the_module_imports_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("retina_plugin.losses.without", tk.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "Triton cannot be imported" in module.unavailable()
    assert not module.supports(torch.zeros(1, 1, 1, 1), FocalLoss())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_reason_is_given():
    """This process does not interpret."""
    assert "Triton" in tk.unavailable()
    assert not tk.supports(torch.zeros(1, 1, 1, 1), FocalLoss())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype, channels_last):
    """Hardware's exp2 and reciprocal are a digit worse than the interpreter's."""
    grad_rtol = 2**-8 if dtype == torch.bfloat16 else 2e-6
    for shape in [*RAGGED, *TINY, (9, 80, 25, 38)]:
        for loss in LOSSES:
            case = [t.cuda() for t in level(*shape, channels_last, dtype)]
            check(case, loss, sum_rtol=1e-6, grad_rtol=grad_rtol)


def compiled(kernel, plan, pointer, capability):
    """FL of gamma 2 on a level of 50x84: a multiple of 8, not of the 16 that Triton looks for."""
    triton = pytest.importorskip("triton")
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    sizes = plan(9, 80, 50 * 84, 2 if pointer == "*bf16" else 4)[1]
    values = {**sizes, **tk._constants(FocalLoss()), "WRITE": True}
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
        options={"num_warps": tk._WARPS},
    )


@needs_triton
@pytest.mark.parametrize(
    "name, pointer, capability",
    [
        ("planes", "*bf16", 80),
        ("rows", "*fp32", 80),
        ("planes", "*fp32", 90),
        ("rows", "*bf16", 90),
    ],
)
def test_compiles_to_wide_loads_without_spills(name, pointer, capability, tmp_path, monkeypatch):
    """128 bits at a time, reciprocals instead of quotients, and nothing in local memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled(getattr(tk, f"_{name}"), getattr(tk, f"_plan_{name}"), pointer, capability)
    ptx = code.asm["ptx"]
    wide = tk._TILE * (2 if pointer == "*bf16" else 4) // (16 * 32 * tk._WARPS)
    assert ptx.count("ld.global.v4.b32") >= wide
    assert ptx.count("st.global.v4.b32") == wide
    assert "rcp.approx.ftz.f32" in ptx and not re.search(r"div\.(full|approx|rn)", ptx)
    assert "ld.local" not in ptx and "st.local" not in ptx

    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton comes without cuobjdump: registers are not known")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    assert registers <= 128  # four programs of a multiprocessor at least
    assert stack <= 16  # a value or two may be put away for the time of the loop
