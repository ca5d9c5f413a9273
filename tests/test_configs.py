"""Every config: its header, its settings and the model it builds, compared with docs/paper.yaml."""

import functools
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from reproduction.paper import METRICS, load_paper
from reproduction.plan import plain_value
from retina_plugin import add_retina_config
from retina_plugin.config import flatten
from retina_plugin.engine import setup_cfg
from retina_plugin.modeling import TimmFeatures

REPO = Path(__file__).parents[1]
CONFIGS = sorted(p.relative_to(REPO).as_posix() for p in REPO.glob("configs/**/*.yaml"))
CONFIGS = [name for name in CONFIGS if not name.startswith("configs/_base_/")]
TABLES = load_paper()
ROWS = [row for table in TABLES.values() for row in table.rows]

every_config = pytest.mark.parametrize("config", CONFIGS)
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def find(table, name):
    (row,) = (row for row in TABLES[table].rows if row.name == name)
    return row


def load(row):
    return setup_cfg(str(REPO / row.config))


@functools.cache
def resolved(config):
    """Key -> value of a config, without its output folder."""
    settings = flatten(setup_cfg(str(REPO / config)))
    settings.pop("OUTPUT_DIR")
    return settings


# ---- the files


def test_every_config_belongs_to_one_row():
    rows = [name for name in CONFIGS if not name.startswith(("configs/quick/", "configs/timm/"))]
    assert sorted(row.config for row in ROWS) == rows != CONFIGS


def header(config):
    """The comment before the first setting, as one line."""
    lines = (REPO / config).read_text().splitlines()
    assert max(map(len, lines)) <= 100
    first_setting = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("# ") for line in lines[:first_setting])


@every_row
def test_header_states_table_row_and_numbers(row):
    table = TABLES[row.table]
    where = "Section 5.1" if row.table == "5.1" else f"Table {row.table}"
    ap = ", ".join(f"{m} {row.metrics[m]:.1f}" for m in METRICS if m in row.metrics)
    paper = "In the paper, the training diverges."
    if not row.diverges:
        paper = f"The paper has {ap} on {table.split}."
    text = header(row.config)
    assert text.startswith(f'{where}: {table.title}. Row "{row.name}". {paper} ')
    assert len(re.findall(r"\bAP\w* \d", text)) == len(row.metrics.keys() & set(METRICS))
    assert " Trains on trainval35k, evaluates on minival. Choice" in text
    if row.table == "1e":
        assert f"at most {resolved(row.config)['INPUT.MAX_SIZE_TRAIN']} px" in text


@every_config
def test_header_states_choices_and_command(config):
    text = header(config)
    assert re.search(r"\. Choices?: ", text)
    assert re.search(rf" python train_net.py --config-file {config}( --num-gpus 8)?$", text)
    assert text.endswith(" --num-gpus 8") != config.startswith("configs/quick/")


@every_config
def test_config_has_at_most_15_settings(config):
    lines = (REPO / config).read_text().splitlines()
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines) <= 15


def test_output_folders_follow_the_file_names_and_differ():
    """With a shared folder, --resume would load the other config's checkpoint."""
    folders = {config: setup_cfg(str(REPO / config)).OUTPUT_DIR for config in CONFIGS}
    assert all(folder == f"output/{Path(config).stem}" for config, folder in folders.items())
    assert len(set(folders.values())) == len(CONFIGS)


# ---- settings of the rows


def choices(settings):
    """What the paper leaves open and depends on image size and backbone."""
    longer_side = round(1333 / 800 * settings["INPUT.MIN_SIZE_TEST"])
    is_resnext = settings["MODEL.RESNETS.NUM_GROUPS"] > 1
    weights = "FAIR/X-101-32x8d" if is_resnext else f"MSRA/R-{settings['MODEL.RESNETS.DEPTH']}"
    return {
        "INPUT.MAX_SIZE_TRAIN": longer_side,
        "INPUT.MAX_SIZE_TEST": longer_side,
        "MODEL.WEIGHTS": f"detectron2://ImageNetPretrained/{weights}.pkl",
        "MODEL.PIXEL_STD": [57.375, 57.120, 58.395] if is_resnext else [1.0, 1.0, 1.0],
        "MODEL.RESNETS.STRIDE_IN_1X1": not is_resnext,
    }


@every_row
def test_config_sets_what_the_paper_says_and_nothing_else(row):
    """Every other key is that of the default model, RetinaNet-50-600 of Table 1e."""
    default = resolved("configs/retina_R50_600.yaml")
    expected = {**default, **row.settings, **choices(row.settings)}
    assert plain_value(resolved(row.config)) == plain_value(expected)


@every_row
def test_optimizer_and_schedule(row):
    cfg, paper = load(row), row.settings
    optimizer = build_optimizer(cfg, torch.nn.Conv2d(1, 1, 1))
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert group["momentum"] == paper["SOLVER.MOMENTUM"]
        assert group["weight_decay"] == paper["SOLVER.WEIGHT_DECAY"]
        assert not group["nesterov"]
    multiplier = build_lr_scheduler(cfg, optimizer)._multiplier
    end, (first, second) = paper["SOLVER.MAX_ITER"], paper["SOLVER.STEPS"]
    base, drop = paper["SOLVER.BASE_LR"], paper["SOLVER.GAMMA"]

    def rate(iteration):
        return base * multiplier(iteration / end)

    expected = {cfg.SOLVER.WARMUP_ITERS: base, first - 1: base, first: base * drop}
    expected |= {second - 1: base * drop, second: base * drop**2, end - 1: base * drop**2}
    for iteration, value in expected.items():
        assert rate(iteration) == pytest.approx(value), iteration
    assert 0 < rate(0) < base and cfg.SOLVER.WARMUP_ITERS <= 1000  # a choice: a short warm-up


@every_row
def test_augmentation(row):
    """A training size is drawn; images are flipped with probability .5; nothing else happens."""
    cfg, paper = load(row), row.settings
    resize, flip = build_augmentation(cfg, is_train=True)
    assert isinstance(resize, ResizeShortestEdge) and isinstance(flip, RandomFlip)
    assert list(resize.short_edge_length) == paper["INPUT.MIN_SIZE_TRAIN"]
    assert resize.sample_style == "choice"
    assert (flip.horizontal, flip.vertical, flip.prob) == (True, False, 0.5)
    assert not cfg.INPUT.CROP.ENABLED
    (test_resize,) = build_augmentation(cfg, is_train=False)
    assert set(test_resize.short_edge_length) == {paper["INPUT.MIN_SIZE_TEST"]}
    assert max(paper["INPUT.MIN_SIZE_TRAIN"]) == paper["INPUT.MIN_SIZE_TEST"]
    assert resize.max_size == test_resize.max_size == cfg.INPUT.MAX_SIZE_TEST


@every_row
def test_test_dev_is_an_override(row):
    """Test-dev has images only: the evaluator writes the file to submit."""
    cfg = setup_cfg(str(REPO / row.config), ["DATASETS.TEST", "('coco_2017_test-dev',)"])
    (test_set,) = cfg.DATASETS.TEST
    assert test_set in DatasetCatalog
    assert "image_info_test-dev2017.json" in MetadataCatalog.get(test_set).json_file
    assert cfg.TEST.EVALUATORS == ("FastCOCOEvaluator",)
    assert len(MetadataCatalog.get("coco_2017_val").thing_classes) == 80
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 80


# ---- the models


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


PARTS = [
    *("backbone.bottom_up.res3", "backbone.bottom_up.res4", "backbone.bottom_up.res5"),
    *("backbone.fpn_lateral3", "backbone.fpn_output5", "backbone.top_block.p6"),
    *("backbone.top_block.p7", "head.cls_subnet", "head.bbox_subnet", "head.cls_score"),
    "head.bbox_pred",
]


def build_and_use(cfg):
    """Build the model, detect, train one step; what it is made of."""
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
    resnet = model.backbone.bottom_up
    is_timm = isinstance(resnet, TimmFeatures)
    for part in PARTS:
        if is_timm:  # layer2 is res3
            part = re.sub(r"res(\d)", lambda m: f"features.layer{int(m[1]) - 1}", part)
        assert any(n.startswith(part) for n in changed), part
    shapes = model.backbone.output_shape()
    facts = {}
    if not is_timm:
        groups, channels = resnet.res3[0].conv2.groups, resnet.res3[0].conv2.out_channels
        facts = {
            "blocks": [len(stage) for stage in resnet.stages],
            "groups": groups,
            "group_width": channels // 2 // groups,
        }
    return facts | {
        "frozen": {n.split(".")[2] for n, p in model.named_parameters() if not p.requires_grad},
        "levels": list(model.head_in_features),
        "strides": [shapes[f].stride for f in model.head_in_features],
        "channels": {shapes[f].channels for f in model.head_in_features},
        "convs": [
            sum(isinstance(m, torch.nn.Conv2d) for m in subnet)
            for subnet in (model.head.cls_subnet, model.head.bbox_subnet)
        ],
        "outputs": (model.head.cls_score.out_channels, model.head.bbox_pred.out_channels),
        "anchors": [cell.clone() for cell in model.anchor_generator.cell_anchors],
        "prior": prior,
        "loss": model.cls_loss,
        "sampler": model.sampler,
    }


@pytest.fixture(scope="module")
def facts_of():
    """Config -> what its model is made of. Configs with equal MODEL nodes share a model."""
    facts = {}

    def get(config):
        cfg = setup_cfg(str(REPO / config))
        key = cfg.MODEL.dump()
        if key not in facts:
            facts[key] = build_and_use(cfg)
        return facts[key]

    return get


@every_config
def test_model_detects_and_learns(config, facts_of):
    facts = facts_of(config)
    assert facts["levels"] == ["p3", "p4", "p5", "p6", "p7"]
    assert facts["strides"] == [8, 16, 32, 64, 128]


@every_row
def test_model_is_the_papers(row, facts_of):
    """Backbone, pyramid, subnets and anchors (section 4), prior, loss and sampler."""
    facts, paper = facts_of(row.config), row.settings
    retinanet = {k.removeprefix("MODEL.RETINANET."): v for k, v in paper.items()}
    depth = paper["MODEL.RESNETS.DEPTH"]
    assert facts["blocks"][-3:] == {50: [4, 6, 3], 101: [4, 23, 3]}[depth]
    assert facts["groups"] == paper["MODEL.RESNETS.NUM_GROUPS"]
    assert facts["group_width"] == paper.get("MODEL.RESNETS.WIDTH_PER_GROUP", 64)
    assert facts["frozen"] == {"stem", "res2"}  # a choice
    assert facts["levels"] == retinanet["IN_FEATURES"]
    assert facts["channels"] == {paper["MODEL.FPN.OUT_CHANNELS"]}
    assert facts["convs"] == [retinanet["NUM_CONVS"]] * 2
    assert facts["prior"] == pytest.approx(retinanet["PRIOR_PROB"])

    sizes = paper["MODEL.ANCHOR_GENERATOR.SIZES"]
    (ratios,) = paper["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"]
    num_anchors = len(sizes[0]) * len(ratios)
    assert facts["outputs"] == (num_anchors * 80, num_anchors * 4)
    for cell, sides in zip(facts["anchors"], sizes, strict=True):
        width, height = (cell[:, 2:] - cell[:, :2]).unbind(1)
        areas = torch.tensor(sides).square().repeat_interleave(len(ratios))
        assert torch.allclose((width * height).sort().values, areas, rtol=1e-4)
        expected = torch.tensor(ratios).repeat(len(sides)).sort().values
        assert torch.allclose((height / width).sort().values, expected, rtol=1e-4)

    loss, sampler = facts["loss"], facts["sampler"]
    assert type(loss).__name__ == retinanet["CLS_LOSS"]
    assert type(sampler).__name__ == retinanet["SAMPLER"]
    assert loss.alpha == retinanet["FOCAL_LOSS_ALPHA"]
    if retinanet["CLS_LOSS"] == "FocalLoss":
        assert loss.gamma == retinanet["FOCAL_LOSS_GAMMA"]
    if retinanet["CLS_LOSS"] == "FocalLossStar":
        assert loss.gamma == retinanet["FOCAL_STAR_GAMMA"]
        assert loss.beta == retinanet["FOCAL_STAR_BETA"]
    if retinanet["SAMPLER"] == "OHEM":
        assert sampler.batch_size == retinanet["OHEM.BATCH_SIZE"]
        assert sampler.nms_thresh == retinanet["OHEM.NMS_THRESH"]
        assert sampler.positive_fraction == retinanet.get("OHEM.POSITIVE_FRACTION")


# ---- the protocols in _base_

# Reference: the code of Detectron, the authors' first implementation.
DETECTRON1 = {
    "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
    "MODEL.RETINANET.NORMALIZER": "per_gpu",
    "MODEL.RETINANET.LOW_QUALITY_MATCHES": "above_background",
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.11,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "SOLVER.BIAS_LR_FACTOR": 2.0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "SOLVER.WARMUP_FACTOR": 1 / 3,
    "SOLVER.WARMUP_ITERS": 500,
}
PROTOCOLS = ("paper", "detectron1", "detectron2")


def protocol_file(name):
    return REPO / "configs" / "_base_" / f"protocol_{name}.yaml"


@pytest.fixture
def with_protocols(tmp_path):
    """A config that inherits a row and protocols, in this order."""

    def merge(row, *protocols):
        bases = [REPO / row.config, *map(protocol_file, protocols)]
        path = tmp_path / "merged.yaml"
        path.write_text(yaml.safe_dump({"_BASE_": [str(base) for base in bases]}))
        return setup_cfg(str(path), ["OUTPUT_DIR", "out"])

    return merge


def test_protocols_set_the_same_keys():
    """So any replaces any other; none has a base."""
    for name in PROTOCOLS:
        settings = yaml.safe_load(protocol_file(name).read_text())
        assert flatten(settings).keys() == DETECTRON1.keys()


@pytest.mark.parametrize("row", TABLES["1e"].rows, ids=str)
def test_protocol_changes_its_own_keys_and_the_last_wins(row, with_protocols):
    plain = flatten(with_protocols(row))
    alone = {name: flatten(with_protocols(row, name)) for name in PROTOCOLS}
    for name, got in alone.items():
        assert {key for key in plain if plain[key] != got[key]} <= DETECTRON1.keys()
        assert got.keys() == plain.keys()
        for other in PROTOCOLS:
            assert flatten(with_protocols(row, other, name)) == got
    assert len({str(got) for got in alone.values()}) == 3


@pytest.mark.parametrize("name", ["R50-800", "R101-800"])
def test_papers_protocol_changes_nothing_at_800_px(name, with_protocols):
    row = find("1e", name)
    assert with_protocols(row, "paper") == with_protocols(row)


def test_detectrons_protocol(with_protocols):
    got = flatten(with_protocols(find("1e", "R50-800"), "detectron1"))
    assert {key: got[key] for key in DETECTRON1} == DETECTRON1


def test_detectron2s_protocol_is_its_own_config(with_protocols):
    """The YAML of the model zoo on top of Detectron2's defaults."""
    cfg = add_retina_config(get_cfg())
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    theirs, ours = flatten(cfg), flatten(with_protocols(find("1e", "R50-800"), "detectron2"))
    assert {key: ours[key] for key in DETECTRON1} == {key: theirs[key] for key in DETECTRON1}


@pytest.mark.parametrize(("name", "bias"), [("detectron1", (0.02, 0)), ("paper", (0.01, 1e-4))])
def test_learning_rate_and_decay_of_biases(name, bias, with_protocols):
    """Detectron: twice the learning rate, no decay. The paper's protocol: as for the weights."""
    layer = torch.nn.Conv2d(1, 1, 1)
    groups = build_optimizer(with_protocols(find("1e", "R50-800"), name), layer).param_groups
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {id(layer.weight): (0.01, 1e-4), id(layer.bias): bias}
