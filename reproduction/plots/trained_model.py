"""Figure 4: how the loss of a trained model is distributed over easy and hard samples.

Section 5.1, "Analysis of the Focal Loss": compute FL of positives and of negatives, normalise each
to a sum of 1, sort it from the lowest to the highest, add it up. A sample is an output of the
classification subnet: one class of one anchor, so its loss is a function of one probability, and
alpha, a constant for positives and for negatives, cancels. Labels are those of training; ignored
anchors are left out. The paper samples 10^5 positives and 10^7 negatives; here all outputs count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from tabulate import tabulate
from tqdm import tqdm

from reproduction.paper import load_figures
from retina_plugin.data import register_datasets
from retina_plugin.data.mapper import DATASET_MAPPER_REGISTRY
from retina_plugin.doctor import dataset_records
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError
from retina_plugin.losses.targets import IGNORED
from retina_plugin.modeling import FocalRetinaNet
from retina_plugin.predict.loading import load_model, prediction_cfg

from .loss_distribution import LossDistribution
from .style import BY_GAMMA, Plot, new_figure, table_of

__all__ = ["DEMO", "draw", "find_weights", "measure"]

DEMO = "quick/digits_R18.yaml"


@torch.no_grad()
def measure(
    cfg: CfgNode, model: FocalRetinaNet, records: Iterable[Mapping[str, Any]]
) -> dict[str, LossDistribution]:
    """The distributions of "positives" and "negatives", over all anchors of all images.

    Args:
        cfg: of the model. Images have its test size.
        model: in evaluation mode.
        records: Detectron2's, with annotations.

    Raises:
        ConfigError: an image or annotation cannot be used, or the logits are not those of a trained
            model; the line has the file.
    """
    mapper = DATASET_MAPPER_REGISTRY.build(_labelled(cfg), True)
    found = {"positives": LossDistribution(), "negatives": LossDistribution()}
    for record in records:
        x = mapper(record)
        if "instances" not in x:
            raise ConfigError(f"{record['file_name']} has no annotations: fig4 needs ground truth")
        images = model.preprocess_image([x])
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        logits, _ = model.head(features)
        anchors_R4 = Boxes.cat(model.anchor_generator(features)).tensor
        targets = model.labeler(anchors_R4, [x["instances"].to(model.device)])
        positives, negatives = [], []
        for x_level, labels in zip(logits, targets.label_maps(logits, model.num_classes)):
            x_NAKHW = x_level.unflatten(1, (-1, model.num_classes))
            label_NAHW = labels.labels_NAHW
            n, a, h, w = torch.where(label_NAHW >= 0)
            k = label_NAHW[n, a, h, w].long()
            is_negative = (label_NAHW != IGNORED)[:, :, None].expand_as(x_NAKHW).clone()
            is_negative[n, a, k, h, w] = False
            positives.append(x_NAKHW[n, a, k, h, w])
            negatives.append(-x_NAKHW[is_negative])
        try:
            found["positives"].add(torch.cat(positives))
            found["negatives"].add(torch.cat(negatives))
        except ConfigError as error:
            raise ConfigError(f"{record['file_name']}: {error}") from None
    return found


def _labelled(cfg: CfgNode) -> CfgNode:
    """A config whose training mapper gives images as in a test, but with their ground truth."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.ENABLED = "none", False
    cfg.DATALOADER.ON_BAD_IMAGE = "error"
    return cfg


def find_weights(config_file: str, weights: str | None) -> str:
    """``weights``, or those that a training with this config wrote.

    Raises:
        ConfigError: there are none.
    """
    if weights is not None:
        return weights
    path = Path(setup_cfg(config_file).OUTPUT_DIR, "model_final.pth")
    if not path.is_file():
        train = "make demo" if config_file == DEMO else f"retina train --config-file {config_file}"
        raise ConfigError(f"fig4 needs a trained model: no {path}; give --weights, or run {train}")
    return os.fspath(path)


def draw(
    config_file: str, weights: str, dataset: str | None = None, num_images: int | None = None
) -> Plot:
    """Figure 4 of a trained model.

    Args:
        config_file, weights: of the model.
        dataset: name of a registered dataset; None: the first of ``DATASETS.TEST``.
        num_images: so many of its images, chosen at random but always the same; None for all.

    Raises:
        ConfigError: the model or the dataset cannot be read, or it has no objects.
    """
    cfg = prediction_cfg(config_file, weights)
    if dataset is None and not cfg.DATASETS.TEST:
        raise ConfigError(f"{config_file} has no DATASETS.TEST: give --dataset")
    dataset = dataset or cfg.DATASETS.TEST[0]
    if num_images is not None and num_images < 1:
        raise ConfigError(f"--images {num_images}: give 1 or more")
    register_datasets([dataset])
    records: Sequence[Any] = dataset_records(dataset)
    if num_images is not None and num_images < len(records):
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0))
        records = [records[i] for i in order[:num_images].tolist()]
    model, _ = load_model(cfg)
    if not isinstance(model, FocalRetinaNet):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: fig4 needs FocalRetinaNet"
        )
    found = measure(cfg, model, tqdm(records, unit="image", disable=None))
    for name, distribution in found.items():
        if not len(distribution):
            raise ConfigError(f"{dataset} has no {name}: fig4 needs images with annotated objects")
    title = f"Focal loss of {Path(weights).name} on {len(records)} images of {dataset}"
    return _plot(found, title, len(records))


def _plot(found: Mapping[str, LossDistribution], title: str, num_images: int) -> Plot:
    gammas = load_figures()["4"]["gamma"]
    # Evenly, and closer and closer to 1, where the hardest negatives are.
    tail = 1 - np.logspace(-3, -7, 81)[1:]
    fraction = np.append(np.append(np.linspace(0, 1, 1001)[:-1], tail), 1.0)
    columns = {"fraction": torch.tensor(fraction)}
    shares, worst = [], 0.0
    figure, panels = new_figure(9.6, 4.6, columns=2)
    for axes, (name, distribution) in zip(panels, found.items()):
        for gamma, colour in zip(gammas, BY_GAMMA):
            curve = distribution.curve(gamma)
            worst = max(worst, curve.error)
            hardest = [curve.hardest(part) for part in (0.01, 0.2)]
            shares.append([name, len(distribution), gamma, *hardest])
            columns[f"{name} gamma={gamma:g}"] = torch.tensor(curve.at(fraction))
            axes.plot(
                curve.fraction,
                curve.share,
                color=colour,
                label=f"γ = {gamma:g}: {100 * hardest[0]:.1f} %",
            )
        axes.set(
            xlabel=f"fraction of the {name}, easiest first",
            ylabel="share of their loss",
            title=f"{len(distribution):,} {name}",
            xlim=(0, 1.01),  # the last rise is not hidden by the border
            ylim=(0, 1.02),
        )
        axes.legend(title="the hardest 1 % hold", loc="upper left", title_fontsize=10)
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    header = ["samples", "number", "gamma", "hardest 1 %", "hardest 20 %"]
    table = tabulate(shares, header, "pipe", floatfmt=("", "", "g", ".4f", ".4f"))
    confused = found["negatives"].below(math.log(0.95 / 0.05)) / num_images
    text = (
        f"Negatives with a score above .05: {confused:.4g} an image.\n"
        f"Share of the loss, from the histogram's bins, exact to {_rounded_up(worst)}:\n{table}\n"
        "The paper (COCO, ResNet-101): the hardest 20 % of the positives hold about half of their "
        "loss for gamma 0;\nwith gamma 2, the vast majority of the negatives' loss comes from a "
        "small fraction of them."
    )
    return Plot(figure, {"": table_of(columns), "shares": (header, shares)}, text)


def _rounded_up(x: float) -> str:
    digits = 1 - math.floor(math.log10(x))
    return f"{math.ceil(x * 10**digits) / 10**digits:g}"
