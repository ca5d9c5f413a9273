"""Converting a file: the weights and, beside them, the config that belongs to them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from retina_plugin.cache import atomic_write
from retina_plugin.errors import ConfigError, one_line

from ..fit import check_finite
from ..reading import read_checkpoint
from . import detectron2
from .source import Converted, Source
from .sources import SOURCES, find_source, get_source, without_prefix

__all__ = ["check_output", "config_path", "convert_file", "convert_weights", "write_converted"]

_SUFFIXES = (".pth", ".safetensors")


def convert_file(
    path: str | os.PathLike, output: str | os.PathLike, source: str | None = None
) -> Converted:
    """Convert the weights of another library, and write them and their config.

    Args:
        path: the weights, in any format that :func:`retina_plugin.weights.read_checkpoint` knows.
        output: .pth or .safetensors; the config is beside it, with the suffix .yaml. Files that are
            there are replaced.
        source: a name in :data:`.sources.SOURCES`; None: it is recognised by the names of the
            tensors.

    Returns:
        What was written. Its ``class_names`` are those of the file, if it has any, or those that
        belong to the library's own models.

    Raises:
        ConfigError: see :func:`check_output` and ``read_checkpoint``; the library is unknown or has
            a model that cannot be converted.
        OSError: the output cannot be written. One line with its path.

    Example::

        convert_file("model_final.pkl", "retinanet.pth")
        cfg = setup_cfg("retinanet.yaml")
    """
    check_output(path, output)
    known, converted = convert_weights(path, source)
    return write_converted(converted, output, f"{Path(path).name} ({known.name})")


def convert_weights(path: str | os.PathLike, source: str | None = None) -> tuple[Source, Converted]:
    """The library that a file is from, and its weights, converted. Nothing is written.

    Args, Raises: see :func:`convert_file`.
    """
    known = get_source(source) if source is not None else None
    checkpoint = read_checkpoint(path)
    state = without_prefix(checkpoint["model"])
    check_finite(state, os.fspath(path))
    try:
        known = known or find_source(state)
        if known is None:
            raise ConfigError(_unknown(state))
        if not known.recognises(state):
            raise ConfigError(f"these are not the names of {known.name}: {_unknown(state)}")
        converted = detectron2.of_a_training(checkpoint, state) or known.convert(state)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    names = checkpoint.get("class_names")
    num_classes = converted.config["MODEL"].get("RETINANET", {}).get("NUM_CLASSES")
    if names and len(names) == num_classes:
        converted = replace(converted, class_names=names)
    return known, converted


def write_converted(
    converted: Converted,
    output: str | os.PathLike,
    origin: str,
    check: Callable[[Path, Path], None] | None = None,
) -> Converted:
    """Write the weights and their config: both whole, or neither.

    Args:
        output: see :func:`convert_file`.
        origin: for the header of the config, e.g. "model_final.pkl (detectron)".
        check: is called with the weights and the config under temporary paths. If it raises, files
            that are there stay as they are.

    Returns:
        ``converted`` with the ``MODEL.WEIGHTS`` that was written.

    Raises:
        OSError: one line with the path.
    """
    output = Path(output)
    model = {**converted.config["MODEL"], "WEIGHTS": os.path.abspath(output)}
    converted = replace(converted, config={**converted.config, "MODEL": model})
    try:
        with atomic_write(config_path(output)) as config, atomic_write(output) as weights:
            _save(converted, weights)
            config.write_text(_config_text(output, converted, origin), encoding="utf-8")
            if check is not None:
                check(weights, config)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {output}: {reason}") from None
    return converted


def _save(converted: Converted, path: Path) -> None:
    state = {name: value.contiguous() for name, value in converted.state.items()}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path, _metadata(converted))
        return
    data: dict[str, Any] = {"model": state}
    if converted.class_names:
        data["class_names"] = converted.class_names
    try:
        torch.save(data, path)
    except RuntimeError as error:  # hides the file's error
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        raise OSError(getattr(first, "strerror", None) or str(first)) from None


def config_path(output: str | os.PathLike) -> Path:
    """Where the config of converted weights is: beside them, with the suffix .yaml."""
    return Path(output).with_suffix(".yaml")


def check_output(path: str | os.PathLike, output: str | os.PathLike) -> None:
    """Raise a :class:`ConfigError` if ``output`` cannot be the result of converting ``path``.

    It needs one of the suffixes, an existing folder, and may neither be the input nor a folder.
    """
    path, output = Path(path), Path(output)
    if output.suffix not in _SUFFIXES or not output.stem:
        raise ConfigError(f"--output {output}: its name must end with {' or '.join(_SUFFIXES)}")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}: make it first")
    for file in (output, config_path(output)):
        if file.is_dir():
            raise ConfigError(f"--output {output}: {file} is a folder")
        if file.exists() and path.exists() and file.samefile(path):
            raise ConfigError(f"--output {output}: {file} is the input: choose another name")


def _unknown(state: dict[str, Tensor]) -> str:
    seen = ", ".join(list(state)[:3])[:200]
    return (
        f"it has {len(state)} tensors ({seen}, ...), and known are RetinaNets of "
        f"{', '.join(name for name in SOURCES if name != 'imagenet')}, and ResNets trained on "
        "ImageNet (imagenet)"
    )


def _metadata(converted: Converted) -> dict[str, str]:
    metadata = {"format": "pt"}
    if converted.class_names:
        metadata["class_names"] = json.dumps(converted.class_names, ensure_ascii=False)
    return metadata


def _config_text(output: Path, converted: Converted, origin: str) -> str:
    is_backbone = not any(name.startswith("head.") for name in converted.state)
    config = shlex.quote(str(config_path(output)))
    lines = [
        f"Config of {output.name}, converted from {origin}.",
        *converted.notes,
        # Detectron2 takes a relative path from the folder in which a command is run
        "MODEL.WEIGHTS is an absolute path: change it if you move the files.",
        f"Train from it: retina train --config-file {config}"
        if is_backbone
        else f"Detect with it: retina predict --config-file {config} photo.jpg",
    ]
    header = "".join(f"# {line}\n" for text in lines for line in wrap(one_line(text), 98))
    return header + yaml.safe_dump(converted.config, sort_keys=False, default_flow_style=None)
