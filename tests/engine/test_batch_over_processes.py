"""Several processes train as one with the whole batch: gradients and logged counts."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from detectron2.engine import HookBase, create_ddp_model
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from retina_plugin.engine import setup_cfg
from retina_plugin.engine.step import StepTrainer

BATCH = 8
OHEM = ("MODEL.RETINANET.SAMPLER", "OHEM", "MODEL.RETINANET.OHEM.BATCH_SIZE", 32)

# name -> (normaliser, overrides, passes, images without ground truth)
CASES = {
    f"{normalizer}{name}": (normalizer, overrides, passes, empty)
    for normalizer in ("per_image", "global", "ema")
    for name, overrides, passes, empty in (
        ("", (), 1, ()),
        (", half of the images without boxes", (), 1, (0, 1, 2, 3)),
        (", no boxes at all", (), 1, range(BATCH)),
        (", accumulated", (), 2, (0, 5)),
        (", OHEM", OHEM, 1, (0, 5)),
        (", OHEM and accumulated", OHEM, 2, (0, 1, 2, 3)),
    )
    if normalizer != "ema" or name in ("", ", no boxes at all")  # it differs from global in E only
}
LOSSES = {"total_loss", "loss_cls", "loss_box_reg"}  # the main process logs them
PER_GPU = ("per_gpu", (), 1, (0, 1))


def images(empty):
    """Eight training records of random pixels with up to three boxes."""
    generator = torch.Generator().manual_seed(3)
    records = []
    for n in range(BATCH):
        corners = torch.rand(n % 3 + 1, 2, 2, generator=generator).mul(40).sort(dim=1).values
        boxes = (corners + torch.tensor([[0.0], [16.0]])).flatten(1)[: 0 if n in empty else None]
        instances = Instances((64, 64), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.arange(len(boxes))
        pixels = torch.randint(0, 256, (3, 64, 64), generator=generator).float()
        records.append({"image": pixels, "instances": instances})
    return records


class Gradient(HookBase):
    def after_backward(self):
        model = self.trainer.model
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.flat = torch.cat(grads)


def step(cfg, batch, normalizer, overrides, passes, initial=100.0):
    """The gradient of a step on this process's ``batch``, and the scalars that are logged."""
    cfg = cfg.clone()
    cfg.merge_from_list([*overrides, "MODEL.RETINANET.NORMALIZER", normalizer])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.normalizer.ema.fill_(initial)
    model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = StepTrainer(model, [batch], optimizer, passes=passes)
    trainer.iter, hook = 0, Gradient()
    trainer.register_hooks([hook])
    with EventStorage() as storage:
        trainer.run_step()
    scalars = {name: value for name, (value, _) in storage.latest().items() if "time" not in name}
    return hook.flat, scalars


def _run(rank, size, store, cfg, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    for name, (normalizer, overrides, passes, empty) in {**CASES, "per_gpu": PER_GPU}.items():
        results[rank, name] = step(cfg, images(empty)[share], normalizer, overrides, passes)
    torch.distributed.destroy_process_group()


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_cfg():
    """A small model without batch norm, which normalises what a process has."""
    cfg = setup_cfg(str(Path(__file__).parents[2] / "configs" / "_base_" / "digits_R18.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.RETINANET.NORM = "FrozenBN", "", ""
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RETINANET.NUM_CONVS = 32, 1
    return cfg


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory, small_cfg):
    """(number of processes, what each found by (rank, case))."""
    size = request.param
    shared = torch.multiprocessing.Manager().dict()
    store = f"file://{tmp_path_factory.mktemp('ddp')}/store"
    torch.multiprocessing.spawn(_run, args=(size, store, small_cfg, shared), nprocs=size)
    return size, dict(shared)


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_log_are_those_of_one_process(processes, small_cfg, name):
    """``global`` and ``ema`` count a pass: one process takes the passes of all together.

    ``ema`` begins at 100 positives a process.
    """
    size, results = processes
    normalizer, overrides, passes, empty = CASES[name]
    records, per_pass = images(empty), BATCH // size // passes
    shares = [records[i : i + per_pass] for i in range(0, BATCH, per_pass)]
    batch = [x for p in range(passes) for share in shares[p::passes] for x in share]
    expected, logged = step(small_cfg, batch, normalizer, overrides, passes, 100.0 * size)
    assert expected.norm() > 0
    for rank in range(size):
        gradient, scalars = results[rank, name]
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()
        logged["retinanet/normalizer"] /= size  # what a process divides by
        assert scalars.keys() == (logged.keys() if rank == 0 else logged.keys() - LOSSES)
        for key, value in scalars.items():
            assert value == pytest.approx(logged[key], rel=1e-6, abs=1e-7), key
        logged["retinanet/normalizer"] *= size
    assert {"num_pos_anchors", "retinanet/num_pos_p3", "retinanet/normalizer"} < logged.keys()


def test_per_gpu_is_the_mean_of_the_processes(processes, small_cfg):
    """Its definition: each process divides by its own positives."""
    size, results = processes
    normalizer, overrides, passes, empty = PER_GPU
    share = BATCH // size
    records = images(empty)
    parts = [records[i : i + share] for i in range(0, BATCH, share)]
    steps = [step(small_cfg, part, normalizer, overrides, passes) for part in parts]
    expected = sum(gradient for gradient, _ in steps) / size
    whole, _ = step(small_cfg, records, normalizer, overrides, passes)
    assert (whole - expected).norm() > 0.01 * expected.norm()
    for rank in range(size):
        gradient, scalars = results[rank, "per_gpu"]
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()
        for key in ("num_pos_anchors", "retinanet/cls_foreground", "retinanet/normalizer"):
            mean = sum(logged[key] for _, logged in steps) / size
            assert scalars[key] == pytest.approx(mean, rel=1e-6), key


def test_logged_counts_do_not_depend_on_passes(small_cfg):
    """Of a step with several passes they are the means over the passes, not the last one's."""
    batch = images((0, 1, 2, 3))
    _, whole = step(small_cfg, batch, "per_image", (), 1)
    _, split = step(small_cfg, batch, "per_image", (), 4)
    assert whole.keys() == split.keys() and whole["num_pos_anchors"] > 0
    for key, value in whole.items():
        if key != "retinanet/normalizer":  # times the images of a pass
            assert split[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key
