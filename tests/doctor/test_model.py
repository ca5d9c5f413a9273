"""A model that cannot be built is found without building it."""

import pytest
import torch
from torch import nn

from retina_plugin.doctor.model import build_without_memory, check_model
from tests.doctor.examples import config

R = "MODEL.RETINANET."


@pytest.mark.parametrize("name", ["FocalRetinaNet", "RetinaNet"])
def test_detectors_that_can_be_built(name):
    assert list(check_model(config("MODEL.META_ARCHITECTURE", name))) == []


@pytest.mark.parametrize(
    ("opts", "where", "what"),
    [
        (("MODEL.META_ARCHITECTURE", "FocalRetina"), "MODEL.META_ARCHITECTURE", "FocalRetinaNet"),
        (("MODEL.BACKBONE.NAME", "nope"), "MODEL", "'nope'"),
        (("MODEL.ANCHOR_GENERATOR.NAME", "nope"), "MODEL", "'nope'"),
        (("MODEL.RESNETS.DEPTH", 17), "MODEL", "KeyError: 17"),
        ((R + "HEAD", "nope"), R + "HEAD", "unknown 'nope'"),
        ((R + "CLS_LOSS", "nope"), R + "CLS_LOSS", "unknown 'nope'"),
        ((R + "BBOX_REG_LOSS_TYPE", "nope"), R + "BBOX_REG_LOSS_TYPE", "unknown 'nope'"),
        ((R + "SAMPLER", "nope"), R + "SAMPLER", "unknown 'nope'"),
        ((R + "IN_FEATURES", ["p3", "p9"]), "MODEL", "p9"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_built_is_one_error(opts, where, what):
    (finding,) = check_model(config(*opts))
    assert finding.severity == "error" and finding.where == where and what in finding.what


def test_nothing_is_allocated():
    assert build_without_memory(lambda: nn.Linear(10**6, 10**6)).weight.is_meta


def test_constructor_that_reads_numbers_is_built_as_it_is():
    assert build_without_memory(lambda: torch.linspace(0, 1, 3)[1].item()) == 0.5
