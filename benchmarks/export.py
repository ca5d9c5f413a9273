"""Exported files: size, time and AP beside eager PyTorch; ours, Detectron2's, torchvision's.

    python -m benchmarks.export --weights output/digits_R18/model_final.pth
    python -m benchmarks.export --case detectron2 torchvision

Every file runs in this process, in turns with eager PyTorch, after its detections in one image have
been compared with eager PyTorch's. Results are written as JSON, from which docs/deployment.md is
generated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.testing import convert_scripted_instances
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn

from benchmarks.formats import Detections, Formats, Run
from benchmarks.inputs import model_cfg, spread_scores
from benchmarks.machine import describe_machine, keep_heap
from retina_plugin import get_config_file
from retina_plugin.data import digits
from retina_plugin.deploy import DenseModel, describe_model, load_exported, write_exported
from retina_plugin.deploy.check import compare_ap
from retina_plugin.deploy.export import load_for_export
from retina_plugin.deploy.images import find_images
from retina_plugin.deploy.quantize import CalibrationImages, quantize
from retina_plugin.deploy.runtime import ExportedModel

__all__ = ["CASES", "main"]

CASES = {
    "demo": "The demo model, 160 x 160",
    "R50": "R50, 400 x 600, random weights",
    "detectron2": "Detectron2's RetinaNet R50, 400 x 600, the same weights",
    "torchvision": "torchvision's RetinaNet R50, 400 x 600, random weights",
}
_SIZE = (400, 600)
_DATASET = "digits_scenes_val"


def ours(case: str, cfg: Any, model: Any, image: Tensor, images: Any, folder: Path) -> Formats:
    """The formats of ``retina export``, and Detectron2's tracing, of one of our models."""
    formats = Formats(CASES[case], lambda: _instances(_detect(model, image)))
    formats.add("torch.jit.trace", lambda: _traced(model, image, folder))

    def file(name: str, suffix: str) -> tuple[Run, int]:
        path = folder / f"{case}{suffix}"
        if name in ("int8", "fp16"):
            quantized = folder / f"{case}_{name}{suffix}"
            quantize(path, quantized, name, images)
            path = quantized
        elif not path.exists():
            dense = DenseModel(model).eval()
            metadata = describe_model(
                cfg,
                model.state_dict(),
                stage="nms",
                class_names=[str(k) for k in range(cfg.MODEL.RETINANET.NUM_CLASSES)],
                category_ids=None,
                divisibility=dense.divisibility,
            )
            write_exported(dense, metadata, path)
        loaded = load_exported(path, threads=1)
        if name == "16 bit":
            loaded = _openvino_default(loaded)
        exported[f"{suffix} {name}"] = loaded
        return (lambda: _dense(loaded, image)), sum(
            x.stat().st_size for x in (path, path.with_suffix(".bin")) if x.exists()
        )

    exported: dict[str, ExportedModel] = {}
    names = {
        "pt2 (torch.export)": ("", ".pt2"),
        "onnx": ("", ".onnx"),
        "onnx, int8": ("int8", ".onnx"),
        "onnx, fp16": ("fp16", ".onnx"),
        "openvino, f32": ("", ".xml"),
        "openvino, its default precision": ("16 bit", ".xml"),
        "openvino, int8": ("int8", ".xml"),
    }
    for title, (name, suffix) in names.items():
        formats.add(title, lambda name=name, suffix=suffix: file(name, suffix))  # type: ignore[misc]
        loaded = exported.get(f"{suffix} {name}")
        if case == "demo" and loaded is not None:
            compared = compare_ap(cfg, model, loaded, _DATASET)
            formats.rows[title].ap_difference = compared.difference["AP"]
    return formats


def detectron2(model: nn.Module, image: Tensor, folder: Path) -> Formats:
    """Detectron2's RetinaNet by the ways of its documentation, and torch.onnx's newer one."""
    formats = Formats(CASES["detectron2"], lambda: _instances(_detect(model, image)))
    formats.add("torch.jit.trace", lambda: _traced(model, image, folder))

    def scripted() -> tuple[Run, int]:
        fields = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
        script = scripting_with_instances(model, fields)

        def run() -> Detections:
            found = convert_scripted_instances(script([{"image": image}])[0])
            return _instances(detector_postprocess(found, *image.shape[1:]))

        return run, _saved(script, folder)

    formats.add("torch.jit.script", scripted)
    adapter = TracingAdapter(model, image, _detect).eval()
    for title, dynamo in (("onnx (TorchScript)", False), ("onnx (torch.export)", True)):
        formats.add(title, lambda dynamo=dynamo: _onnx(adapter, image, dynamo, folder, (0, 2, 1)))  # type: ignore[misc]
    return formats


def torchvision(model: nn.Module, image: Tensor, folder: Path) -> Formats:
    """torchvision's RetinaNet. Its images are RGB, 0 to 1; the resize is part of the model."""
    image = image / 255
    order = ("boxes", "scores", "labels")

    def detections(found: dict[str, Tensor]) -> Detections:
        return tuple(found[name].numpy() for name in order)  # type: ignore[return-value]

    formats = Formats(CASES["torchvision"], lambda: detections(model([image])[0]))

    def scripted() -> tuple[Run, int]:
        script = torch.jit.script(model)
        return (lambda: detections(script([image])[1][0])), _saved(script, folder)

    formats.add("torch.jit.script", scripted)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            found = self.model([image])[0]
            return tuple(found[name] for name in order)

    flat = Flat().eval()  # an exporter leaves the model in the mode of what wraps it

    def program() -> tuple[Run, int]:
        sizes = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
        exported = torch.export.export(flat, (image,), dynamic_shapes={"image": sizes})
        path = folder / "torchvision.pt2"
        torch.export.save(exported, path)
        run = exported.module()
        return (lambda: tuple(x.numpy() for x in run(image))), path.stat().st_size

    formats.add("pt2 (torch.export)", program)
    for title, dynamo in (("onnx (TorchScript)", False), ("onnx (torch.export)", True)):
        formats.add(title, lambda dynamo=dynamo: _onnx(flat, image, dynamo, folder, (0, 1, 2)))  # type: ignore[misc]
    return formats


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--weights", type=Path, default=Path("output/digits_R18/model_final.pth"), help="the demo's"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/export.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine = describe_machine("cpu", 1, keep_heap())
    rows = _read(args.output) if args.output.is_file() else {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as name:
        for case in args.case:
            formats = _formats(case, args.weights, Path(name))
            rows[CASES[case]] = [asdict(row) for row in formats.timed(args.rounds)]
            for row in rows[CASES[case]]:
                print(row, flush=True)
            ordered = [row for title in CASES.values() for row in rows.get(title, [])]
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps({"machine": machine, "rows": ordered}, indent=1))


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        rows.setdefault(row["case"], []).append(row)
    return rows


def _formats(case: str, weights: Path, folder: Path) -> Formats:
    if case == "demo":
        digits.prepare()
        cfg, model, _ = load_for_export(get_config_file("quick/digits_R18.yaml"), weights)
        (pixels,) = find_images([_DATASET], cfg.INPUT.FORMAT, 1)
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
        return ours(case, cfg, model, image, CalibrationImages(cfg, cfg.DATASETS.TRAIN), folder)
    photo = torch.from_numpy(load_sample_images().images[0].transpose(2, 0, 1).copy()).float()
    image = nn.functional.interpolate(photo[None], _SIZE, mode="bilinear")[0].round()
    torch.manual_seed(0)
    if case == "torchvision":
        options: dict[str, Any] = {"min_size": _SIZE[0], "max_size": _SIZE[1]}
        options["score_thresh"] = 0.005  # below the prior, so that random weights detect
        peer = retinanet_resnet50_fpn(weights=None, weights_backbone=None, **options).eval()
        return torchvision(peer, image, folder)
    cfg = model_cfg("R50_400", "cpu")
    model = build_model(cfg).eval()
    spread_scores(model, image)
    if case == "R50":
        return ours(case, cfg, model, image, [image[None].numpy()], folder)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    peer = build_model(cfg).eval()
    peer.load_state_dict(model.state_dict())
    return detectron2(peer, image, folder)


def _detect(model: nn.Module, image: Tensor) -> Any:
    return model([{"image": image}])[0]["instances"]


def _instances(found: Any) -> Detections:
    return tuple(x.numpy() for x in (found.pred_boxes.tensor, found.scores, found.pred_classes))


def _dense(exported: ExportedModel, image: Tensor) -> Detections:
    found = {name: x[0] for name, x in exported(image[None].numpy()).items()}
    n = int((found["classes"] >= 0).sum())
    return found["boxes"][:n], found["scores"][:n], found["classes"][:n]


def _saved(module: Any, folder: Path) -> int:
    path = folder / "module.pt"
    torch.jit.save(module, path)
    return path.stat().st_size


def _traced(model: nn.Module, image: Tensor, folder: Path) -> tuple[Run, int]:
    adapter = TracingAdapter(model, image, _detect).eval()
    small = nn.functional.interpolate(image[None], scale_factor=0.5)[0]
    traced = torch.jit.trace(adapter, (small,))
    return (lambda: _instances(adapter.outputs_schema(traced(image)))), _saved(traced, folder)


def _onnx(
    module: nn.Module, image: Tensor, dynamo: bool, folder: Path, order: tuple[int, int, int]
) -> tuple[Run, int]:
    """``order``: which outputs are boxes, scores and classes."""
    import onnxruntime

    path = folder / f"peer_{dynamo}.onnx"
    free: Any = ({1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    if isinstance(module, TracingAdapter):
        free = (free,)  # it takes *args
    sizes: dict[str, Any] = (
        {"dynamic_shapes": free}
        if dynamo
        else {"dynamic_axes": {"image": {1: "height", 2: "width"}}}
    )
    torch.onnx.export(module, (image,), path, dynamo=dynamo, input_names=["image"], **sizes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"image": image.numpy()}

    def run() -> Detections:
        outputs = session.run(None, inputs)
        return tuple(outputs[i] for i in order)

    run()
    return run, sum(x.stat().st_size for x in folder.glob(f"{path.name}*"))


def _openvino_default(loaded: ExportedModel) -> ExportedModel:
    """The same file in the precision that OpenVINO chooses: 16 bit where the processor has it."""
    import dataclasses

    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(loaded.path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    return dataclasses.replace(loaded, _run=lambda images: list(compiled(images).values()))


if __name__ == "__main__":
    main()
