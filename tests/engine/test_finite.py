"""The gate of a step: what is found, what a skipped step leaves, no wait for an accelerator."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from retina_plugin.engine import finite
from retina_plugin.engine.buffers import WrittenBuffers
from retina_plugin.engine.finite import StepGate, found_nonfinite, nonfinite_names
from retina_plugin.errors import ConfigError

CPU = torch.device("cpu")
BAD = [torch.nan, torch.inf, -torch.inf]


def model(norm=True):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3)] if norm else [nn.Linear(4, 3)]
    return nn.Sequential(*layers, nn.Linear(3, 2))


def clipped(optimizer):
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.1
    return maybe_add_gradient_clipping(cfg, optimizer)


OPTIMIZERS = {
    "plain": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5),
    "clipped": lambda p: clipped(torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True)),
    "adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


class OwnStep(torch.optim.SGD):
    """A user's optimizer, which does not look at the flag."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()


def state(net, optimizer):
    """Copies of everything that a step may change."""
    tensors = [*net.state_dict().values()]
    for values in optimizer.state.values():
        tensors += [x for x in values.values() if isinstance(x, torch.Tensor)]
    return [x.clone() for x in tensors]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def take_step(gate, net, seed, bad=None):
    """One step on random data; ``bad`` is put into the last number of the last gradient."""
    data = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    gate.optimizer.zero_grad()
    gate.before_forward()
    loss = net(data).square().mean()
    loss.backward()
    if bad is not None:
        list(net.parameters())[-1].grad[-1] = bad
    return gate.step(loss.detach()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_one_bad_number_is_found_wherever_it_is(dtype, size):
    tensors = [torch.ones(3, dtype=torch.float32), torch.ones(size, dtype=dtype)]
    assert found_nonfinite(tensors, CPU) == 0
    for bad in BAD:
        for index in {0, size // 2, size - 1}:
            spoiled = [tensors[0], tensors[1].index_fill(0, torch.tensor(index), bad)]
            assert found_nonfinite(spoiled, CPU) == 1
            assert nonfinite_names(zip("ab", spoiled)) == ["b"]


def test_large_numbers_are_finite():
    """Although their sum, and their norm, is infinite."""
    tensors = [torch.full((100,), 3e38), torch.full((100,), -3e38)]
    assert found_nonfinite(tensors, CPU) == 0 and nonfinite_names(zip("ab", tensors)) == []


def test_empty_and_strided_tensors_and_integers_are_accepted():
    strided = torch.ones(4, 4).t()[::2]
    assert found_nonfinite([torch.empty(0), strided], CPU) == 0
    strided[1, 1] = torch.nan
    assert found_nonfinite([torch.empty(0), strided], CPU) == 1
    assert found_nonfinite([], CPU) == 0
    named = {"empty": torch.empty(0), "strided": strided, "integers": torch.ones(3).long()}
    assert nonfinite_names(named.items()) == ["strided"]
    assert nonfinite_names([]) == []


def test_gradients_are_not_changed():
    x = torch.randn(1000)
    before = x.clone()
    found_nonfinite([x], CPU)
    assert torch.equal(x, before)


def test_sparse_gradients_are_looked_at():
    net = nn.Embedding(10, 3, sparse=True)
    gate = StepGate(net, torch.optim.SGD(net.parameters(), 0.1))
    before = net.weight.detach().clone()
    for factor in (torch.nan, 1.0):
        net.zero_grad()
        (net(torch.tensor([2, 2, 5])).sum() * factor).backward()
        assert torch.equal(net.weight, before)
        gate._count.zero_()
        gate.step(torch.zeros(()))
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finite_steps_are_the_optimizers(name):
    """To the bit, on the CPU."""
    net, reference = model(), model()
    gate = StepGate(net, OPTIMIZERS[name](net.parameters()))
    optimizer = OPTIMIZERS[name](reference.parameters())
    for seed in range(4):
        assert take_step(gate, net, seed) == 0
        data = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        reference(data).square().mean().backward()
        optimizer.step()
    assert equal(state(net, gate.optimizer), state(reference, optimizer))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", [*OPTIMIZERS, "own"])
def test_skipped_step_changes_nothing(name, bad):
    """Weights, momenta, the statistics of batch norm: to the bit. The next step is as ever."""
    make = OPTIMIZERS.get(name, lambda p: OwnStep(p, 0.1))
    net = model()
    gate = StepGate(net, make(net.parameters()), max_skipped=2)
    take_step(gate, net, 0)
    reference = copy.deepcopy(net)
    expected = StepGate(reference, make(reference.parameters()))
    expected.optimizer.load_state_dict(copy.deepcopy(gate.optimizer.state_dict()))
    before = state(net, gate.optimizer)
    assert take_step(gate, net, 1, bad) == 1
    assert equal(state(net, gate.optimizer), before)
    assert take_step(gate, net, 2) == 0
    take_step(expected, reference, 2)
    after = state(net, gate.optimizer)
    assert equal(after, state(reference, expected.optimizer)) and not equal(after, before)


def test_bad_loss_with_finite_gradients_closes_the_gate():
    net = model()
    gate = StepGate(net, torch.optim.SGD(net.parameters(), 0.1))
    before = state(net, gate.optimizer)
    gate.before_forward()
    loss = net(torch.randn(5, 4)).square().mean()
    loss.backward()
    assert gate.step(loss.detach() + torch.inf) == 1
    assert equal(state(net, gate.optimizer), before)


@pytest.mark.parametrize("allowed", [0, 2])
def test_model_is_frozen_after_the_allowed_skips(allowed):
    """Good steps after that change nothing, until the host reads the flags."""
    net = model()
    gate = StepGate(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), allowed)
    take_step(gate, net, 0)
    for seed in range(allowed):
        take_step(gate, net, seed, torch.nan)
    before = state(net, gate.optimizer)
    take_step(gate, net, 5)
    assert not equal(state(net, gate.optimizer), before)
    before = state(net, gate.optimizer)
    assert take_step(gate, net, 6, torch.nan) == 1
    assert [take_step(gate, net, seed) for seed in (7, 8)] == [0, 0]
    assert equal(state(net, gate.optimizer), before)


def test_count_of_before_a_resume_counts():
    net = model()
    gate = StepGate(net, torch.optim.SGD(net.parameters(), 0.1), max_skipped=2)
    gate.set_count(2)
    take_step(gate, net, 0)
    before = state(net, gate.optimizer)
    take_step(gate, net, 1, torch.nan)
    take_step(gate, net, 2)
    assert equal(state(net, gate.optimizer), before)


def test_negative_number_of_skips_raises():
    with pytest.raises(ConfigError, match="SOLVER.MAX_SKIPPED_STEPS -1: "):
        StepGate(model(), None, -1)


class Counter(nn.Module):
    """Buffers of several types, one of which is replaced in each forward pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("replaced", torch.zeros(2, 3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("made_later", None)
        self.frozen = FrozenBatchNorm2d(2)

    def forward(self, x):
        self.replaced = self.replaced + 1
        self.steps += 1
        self.made_later = torch.ones(1)
        return x @ self.weight


@pytest.mark.parametrize("on_device", [False, True])
def test_buffers_are_put_back(on_device, monkeypatch):
    """Also where a module replaces them, and by the code for accelerators."""
    net = Counter()
    buffers = WrittenBuffers(net)
    for closed, expected in ((False, 1), (True, 1), (False, 2)):
        buffers.keep()
        net(torch.ones(2, 2))
        gate = torch.tensor(closed)
        if on_device:
            gate = _OnDevice(gate)
        with torch.no_grad():
            buffers.restore(gate)
        assert net.replaced.tolist() == [[expected] * 3] * 2 and net.steps == expected


class _OnDevice(torch.Tensor):
    """A tensor that says that it is on an accelerator, and that cannot be read."""

    device = torch.device("cuda")

    def __bool__(self):
        raise AssertionError("read by the host")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_gate_equals_the_hosts(name):
    """PyTorch's fused kernels on the CPU: the same weights, and a closed gate changes nothing."""
    net, reference = model(norm=False), model(norm=False)
    optimizer = OPTIMIZERS[name](net.parameters())
    expected = OPTIMIZERS[name](reference.parameters())
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for seed in range(6):
        is_bad = seed in (2, 3)
        for m, o in ((net, optimizer), (reference, expected)):
            o.zero_grad()
            m(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).sum().backward()
            if is_bad:
                m[0].weight.grad[0, 0] = torch.nan
        before = state(net, optimizer)
        if seed == 0:
            optimizer.step()  # the buffers of SGD exist from here on
        else:
            assert finite._can_be_gated(optimizer)
            finite.fused_step(optimizer, torch.tensor(is_bad))
        assert equal(state(net, optimizer), before) == is_bad
        if not is_bad:
            expected.step()
    for ours, theirs in zip(state(net, optimizer), state(reference, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    # What a checkpoint holds does not change.
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert not hasattr(optimizer, "found_inf")


@pytest.fixture
def kernel_calls(monkeypatch):
    """A stand-in for the fused kernel of SGD, which needs a GPU's driver."""
    calls = []

    def kernel(params, grads, momenta, *, found_inf, **_):
        calls.append(found_inf)

    monkeypatch.setattr(torch, "_fused_sgd_", kernel)
    return calls


def on_fake_gpu(make_optimizer, norm=True):
    """A model on a GPU without one, its optimizer and gate."""
    torch.set_default_device("cuda")
    try:
        net = model(norm)
    finally:
        torch.set_default_device(None)
    return net, StepGate(net, make_optimizer(net.parameters()))


def fake_step(gate, net):
    gate.before_forward()
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    return gate.step(torch.empty((), device="cuda"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gate_does_not_wait_for_a_gpu(name, kernel_calls):
    """Except in the first step of SGD with momentum, whose buffers the kernel would not fill."""
    with FakeTensorMode():
        net, gate = on_fake_gpu(OPTIMIZERS[name])
        momentum = gate.optimizer.param_groups[0].get("momentum", 0) != 0
        if momentum:
            with pytest.raises(DataDependentOutputException):
                fake_step(gate, net)
            for p in net.parameters():
                gate.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
        for _ in range(3):
            flag = fake_step(gate, net)
            assert flag.device.type == "cuda" and flag.dtype == torch.float32
        if "adam" not in name:
            assert len(kernel_calls) == 3
            assert all(x.device.type == "cuda" and x.shape == () for x in kernel_calls)


@pytest.mark.parametrize(
    "make", [lambda p: OwnStep(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1)], ids=["own", "adamw"]
)
def test_other_optimizers_wait_for_a_gpu(make, kernel_calls):
    """They cannot be gated on the device, so the host decides."""
    with FakeTensorMode():
        net, gate = on_fake_gpu(make)
        with pytest.raises(DataDependentOutputException):
            fake_step(gate, net)
    assert kernel_calls == []


class FakeScaler:
    """GradScaler without a GPU's driver: it checks by the same kernel, and is told to step."""

    def __init__(self):
        self.calls = []

    def scale(self, x):
        return x * 1024

    def unscale_(self, optimizer):
        self.calls.append("unscale")

    def step(self, optimizer):
        self.calls.append(("step", optimizer._step_supports_amp_scaling))

    def update(self):
        self.calls.append("update")


def test_gate_with_a_loss_scaler_does_not_wait_for_a_gpu():
    """The scaler unscales before the step, which clips, and hands its flag to the kernel."""
    with FakeTensorMode():
        net, gate = on_fake_gpu(OPTIMIZERS["plain"])
        scaler = FakeScaler()
        gate.before_forward()
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        gate.step(torch.empty((), device="cuda"), scaler)
    assert scaler.calls == ["unscale", ("step", True), "update"]


def scaled_step(gate, net, scaler, bad_gradient=None, bad_loss=None):
    gate.optimizer.zero_grad()
    loss = net(torch.randn(5, 4)).square().mean()
    scaler.scale(loss).backward()
    if bad_gradient is not None:
        net[0].weight.grad[0, 0] = bad_gradient
    loss = loss.detach()
    return gate.step(loss if bad_loss is None else loss + bad_loss, scaler).item()


def test_overflow_is_the_scalers_business():
    """It lowers the scale and skips the step. The loss is still looked at."""
    net = model()
    gate = StepGate(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in net.parameters()]
    assert scaled_step(gate, net, scaler, bad_gradient=torch.inf) == 0
    assert equal([p.detach() for p in net.parameters()], before) and scaler.get_scale() == 4.0
    assert scaled_step(gate, net, scaler) == 0
    after = [p.detach().clone() for p in net.parameters()]
    assert not equal(after, before)
    assert scaled_step(gate, net, scaler, bad_loss=torch.inf) == 1
    assert equal([p.detach() for p in net.parameters()], after)


def test_gradient_that_no_scale_helps_is_no_overflow():
    """At a scale of 1 it is reported, and the scale does not fall to 0 without a word."""
    net = model()
    gate = StepGate(net, torch.optim.SGD(net.parameters(), 0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    flags = [scaled_step(gate, net, scaler, bad_gradient=torch.nan) for _ in range(3)]
    assert flags == [0, 0, 1]


def test_scaled_step_clips_unscaled_gradients():
    """As without a scaler."""
    net, reference = model(norm=False), model(norm=False)
    data = torch.randn(5, 4)
    gate = StepGate(net, clipped(torch.optim.SGD(net.parameters(), 0.1)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    loss = net(data).square().mean()
    scaler.scale(loss).backward()
    gate.step(loss.detach(), scaler)
    optimizer = clipped(torch.optim.SGD(reference.parameters(), 0.1))
    reference(data).square().mean().backward()
    optimizer.step()
    for ours, theirs in zip(net.parameters(), reference.parameters()):
        torch.testing.assert_close(ours, theirs)
