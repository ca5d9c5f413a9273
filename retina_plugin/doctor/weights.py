"""``MODEL.WEIGHTS`` is there, and can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import Detectron2Handler

from retina_plugin.errors import ConfigError
from retina_plugin.modeling.timm_models import check_timm_name, pixel_statistics
from retina_plugin.weights import read_checkpoint
from retina_plugin.weights.downloads import download, split_query
from retina_plugin.weights.fit import check_finite
from retina_plugin.weights.timm_weights import PREFIX

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
    path, _ = split_query(path)  # ?matching_heuristics=True belongs to the checkpointer
    if path.startswith(PREFIX):
        bad = list(_check_timm(cfg, path.removeprefix(PREFIX)))
        yield from bad
        if bad:
            return
    url = path.replace("detectron2://", Detectron2Handler.S3_DETECTRON2_PREFIX)
    try:
        local = download(path)
    except ConfigError as error:
        yield Finding(Severity.ERROR, "MODEL.WEIGHTS", str(error).removeprefix("MODEL.WEIGHTS: "))
        return
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


def _check_timm(cfg: CfgNode, name: str) -> Iterator[Finding]:
    """The weights ``timm://NAME`` are those of the backbone, and the pixels are as it knows them.

    Other weights that follow other pixel values train too, to a lower AP, and nothing would say so.
    """
    if cfg.MODEL.BACKBONE.NAME != "build_timm_retina_fpn_backbone":
        yield Finding(
            Severity.ERROR,
            "MODEL.WEIGHTS",
            f"{PREFIX}{name} does not fit MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME}",
            "set MODEL.BACKBONE.NAME build_timm_retina_fpn_backbone",
        )
        return
    model, ours = name.partition(".")[0], cfg.MODEL.TIMM.NAME
    if ours.partition(".")[0] != model:
        yield Finding(
            Severity.ERROR,
            "MODEL.WEIGHTS",
            f"{PREFIX}{name} does not fit MODEL.TIMM.NAME {ours}",
            f"set MODEL.TIMM.NAME {model}",
        )
        return
    try:
        check_timm_name(name, "MODEL.WEIGHTS")
        mean, std = pixel_statistics(name)
    except ConfigError as error:
        yield Finding(Severity.ERROR, "MODEL.WEIGHTS", str(error).removeprefix("MODEL.WEIGHTS: "))
        return
    given = {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
    }
    needed = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
    wrong = [key for key in needed if not _close(given[key], needed[key])]
    if wrong:
        yield Finding(
            Severity.ERROR,
            wrong[0],
            f"is {given[wrong[0]]}, but {PREFIX}{name} was trained with {needed[wrong[0]]}",
            "set " + ", ".join(f"{key}: {value}" for key, value in needed.items()),
        )


def _close(given: Any, needed: Any) -> bool:
    if isinstance(needed, str) or len(given) != len(needed):
        return bool(given == needed)
    return all(abs(a - b) < 0.01 for a, b in zip(given, needed))
