"""One training step: equal to Detectron2's, accumulation, 16 bit, the log, the checkpoint."""

import copy

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from retina_plugin.engine.step import LossLog, StepTrainer
from retina_plugin.errors import ConfigError


class Model(nn.Module):
    """Two losses, each a mean over the images of the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.seen = []

    def forward(self, batch):
        self.seen.append(len(batch))
        y = self.linear(torch.stack(batch))
        self.dtype = y.dtype
        return {"loss_a": y.square().sum(1).mean(), "loss_b": y.abs().sum(1).mean()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def batches(number=3, size=4):
    generator = torch.Generator().manual_seed(1)
    return [list(torch.rand(size, 6, generator=generator)) for _ in range(number)]


def train(trainer_class, model, data, end=None, **options):
    """Take a step for each batch; return the trainer and its event storage."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = trainer_class(model, data, optimizer, **options)
    if end is not None:
        trainer.max_iter = end
    with EventStorage() as storage:
        for trainer.iter in range(len(data)):
            storage.iter = trainer.iter
            trainer.run_step()
    return trainer, storage


def log(storage):
    """Name -> [(loss, iteration), ...]."""
    return {k: storage.history(k).values() for k in ("total_loss", "loss_a", "loss_b")}


def test_step_equals_detectron2s(model):
    """Parameters, momenta and the log, to the bit."""
    reference = copy.deepcopy(model)
    ours, storage = train(StepTrainer, model, batches())
    theirs, expected = train(SimpleTrainer, reference, batches())
    assert torch.equal(model.linear.weight, reference.linear.weight)
    assert log(storage) == log(expected) and len(log(storage)["total_loss"]) == 3
    assert "data_time" in storage.histories()
    state, expected_state = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected_state.keys()
    momentum, expected_momentum = (
        s["optimizer"]["state"][0]["momentum_buffer"] for s in (state, expected_state)
    )
    assert torch.equal(momentum, expected_momentum)


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulated_step_equals_a_whole_step(model, passes):
    """Parameters and logged losses are the same up to rounding; the passes are small."""
    reference = copy.deepcopy(model)
    _, storage = train(StepTrainer, model, batches(), passes=passes)
    _, expected = train(StepTrainer, reference, batches())
    assert model.seen == [4 // passes] * 3 * passes and reference.seen == [4] * 3
    torch.testing.assert_close(model.linear.weight, reference.linear.weight, rtol=0, atol=1e-6)
    for name, values in log(expected).items():
        assert log(storage)[name] == [(pytest.approx(v, rel=1e-6), i) for v, i in values], name


def image(seed, boxes):
    """A random image with 0 to 2 boxes."""
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 1, 60, 60]])[:boxes])
    instances.gt_classes = torch.tensor([1, 3])[:boxes]
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 255
    return {"image": pixels, "instances": instances}


def test_accumulated_gradients_of_the_detector(tiny_cfg):
    """2 passes of 4 images give the gradient of 8 (with NORMALIZER per_image and FrozenBN)."""
    tiny_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    assert tiny_cfg.MODEL.RETINANET.NORMALIZER == "per_image"
    whole = build_model(tiny_cfg)
    parts = copy.deepcopy(whole)
    data = [[image(i, i % 3) for i in range(8)]]
    for model, passes in ((whole, 1), (parts, 2)):
        trainer = StepTrainer(model, data, build_optimizer(tiny_cfg, model), passes=passes)
        trainer.iter = 0
        with EventStorage():
            trainer.run_step()
    for (name, ours), theirs in zip(parts.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is not None:
            error = (ours.grad - theirs.grad).abs().max()
            assert error <= 1e-5 * theirs.grad.abs().max(), name


def test_uneven_passes_raise(model):
    """The message has the key and the number of images."""
    with pytest.raises(ConfigError, match="ACCUMULATE 3: the data loader gave 4 images"):
        train(StepTrainer, model, batches(), passes=3)


def test_single_loss_is_accepted(model):
    """As by Detectron2's trainer."""
    losses = model.forward
    model.forward = lambda batch: sum(losses(batch).values())
    _, storage = train(StepTrainer, model, batches(), passes=2)
    assert len(storage.history("total_loss").values()) == 3


@pytest.mark.parametrize("passes", [1, 2])
def test_infinite_loss_never_reaches_the_weights(model, passes):
    """It raises Detectron2's error, before the optimizer's step."""
    before = model.linear.weight.detach().clone()
    data = batches(1)
    data[0][3] = torch.full((6,), torch.inf)
    with pytest.raises(FloatingPointError, match="iteration=0"):
        train(StepTrainer, model, data, passes=passes)
    assert torch.equal(model.linear.weight, before)


def test_bfloat16_equals_autocast(model):
    """Also on the CPU. Weights and gradients stay float32, and there is no loss scaler."""
    reference = copy.deepcopy(model)
    trainer, _ = train(StepTrainer, model, batches(1), precision=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = reference(batches(1)[0])
    sum(losses.values()).backward()
    assert model.dtype == torch.bfloat16
    assert model.linear.weight.grad.dtype == torch.float32
    assert torch.equal(model.linear.weight.grad, reference.linear.weight.grad)
    assert "grad_scaler" not in trainer.state_dict()


def test_float16_scales_the_loss(model):
    """And unscales the gradients. An overflow skips the step and halves the scale."""
    reference, before = copy.deepcopy(model), model.linear.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(scaler.state_dict() | {"scale": 1024.0})
    options = {"precision": torch.float16, "grad_scaler": scaler, "passes": 2}
    train(StepTrainer, model, batches(1), **options)
    train(StepTrainer, reference, batches(1))
    assert model.dtype == torch.float16 and not torch.equal(model.linear.weight, before)
    torch.testing.assert_close(model.linear.weight, reference.linear.weight, rtol=0, atol=1e-3)
    # The losses are finite, but their scaled gradients are not.
    before = model.linear.weight.detach().clone()
    huge = [[torch.full((6,), 100.0)] * 4]
    trainer, _ = train(StepTrainer, model, huge, **options)
    assert torch.equal(model.linear.weight, before)
    assert trainer.state_dict()["grad_scaler"]["scale"] == 512.0


def test_loss_scaler_is_resumed(model):
    """A checkpoint without one can be loaded too."""
    data = batches(1)
    other, _ = train(StepTrainer, copy.deepcopy(model), data, precision=torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu")
    trainer, _ = train(StepTrainer, model, data, precision=torch.float16, grad_scaler=scaler)
    state = trainer.state_dict()
    state["grad_scaler"]["scale"] = 128.0
    trainer.load_state_dict(state)
    assert scaler.get_scale() == 128.0
    trainer.load_state_dict(other.state_dict())
    other.load_state_dict(state)
    assert scaler.get_scale() == 128.0


def test_hooks_run_after_the_backward_pass(model):
    """Once a step, after the last pass and before the optimizer's step."""

    class Hook(HookBase):
        gradients = ()

        def after_backward(self):
            self.gradients += (model.linear.weight.grad.norm().item(),)
            self.weight = model.linear.weight.detach().clone()

    hook, before = Hook(), model.linear.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = StepTrainer(model, batches(1), optimizer, passes=2)
    trainer.register_hooks([hook])
    trainer.iter = 0
    with EventStorage():
        trainer.run_step()
    assert hook.gradients == (model.linear.weight.grad.norm().item(),)
    assert torch.equal(hook.weight, before)


@pytest.mark.parametrize("period", [3, 20])
def test_log_is_written_once_a_period(model, period, monkeypatch):
    """With all iterations, also those after the last whole period. Weights do not change."""
    data = batches(number=7)
    every = copy.deepcopy(model)
    _, expected = train(StepTrainer, every, data, end=7)
    written = []
    write = LossLog.write

    def watched(self):
        written.append(get_event_storage().iter)
        write(self)

    monkeypatch.setattr(LossLog, "write", watched)
    _, storage = train(StepTrainer, model, data, end=7, log_period=period)
    assert written == ([2, 5, 6] if period == 3 else [6])
    assert log(storage) == log(expected) and len(log(storage)["loss_a"]) == 7
    assert len(storage.history("data_time").values()) == 7
    assert storage.iter == 6
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), every.parameters()))


def test_train_of_detectron2_writes_the_last_losses(model):
    """``TrainerBase.train`` sets ``max_iter``."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = StepTrainer(model, batches(4), optimizer, log_period=3)
    trainer.train(0, 4)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [3, 6])
def test_error_names_the_first_infinite_loss(model, bad):
    """Within a period, and after the last whole one. Earlier iterations are logged."""
    data = batches(number=7)
    data[bad][1] = torch.full((6,), torch.inf)
    with EventStorage() as storage:
        trainer = StepTrainer(model, data, torch.optim.SGD(model.parameters(), 0.1), log_period=5)
        trainer.max_iter = 7
        with pytest.raises(FloatingPointError, match=f"iteration={bad}"):
            for trainer.iter in range(7):
                storage.iter = trainer.iter
                trainer.run_step()
    assert trainer.iter == (4 if bad == 3 else 6)
    assert [i for _, i in storage.history("total_loss").values()] == list(range(bad))


def test_each_pass_backpropagates_the_whole_loss(model):
    """The gradient of a loss stays 1 with ACCUMULATE, which the loss kernels count on."""
    factors, forward = [], model.forward

    def watched(batch):
        losses = forward(batch)
        losses["loss_a"].register_hook(lambda grad: factors.append(grad.item()))
        return losses

    model.forward = watched
    train(StepTrainer, model, batches(1), passes=4)
    assert factors == [1.0] * 4
