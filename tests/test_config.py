"""add_retina_config adds the plugin's keys and nothing else."""

from detectron2 import model_zoo
from detectron2.config import get_cfg

from retina_plugin import add_retina_config
from retina_plugin.config import flatten


def test_detectron2s_keys_and_defaults_stay():
    cfg = add_retina_config(get_cfg())
    plain = get_cfg()
    added = set(cfg.MODEL.RETINANET) - set(plain.MODEL.RETINANET)
    assert {"HEAD", "CLS_LOSS", "SAMPLER", "NORMALIZER", "LOW_QUALITY_MATCHES"} < added
    for key, value in plain.MODEL.RETINANET.items():
        assert cfg.MODEL.RETINANET[key] == value


def test_calling_it_again_keeps_what_was_set():
    cfg = add_retina_config(get_cfg())
    cfg.MODEL.RETINANET.CLS_LOSS = "CrossEntropy"
    cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA = None
    cfg.freeze()
    again = add_retina_config(cfg)
    assert again is cfg and cfg.is_frozen()
    assert cfg.MODEL.RETINANET.CLS_LOSS == "CrossEntropy"


def test_nothing_global_changes():
    add_retina_config(get_cfg()).MODEL.RETINANET.HEAD = "Mine"
    assert "HEAD" not in get_cfg().MODEL.RETINANET
    assert add_retina_config(get_cfg()).MODEL.RETINANET.HEAD == "RetinaHead"


def test_defaults_are_detectron2s_behaviour():
    """Changing only META_ARCHITECTURE of a Detectron2 YAML keeps its results."""
    cfg = add_retina_config(get_cfg())
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    retinanet = cfg.MODEL.RETINANET
    chosen = retinanet.CLS_LOSS, retinanet.NORMALIZER, retinanet.LOW_QUALITY_MATCHES
    assert chosen == ("FocalLoss", "ema", "always")
    assert retinanet.P6_SOURCE == "res5" and retinanet.SAMPLER == "AllAnchors"


def test_flatten_names_every_leaf_of_configs_and_plain_dicts():
    assert flatten({"A": {"B": 1, "C": {"D": [2]}}, "E": None}) == {
        "A.B": 1,
        "A.C.D": [2],
        "E": None,
    }
    assert flatten(add_retina_config(get_cfg()))["MODEL.RETINANET.OHEM.BATCH_SIZE"] == 128
