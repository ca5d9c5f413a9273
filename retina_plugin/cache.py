"""Where generated files are kept between runs: the embedded dataset, weights, compiled kernels."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_root", "written_whole"]


def cache_root() -> Path:
    """``$RETINA_PLUGIN_CACHE``, else ~/.cache/retina_plugin."""
    return Path(os.environ.get("RETINA_PLUGIN_CACHE", "~/.cache/retina_plugin")).expanduser()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write, which becomes ``path`` at once and without an error only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        os.replace(part, path)
