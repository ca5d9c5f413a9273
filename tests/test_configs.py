"""Every YAML: its numbers against the paper's, its header, one training step and one inference."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from retina_plugin import add_retina_config
from retina_plugin.engine import Trainer, check_config, import_user_modules, setup_cfg
from retina_plugin.evaluation import EVALUATOR_REGISTRY
from retina_plugin.losses import BOX_LOSS_REGISTRY, CLS_LOSS_REGISTRY
from retina_plugin.modeling import ANCHOR_SAMPLER_REGISTRY, RETINANET_HEAD_REGISTRY

# Section 4: five levels, three scales an octave, three ratios.
SCALES = {count: [2 ** (k / count) for k in range(count)] for count in (1, 2, 3, 4)}
RATIOS = {1: [1.0], 3: [0.5, 1.0, 2.0]}
# Table 2's jitter; its range is not published.
JITTER = (640, 672, 704, 736, 768, 800)


def focal(gamma, alpha):
    return ("FocalLoss", {"alpha": alpha, "gamma": gamma})


def cross_entropy(alpha):
    return ("CrossEntropy", {"alpha": alpha})


def row(table, row, ap, split="minival", **changes):
    """One row of the paper; what is not given is what sections 4.1 and 5 say of every row."""
    return {
        "table": table,
        "row": row,
        "ap": dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), ap.split(), strict=False)),
        "split": split,
        "depth": 50,
        "groups": 1,
        "train_scales": (600,),
        "test_scale": 600,
        "iterations": 90_000,
        "steps": (60_000, 80_000),
        "scales": 3,
        "ratios": 3,
        "prior": 0.01,
        "loss": focal(2.0, 0.25),
        "sampler": ("AllAnchors", {}),
        **changes,
    }


def dot(number):
    """.25 for 0.25, as headers write it."""
    return f"{number:g}".removeprefix("0") if number else "0"


def rows_of_tables_1e_and_2():
    table_1e = {
        (50, 400): "30.5 47.8 32.7 11.2 33.8 46.1",
        (50, 500): "32.5 50.9 34.8 13.9 35.8 46.7",
        (50, 600): "34.3 53.2 36.9 16.2 37.4 47.4",
        (50, 700): "35.1 54.2 37.7 18.0 39.3 46.4",
        (50, 800): "35.7 55.0 38.5 18.9 38.9 46.3",
        (101, 400): "31.9 49.5 34.1 11.6 35.8 48.5",
        (101, 500): "34.4 53.1 36.8 14.7 38.5 49.1",
        (101, 600): "36.0 55.2 38.7 17.4 39.6 49.7",
        (101, 700): "37.1 56.6 39.8 19.1 40.6 49.4",
        (101, 800): "37.8 57.5 40.8 20.2 41.1 49.2",
    }
    for (depth, size), ap in table_1e.items():
        changes = {"depth": depth, "train_scales": (size,), "test_scale": size}
        name = f"RetinaNet-{depth}-{size}"
        yield f"retina_R{depth}_{size}", row("Table 1e", name, ap, "test-dev", **changes)
    recipe = {"depth": 101, "train_scales": JITTER, "test_scale": 800}
    recipe |= {"iterations": 135_000, "steps": (90_000, 120_000)}
    resnet, resnext = "39.1 59.1 42.3 21.8 42.7 50.2", "40.8 61.1 44.1 24.1 44.2 51.2"
    yield (
        "table2/retina_R101_800_jitter",
        row("Table 2", "RetinaNet with ResNet-101-FPN", resnet, "test-dev", **recipe),
    )
    yield (
        "table2/retina_X101_32x8d_800_jitter",
        row("Table 2", "ResNeXt-32x8d-101-FPN", resnext, "test-dev", **recipe, groups=32),
    )


def rows_of_section_51():
    name = "CE with pi .01"
    yield (
        "section51_init/ce_pi0.01",
        row("Section 5.1", name, "30.2", loss=cross_entropy(None), prior=0.01),
    )
    yield (
        "section51_init/ce_pi0.5",  # diverges
        row("Section 5.1", "CE with pi .5", "", loss=cross_entropy(None), prior=0.5),
    )
    table_1a = {
        0.1: "0.0 0.0 0.0",
        0.25: "10.8 16.0 11.7",
        0.5: "30.2 46.7 32.8",
        0.75: "31.1 49.4 33.0",
        0.9: "30.8 49.7 32.3",
        0.99: "28.7 47.4 29.9",
        0.999: "25.1 41.7 26.1",
    }
    for alpha, ap in table_1a.items():
        name = f"alpha-balanced CE with alpha {dot(alpha)};"
        yield f"table1a_alpha/ce_alpha{alpha}", row("Table 1a", name, ap, loss=cross_entropy(alpha))
    table_1b = {
        (0, 0.75): "31.1 49.4 33.0",
        (0.1, 0.75): "31.4 49.9 33.1",
        (0.2, 0.75): "31.9 50.7 33.4",
        (0.5, 0.5): "32.9 51.7 35.2",
        (1, 0.25): "33.7 52.0 36.2",
        (2, 0.25): "34.0 52.5 36.5",
        (5, 0.25): "32.2 49.6 34.8",
    }
    for (gamma, alpha), ap in table_1b.items():
        name = f"FL with gamma {dot(gamma)} and alpha {dot(alpha)};"
        loss = focal(float(gamma), alpha)
        yield f"table1b_gamma/fl_gamma{gamma}", row("Table 1b", name, ap, loss=loss)
    table_1d = {
        (0.7, 128, None): "31.1 47.2 33.2",
        (0.7, 256, None): "31.8 48.8 33.9",
        (0.7, 512, None): "30.6 47.0 32.6",
        (0.5, 128, None): "32.8 50.3 35.1",
        (0.5, 256, None): "31.0 47.4 33.0",
        (0.5, 512, None): "27.6 42.0 29.2",
        (0.5, 128, 0.25): "31.1 47.2 33.2",
        (0.5, 256, 0.25): "28.3 42.4 30.3",
        (0.5, 512, 0.25): "24.0 35.5 25.8",
    }
    for (nms, size, fraction), ap in table_1d.items():
        ohem = {"batch_size": size, "nms_thresh": nms, "positive_fraction": fraction}
        kind, file = ("OHEM 1:3", "ohem_1to3") if fraction else ("OHEM", "ohem")
        name = f"{kind} with batch size {size} and NMS at {dot(nms)}, ResNet-101;"
        changes = {"depth": 101, "loss": cross_entropy(None), "sampler": ("OHEM", ohem)}
        yield f"table1d_ohem/{file}_{size}_nms{nms}", row("Table 1d", name, ap, **changes)
    fl = row("Table 1d", "FL with ResNet-101;", "36.0 54.9 38.7", depth=101)
    yield "table1d_ohem/fl_R101_600", fl


def rows_of_section_52_and_table_3():
    table_1c = {
        (1, 1): "30.3 49.0 31.8",
        (2, 1): "31.9 50.0 34.0",
        (3, 1): "31.8 49.4 33.7",
        (1, 3): "32.4 52.3 33.9",
        (2, 3): "34.2 53.1 36.5",
        (3, 3): "34.0 52.5 36.5",
        (4, 3): "33.8 52.1 36.2",
    }
    for (scales, ratios), ap in table_1c.items():
        name = f"anchors of {scales} scale{'s' * (scales > 1)} x {ratios} aspect ratio"
        changes = {"scales": scales, "ratios": ratios}
        yield f"table1c_anchors/anchors_{scales}x{ratios}", row("Table 1c", name, ap, **changes)
    yield (
        "table3_fl_star/table3_ce",
        row("Table 3", "CE;", "31.1 49.4 33.0", loss=cross_entropy(0.75)),
    )
    yield "table3_fl_star/table3_fl", row("Table 3", "FL with gamma 2;", "34.0 52.5 36.5")
    for gamma, beta, ap in [(2, 1, "33.8 52.7 36.3"), (4, 0, "33.9 51.8 36.4")]:
        loss = ("FocalLossStar", {"alpha": 0.25, "gamma": float(gamma), "beta": float(beta)})
        name = f"FL* with gamma {gamma} and beta {beta};"
        file = f"table3_fl_star/fl_star_gamma{gamma}_beta{beta}"
        yield file, row("Table 3", name, ap, loss=loss)


# file -> what the paper says about it
PAPER = {
    f"{name}.yaml": values
    for rows in (rows_of_tables_1e_and_2, rows_of_section_51, rows_of_section_52_and_table_3)
    for name, values in rows()
}


def pytest_generate_tests(metafunc):
    """``any_config``: every file in configs/, seen from there, but for the fragments in _base_."""
    if "any_config" in metafunc.fixturenames:
        folder = Path(__file__).parents[1] / "configs"
        found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))
        metafunc.parametrize("any_config", [n for n in found if not n.startswith("_base_")])


@pytest.fixture(params=sorted(PAPER))
def name(request):
    """The file of a row of the paper."""
    return request.param


@pytest.fixture
def paper(name):
    return PAPER[name]


@pytest.fixture
def cfg(repo, name):
    return setup_cfg(str(repo / "configs" / name))


def header(path):
    """The comment lines before the first setting, as one string."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def test_every_file_is_named_here(repo):
    """A new config needs its numbers in the table above; quick/ has no numbers of the paper."""
    folder = repo / "configs"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
    rows = {name for name in found if name.split("/")[0] not in ("_base_", "quick")}
    assert rows == set(PAPER)
    assert any(name.startswith("quick/") for name in found)


def test_optimisation_is_the_papers(cfg, paper):
    """Batch, learning rate, momentum, decay and schedule, as the built optimizer has them."""
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert cfg.SOLVER.MAX_ITER == paper["iterations"]
    assert cfg.SOLVER.STEPS == paper["steps"]
    optimizer = build_optimizer(cfg, torch.nn.Conv2d(1, 1, 1))
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0.0001)
        assert not group["nesterov"]
    multiplier = build_lr_scheduler(cfg, optimizer)._multiplier

    def rate(iteration):
        return 0.01 * multiplier(iteration / paper["iterations"])

    assert cfg.SOLVER.BASE_LR == 0.01
    first, second = paper["steps"]
    expected = {cfg.SOLVER.WARMUP_ITERS: 0.01, first - 1: 0.01, first: 0.001}
    expected |= {second - 1: 0.001, second: 0.0001, paper["iterations"] - 1: 0.0001}
    for iteration, value in expected.items():
        assert rate(iteration) == pytest.approx(value), iteration
    assert 0 < rate(0) < 0.01 and cfg.SOLVER.WARMUP_ITERS <= 1000  # a choice, but short


def test_images_are_the_papers(cfg, paper):
    """Scales of training and test; the horizontal flip is the only other augmentation."""
    resize, flip = build_augmentation(cfg, is_train=True)
    assert isinstance(resize, ResizeShortestEdge) and isinstance(flip, RandomFlip)
    assert tuple(resize.short_edge_length) == paper["train_scales"]
    assert resize.sample_style == "choice"
    assert (flip.horizontal, flip.vertical, flip.prob) == (True, False, 0.5)
    assert not cfg.INPUT.CROP.ENABLED
    (test_resize,) = build_augmentation(cfg, is_train=False)
    assert set(test_resize.short_edge_length) == {paper["test_scale"]}
    # the long side is bounded in proportion, the same in training and test: a choice
    bound = 1333 / 800 * max(paper["train_scales"])
    assert resize.max_size == test_resize.max_size == pytest.approx(bound, abs=1)


def test_data_are_the_papers(cfg):
    """trainval35k to train, minival to evaluate: the images of train2017 and val2017."""
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
    assert len(MetadataCatalog.get("coco_2017_val").thing_classes) == 80
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 80


def test_test_dev_is_an_override(repo, name):
    """A registered set whose file has images only: the evaluator writes what is submitted."""
    path = str(repo / "configs" / name)
    cfg = setup_cfg(path, ["DATASETS.TEST", "('coco_2017_test-dev',)"])
    (test_set,) = cfg.DATASETS.TEST
    assert test_set in DatasetCatalog
    assert "image_info_test-dev2017.json" in MetadataCatalog.get(test_set).json_file
    assert cfg.TEST.EVALUATOR == "FastCOCOEvaluator"


def test_weights_are_of_the_backbone(cfg, paper):
    """ImageNet weights of the same depth and kind, with the pixel scale that they were made for."""
    url = cfg.MODEL.WEIGHTS
    assert url.startswith("detectron2://ImageNetPretrained/")
    if paper["groups"] == 32:
        assert url.endswith("/FAIR/X-101-32x8d.pkl")
        assert cfg.MODEL.PIXEL_STD == [57.375, 57.120, 58.395]
        assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    else:
        assert url.endswith(f"/MSRA/R-{paper['depth']}.pkl")
        assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
        assert cfg.MODEL.RESNETS.STRIDE_IN_1X1


def test_header(repo, name, paper, cfg):
    """Table and row, expected AP and split, what is a choice, the command."""
    text = header(repo / "configs" / name)
    assert text.startswith(f"{paper['table']}, ") and paper["row"] in text
    numbers = ", ".join(f"{metric} {value}" for metric, value in paper["ap"].items())
    expected = f"{numbers}." if numbers else "no AP: the training diverges."
    assert f"on {paper['split']} the paper has {expected}" in text
    assert "Trains on trainval35k; evaluates on minival." in text
    assert re.search(r"[Cc]hoices?:", text)
    if paper["table"] == "Table 1e":
        assert f"at most {cfg.INPUT.MAX_SIZE_TRAIN} px" in text
    assert text.endswith(f"python train_net.py --config-file configs/{name} --num-gpus 8")


def test_a_config_is_a_short_delta(repo, name):
    """At most 15 lines without comments."""
    lines = (repo / "configs" / name).read_text().splitlines()
    assert sum(1 for line in lines if line.strip() and not line.lstrip().startswith("#")) <= 15


def test_output_dir_follows_the_file(any_config, repo):
    """Any config, also of those in quick/, that names no other."""
    path = repo / "configs" / any_config
    assert setup_cfg(str(path)).OUTPUT_DIR.endswith(path.stem)


def test_no_two_configs_share_an_output_folder(repo):
    """Or --resume would go on with the other one's checkpoint."""
    files = [p for p in (repo / "configs").rglob("*.yaml") if p.parent.name != "_base_"]
    folders = [setup_cfg(str(path)).OUTPUT_DIR for path in files]
    assert len(files) > len(PAPER)
    assert sorted(folders) == sorted(set(folders))


def test_every_config_has_a_header(any_config, repo):
    """What it is and the command."""
    text = header(repo / "configs" / any_config)
    assert len(text) > 40
    assert f"python train_net.py --config-file configs/{any_config}" in text


def batch(num_classes):
    """Two images of 64 px with an object each."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for box in ([4.0, 4.0, 40.0, 40.0], [10.0, 20.0, 60.0, 62.0]):
        truth = Instances((64, 64), gt_boxes=Boxes(torch.tensor([box])))
        truth.gt_classes = torch.tensor([num_classes - 1])
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": truth, "height": 128, "width": 128})
    return inputs


@pytest.fixture(scope="module")
def used():
    """MODEL node -> its facts; configs that differ in images and schedule share a model."""
    return {}


PARTS = [
    *("backbone.bottom_up.res3", "backbone.bottom_up.res4", "backbone.bottom_up.res5"),
    *("backbone.fpn_lateral3", "backbone.fpn_output5", "backbone.top_block.p6"),
    *("backbone.top_block.p7", "head.cls_subnet", "head.bbox_subnet", "head.cls_score"),
    "head.bbox_pred",
]


def use(cfg):
    """Build the model, detect, train one step; facts about it."""
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    prior = model.head.cls_score.bias.sigmoid().mean().item()
    inputs = batch(cfg.MODEL.RETINANET.NUM_CLASSES)

    model.eval()
    for output in model(inputs):
        instances = output["instances"]
        assert instances.image_size == (128, 128)
        assert len(instances) <= cfg.TEST.DETECTIONS_PER_IMAGE
        assert torch.isfinite(instances.pred_boxes.tensor).all()
        assert ((instances.scores > 0) & (instances.scores <= 1)).all()

    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    with EventStorage():
        losses = model(inputs)
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert all(torch.isfinite(value) and value > 0 for value in losses.values())
    optimizer.zero_grad()
    sum(losses.values()).backward()
    for n, p in trainable.items():
        assert p.grad is not None and torch.isfinite(p.grad).all(), n
    optimizer.step()
    scheduler.step()
    changed = [n for n, p in trainable.items() if not torch.equal(p, before[n])]
    for part in PARTS:
        assert any(n.startswith(part) for n in changed), part

    resnet = model.backbone.bottom_up
    block = resnet.res3[0]
    return {
        "blocks": [len(stage) for stage in resnet.stages],
        "groups": block.conv2.groups,
        "frozen": {n.split(".")[2] for n, p in model.named_parameters() if not p.requires_grad},
        "levels": list(model.head_in_features),
        "strides": [model.backbone.output_shape()[f].stride for f in model.head_in_features],
        "channels": {model.backbone.output_shape()[f].channels for f in model.head_in_features},
        "subnet_convs": sum(isinstance(m, torch.nn.Conv2d) for m in model.head.cls_subnet),
        "outputs": (model.head.cls_score.out_channels, model.head.bbox_pred.out_channels),
        "prior": prior,
        "loss": (type(model.cls_loss).__name__, vars(model.cls_loss)),
        "sampler": (type(model.sampler).__name__, vars(model.sampler)),
    }


def used_model(cfg, used):
    key = cfg.MODEL.dump()
    if key not in used:
        used[key] = use(cfg)
    return used[key]


def test_one_step_and_one_inference(any_config, repo, used):
    """Every config builds a model that detects, gives a finite loss and learns everywhere."""
    facts = used_model(setup_cfg(str(repo / "configs" / any_config)), used)
    assert facts["levels"] == ["p3", "p4", "p5", "p6", "p7"]
    assert facts["strides"] == [8, 16, 32, 64, 128]


def test_models_are_the_papers(cfg, paper, used):
    """Backbone, pyramid, subnets and anchors (section 4), prior, loss and sampler of the row."""
    facts = used_model(cfg, used)
    assert facts["blocks"][-3:] == {50: [4, 6, 3], 101: [4, 23, 3]}[paper["depth"]]
    assert facts["groups"] == paper["groups"]
    assert facts["channels"] == {256}
    assert facts["subnet_convs"] == 4
    anchors = paper["scales"] * paper["ratios"]
    assert facts["outputs"] == (anchors * 80, anchors * 4)
    assert facts["prior"] == pytest.approx(paper["prior"])
    assert facts["loss"] == paper["loss"]
    assert facts["sampler"] == paper["sampler"]
    assert facts["frozen"] == {"stem", "res2"}  # a choice


def test_anchors_are_the_papers(cfg, paper):
    """Areas 32^2 to 512^2 times the scales of an octave, and the ratios."""
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert len(sizes) == 5
    for size, values in zip((32, 64, 128, 256, 512), sizes, strict=True):
        assert values == pytest.approx([size * scale for scale in SCALES[paper["scales"]]])
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [RATIOS[paper["ratios"]]]


def all_keys(node, prefix=""):
    keys = set()
    for key, value in node.items():
        is_node = isinstance(value, CfgNode)
        keys |= all_keys(value, f"{prefix}{key}.") if is_node else {prefix + key}
    return keys


def test_no_dead_knob(tiny_cfg, monkeypatch):
    """Every key that the plugin adds is read by what it is for; the recorder would miss none."""
    added = all_keys(add_retina_config(get_cfg())) - all_keys(get_cfg())
    assert {"MODEL.RETINANET.CLS_LOSS", "SOLVER.LR_PER_IMAGE", "TEST.EVALUATOR"} <= added
    cfg = tiny_cfg
    cfg.MODEL.RETINANET.DEAD = 1  # what the test is to find
    paths = {id(cfg): ""}

    def locate(node):
        for key, value in node.items():
            if isinstance(value, CfgNode):
                paths[id(value)] = f"{paths[id(node)]}{key}."
                locate(value)

    locate(cfg)
    read = set()
    getattr_ = CfgNode.__getattr__

    def recording(self, key):
        if id(self) in paths:
            read.add(paths[id(self)] + key)
        return getattr_(self, key)

    registries = {
        "HEAD": RETINANET_HEAD_REGISTRY,
        "CLS_LOSS": CLS_LOSS_REGISTRY,
        "SAMPLER": ANCHOR_SAMPLER_REGISTRY,
        "BBOX_REG_LOSS_TYPE": BOX_LOSS_REGISTRY,
    }
    choices = []  # every component once; each may have keys of its own
    for key, registry in registries.items():
        default = cfg.MODEL.RETINANET[key]
        choices += [(key, name, default) for name, _ in registry]
    with monkeypatch.context() as patch:
        patch.setattr(CfgNode, "__getattr__", recording)
        import_user_modules(cfg)
        check_config(cfg)
        for key, name, default in choices:
            cfg.MODEL.RETINANET[key] = name
            build_model(cfg)
            cfg.MODEL.RETINANET[key] = default
        for name, _ in EVALUATOR_REGISTRY:
            cfg.TEST.EVALUATOR = name
            Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = True, "bfloat16"
        Trainer.test(cfg, Trainer(cfg).model)
    assert added - read == set()
    assert "MODEL.RETINANET.DEAD" not in read
