"""Two processes: gradients and logs are those of Detectron2's trainer, whatever the options."""

import copy
import itertools

import pytest
import torch
import torch.distributed
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from retina_plugin.engine.performance import checkpoint_activations
from retina_plugin.engine.step import LossLog, StepTrainer

# Options of ``gradients`` by name.
CASES = {
    "plain": {},
    "checkpointed": {"checkpointed": True},
    "compiled": {"compiled": True},
    "compiled and checkpointed": {"compiled": True, "checkpointed": True},
    "accumulated": {"passes": 2},
    "accumulated and checkpointed": {"passes": 2, "checkpointed": True},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))])

    def forward(self, batch):
        return {"loss": self.head[0](torch.stack(batch)).square().sum(1).mean()}


class Gradients(HookBase):
    """Keeps the gradients of every step, before the optimizer's step."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def after_backward(self):
        self.steps.append([p.grad.clone() for p in self.model.parameters()])


def gradients(
    model, rank, trainer_class, compiled=False, checkpointed=False, on_exchange=None, **options
):
    """Gradients of three steps; each process has its own data."""
    generator = torch.Generator().manual_seed(rank)
    data = [list(torch.rand(4, 6, generator=generator)) for _ in range(3)]
    if checkpointed:
        checkpoint_activations(nn.Identity(), model.head)
    if compiled:
        model.head[0].compile(backend="eager", dynamic=True)  # as prepare_model does
    # as Trainer does
    model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    assert isinstance(model, DistributedDataParallel)
    if on_exchange is not None:
        model.register_comm_hook(None, on_exchange)
    trainer = trainer_class(model, data, torch.optim.SGD(model.parameters(), 0.1), **options)
    hook = Gradients(model)
    trainer.register_hooks([hook])
    with EventStorage():
        for trainer.iter in range(3):
            trainer.run_step()
    return hook.steps


class Detectron2Log:
    """Logs as Detectron2's trainer does, behind the methods of ``LossLog``."""

    def add(self, iteration, losses, data_time):
        SimpleTrainer.write_metrics(losses, data_time, iteration)

    def write(self):
        pass


def logged(rank, losses):
    """Name -> [(value, iteration), ...] of three iterations."""
    with EventStorage() as storage:
        for storage.iter in range(3):
            values = torch.rand(
                2, generator=torch.Generator().manual_seed(10 * rank + storage.iter)
            )
            names = ("loss_a", "loss_b")
            losses.add(storage.iter, dict(zip(names, values)), float(rank + storage.iter))
        losses.write()
        losses.write()  # logs nothing more
        assert storage.iter == 2
        return {name: history.values() for name, history in storage.histories().items()}


def _run(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model()
    results[rank, "Detectron2"] = gradients(copy.deepcopy(model), rank, SimpleTrainer)
    for name, options in CASES.items():
        results[rank, name] = gradients(copy.deepcopy(model), rank, StepTrainer, **options)
    buckets = []

    def count(state, bucket):
        buckets.append(bucket)
        return default_hooks.allreduce_hook(state, bucket)

    gradients(model, rank, StepTrainer, on_exchange=count, passes=2)
    results[rank, "exchanges"] = len(buckets)
    results[rank, "log"] = logged(rank, LossLog())
    results[rank, "log of Detectron2"] = logged(rank, Detectron2Log())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes found, by (rank, name)."""
    shared = torch.multiprocessing.Manager().dict()
    store = f"file://{tmp_path_factory.mktemp('ddp')}/store"
    torch.multiprocessing.spawn(_run, args=(store, shared), nprocs=2)
    return dict(shared)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_detectron2(results, name):
    """In each step, and the same in both processes. Accumulation adds in another order."""
    tolerance = 1e-6 if name.startswith("accumulated") else 0
    for rank in (0, 1):
        found, expected = results[rank, name], results[rank, "Detectron2"]
        assert len(found) == len(expected) == 3
        for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    for ours, theirs in zip(itertools.chain(*results[0, name]), itertools.chain(*results[1, name])):
        assert torch.equal(ours, theirs)


def test_accumulation_exchanges_gradients_once_a_step(results):
    """Not once for each of the two passes."""
    assert results[0, "exchanges"] == results[1, "exchanges"] == 3


def test_log_of_several_iterations_is_detectron2s(results):
    """The first process has the means and the longest wait; both have their own wait."""
    for rank in (0, 1):
        assert results[rank, "log"] == results[rank, "log of Detectron2"]
    assert len(results[0, "log"]["total_loss"]) == 3
    assert results[1, "log"].keys() == {"rank_data_time"}
