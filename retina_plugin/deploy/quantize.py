"""Exported files in 8 or 16 bit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.errors import ConfigError, check_choice
from retina_plugin.optional import optional

from .formats import atomic_files, save_openvino
from .graph import onnx_network, outside_network
from .half import to_float16
from .images import image_files, readable_images
from .metadata import METADATA_KEY, Metadata
from .runtime import format_of, load_exported

__all__ = ["METHODS", "CalibrationImages", "check_quantizable", "quantize"]

METHODS = ("int8", "fp16")

_IMAGES = 100  # of the calibration

# Operators of ONNX that compute in 8 bit. Any other one of a backbone stays in float32.
_IN_8_BIT = ("Conv", "Relu", "Clip", "MaxPool", "Add", "Resize")


class CalibrationImages:
    """Images that show which values the layers take. They are read one at a time.

        images = CalibrationImages(cfg, cfg.DATASETS.TRAIN)

    Each is resized as for a test. They are spread evenly over the sources, because a dataset may be
    sorted. Images that cannot be read are left out.

    Args:
        cfg: the model's config.
        sources: datasets, folders, files and patterns, see :func:`.images.image_files`.
        count: of the images, at most.

    Raises:
        ConfigError: no image is there.
    """

    def __init__(self, cfg: CfgNode, sources: Sequence[str], count: int = _IMAGES) -> None:
        if not sources:
            raise ConfigError(
                "there are no images to calibrate with: DATASETS.TRAIN is empty, so name a dataset "
                "or a folder by --calibration"
            )
        try:
            files = image_files(sources)
        except ConfigError as error:
            raise ConfigError(
                f"the calibration has no images ({error}): name another dataset, or a folder, by "
                "--calibration"
            ) from None
        number = min(count, len(files))
        self.files = [files[i * len(files) // number] for i in range(number)]
        self._format = cfg.INPUT.FORMAT
        self._prepare = DATASET_MAPPER_REGISTRY.build(cfg, False).prepare_image

    def __iter__(self) -> Iterator[np.ndarray]:
        """(1, 3, H, W) float32 arrays, as the file takes them.

        Raises:
            ConfigError: not one image can be read.
        """
        found = False
        for image in readable_images(self.files, self._format):
            found = True
            yield self._prepare(image).numpy()[None].astype(np.float32)
        if not found:
            raise ConfigError(
                f"none of {len(self.files)} images for the calibration can be read, such as "
                f"{self.files[0]}"
            )


def quantize(
    path: str | os.PathLike,
    output: str | os.PathLike,
    method: str,
    images: Iterable[np.ndarray] = (),
) -> Metadata:
    """Write an exported file in fewer bits.

        quantize("model.onnx", "model_int8.onnx", "int8", CalibrationImages(cfg, ["my_train"]))

    The backbone, the pyramid and the head are quantized, but not the last convolutions, which give
    logits and deltas. These, the normalisation of the pixels, the decoding of boxes and the NMS
    stay in float32, and so do the input and the outputs.

    - "int8": weights by output channel, in 7 of the 8 bits; activations by tensor. With all 8 bits
      the sum of two products overflows the 16 bits of x86 processors without VNNI, see
      https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    - "fp16": onnxruntime has no 16-bit convolution for the CPU and computes in float32, so this is
      for GPUs and for a file of half the size. OpenVINO's file holds 16-bit weights.

    Args:
        path: a file in float32, .onnx or .xml.
        output: of the same format.
        method: "int8" or "fp16".
        images: (1, 3, H, W) float32 arrays, for "int8" only. They are gone through several times,
            so a generator will not do: see :class:`CalibrationImages`.

    Returns:
        The metadata of the new file.

    Raises:
        ConfigError: the file is of another format or quantized already; the format's library is not
            installed; there are no images; ``output`` cannot be written.
    """
    path, output = Path(path), Path(output)
    check_quantizable(path, method)
    kind = format_of(path)
    if format_of(output) != kind:
        raise ConfigError(f"{output}: quantizing does not change the format, {path.suffix}")
    metadata = load_exported(path).metadata
    if metadata.quantized:
        raise ConfigError(f"{path} is quantized already ({metadata.quantized})")
    if method == "int8" and next(iter(images), None) is None:
        raise ConfigError("there are no images to calibrate with: int8 needs some")
    metadata = dataclasses.replace(metadata, quantized=method)
    write = {
        ("onnx", "int8"): _onnx_int8,
        ("onnx", "fp16"): _onnx_fp16,
        ("openvino", "int8"): _openvino_int8,
        ("openvino", "fp16"): _openvino_fp16,
    }[kind, method]
    try:
        with atomic_files(output) as temporary:
            write(path, temporary, metadata, images)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror or error}") from None
    return metadata


def check_quantizable(path: str | os.PathLike, method: str) -> None:
    """
    Raises:
        ConfigError: the method is unknown, or there is none for the file's format.
    """
    check_choice("--quantize", method, METHODS)
    if format_of(path) == "pt2":
        raise ConfigError(f"{path}: a .pt2 file cannot be quantized: export it as .onnx or .xml")


def _onnx_int8(path: Path, output: Path, metadata: Metadata, images: Iterable[np.ndarray]) -> None:
    purpose = "--quantize int8 of an .onnx file"
    onnx: Any = optional("onnx", purpose)
    quantization: Any = optional("onnxruntime.quantization", purpose)
    preparation: Any = optional("onnxruntime.quantization.shape_inference", purpose)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        # It merges batch norms and other factors into the convolutions.
        merged = Path(folder) / "merged.onnx"
        preparation.quant_pre_process(path, merged, skip_symbolic_shape=True)
        graph = onnx.load(merged).graph
        quantization.quantize_static(
            merged,
            output,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_IN_8_BIT),
            nodes_to_quantize=sorted(onnx_network(graph)),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    _finish_onnx(onnx, onnx.load(output), output, metadata)


def _onnx_fp16(path: Path, output: Path, metadata: Metadata, images: Iterable[np.ndarray]) -> None:
    purpose = "--quantize fp16 of an .onnx file"
    onnx: Any = optional("onnx", purpose)
    preparation: Any = optional("onnxruntime.quantization.shape_inference", purpose)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        merged = Path(folder) / "merged.onnx"
        preparation.quant_pre_process(path, merged, skip_symbolic_shape=True)
        model = onnx.load(merged)
    to_float16(model.graph, onnx_network(model.graph))
    _finish_onnx(onnx, model, output, metadata)


def _finish_onnx(onnx: Any, model: Any, output: Path, metadata: Metadata) -> None:
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, metadata.to_json()
    onnx.save(model, output)
    onnx.checker.check_model(str(output), full_check=True)


def _openvino_int8(
    path: Path, output: Path, metadata: Metadata, images: Iterable[np.ndarray]
) -> None:
    purpose = "--quantize int8 of an .xml file"
    openvino: Any = optional("openvino", purpose)
    nncf: Any = optional("nncf", purpose)
    advanced: Any = optional("nncf.quantization.advanced_parameters", purpose)
    ranges: Any = optional("nncf.quantization.range_estimator", purpose)
    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(path)
    with _quiet():
        model = nncf.quantize(
            model,
            nncf.Dataset(images, lambda image: {"image": image}),
            subset_size=_IMAGES,
            ignored_scope=nncf.IgnoredScope(names=outside_network(model), validate=False),
            advanced_parameters=advanced.AdvancedQuantizationParameters(
                overflow_fix=advanced.OverflowFix.ENABLE,  # 7 bits, see `quantize`
                # NNCF's defaults, the mean of the ranges of the images and a correction of biases,
                # cost .5 AP on the embedded digits; these cost .1.
                activations_range_estimator_params=ranges.RangeEstimatorParametersSet.MINMAX,
                disable_bias_correction=True,
            ),
        )
    save_openvino(model, metadata, output)


def _openvino_fp16(
    path: Path, output: Path, metadata: Metadata, images: Iterable[np.ndarray]
) -> None:
    openvino: Any = optional("openvino", "--quantize fp16 of an .xml file")
    model = openvino.Core().read_model(path)
    save_openvino(model, metadata, output, in_16_bit=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hints of the libraries, and without their progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
