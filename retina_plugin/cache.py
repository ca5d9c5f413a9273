"""Where generated files are kept between runs: the embedded dataset, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """``$RETINA_PLUGIN_CACHE``, else ~/.cache/retina_plugin."""
    return Path(os.environ.get("RETINA_PLUGIN_CACHE", "~/.cache/retina_plugin")).expanduser()
