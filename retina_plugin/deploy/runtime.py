"""Exported files, run by the library of their format."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retina_plugin.errors import ConfigError, first_line
from retina_plugin.optional import optional

from . import ops as _ops  # noqa: F401  a pt2 file calls the operator that it registers
from .metadata import METADATA_KEY, Metadata

__all__ = ["SUFFIXES", "ExportedModel", "format_of", "load_exported", "quiet_torch"]

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}

Run = Callable[[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True)
class ExportedModel:
    """A file that is ready to run.

        detect = load_exported("model.onnx")
        found = detect(np.zeros((1, 3, 480, 640), np.float32))
        found["boxes"], found["scores"], found["classes"]

    Attributes:
        path, format: of the file; the format is "onnx", "pt2" or "openvino".
        metadata: what the file says of itself.
        output_names: of the arrays that a call returns.
    """

    path: Path
    format: str
    metadata: Metadata
    output_names: tuple[str, ...]
    _run: Run

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the file on (N, 3, H, W) float32 images, pixels 0 to 255 in ``metadata.format``."""
        return dict(zip(self.output_names, self._run(images), strict=True))


def format_of(path: str | os.PathLike) -> str:
    """The format that a file's name says.

    Raises:
        ConfigError: it is none of :data:`SUFFIXES`, or not one that the library takes.
    """
    for name, suffix in SUFFIXES.items():
        given = Path(path).suffix
        if given.lower() == suffix:
            if name == "openvino" and given != suffix:
                raise ConfigError(f"{path}: OpenVINO needs the ending {suffix} in lower case")
            return name
    endings = ", ".join(f"{suffix} ({name})" for name, suffix in SUFFIXES.items())
    raise ConfigError(f"{path}: an exported model ends in {endings}")


def load_exported(path: str | os.PathLike, *, threads: int | None = None) -> ExportedModel:
    """An exported file on the CPU.

    OpenVINO computes in float32 here: its default, 16 bit where the processor has it, is faster and
    less exact.

    Args:
        path: .onnx, .pt2, or the .xml of OpenVINO with its .bin beside it.
        threads: of the computation; None: the library's choice (pt2: PyTorch's).

    Raises:
        ConfigError: the file cannot be read, has no metadata of ``retina export``, or its library
            is not installed.
    """
    path = Path(path)
    kind = format_of(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is not a file")
    load = {"onnx": _load_onnx, "pt2": _load_pt2, "openvino": _load_openvino}[kind]
    text, names, run = load(path, threads)
    if not text:
        raise ConfigError(f"{path} has no metadata of retina_plugin: write it with `retina export`")
    return ExportedModel(path, kind, Metadata.from_json(text, str(path)), tuple(names), run)


def _load_onnx(path: Path, threads: int | None) -> tuple[str, list[str], Run]:
    onnxruntime = optional("onnxruntime", f"{path.name}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: warnings are of shapes that it infers
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own C++ classes, without a common base
        raise ConfigError(f"{path} cannot be read by onnxruntime: {first_line(error)}") from None
    names = [output.name for output in session.get_outputs()]
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "")
    return text, names, lambda images: session.run(names, {"image": images})


def _load_pt2(path: Path, threads: int | None) -> tuple[str, list[str], Run]:
    extra = {f"{METADATA_KEY}.json": "", f"{METADATA_KEY}.outputs": ""}
    try:
        if not _is_pt2(path):
            raise ValueError("torch.export did not write it, or a part of it is missing")
        with quiet_torch():
            program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # zipfile's, pickle's, its own
        raise ConfigError(f"{path} cannot be read by torch: {first_line(error)}") from None
    module = program.module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads or before)
            with torch.inference_mode():
                return [x.numpy() for x in module(torch.from_numpy(images))]
        finally:
            torch.set_num_threads(before)

    return extra[f"{METADATA_KEY}.json"], extra[f"{METADATA_KEY}.outputs"].split(), run


def _is_pt2(path: Path) -> bool:
    """Any checkpoint of PyTorch is a zip archive, too."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/archive_format") for name in archive.namelist())


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Without the log of PyTorch's exporters, which is meant for who writes them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _load_openvino(path: Path, threads: int | None) -> tuple[str, list[str], Run]:
    openvino = optional("openvino", f"{path.name}")
    core = openvino.Core()
    options: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        _check_openvino(path)
        model = core.read_model(path)
        compiled = core.compile_model(model, "CPU", options)
    except (RuntimeError, ValueError) as error:
        # The lines above the last one name places in OpenVINO's own code.
        reason = ([line for line in str(error).splitlines() if line.strip()] or ["no reason"])[-1]
        raise ConfigError(f"{path} cannot be read by openvino: {reason.strip()}") from None
    text = model.get_rt_info(METADATA_KEY).astype(str) if model.has_rt_info(METADATA_KEY) else ""
    names = [output.get_any_name() for output in compiled.outputs]
    return text, names, lambda images: list(compiled(images).values())


def _check_openvino(path: Path) -> None:
    """
    Raises:
        ValueError: the two files cannot be a model; OpenVINO's own message would not say why.
    """
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ValueError(f"{weights.name}, which holds its weights, is not beside it: copy both")
    with path.open("rb") as file:
        if b"<net" not in file.read(1000):
            raise ValueError("its content is not that of OpenVINO: write it with `retina export`")
