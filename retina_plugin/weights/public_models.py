"""RetinaNets that others have published: fetched, converted and kept by their name.

``MODELS`` is the table. Every URL, AP and licence in it is that of the page in ``published``. What
could not be verified is not in it, as MMDetection's R-18: its README and its metafile differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from iopath.common.file_io import get_cache_dir

from retina_plugin.cache import Fingerprint, atomic_write, cache_root, only_writer
from retina_plugin.errors import ConfigError, did_you_mean, one_line

from . import conversion
from .conversion import config_path, convert_file
from .downloads import download

__all__ = ["MODELS", "PublicModel", "prepare_model"]

logger = logging.getLogger("retina_plugin")

_TORCHVISION_LICENCE = "not stated for weights (torchvision is BSD-3-Clause)"
_MMDETECTION_LICENCE = "not stated for weights (MMDetection is Apache-2.0)"
_BY_SA = "CC BY-SA 3.0"


@dataclass(frozen=True)
class PublicModel:
    """A published RetinaNet, trained on COCO train2017.

    Args:
        source: the library whose weights they are, as ``retina convert --from`` takes it.
        url: of the weights.
        ap: box AP on COCO val2017 that its authors published; it was not measured here.
        licence: of the weights, as their authors state it.
        published: the page that states AP and licence.
    """

    source: str
    url: str
    ap: float
    licence: str
    published: str

    @property
    def checksum(self) -> tuple[str, str] | None:
        """(algorithm, first hexadecimal digits) by the file's name; None if it has none.

        torchvision and MMDetection end names with "-" and SHA-256, Detectron2 with "_" and MD5.
        """
        name = self.url.rpartition("/")[2]
        if match := re.search(r"-([0-9a-f]{8})\.pth$", name):
            return "sha256", match[1]
        if match := re.search(r"_([0-9a-f]{6})\.pkl$", name):
            return "md5", match[1]
        return None

    def local_path(self) -> Path:
        """Where the library that fetches the weights keeps them."""
        if self.source == "torchvision":
            return Path(torch.hub.get_dir(), "checkpoints", self.url.rpartition("/")[2])
        return Path(get_cache_dir(), urlparse(self.url).path.lstrip("/"))


def _torchvision(file: str, ap: float) -> PublicModel:
    page = "https://pytorch.org/vision/stable/models.html#object-detection"
    url = f"https://download.pytorch.org/models/{file}.pth"
    return PublicModel("torchvision", url, ap, _TORCHVISION_LICENCE, page)


def _detectron2(path: str, ap: float) -> PublicModel:
    page = "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md"
    url = f"https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/{path}.pkl"
    return PublicModel("detectron2", url, ap, _BY_SA, page)


def _detectron(number: int, run: str, ap: float) -> PublicModel:
    page = "https://github.com/facebookresearch/Detectron/blob/main/MODEL_ZOO.md"
    url = (
        f"https://dl.fbaipublicfiles.com/detectron/{number}/12_2017_baselines/retinanet_{run}/"
        "output/train/coco_2014_train%3Acoco_2014_valminusminival/retinanet/model_final.pkl"
    )
    return PublicModel("detectron", url, ap, _BY_SA, page)


def _mmdetection(name: str, stamp: str, ap: float) -> PublicModel:
    page = "https://github.com/open-mmlab/mmdetection/tree/main/configs/retinanet"
    url = f"https://download.openmmlab.com/mmdetection/v2.0/retinanet/{name}/{name}_{stamp}.pth"
    return PublicModel("mmdetection", url, ap, _MMDETECTION_LICENCE, page)


MODELS: dict[str, PublicModel] = {
    "torchvision/retinanet_resnet50_fpn": _torchvision(
        "retinanet_resnet50_fpn_coco-eeacb38b", 36.4
    ),
    "torchvision/retinanet_resnet50_fpn_v2": _torchvision(
        "retinanet_resnet50_fpn_v2_coco-5905b1c5", 41.5
    ),
    **{
        f"detectron2/{path.partition('/')[0]}": _detectron2(path, ap)
        for path, ap in (
            ("retinanet_R_50_FPN_1x/190397773/model_final_bfca0b", 37.4),
            ("retinanet_R_50_FPN_3x/190397829/model_final_5bd44e", 38.7),
            ("retinanet_R_101_FPN_3x/190397697/model_final_971ab9", 40.4),
        )
    },
    **{
        f"detectron/retinanet_{run.partition('.')[0]}": _detectron(number, run, ap)
        for number, run, ap in (
            (36768636, "R-50-FPN_1x.yaml.08_29_48.t4zc9clc", 35.7),
            (36768677, "R-50-FPN_2x.yaml.08_30_38.sgZIQZQ5", 35.7),
            (36768744, "R-101-FPN_1x.yaml.08_31_38.5poQe1ZB", 37.7),
            (36768840, "R-101-FPN_2x.yaml.08_33_29.grtM0RTf", 37.8),
            (36768875, "X-101-64x4d-FPN_1x.yaml.08_34_37.FSXgMpzP", 39.8),
            (36768907, "X-101-64x4d-FPN_2x.yaml.08_35_40.pF3nzPpu", 39.2),
            (36769563, "X-101-32x8d-FPN_1x.yaml.08_42_05.06JTK6vJ", 39.5),
            (36769641, "X-101-32x8d-FPN_2x.yaml.08_42_55.sUPnwXI5", 38.6),
        )
    },
    **{
        f"mmdetection/{name}": _mmdetection(name, stamp, ap)
        for name, stamp, ap in (
            ("retinanet_r50_caffe_fpn_1x_coco", "20200531-f11027c5", 36.3),
            ("retinanet_r50_fpn_1x_coco", "20200130-c2398f9e", 36.5),
            ("retinanet_r50_fpn_2x_coco", "20200131-fdb43119", 37.4),
            ("retinanet_r50_fpn_mstrain_3x_coco", "20210718_220633-88476508", 39.5),
            ("retinanet_r101_caffe_fpn_1x_coco", "20200531-b428fa0f", 38.5),
            ("retinanet_r101_caffe_fpn_mstrain_3x_coco", "20210721_063439-88a8a944", 40.7),
            ("retinanet_r101_fpn_1x_coco", "20200130-7a93545f", 38.5),
            ("retinanet_r101_fpn_2x_coco", "20200131-5560aee8", 38.9),
            ("retinanet_r101_fpn_mstrain_3x_coco", "20210720_214650-7ee888e0", 41.0),
            ("retinanet_x101_32x4d_fpn_1x_coco", "20200130-5c8b7ec4", 39.9),
            ("retinanet_x101_32x4d_fpn_2x_coco", "20200131-237fc5e1", 40.1),
            ("retinanet_x101_64x4d_fpn_1x_coco", "20200130-366f5af1", 41.0),
            ("retinanet_x101_64x4d_fpn_2x_coco", "20200131-bca068ab", 40.8),
            ("retinanet_x101_64x4d_fpn_mstrain_3x_coco", "20210719_051838-022c2187", 41.6),
        )
    },
}
"""Name -> model. The names are those of the libraries, after the library's."""


def prepare_model(name: str) -> tuple[str, str]:
    """The config and the weights of a public model, as local files.

    At first use the weights are fetched into the cache of their own library and converted. Later
    both files are taken from our cache, after a look at whether they are as they were written.

        config_file, weights_file = prepare_model("torchvision/retinanet_resnet50_fpn_v2")

    Args:
        name: in ``MODELS``.

    Raises:
        ConfigError: an unknown name; the weights cannot be fetched (what to fetch and where to put
            it), or are damaged; the cache cannot be written.
    """
    if name not in MODELS:
        raise ConfigError(
            f"there is no public model '{name}'{did_you_mean(name, MODELS)}; known: "
            f"{', '.join(MODELS)}"
        )
    model = MODELS[name]
    weights = cache_root() / "models" / _conversion_version() / f"{name}.safetensors"
    config, record = config_path(weights), weights.with_suffix(".fingerprints")
    try:
        with only_writer(weights.parent):
            if not _is_intact(record, weights, config):
                if record.exists():
                    logger.warning("%s is damaged: converting it again", weights)
                convert_file(_fetch(name, model), weights, source=model.source)
                with atomic_write(record) as temporary:
                    temporary.write_text(
                        json.dumps([Fingerprint.of(weights), Fingerprint.of(config)])
                    )
    except OSError as error:
        raise ConfigError(
            f"cannot write to the cache ({error}): set RETINA_PLUGIN_CACHE to a folder on a disk "
            "with space, in which you may write"
        ) from None
    return str(config), str(weights)


def _conversion_version() -> str:
    """Changes with the code that converts, whose results are then made again."""
    digest = hashlib.sha256()
    for file in sorted(Path(conversion.__path__[0]).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _is_intact(record: Path, *files: Path) -> bool:
    try:
        written = [Fingerprint(*entry) for entry in json.loads(record.read_text())]
    except (OSError, ValueError, TypeError):
        return False  # not yet made, or not completely
    return len(written) == len(files) and all(map(Fingerprint.matches, written, files))


def _fetch(name: str, model: PublicModel) -> Path:
    """The file of a model's weights, fetched by the means of its own library."""
    path = model.local_path()
    try:
        if model.source != "torchvision":
            path = Path(download(model.url))
        elif not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = model.checksum[1] if model.checksum else None
            torch.hub.download_url_to_file(model.url, str(path), prefix)
    except Exception as error:  # a download can fail in many ways, and the fix is always the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConfigError(
            f"cannot fetch {name} ({one_line(reason)}): download {model.url} and put it at {path}"
        ) from None
    if model.checksum:
        algorithm, prefix = model.checksum
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(prefix):
            raise ConfigError(
                f"{path} is damaged: its {algorithm} begins with {found[: len(prefix)]} and not, "
                f"as its name says, with {prefix}: delete it, or download {model.url} again"
            )
    return path
