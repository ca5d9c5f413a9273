"""Two processes, and something is not finite in one of them: both decide and say the same."""

import pytest
import torch
import torch.distributed
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from retina_plugin.engine.finite import NonFiniteError
from retina_plugin.engine.step import StepTrainer

pytestmark = pytest.mark.slow

AT = 2  # the iteration that is not finite, in process 1 alone


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, batch):
        y = self.norm(self.linear(torch.stack([x["image"] for x in batch])).transpose(1, 2))
        shift = sum(x.get("shift", 0.0) for x in batch)  # of the loss: its gradient stays finite
        factor = torch.tensor([x.get("gradient", 1.0) for x in batch])
        if y.requires_grad:
            y.register_hook(lambda g: g * factor[:, None, None])
        return {"loss": y.square().sum() * y.mean() + shift}


class Loader:
    def __init__(self, rank, fault):
        self.rank, self.fault, self.last_samples = rank, fault, []

    def batch(self, i):
        generator = torch.Generator().manual_seed(10 * i + self.rank)
        records = [
            {"image": torch.rand(5, 6, generator=generator), "file_name": f"{self.rank}_{i}_{j}"}
            for j in range(2)
        ]
        if self.rank == 1 and i == AT:
            records[1].update(self.fault)
        return records

    def __iter__(self):
        for i in range(5):
            self.last_samples = [(4 * i + 2 * self.rank + j, i) for j in range(2)]
            yield self.batch(i)

    def read(self, samples):
        return self.batch(samples[0][1])

    def state_dict(self):
        return {}


FAULTS = {
    "pixels": {"image": torch.full((5, 6), torch.nan)},
    "loss": {"shift": torch.inf},
    "gradient": {"gradient": torch.nan},
}


def train(fault, log_period, max_skipped=0):
    """The error's text, the state, and the records that were written."""
    torch.manual_seed(0)
    model = create_ddp_model(Model(), broadcast_buffers=False, device_ids=None)
    written = []
    trainer = StepTrainer(
        model,
        Loader(comm.get_rank(), FAULTS.get(fault, {})),
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        log_period=log_period,
        max_skipped_steps=max_skipped,
        write_record=lambda record: written.append(record) or "FILE",
    )
    trainer.max_iter = 5
    text = ""
    with EventStorage() as storage:
        try:
            for trainer.iter in range(5):
                storage.iter = trainer.iter
                trainer.run_step()
        except NonFiniteError as error:
            text = str(error)
    return text, [x.clone() for x in model.state_dict().values()], written


def _run(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for fault in FAULTS:
        for log_period in (1, 20):
            results[rank, fault, log_period, 0] = train(fault, log_period)
        results[rank, fault, 1, 1] = train(fault, 1, max_skipped=1)
    results[rank, "none"] = train("none", 1)
    # What check_finite finds in one process: each has its own statistics of batch norm.
    model = create_ddp_model(Model(), broadcast_buffers=False, device_ids=None)
    trainer = StepTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1))
    if rank == 1:
        model.module.norm.running_var[0] = torch.inf
    try:
        trainer.check_finite()
    except NonFiniteError as error:
        results[rank, "buffer"] = str(error)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    shared = torch.multiprocessing.Manager().dict()
    store = f"file://{tmp_path_factory.mktemp('finite')}/store"
    torch.multiprocessing.spawn(_run, args=(store, shared), nprocs=2)
    return dict(shared)


@pytest.mark.parametrize("log_period", [1, 20])
@pytest.mark.parametrize("fault", FAULTS)
def test_both_stop_and_name_the_image_of_process_1(results, fault, log_period):
    texts = [results[rank, fault, log_period, 0][0] for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert f"iteration={AT} " in texts[0] and f"; image 1_{AT}_1: " in texts[0]
    assert "`retina replay FILE`" in texts[0]
    weights = [results[rank, fault, log_period, 0][1][:2] for rank in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert all(bool(x.isfinite().all()) for x in weights[0])


@pytest.mark.parametrize("fault", FAULTS)
def test_main_process_writes_what_both_know(results, fault):
    for log_period in (1, 20):
        (record,) = results[0, fault, log_period, 0][2]
        assert [p.samples[0] for p in record.processes] == [[4 * AT, AT], [4 * AT + 2, AT]]
        assert results[1, fault, log_period, 0][2] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_both_skip_the_step(results, fault):
    """Weights, momenta's effect and each process's own buffers stay in step."""
    states = [results[rank, fault, 1, 1] for rank in (0, 1)]
    assert [text for text, *_ in states] == ["", ""]
    weights = [state[:2] for _, state, _ in states]
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert all(bool(x.isfinite().all()) for _, state, _ in states for x in state)
    untouched = results[0, "none"][1]
    assert not torch.equal(weights[0][0], untouched[0])
    # One step fewer in both processes: batch norm counts them.
    counts = [int(state[-1]) for _, state, _ in states]
    assert counts == [4, 4] and int(untouched[-1]) == 5


def test_both_refuse_to_save_what_one_of_them_has(results):
    assert results[0, "buffer"] == results[1, "buffer"]
    assert "norm.running_var" in results[0, "buffer"]
