"""Two processes: the options of DistributedDataParallel give the gradients of the plain one."""

import copy
import itertools

import pytest
import torch
import torch.distributed
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from retina_plugin.engine.distributed import make_ddp_model
from retina_plugin.engine.loss_log import LossLog
from retina_plugin.engine.recompute import checkpoint_activations
from retina_plugin.engine.step import StepTrainer
from retina_plugin.errors import ConfigError

# name -> options of make_ddp_model, of the trainer, and whether activations are recomputed; a name
# with "compiled" is that of a compiled head
CASES = {
    "plain": ({}, {}, False),
    "static graph": ({"static_graph": True}, {}, False),
    "bucket view": ({"gradient_as_bucket_view": True}, {}, False),
    "recomputed": ({}, {}, True),
    "recomputed static graph": (
        {"static_graph": True, "gradient_as_bucket_view": True},
        {},
        True,
    ),
    "accumulated": ({"gradient_as_bucket_view": True}, {"passes": 2}, True),
    "compiled": ({}, {}, False),
    "compiled recomputed": ({"gradient_as_bucket_view": True}, {}, True),
    "float16": ({"compression": "float16"}, {}, False),
    "bfloat16": ({"compression": "bfloat16"}, {}, False),
    "bfloat16 static graph": (
        {"compression": "bfloat16", "static_graph": True, "gradient_as_bucket_view": True},
        {},
        True,
    ),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.ModuleList([nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))])

    def forward(self, batch):
        return {"loss": self.head[0](torch.stack(batch)).square().sum(1).mean()}


class Gradients(HookBase):
    """Of every step, before the optimizer's."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def after_backward(self):
        self.steps.append([p.grad.clone() for p in self.model.parameters()])


def gradients(model, rank, ddp, options, recomputed, compiled=False):
    """Of three steps."""
    generator = torch.Generator().manual_seed(rank)
    data = [list(torch.rand(4, 6, generator=generator)) for _ in range(3)]
    if recomputed:
        checkpoint_activations(nn.Identity(), model.head)
    if compiled:
        model.head[0].compile(backend="eager", dynamic=True)  # as prepare_model does
    model = make_ddp_model(model, **ddp)
    assert isinstance(model, DistributedDataParallel)
    for option in ("static_graph", "gradient_as_bucket_view"):
        assert getattr(model, option) == ddp.get(option, False)
    trainer = StepTrainer(model, data, torch.optim.SGD(model.parameters(), 0.1), **options)
    hook = Gradients(model)
    trainer.register_hooks([hook])
    with EventStorage():
        for trainer.iter in range(3):
            trainer.run_step()
    return hook.steps


class Immediately:
    """Detectron2's way of logging, behind :class:`LossLog`'s methods."""

    def add(self, iteration, losses, data_time):
        SimpleTrainer.write_metrics(losses, data_time, iteration)

    def write(self):
        pass


def logged(rank, losses):
    """Three iterations by name: [(value, iteration)]."""
    with EventStorage() as storage:
        for storage.iter in range(3):
            values = torch.rand(
                2, generator=torch.Generator().manual_seed(10 * rank + storage.iter)
            )
            names = ("loss_a", "loss_b")
            losses.add(storage.iter, dict(zip(names, values)), float(rank + storage.iter))
        losses.write()
        losses.write()  # there is nothing left
        assert storage.iter == 2
        return {name: history.values() for name, history in storage.histories().items()}


def _run(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model()
    for name, case in CASES.items():
        compiled = name.startswith("compiled")
        results[rank, name] = gradients(copy.deepcopy(model), rank, *case, compiled)
    buckets = []

    def counting(state, bucket):
        buckets.append(bucket)
        return hook(state, bucket)

    hook, default_hooks.fp16_compress_hook = default_hooks.fp16_compress_hook, counting
    gradients(model, rank, {"compression": "float16"}, {"passes": 2}, False)
    results[rank, "exchanges"] = len(buckets)
    results[rank, "log"] = logged(rank, LossLog())
    results[rank, "log of Detectron2"] = logged(rank, Immediately())
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Gradients by rank and case."""
    shared = torch.multiprocessing.Manager().dict()
    store = f"file://{tmp_path_factory.mktemp('ddp')}/store"
    torch.multiprocessing.spawn(_run, args=(store, shared), nprocs=2)
    return dict(shared)


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_gradients_are_those_of_plain_ddp(results, name):
    """Exactly, or up to the digits that are sent; the same in both processes, in each step."""
    # float16 has 11 bits, bfloat16 8; "accumulated" adds in another order
    tolerance = {"float16": 2**-9, "bfloat16": 2**-6, "accumulated": 1e-6}.get(name.split()[0], 0)
    for rank in (0, 1):
        found, expected = results[rank, name], results[rank, "plain"]
        assert len(found) == len(expected) == 3
        for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    for ours, theirs in zip(itertools.chain(*results[0, name]), itertools.chain(*results[1, name])):
        assert torch.equal(ours, theirs)
    if "16" in name:  # the compression is there
        sent = torch.float16 if name == "float16" else torch.bfloat16
        first = results[0, name][0][0]
        assert torch.equal(first.to(sent).float(), first)
        assert not torch.equal(first, results[0, "plain"][0][0])


def test_gradients_are_exchanged_once_a_step(results):
    """Not in each of its two passes."""
    assert results[0, "exchanges"] == results[1, "exchanges"] == 3


def test_the_log_of_several_iterations_is_detectron2s(results):
    """Means over the processes and the longest wait, in the first; each one's own wait in both."""
    for rank in (0, 1):
        assert results[rank, "log"] == results[rank, "log of Detectron2"]
    assert len(results[0, "log"]["total_loss"]) == 3
    assert results[1, "log"].keys() == {"rank_data_time"}


def test_one_process_has_no_ddp():
    """The model itself, whatever the options."""
    model = nn.Linear(2, 2)
    assert make_ddp_model(model, static_graph=True, compression="float16") is model


def test_unknown_compression():
    """Lists the known ones."""
    with pytest.raises(ConfigError, match="COMPRESSION: no 'int8'; known: none, float16, bfloat16"):
        make_ddp_model(nn.Linear(2, 2), compression="int8")


def test_a_static_graph_has_one_pass():
    """Whoever makes the model: PyTorch's own error would come in the second iteration."""
    with pytest.raises(ConfigError, match="STATIC_GRAPH with SOLVER.ACCUMULATE > 1 is not support"):
        make_ddp_model(nn.Linear(2, 2), static_graph=True, passes=2)


def test_a_pytorch_that_cannot_send_bfloat16(monkeypatch):
    """One without NCCL says so when the hook is registered: one line with the key."""

    class Wrapped(DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

        def register_comm_hook(self, state, hook):
            raise TypeError("BF16 needs NCCL")

    monkeypatch.setattr(
        "retina_plugin.engine.distributed.create_ddp_model", lambda model, **options: Wrapped()
    )
    with pytest.raises(ConfigError, match="COMPRESSION bfloat16: BF16 needs NCCL; set it to float"):
        make_ddp_model(nn.Linear(2, 2), compression="bfloat16")
