"""Names and parts of a model that cannot be: one line, before anything is built."""

import pytest
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator

from retina_plugin.doctor import quick_checks
from retina_plugin.engine import check_config
from retina_plugin.errors import ConfigError

ANCHORS, RESNETS, FPN = "MODEL.ANCHOR_GENERATOR.", "MODEL.RESNETS.", "MODEL.FPN."
BACKBONE, R = "MODEL.BACKBONE.NAME", "MODEL.RETINANET."
TIMM = [BACKBONE, "build_timm_retina_fpn_backbone"]
FORTY = [FPN + "OUT_CHANNELS", 40]


def errors(cfg, *overrides):
    cfg.merge_from_list(list(overrides))
    return [str(f) for f in quick_checks(cfg) if f.severity == "error"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNett"], ["'RetinaNett'", "did you mean 'RetinaNet'"]),
        ([BACKBONE, "build_retina_fpn"], ["did you mean 'build_retina_fpn_backbone'"]),
        ([ANCHORS + "NAME", "DefaultAnchors"], ["did you mean 'DefaultAnchorGenerator'"]),
        ([ANCHORS + "NAME", "RotatedAnchorGenerator"], ["set it to DefaultAnchorGenerator"]),
        (
            [ANCHORS + "SIZES", [[8], [9]], ANCHORS + "NAME", "DetectronAnchorGenerator"],
            ["has 2 lists for the 5 levels"],
        ),
        (
            [RESNETS + "OUT_FEATURES", ["res4", "res5"]],
            ["lacks res3", "set it to ['res3', 'res4', 'res5']"],
        ),
        ([RESNETS + "OUT_FEATURES", ["res3", "res4"]], ["lacks res5"]),
        ([RESNETS + "OUT_FEATURES", ["res3", "res4", "res5", "res6"]], ["'res6'", "known: stem"]),
        ([FPN + "IN_FEATURES", ["res3", "res9"]], ["'res9'", "known: res2"]),
        (
            [R + "IN_FEATURES", ["p2"], ANCHORS + "SIZES", [[32.0]]],
            ["'p2'", "known: p3, p4, p5, p6, p7"],
        ),
        ([FPN + "NORM", "GN", *FORTY], ["32 groups", "OUT_CHANNELS 40", "OUT_CHANNELS 32"]),
        ([FPN + "NORM", "GN", *FORTY, *TIMM], ["32 groups", "OUT_CHANNELS 40"]),
        ([R + "NORM", "GN", *FORTY], ["32 groups", "MODEL.FPN.OUT_CHANNELS 40"]),
        (
            [RESNETS + "NORM", "GN", RESNETS + "RES2_OUT_CHANNELS", 32],
            ["32 groups", "MODEL.RESNETS.STEM_OUT_CHANNELS 16"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:2])),
)
def test_what_cannot_be_is_one_line(tiny_cfg, overrides, parts):
    (line,) = errors(tiny_cfg, *overrides)
    key = overrides[0]
    assert line.startswith(f"{key}: ") and all(part in line for part in parts), line
    with pytest.raises(ConfigError, match=f"^{key}: "):
        check_config(tiny_cfg, eval_only=True)


@pytest.mark.parametrize(
    "overrides",
    [
        [*TIMM, RESNETS + "NORM", "Foo", RESNETS + "DEPTH", 19, RESNETS + "OUT_FEATURES", ["res4"]],
        [R + "NORM", "GN", R + "NUM_CONVS", 0, *FORTY],
        [R + "P6_SOURCE", "p5", FPN + "IN_FEATURES", ["res3", "res4"]]
        + [RESNETS + "OUT_FEATURES", ["res3", "res4"], R + "IN_FEATURES", ["p3", "p4", "p6"]],
        [BACKBONE, "build_resnet_fpn_backbone", R + "IN_FEATURES", ["p3", "p6"]],
        [BACKBONE, "build_resnet_backbone", R + "IN_FEATURES", ["res4"], FPN + "NORM", "Foo"],
    ],
    ids=lambda overrides: f"{overrides[0]} {overrides[1]}",
)
def test_keys_that_are_not_read_may_be_anything(tiny_cfg, overrides):
    tiny_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32.0]]
    assert errors(tiny_cfg, *overrides) == []


def test_parts_of_your_own_pass(tiny_cfg, monkeypatch):
    """With keys that mean something else to them."""
    for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY, ANCHOR_GENERATOR_REGISTRY):
        parts = dict(registry) | {"Own": type("Own", (DefaultAnchorGenerator,), {})}
        monkeypatch.setattr(registry, "_obj_map", parts)
    backbone = [BACKBONE, "Own", RESNETS + "NORM", "Own", FPN + "NORM", "Own", *FORTY]
    assert errors(tiny_cfg, *backbone, R + "NORM", "GN", R + "IN_FEATURES", ["a"] * 5) == []
    sizes = [ANCHORS + "SIZES", [[8.0], [9.0]]]
    assert errors(tiny_cfg, ANCHORS + "NAME", "Own", *sizes) == []
    names = [ANCHORS + "NAME", "nope", BACKBONE, "nope"]
    assert errors(tiny_cfg, "MODEL.META_ARCHITECTURE", "Own", *names) == []
