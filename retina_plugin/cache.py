"""Generated files that are kept between runs: the embedded dataset, weights, compiled kernels."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_write", "cache_root"]


def cache_root() -> Path:
    """``$RETINA_PLUGIN_CACHE``, or ~/.cache/retina_plugin if it is not set."""
    return Path(os.environ.get("RETINA_PLUGIN_CACHE", "~/.cache/retina_plugin")).expanduser()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all, so that other processes never read a part of it.

    Yields a temporary path to write to. It is renamed to ``path`` at the end of the block, and
    deleted if the block raises.

        with atomic_write(cache_root() / "weights.pth") as temporary:
            torch.save(state, temporary)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
