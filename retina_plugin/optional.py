"""Packages that only some users need, imported where they are needed."""

from __future__ import annotations

import importlib
import os
from typing import Any

from retina_plugin.errors import ConfigError

__all__ = ["optional"]

_EXTRAS = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "openvino",
    "nncf": "openvino",
    "hotcoco": "fast",
    "plotly": "report",
}


def optional(module: str, purpose: str) -> Any:
    """Import a package that only some users need.

    Args:
        module: e.g. ``onnxruntime`` or ``onnxruntime.quantization``.
        purpose: what needs it, for the message.

    Raises:
        ConfigError: it is not installed, or its import fails.
    """
    package = module.partition(".")[0]
    if package == "nncf":
        os.environ.setdefault("NNCF_CI", "1")  # then it sends no usage statistics
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ConfigError(
                f"{purpose} needs {package}: pip install 'retina_plugin[{_EXTRAS[package]}]'"
            ) from None
        raise ConfigError(f"{purpose} needs {package}, which cannot be imported: {error}") from None
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {package}, which cannot be imported: {error}") from None
