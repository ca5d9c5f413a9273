"""The formats of an exported file: ONNX, torch.export, OpenVINO."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import _config

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError, one_line
from retina_plugin.optional import optional

from .dense import DenseModel
from .metadata import METADATA_KEY, Metadata
from .ops import onnx_translations
from .runtime import format_of, quiet_torch

__all__ = [
    "atomic_files",
    "check_packages",
    "check_torch",
    "export_program",
    "save_openvino",
    "write_exported",
]

_OLDEST_TORCH = (2, 14)  # of pyproject.toml

# What writes a file. OpenVINO's is made from an ONNX file.
_PACKAGES = {
    "pt2": (),
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}

# The traced image. Its sides are no special numbers: not equal, and no multiples of each other.
_TRACED = (2, 3, 288, 352)


def check_torch(version: str = torch.__version__) -> None:
    """
    Raises:
        ConfigError: PyTorch is older than what the export was written for.
    """
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ConfigError(f"torch {version} is too old for an export: upgrade it to {oldest}")


def check_packages(kind: str, *more: str) -> None:
    """
    Args:
        kind: the format of a file that will be written.
        more: modules that the caller needs as well.

    Raises:
        ConfigError: a package is not installed.
    """
    for module in (*_PACKAGES[kind], *more):
        optional(module, f"retina export --format {kind}")


def export_program(dense: DenseModel) -> torch.export.ExportedProgram:
    """The graph of a model, for any number and size of images.

    Raises:
        ConfigError: PyTorch cannot trace a part of the model; its first line says which.
    """
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    images = torch.zeros(_TRACED)
    # Without it the graph would be refused, or wrong, for images of which a level has one row: a
    # size of 1 is taken for a special case.
    config: Any = _config
    any_size = config.patch(backed_size_oblivious=True)
    try:
        with torch.no_grad(), quiet_torch(), any_size:
            return torch.export.export(dense, (images,), dynamic_shapes={"image": sizes})
    except Exception as error:  # whatever the model's own code raises on symbolic sizes
        reason = one_line(str(error))[:300]
        raise ConfigError(
            f"torch.export cannot trace the model: {type(error).__name__}: {reason}"
        ) from None


def write_exported(dense: DenseModel, metadata: Metadata, output: str | os.PathLike) -> None:
    """Write a model in the format of the file's ending.

    Args:
        dense: in evaluation mode, on the CPU.
        metadata: goes into the file.
        output: .onnx, .pt2 or .xml (OpenVINO, which puts the weights into a .bin beside it).

    Raises:
        ConfigError: see :func:`check_torch` and :func:`export_program`; the format's library is not
            installed; an operator has no form in it.
    """
    check_torch()
    output = Path(output)
    kind = format_of(output)
    check_packages(kind)
    program = export_program(dense)
    if kind == "pt2":
        _write_pt2(program, metadata, dense.output_names, output)
    elif kind == "onnx":
        _write_onnx(program, metadata, dense.output_names, output)
    else:
        # OpenVINO reads ONNX, and so the operator of the NMS, which its PyTorch front end does not.
        with tempfile.TemporaryDirectory() as folder:
            onnx_file = Path(folder) / "model.onnx"
            _write_onnx(program, metadata, dense.output_names, onnx_file)
            openvino = optional("openvino", "an .xml file")
            # not convert_model, which may send usage statistics
            model = openvino.Core().read_model(onnx_file)
            save_openvino(model, metadata, output)


@contextlib.contextmanager
def atomic_files(output: Path) -> Iterator[Path]:
    """:func:`~retina_plugin.cache.atomic_write` of an exported file, with OpenVINO's weights.

    Raises:
        OSError: the folder cannot be written to.
    """
    with atomic_write(output) as temporary:
        yield temporary
        if format_of(output) == "openvino":
            # its weights first: the .xml is what a reader looks for
            with atomic_write(output.with_suffix(".bin")) as weights_file:
                os.replace(temporary.with_suffix(".bin"), weights_file)


def save_openvino(model: Any, metadata: Metadata, output: Path, *, in_16_bit: bool = False) -> None:
    """Write an OpenVINO model with our metadata as all that it says of its origin."""
    openvino: Any = optional("openvino", "an .xml file")
    for key in list(model.rt_info):  # what made it, with paths of this machine
        del model.rt_info[key]
    model.set_rt_info(metadata.to_json(), METADATA_KEY)
    openvino.save_model(model, output, compress_to_fp16=in_16_bit)


def _write_pt2(
    program: torch.export.ExportedProgram, metadata: Metadata, names: Sequence[str], output: Path
) -> None:
    extra = {
        f"{METADATA_KEY}.json": metadata.to_json(),
        f"{METADATA_KEY}.outputs": " ".join(names),
    }
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # of this machine's files
    program.example_inputs = None  # the traced image would be a part of the file
    with quiet_torch():
        torch.export.save(program, output, extra_files=extra)


def _write_onnx(
    program: torch.export.ExportedProgram, metadata: Metadata, names: Sequence[str], output: Path
) -> None:
    import onnx

    try:
        with quiet_torch():
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=onnx_translations(),
                input_names=["image"],
                output_names=list(names),
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        reason = one_line(str(error.__cause__ or error))[:300]
        raise ConfigError(f"torch.onnx cannot write the model: {reason}") from None
    _name_sizes(exported.model.graph, metadata)
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()  # the stack traces of this machine's files
    exported.model.metadata_props[METADATA_KEY] = metadata.to_json()
    exported.save(output, external_data=False)
    onnx.checker.check_model(str(output), full_check=True)


def _name_sizes(graph: Any, metadata: Metadata) -> None:
    """Readable names of the sizes that may change, instead of torch's ``s77``."""
    import onnx_ir

    image = graph.inputs[0]
    image.shape = onnx_ir.Shape(["N", 3, "H", "W"])
    if metadata.stage != "head":
        for value in graph.outputs:
            rest = list(value.shape)[1:]
            value.shape = onnx_ir.Shape(["N", *(x if isinstance(x, int) else "R" for x in rest)])
