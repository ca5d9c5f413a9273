"""From a config and weights to a file that was compared with the model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError
from retina_plugin.modeling import FocalRetinaNet

from . import standalone
from .check import ApComparison, compare_ap
from .dense import DenseModel
from .formats import atomic_files, check_packages, check_torch, write_exported
from .images import find_images
from .loading import load_for_export
from .metadata import Metadata
from .parity import Parity, compare, parity_sizes, table
from .quantize import CalibrationImages, check_quantizable
from .quantize import quantize as write_quantized
from .runtime import format_of, load_exported

__all__ = ["ExportResult", "export_model", "report_path"]

logger = logging.getLogger("retina_plugin")

_IMAGES = 12  # of 3 sizes, once alone and once in a batch of 3
_AP_IMAGES = 500  # most that the AP of a quantized file is measured on: seconds each on a CPU


@dataclass(frozen=True)
class ExportResult:
    """A file and how equal it is.

    Attributes:
        path: of the file.
        metadata: what it says of itself.
        parity: of the float32 file, for every size and batch, see :func:`.parity.compare`.
        ap: of a quantized file beside the model's, if a dataset was there.
    """

    path: Path
    metadata: Metadata
    parity: list[Parity]
    ap: ApComparison | None = None


def export_model(
    config: str | os.PathLike | CfgNode,
    weights: str | os.PathLike,
    output: str | os.PathLike,
    *,
    stage: str = "nms",
    images: Sequence[str] = (),
    quantize: str | None = None,
    calibration: Sequence[str] = (),
    opts: Sequence[str] = (),
    overwrite: bool = False,
) -> ExportResult:
    """Write a detector as a file, and compare the file with the detector before it is handed over.

        export_model("retina_R50_800.yaml", "model_final.pth", "model.onnx", images=["photos/"])

    The report of the comparison is written beside the file, see :func:`report_path`. If the file is
    not equal there is the report only. Beside an .onnx of the stage nms there is ``standalone.py``,
    which detects with it without PyTorch, unless a mapper of the user's prepares the images.

    Args:
        config, weights, opts: see :meth:`.RetinaPredictor.load`.
        output: its ending is the format: .onnx, .pt2 or .xml (OpenVINO).
        stage: "nms", "boxes" or "head", see :meth:`.DenseModel.forward`.
        images: files, folders or datasets to compare with; none: the config's datasets.
        quantize: "int8" or "fp16", see :func:`.quantize.quantize`; None: float32. The float32 file
            is compared first; of the quantized one the AP is, on ``DATASETS.TEST``.
        calibration: files, folders or datasets for "int8"; none: ``DATASETS.TRAIN``.
        overwrite: whether a file that is there is replaced. A ``standalone.py`` that was edited is
            kept without it.

    Raises:
        ConfigError: the model cannot be exported; the file is not equal to it; the file is there
            already; there are no images.
    """
    check_torch()
    output = Path(output)
    kind = format_of(output)
    _check_output(output, overwrite)
    running = ["onnxruntime"] if kind == "onnx" else []
    quantizing = ["nncf"] if kind == "openvino" and quantize == "int8" else []
    check_packages(kind, *running, *quantizing)  # before the long work
    cfg, model, metadata = load_for_export(config, weights, opts, stage)
    sources = list(images) or [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    pixels = find_images(sources, cfg.INPUT.FORMAT, _IMAGES)
    shown: Iterable[np.ndarray] = ()
    if quantize is not None:
        check_quantizable(output, quantize)
        if quantize == "int8":
            shown = CalibrationImages(cfg, list(calibration) or cfg.DATASETS.TRAIN)
    logger.info("%-11s %s, stage %s", "Export", kind, stage)
    if metadata.resampler == "custom":
        logger.warning(
            "INPUT.MAPPER %s prepares images in its own way: a program that runs the file has to "
            "do so too, and standalone.py and a page refuse it",
            cfg.INPUT.MAPPER,
        )
    try:
        with atomic_files(output) as temporary:
            exact = temporary
            if quantize is not None:
                exact = temporary.with_name(f"float32{output.suffix}")
            write_exported(DenseModel(model, stage).eval(), metadata, exact)
            if quantize is not None:
                logger.info("%-11s the float32 file, before it is quantized", "Compare")
            parity = _check(exact, model, metadata, pixels, output, quantize)
            if quantize is not None:
                logger.info("%-11s %s", "Quantize", quantize)
                metadata = write_quantized(exact, temporary, quantize, shown)
        if kind == "onnx" and stage == "nms" and metadata.resampler != "custom":
            _copy_standalone(output.parent, overwrite)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror or error}") from None
    loss = None
    if quantize is not None and stage == "nms":
        loss = _ap_loss(output, cfg, model)
        _write_report(output, parity, quantize, loss)
    elif quantize is not None:
        logger.warning(
            "the %s file was not compared with the model: in the stage %s it has no AP",
            *(quantize, stage),
        )
    return ExportResult(output, metadata, parity, loss)


def _ap_loss(output: Path, cfg: CfgNode, model: FocalRetinaNet) -> ApComparison | None:
    """AP of a quantized file beside the model's, as far as ``DATASETS.TEST`` is here."""
    measures = "`retina check` measures it on any dataset"
    if not cfg.DATASETS.TEST:
        logger.warning("DATASETS.TEST is empty, so the AP was not measured: %s", measures)
        return None
    exported = load_exported(output, threads=torch.get_num_threads())
    try:
        found = compare_ap(cfg, model, exported, cfg.DATASETS.TEST[0], images=_AP_IMAGES)
    except ConfigError as error:
        logger.warning("the AP was not measured: %s; %s", error, measures)
        return None
    logger.info("%d images of %s", found.images, found.dataset)
    for line in found.table().splitlines():
        logger.info(line)
    return found


def report_path(output: str | os.PathLike) -> Path:
    """Where the comparison of a file is written: ``model.onnx`` -> ``model.onnx.parity.json``.

    ``batches`` are those of ``compared``, which is always the float32 file: of a file that was
    ``quantized`` from it there is the ``ap``, or null if none was measured.
    """
    return Path(f"{os.fspath(output)}.parity.json")


def _check_output(output: Path, overwrite: bool) -> None:
    files = [output]
    if format_of(output) == "openvino":
        files.append(output.with_suffix(".bin"))
    for file in files:
        if file.is_dir():
            raise ConfigError(f"{file} is a folder: name a file")
        if file.exists() and not overwrite:
            raise ConfigError(f"{file} is there already: --overwrite replaces it")


def _copy_standalone(folder: Path, overwrite: bool) -> None:
    """Put the predictor that needs no PyTorch beside the model; keep a file that is the user's."""
    ours = Path(standalone.__file__).read_text(encoding="utf-8")
    copy = folder / "standalone.py"
    theirs = copy.read_text(encoding="utf-8", errors="replace") if copy.exists() else ours
    if not theirs.startswith(ours[:80]):
        logger.warning("%s is another program: retina_plugin's is not copied there", copy)
        return
    if theirs != ours and not overwrite:
        logger.warning("%s was edited, or is of another version: --overwrite replaces it", copy)
        return
    with atomic_write(copy) as temporary:
        temporary.write_text(ours, encoding="utf-8")


def _write_report(
    output: Path, parity: Sequence[Parity], quantize: str | None, ap: ApComparison | None = None
) -> None:
    """
    Raises:
        ConfigError: it cannot be written.
    """
    content = {
        "compared": "float32",
        "quantized": quantize or "",
        "batches": [x.to_dict() for x in parity],
        "ap": None if ap is None else ap.to_dict(),
    }
    path = report_path(output)
    try:
        with atomic_write(path) as report:
            report.write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def _check(
    file: Path,
    model: FocalRetinaNet,
    metadata: Metadata,
    images: Sequence,
    output: Path,
    quantize: str | None,
) -> list[Parity]:
    """Compare and report.

    Raises:
        ConfigError: the file is not equal.
    """
    sizes = parity_sizes(metadata.min_size, metadata.max_size)
    exported = load_exported(file, threads=torch.get_num_threads())  # as many for both
    parity = compare(exported, model, metadata, images, sizes=sizes)
    for line in table(parity).splitlines():
        logger.info(line)
    _write_report(output, parity, quantize)
    if metadata.stage == "nms" and not sum(x.detections for x in parity):
        logger.warning(
            "no detection above MODEL.RETINANET.SCORE_THRESH_TEST %g in %d images: only that the "
            "file has none either was compared",
            metadata.score_thresh,
            len(images),
        )
    for x in parity:
        if x.where:
            raise ConfigError(
                f"{output} is not written: it differs from the model in a batch of {x.batch} "
                f"images of {x.height}x{x.width}: {x.where} (see {report_path(output)})"
            )
    return parity
