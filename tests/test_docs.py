"""Every code block of the documentation works; a page's blocks are tried in order in a folder."""

import contextlib
import importlib
import io
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch.distributed import run as torchrun
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks import command as benchmarks
from reproduction import figures
from retina_plugin.cli import COMMANDS
from retina_plugin.cli import main as retina
from retina_plugin.deploy.page import fetch_onnxruntime_web
from retina_plugin.deploy.parity import compare
from retina_plugin.engine import argument_parser, check_config, setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.losses import BOX_LOSS_REGISTRY, CLS_LOSS_REGISTRY
from retina_plugin.predict.video import VideoWriter
from retina_plugin.weights.public_models import MODELS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]

DEMO = "--config-file quick/digits_R18.yaml --weights output/digits_R18/model_final.pth"
DEPLOYMENT = "docs/deployment.md"  # its commands export: they are parsed, a slow test runs them
TUTORIAL = (
    "docs/tutorial.md"  # its commands after the first: they are parsed, a slow test runs them
)
SHIPPED = [
    f"retina export {DEMO} --output digits.onnx",
    f"retina check digits.onnx {DEMO}",
    "python standalone.py digits.onnx street.jpg --score 0.5 --draw drawn",
]

FIGURES = [
    "python -m reproduction.figures fig1 fig5 fig6 table1e",
    "python -m reproduction.figures fig2 --points mine.csv",
    "python -m reproduction.figures fig4 --config-file my.yaml --weights model_final.pth "
    "--images 500",
    "python -m reproduction.figures fig7 --ledger star.json",
]

# Commands that are only parsed, and why. Everything else is run.
PARSED_ONLY = {
    "make setup": "needs the network",
    "make demo": "takes minutes",
    "make test": "is this",
    "make test-slow": "takes minutes",
    "make coverage": "is this, slower",
    "make help": "needs no test of its own",
    "retina predict --model torchvision/retinanet_resnet50_fpn_v2 street.jpg": "the network",
    **dict.fromkeys(SHIPPED, "test_readme_ships runs it"),
    "python train_net.py --config-file configs/retina_R101_800.yaml --num-gpus 8": "COCO, 8 GPUs",
    "python train_net.py --config-file configs/retina_R101_800.yaml --eval-only MODEL.WEIGHTS "
    "model.pth DATASETS.TEST \"('coco_2017_test-dev',)\"": "COCO",
    "python train_net.py --config-file configs/retina_R101_800.yaml --num-gpus 8 --num-machines 2 "
    "--machine-rank 0 --dist-url tcp://node0:29500": "two machines",
    "torchrun --standalone --nproc_per_node 8 --max-restarts 3 train_net.py --resume --config-file "
    "configs/retina_R101_800.yaml": "COCO, 8 GPUs",
    "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node0:29500 "
    "--max-restarts 3 train_net.py --resume --config-file configs/retina_R101_800.yaml": "machines",
    "python -m http.server --bind 127.0.0.1 --directory site": "serves until it is stopped",
    "python -m benchmarks": "takes minutes",
    "python -m benchmarks --stage loss --device cuda": "a GPU",
    "python -m reproduction.reproduce 1b --scale paper": "COCO, GPUs",
    'python -m reproduction.reproduce 1b --scale mini --rows "gamma=2" --seeds 1 --ledger '
    "mine.json": "takes minutes",
    "python -m reproduction.evidence": "takes minutes",
    "python -m reproduction.reproduce 3 --scale mini --rows FL --ledger star.json": "takes minutes",
    'python -m reproduction.reproduce 3 --scale mini --rows FL "FL* gamma=4 beta=0" --ledger '
    "star.json --set MODEL.RETINANET.NUM_CLASSES 80 DATASETS.TRAIN \"('digits_sparse_80_train',)\" "
    "DATASETS.TEST \"('digits_sparse_80_val',)\"": "takes minutes",
    'python -m reproduction.reproduce 3 --scale mini --rows "FL* gamma=2 beta=1" --ledger '
    "star.json --set MODEL.RETINANET.FOCAL_STAR_GAMMA 3.0": "takes minutes",
    **dict.fromkeys(FIGURES, "tests/reproduction/test_figures.py draws them"),
}


def blocks(page):
    """(language, text, file) of each code block; file is the name in backticks before a colon."""
    found = re.finditer(r"(?:`([\w.]+)`[^`\n]*:\n\n)?```(\w*)\n(.*?)```", page, re.DOTALL)
    return [(m[2], m[3], m[1]) for m in found]


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_digits):
    """What the pages assume: a checkout's configs, an image, a dataset, a model-zoo file."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite("street.jpg", image)
    (tmp_path / "photos").mkdir()
    cv2.imwrite("photos/a.jpg", image)
    with VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as video:
        video.write(image)
    _write_demo_weights()
    for split in ("train", "val"):
        coco = json.loads((tiny_digits / f"{split}.json").read_text())
        coco["categories"] = [{"id": i, "name": f"car {i}"} for i in (1, 2, 3)]
        for annotation in coco["annotations"]:
            annotation["category_id"] = annotation["category_id"] % 3 + 1
        (tmp_path / "cars").mkdir(exist_ok=True)
        (tmp_path / "cars" / f"{split}.json").write_text(json.dumps(coco))
        shutil.copytree(tiny_digits / split, tmp_path / "cars" / "images", dirs_exist_ok=True)
    monkeypatch.setattr(model_zoo, "get_checkpoint_url", model_zoo_file)
    modules, datasets = set(sys.modules), set(DatasetCatalog)
    registries = [CLS_LOSS_REGISTRY, BOX_LOSS_REGISTRY]
    registered = [dict(registry._obj_map) for registry in registries]  # fvcore can't take back
    yield tmp_path
    for registry, entries in zip(registries, registered, strict=True):
        registry._obj_map = entries
    for name in set(sys.modules) - modules:  # but not libraries: onnx aborts at a second import
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).resolve().is_relative_to(tmp_path.resolve()):
            del sys.modules[name]
    for name in set(DatasetCatalog) - datasets:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _write_demo_weights():
    """Random weights in the place of those that `make demo` trains."""
    cfg = setup_cfg("quick/digits_R18.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    model.head.cls_score.weight.data.normal_(std=0.3)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    torch.save({"model": model.state_dict()}, Path(cfg.OUTPUT_DIR, "model_final.pth"))


def _write_torchvision_weights():
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    torch.save(RetinaNet(backbone, 4).state_dict(), "net.pth")


def model_zoo_file(name):
    """Instead of the download: random weights of Detectron2's RetinaNet in the real file's form."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    # A random network gives every anchor nearly the same score. Spread the scores, or their order
    # is a matter of rounding.
    model.head.cls_score.bias.data.fill_(-2.0)
    with torch.no_grad():
        image = torch.as_tensor(cv2.imread("street.jpg").transpose(2, 0, 1))
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        logits, deltas = model.head([features[name] for name in model.head_in_features])
        for outputs, layer in ((logits, model.head.cls_score), (deltas, model.head.bbox_pred)):
            layer.weight.mul_(0.5 / torch.cat([x.flatten() for x in outputs]).std())
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    path = Path("model_final_zoo.pkl")
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    return str(path)


def run_python(text):
    """The block's output."""
    path = Path("block.py")
    path.write_text(text)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(path))
    return printed.getvalue()


def try_command(command, run=True):
    """Run a command, or parse it if it is in PARSED_ONLY or ``run`` is false."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets and command in PARSED_ONLY
    elif words[:2] == ["python", "train_net.py"] or words[0] == "torchrun":
        assert command in PARSED_ONLY
        if words[0] == "torchrun":
            assert torchrun.parse_args(words[1:]).training_script == "train_net.py"
        args = argument_parser().parse_args(words[words.index("train_net.py") + 1 :])
        cfg = setup_cfg(args.config_file, args.opts)
        if "coco_2017" not in str(cfg.DATASETS):
            check_config(cfg)
    elif words[:2] == ["python", "-m"] and words[2] == "benchmarks":
        assert command in PARSED_ONLY
        benchmarks.argument_parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "reproduction.figures"]:
        args = figures.argument_parser().parse_args(words[3:])
        assert {*args.names} <= {*figures.FIGURES, "all"}
        if command not in PARSED_ONLY:
            figures.main(words[3:])
    elif words[:2] == ["python", "standalone.py"] or words[2:3] == ["http.server"]:
        assert command in PARSED_ONLY or not run
    elif words[:2] == ["python", "-m"]:
        dry = [] if "--dry-run" in words else ["--dry-run"]
        assert not dry or command in PARSED_ONLY
        importlib.import_module(words[2]).main([*words[3:], *dry])
    else:
        assert words[0] == "retina" and words[1] in COMMANDS
        if command in PARSED_ONLY or not run:
            module = importlib.import_module(f"retina_plugin.cli.{words[1]}")
            args = module.argument_parser().parse_args(words[2:])
            assert getattr(args, "model", None) is None or args.model in MODELS
        else:
            retina(words[1:])


@pytest.mark.parametrize("page", PAGES)
def test_page(page, folder, capsys):
    tried = 0
    run = page not in (DEPLOYMENT, TUTORIAL)
    if "net.pth" in (ROOT / page).read_text():
        _write_torchvision_weights()
    for language, text, file in blocks((ROOT / page).read_text()):
        tried += 1
        if language == "sh":
            for line in text.splitlines():
                command = line.split(" #")[0].strip()
                if command:
                    try_command(command, run)
        elif language == "yaml":
            path = Path(file or "block.yaml")
            path.write_text(text)
            cfg = setup_cfg(str(path))
            if "coco_2017" not in str(cfg.DATASETS):
                check_config(cfg)
        else:
            assert language == "python", f"{page}: a block without a language that is tried"
            if file:
                Path(file).write_text(text)  # a YAML imports it
            elif not run:
                compile(text, page, "exec")
            else:
                run_python(text)
    assert tried == (ROOT / page).read_text().count("```") / 2


@pytest.fixture
def _untimed_exports(monkeypatch):
    """Exports that compare each size once: a file takes a minute as it is."""
    monkeypatch.setitem(compare.__kwdefaults__, "seconds", 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("_untimed_exports")
def test_readme_ships(folder, capsys):
    """Its export, check and standalone commands, in their order."""
    for command in SHIPPED[:2]:
        retina(shlex.split(command)[1:])
    assert "difference" in capsys.readouterr().out
    subprocess.run([sys.executable, *shlex.split(SHIPPED[2])[1:]], check=True)
    assert Path("drawn", "street.png").is_file()


@pytest.mark.slow
def test_tutorial(folder, tiny_digits, capsys):
    """Its six commands in their order, on a folder of VOC, with a small base and few iterations."""
    coco = json.loads((tiny_digits / "train.json").read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    (folder / "traffic" / "Annotations").mkdir(parents=True)
    shutil.copytree(tiny_digits / "train", folder / "traffic" / "JPEGImages")
    for image in coco["images"]:
        objects = ""
        for a in coco["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = a["bbox"]
                box = dict(xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
                text = "".join(f"<{key}>{value}</{key}>" for key, value in box.items())
                name = names[a["category_id"]]
                objects += f"<object><name>{name}</name><bndbox>{text}</bndbox></object>"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        xml = folder / "traffic" / "Annotations" / f"{Path(image['file_name']).stem}.xml"
        xml.write_text(f"<annotation>{size}{objects}</annotation>")
    text = "".join(text for language, text, _ in blocks((ROOT / TUTORIAL).read_text()))
    more = {"init": "--base _base_/digits_R18.yaml SOLVER.MAX_ITER 2 SOLVER.STEPS ()"}
    commands = [shlex.split(line) for line in text.splitlines()]
    assert [words[1] for words in commands] == "split init doctor train predict report".split()
    for words in commands:
        try:
            retina([*words[1:], *more.get(words[1], "").split()])
        except SystemExit as end:  # the doctor's exit code: warnings are expected of 8 images
            assert words[1] == "doctor" and end.code in (0, None), end
    assert Path("report", "report.html").is_file() and Path("found", "predictions.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("_untimed_exports")
def test_deployment_page(folder, capsys):
    """Its commands and programs in their order, each program in a process of its own."""
    pytest.importorskip("openvino")
    try:
        fetch_onnxruntime_web()
    except ConfigError as error:
        pytest.skip(str(error))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for language, text, _ in blocks((ROOT / DEPLOYMENT).read_text()):
        if language == "python":
            command = ["-c", text]
        else:
            for line in text.splitlines():
                words = shlex.split(line)
                if words[0] == "retina":
                    retina(words[1:])
            command = words[1:] if words[1] == "standalone.py" else []
        if command:
            words = [sys.executable, *command]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)
    assert "difference" in capsys.readouterr().out
    for file in ("check.json", "found.json", "drawn/street.png", "site/second.onnx"):
        assert Path(file).is_file()


def test_parsed_commands_are_still_there():
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    for command in PARSED_ONLY:
        assert command in text


@pytest.mark.slow
def test_model_zoo_weights_detect_as_in_detectron2(folder):
    """The README's ten lines find what Detectron2's own RetinaNet finds, in its order.

    To the bit with Detectron2's resize, which is the mapper's that has its name.
    """
    (code,) = [text for _, text, _ in blocks((ROOT / "README.md").read_text()) if "zoo" in text]
    own = '"FocalRetinaNet"'
    assert own in code
    Path("block.py").write_text(code.replace(own, f'{own}, "INPUT.MAPPER", "DatasetMapper"'))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ran = runpy.run_path("block.py")
    assert re.search(r"num_instances=[1-9]", printed.getvalue())
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(ran["name"]))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "model_final_zoo.pkl", "cpu"
    expected = DefaultPredictor(cfg)(cv2.imread("street.jpg"))["instances"]
    ours = ran["predictor"]("street.jpg").to_instances()[: len(expected)]
    assert torch.equal(ours.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(ours.scores, expected.scores)
    assert torch.equal(ours.pred_classes, expected.pred_classes)


def test_own_loss_of_the_readme_trains(folder, tiny_cfg):
    for _, text, file in blocks((ROOT / "README.md").read_text()):
        if file in ("my_loss.py", "squared.yaml"):
            Path(file).write_text(text)
    short = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "OUTPUT_DIR", str(folder / "out")]
    tiny = ["DATASETS.TRAIN", str(tiny_cfg.DATASETS.TRAIN), "DATASETS.TEST", "()"]
    retina(["train", "--config-file", "squared.yaml", "--num-gpus", "0", *short, *tiny])
    config = (folder / "out" / "config.yaml").read_text()
    assert "CLS_LOSS: SquaredCrossEntropy" in config
    assert (folder / "out" / "model_final.pth").is_file()


def test_links_lead_somewhere():
    """Links within the repository, of every page."""
    for page in [*PAGES, "CHANGELOG.md", "SECURITY.md"]:
        path = ROOT / page
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("name", ["configuration", "deployment", "models", "reliability"])
def test_page_is_generated(name):
    page = runpy.run_path(str(ROOT / "docs" / f"make_{name}.py"))["page"]()
    assert (ROOT / "docs" / f"{name}.md").read_text() == page, "run `make docs`"


def test_tests_that_the_reliability_page_names_exist():
    assert not runpy.run_path(str(ROOT / "docs" / "make_reliability.py"))["missing_tests"]()
