"""``MODEL.WEIGHTS`` is there, and can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.utils.file_io import Detectron2Handler

from retina_plugin.errors import ConfigError
from retina_plugin.weights import read_checkpoint
from retina_plugin.weights.downloads import download
from retina_plugin.weights.fit import check_finite

from .findings import Finding, Severity

__all__ = ["check_weights"]


def check_weights(cfg: CfgNode, *, read: bool = False) -> Iterator[Finding]:
    """``MODEL.WEIGHTS`` is a file, or a URL, which is downloaded to the cache here.

    Args:
        read: also read the file: it is whole, holds weights alone, and all numbers are finite.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        return
    path = path.split("?")[0]  # ?matching_heuristics=True belongs to the checkpointer
    url = path.replace("detectron2://", Detectron2Handler.S3_DETECTRON2_PREFIX)
    try:
        local = download(path)
    except Exception as error:  # a download can fail in many ways, and the fix is always the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        cache = os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache"))
        yield Finding(
            Severity.ERROR,
            "MODEL.WEIGHTS",
            f"cannot download {url} ({reason})",
            "download it by hand and set MODEL.WEIGHTS to the file, or set it to '' to train from "
            f"scratch (downloads are kept in {cache}; the environment variable FVCORE_CACHE "
            "changes that)",
        )
        return
    if not os.path.isfile(local):
        yield Finding(Severity.ERROR, "MODEL.WEIGHTS", f"no file {local}")
    elif read:
        try:
            check_finite(read_checkpoint(local)["model"], local)
        except ConfigError as error:
            yield Finding(Severity.ERROR, "MODEL.WEIGHTS", str(error))
