"""Steps that are not finite in a training: what stops it, what is skipped, and what is said."""

import copy
import functools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from retina_plugin.engine.finite import NonFiniteError
from retina_plugin.engine.state import random_state
from retina_plugin.engine.step import StepTrainer
from retina_plugin.engine.step_record import StepRecord, from_json, write_record
from retina_plugin.errors import ConfigError


class Model(nn.Module):
    """Batch norm and dropout: a forward pass changes buffers and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, batch):
        x = torch.stack([record["image"] for record in batch])
        x = self.norm(self.linear(x).transpose(1, 2)).mean(dim=2)
        y = self.last(nn.functional.dropout(x, 0.3, self.training))
        factor = torch.tensor([record.get("factor", 1.0) for record in batch])
        gradient = torch.tensor([record.get("gradient", 1.0) for record in batch])
        if y.requires_grad:
            y.register_hook(lambda g: g * gradient[:, None])
        return {"loss_a": (y.square().sum(1) * factor).mean(), "loss_b": y.abs().sum(1).mean()}


class Loader:
    """Batches that can be read again, as ``ResumableLoader`` gives them."""

    def __init__(self, batches):
        self.batches, self.last_samples = batches, []

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            self.last_samples = [(4 * i + j, j) for j in range(len(batch))]
            yield batch

    def read(self, samples):
        return [self.batches[position // 4][position % 4] for position, _ in samples]

    def state_dict(self):
        return {"seed": 5}


# What makes a step not finite. Each changes one image of a batch.
FAULTS = {
    "pixels": {"image": torch.full((2, 6), torch.nan)},
    "loss": {"factor": torch.inf},
    "gradient": {"gradient": torch.nan},
}


def batches(number=6, size=4, faults=()):
    """Records; ``faults`` has (iteration, name) pairs, each for image 1 of its batch."""
    generator = torch.Generator().manual_seed(1)
    made = [
        [
            {"image": torch.rand(2, 6, generator=generator), "file_name": f"{i}_{j}.png"}
            for j in range(size)
        ]
        for i in range(number)
    ]
    for iteration, name in faults:
        made[iteration][1].update(FAULTS[name])
    return made


def make_trainer(data, **options):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    return StepTrainer(model, Loader(data), optimizer, **options)


def run(trainer, end=None, storage=None):
    """Take a step for each batch; return the event storage."""
    data = trainer.data_loader.batches
    trainer.max_iter = len(data) if end is None else end
    with storage or EventStorage() as storage:
        for trainer.iter in range(len(data)):
            storage.iter = trainer.iter
            trainer.run_step()
    return storage


def state(trainer):
    """All that a step changes."""
    tensors = list(trainer.model.state_dict().values())
    for values in trainer.optimizer.state.values():
        tensors.append(values["momentum_buffer"])
    return [x.clone() for x in tensors]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("period", [1, 20])
@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("fault", FAULTS)
def test_stopped_training_is_as_before_the_step(fault, at, period, passes):
    """To the bit, also if the flag is read some steps later, and in the first and last step."""
    options = {"log_period": period, "passes": passes}
    trainer = make_trainer(batches(faults=[(at, fault)]), **options)
    with pytest.raises(NonFiniteError, match=f"iteration={at} ") as caught:
        run(trainer)
    assert f"{at}_1.png" in str(caught.value) and "\n" not in str(caught.value)
    expected = make_trainer(batches()[:at], **options)
    run(expected)
    momenta_exist = at > 0
    ours, theirs = state(trainer), state(expected)
    assert equal(ours, theirs) and (len(ours) > 9) == momenta_exist
    assert all(bool(x.isfinite().all()) for x in ours if x.is_floating_point())


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("period", [1, 4, 20])
@pytest.mark.parametrize("fault", FAULTS)
def test_skipped_step_never_happened(fault, period, passes, log):
    """The training equals one without that batch, to the bit, apart from what dropout draws."""
    data = batches(faults=[(0, fault), (3, fault)])
    without = [data[i] for i in (1, 2, 4, 5)]
    trainer = make_trainer(data, log_period=period, passes=passes, max_skipped_steps=2)
    expected = make_trainer(without, passes=passes)
    # Dropout draws in skipped steps, too. Without it the two are comparable.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", lambda x, *_: x)
        storage = run(trainer)
        run(expected)
    assert equal(state(trainer), state(expected))
    warnings = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    for at, number, text in zip((0, 3), (1, 2), warnings):
        assert text.startswith(f"skipped a step ({number} of SOLVER.MAX_SKIPPED_STEPS 2): ")
        assert f"iteration={at} " in text and f"{at}_1.png" in text
        # Later steps have changed the model if the flag is read later: nothing to look at.
        assert ("it begins in" in text) == (period == 1 or (period, at) == (4, 3))
    logged = storage.history("total_loss").values()
    assert all(torch.isfinite(torch.tensor(v)) for v, _ in logged)
    # A finite loss whose gradient is not finite is a number like any other.
    assert [i for _, i in logged] == ([0, 1, 2, 3, 4, 5] if fault == "gradient" else [1, 2, 4, 5])


def test_looking_for_the_cause_changes_nothing():
    """Buffers and random numbers, which it uses: the rest of the training is as without it."""
    data = batches(faults=[(2, "loss")])
    looked, not_looked = (
        make_trainer(copy.deepcopy(data), log_period=period, max_skipped_steps=1)
        for period in (1, 20)
    )
    torch.manual_seed(3)
    run(looked)
    generators = random_state()
    torch.manual_seed(3)
    run(not_looked)
    assert equal(state(looked), state(not_looked))
    assert torch.equal(generators["torch"], random_state()["torch"])


def test_training_stops_after_the_allowed_skips(log):
    """With the number in the error. Steps after it change nothing."""
    data = batches(faults=[(1, "loss"), (3, "pixels"), (4, "pixels")])
    trainer = make_trainer(data, max_skipped_steps=1, log_period=20)
    with pytest.raises(NonFiniteError, match=r"iteration=3 .*skipped before: 1 "):
        run(trainer)
    expected = make_trainer(batches(faults=[(1, "loss")])[:3], max_skipped_steps=1)
    run(expected)
    assert equal(state(trainer), state(expected))


def test_number_of_skipped_steps_is_saved():
    """A resumed training goes on counting."""
    trainer = make_trainer(batches(faults=[(1, "loss")]), max_skipped_steps=1)
    assert "skipped_steps" not in trainer.state_dict()
    run(trainer)
    saved = trainer.state_dict()
    assert saved["skipped_steps"] == 1
    resumed = make_trainer(batches(faults=[(2, "loss")]), max_skipped_steps=1, log_period=20)
    resumed.load_state_dict(saved)
    before = state(resumed)
    with pytest.raises(NonFiniteError, match="iteration=2 "):
        run(resumed)
    assert not equal(state(resumed), before)  # steps 0 and 1
    fresh = make_trainer(batches(), max_skipped_steps=1)
    fresh.load_state_dict({k: v for k, v in saved.items() if k != "skipped_steps"})
    assert "skipped_steps" not in fresh.state_dict()


def test_large_losses_and_gradients_are_no_error():
    """Up to the largest float32."""
    data = batches()
    for record in data[2]:
        record["factor"] = 1e37
    trainer = make_trainer(data[:3])
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    storage = run(trainer)
    assert storage.latest()["total_loss"][0] > 1e36
    assert max(p.grad.abs().max() for p in trainer.model.parameters()) > 1e36


@pytest.mark.parametrize("fault", FAULTS)
def test_flag_is_read_before_a_save(fault):
    """Between two logs."""
    trainer = make_trainer(batches(faults=[(1, fault)]), log_period=20)
    with EventStorage() as storage:
        for trainer.iter in (0, 1):
            storage.iter = trainer.iter
            trainer.run_step()
        with pytest.raises(NonFiniteError, match="iteration=1 .*1_1.png"):
            trainer.check_finite()
        assert [i for _, i in storage.history("total_loss").values()] == [0]


def test_check_writes_the_log_that_waits():
    """Each loss once."""
    trainer = make_trainer(batches(), log_period=4)
    with EventStorage() as storage:
        for trainer.iter in range(6):
            storage.iter = trainer.iter
            trainer.run_step()
            if trainer.iter == 1:
                trainer.check_finite()
        trainer.check_finite()
    assert [i for _, i in storage.history("total_loss").values()] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (lambda t: t.model.last.weight.data, "last.weight"),
        (lambda t: t.model.norm.running_var, "norm.running_var"),
        (
            lambda t: t.optimizer.state[t.model.linear.bias]["momentum_buffer"],
            "momentum_buffer of linear.bias",
        ),
    ],
)
def test_check_looks_at_all_that_a_checkpoint_holds(where, name, bad):
    """Weights, buffers and the optimizer's state."""
    trainer = make_trainer(batches())
    run(trainer)
    trainer.check_finite()
    where(trainer).view(-1)[-1] = bad
    with pytest.raises(NonFiniteError) as caught:
        trainer.check_finite()
    text = str(caught.value)
    assert "iteration=5 " in text and f"the weights after the step ({name})" in text
    assert "5_0.png" in text and "SOLVER.BASE_LR" in text


def test_mask_may_be_infinite():
    """A buffer that held infinity before the first step. A NaN is no mask."""
    trainer = make_trainer(batches())
    trainer.model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    trainer.model.register_buffer("broken", torch.full((2,), torch.nan))
    run(trainer)
    with pytest.raises(NonFiniteError, match=r"the weights after the step \(broken\)"):
        trainer.check_finite()
    trainer.model.broken.zero_()
    trainer.check_finite()


def test_check_before_the_first_step():
    """Weights that are broken already, and weights that are not."""
    trainer = make_trainer(batches())
    trainer.iter = 0
    with EventStorage():
        trainer.check_finite()
        trainer.model.last.weight.data[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="last.weight"):
            trainer.check_finite()


@pytest.mark.parametrize("period", [1, 20])
def test_record_has_what_repeats_the_step(tmp_path, period):
    """Images, samples, random states, config and last checkpoint, as strict JSON."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    trainer = make_trainer(
        batches(faults=[(3, "loss")]),
        log_period=period,
        write_record=functools.partial(write_record, cfg),
    )
    generators = []
    forward = trainer.model.forward

    def watched(batch):
        generators.append(random_state())
        return forward(batch)

    trainer.model.forward = watched
    with pytest.raises(NonFiniteError) as caught:
        run(trainer)
    path = tmp_path / "nonfinite_0000003.json"
    assert f"`retina replay {path}` repeats the step" in str(caught.value)
    assert [x.name for x in tmp_path.glob("nonfinite*")] == [path.name]

    def refuse(text):
        raise ValueError(text)

    json.loads(path.read_text(), parse_constant=refuse)  # NaN and Infinity are no JSON
    record = StepRecord.read(path)
    assert record.iteration == 3 and record.last_checkpoint == "model_0000001.pth"
    assert record.config == cfg.dump()
    (process,) = record.processes
    assert process.losses["loss_a"] == torch.inf
    assert process.images == [{"file_name": f"3_{j}.png", "image_id": None} for j in range(4)]
    assert process.samples == [[12 + j, j] for j in range(4)]
    assert process.bad_images == ["3_1.png"] and process.loader == {"seed": 5}
    saved = from_json(process.random_states)
    assert torch.equal(saved["torch"], generators[3]["torch"])
    assert torch.equal(saved["numpy"][1], generators[3]["numpy"][1])
    assert tuple(saved["python"][1]) == generators[3]["python"][1]


def test_record_that_cannot_be_written_is_a_warning(tmp_path, log):
    """The error of the step is still the one to see."""
    cfg = get_cfg()
    (tmp_path / "file").write_text("")
    cfg.OUTPUT_DIR = str(tmp_path / "file")
    trainer = make_trainer(
        batches(faults=[(0, "loss")]), write_record=functools.partial(write_record, cfg)
    )
    with pytest.raises(NonFiniteError, match="iteration=0") as caught:
        run(trainer)
    assert "replay" not in str(caught.value)
    assert any("cannot write what is needed to repeat" in m for m in log.messages)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2, "processes": []}', "\0\xff"]
)
def test_other_files_are_no_records(tmp_path, content):
    path = tmp_path / "nonfinite_0000000.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="nonfinite_0000000.json") as caught:
        StepRecord.read(path)
    assert "\n" not in str(caught.value)


def test_missing_record_raises(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*nonfinite_7.json"):
        StepRecord.read(tmp_path / "nonfinite_7.json")


# The detector: the error names loss, level and images.


def record(i, boxes=1):
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 1, 60, 60]])[:boxes])
    instances.gt_classes = torch.tensor([1, 3])[:boxes]
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) * 255
    return {"image": pixels, "instances": instances, "file_name": f"{i}.png", "image_id": i}


def on_level(module, number, change):
    """Call ``change(output)`` for the given call of a module that is called once for each level."""
    calls = SimpleNamespace(count=0)

    def hook(module, args, output):
        calls.count += 1
        return change(output) if (calls.count - 1) % 5 == number else output

    module.register_forward_hook(hook)


def image_of(output, value):
    """Only the second image of a batch is spoiled; an image alone is not."""
    if len(output) < 2:
        return output
    factor = torch.ones(len(output), 1, 1, 1)
    factor[1] = value
    return output * factor


def spoil_gradient(output):
    if output.requires_grad:
        output.register_hook(lambda g: image_of(g, torch.nan))
    return output


def nan_pixels(model, data):
    data[1]["image"][0, 3, 4] = torch.nan


def nan_feature(model, data):
    model.backbone.register_forward_hook(
        lambda m, a, out: out | {"p5": image_of(out["p5"], torch.nan)}
    )


def inf_logits(model, data):
    on_level(model.head.cls_score, 2, lambda y: image_of(y, torch.inf))


def nan_deltas(model, data):
    on_level(model.head.bbox_pred, 1, lambda y: image_of(y, torch.nan))


def large_logits(model, data):
    on_level(model.head.cls_score, 3, lambda y: y + 3e38)


def nan_gradient_of_deltas(model, data):
    on_level(model.head.bbox_pred, 0, spoil_gradient)


def nan_gradient_of_a_parameter(model, data):
    model.head.cls_subnet[0].weight.register_hook(lambda g: g * torch.nan)


def nan_weight(model, data):
    model.backbone.fpn_lateral4.weight.data[0, 0] = torch.nan


ALL, SECOND = ["0.png", "1.png"], ["1.png"]


CASES = [
    (nan_pixels, "loss_cls nan, loss_box_reg nan", "the pixels, seen on level p3, p4", SECOND),
    (nan_feature, "loss_cls nan", "the features of level p5", SECOND),
    (inf_logits, "loss_cls", "the logits of level p5", SECOND),
    (nan_deltas, "loss_box_reg nan", "the deltas of level p4", SECOND),
    (large_logits, "loss_cls inf", "largest logits are 3e+38 on level p6", ALL),
    (
        nan_gradient_of_deltas,
        "the losses are finite",
        "the gradient of the deltas of level p3",
        SECOND,
    ),
    (
        nan_gradient_of_a_parameter,
        "the losses are finite",
        "the gradient of head.cls_subnet.0.weight",
        ALL,
    ),
    (
        nan_weight,
        "loss_cls nan",
        "the weights before the step (backbone.fpn_lateral4.weight), seen on level p3, p4",
        ALL,
    ),
]
# The other faults spoil the second image of a whole batch.
OF_ANY_BATCH = (nan_pixels, large_logits, nan_gradient_of_a_parameter, nan_weight)


@pytest.mark.parametrize(
    ("fault", "losses", "cause", "images", "options"),
    [(*case, {}) for case in CASES]
    + [
        pytest.param(*case, options, marks=pytest.mark.slow)
        for case in CASES
        for options in ({"passes": 2}, {"precision": torch.bfloat16})
        if case[0] in OF_ANY_BATCH
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_error_names_loss_level_and_images(tiny_cfg, fault, losses, cause, images, options):
    """And nothing of the model has changed."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    data = [record(0), record(1, boxes=2)]
    fault(model, data)
    trainer = StepTrainer(model, [data], build_optimizer(tiny_cfg, model), **options)
    before = [x.clone() for x in model.state_dict().values()]
    trainer.iter = 0
    with EventStorage() as storage, pytest.raises(NonFiniteError) as caught:
        trainer.run_step()
    text = str(caught.value)
    assert "iteration=0 " in text and f"): {losses}" in text and "\n" not in text
    assert cause in text and "; it begins in " in text
    named = "image" + ("s " if len(images) > 1 else " ") + ", ".join(images) + ": "
    assert named in text
    for x, y in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(x, y) or fault is nan_weight
    assert "total_loss" not in storage.latest()


@pytest.mark.parametrize(
    "keys",
    [
        ["MODEL.RETINANET.LOSS_IN_PLACE", True],
        ["MODEL.RETINANET.SAMPLER", "OHEM"],
        ["MODEL.RETINANET.NORMALIZER", "ema"],
        ["MODEL.ACTIVATION_CHECKPOINTING", True],
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
    ],
    ids=str,
)
def test_options_of_the_detector_do_not_hide_the_level(tiny_cfg, keys):
    """Also that of Detectron2's own detector."""
    tiny_cfg.merge_from_list(keys)
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    inf_logits(model, None)
    data = [record(0), record(1)]
    trainer = StepTrainer(model, [data], build_optimizer(tiny_cfg, model))
    trainer.iter = 0
    ema = getattr(getattr(model, "normalizer", None), "ema", torch.zeros(()))
    before = ema.clone()
    with EventStorage(), pytest.raises(NonFiniteError, match="level p5; image 1.png"):
        trainer.run_step()
    assert torch.equal(ema, before)
