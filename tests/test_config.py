"""The config: the plugin's keys, and configs by name."""

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg

from retina_plugin import add_retina_config, get_config_file
from retina_plugin.config import KEYS, flatten
from retina_plugin.engine import load_config, setup_cfg
from retina_plugin.errors import ConfigError


def test_keys_are_added_and_detectron2s_stay():
    plain, ours = flatten(get_cfg()), flatten(add_retina_config(get_cfg()))
    assert ours == plain | {name: key.default for name, key in KEYS.items()}


def test_every_key_says_what_it_means():
    for name, key in KEYS.items():
        assert key.meaning.endswith("."), name
        assert not key.choices or key.default in key.choices, name


def test_second_call_keeps_values():
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


def test_flatten_names_every_leaf_of_configs_and_dicts():
    assert flatten({"A": {"B": 1, "C": {"D": [2]}}, "E": None}) == {
        "A.B": 1,
        "A.C.D": [2],
        "E": None,
    }
    assert flatten(add_retina_config(get_cfg()))["MODEL.RETINANET.OHEM.BATCH_SIZE"] == 128


def test_config_by_name_is_the_file(repo, monkeypatch, tmp_path):
    """From any folder, for --config-file, _BASE_ and Detectron2's own loader."""
    name = "table1b_gamma/fl_gamma0.5.yaml"
    monkeypatch.chdir(tmp_path)
    expected = setup_cfg(str(repo / "configs" / name))
    assert get_config_file(name) == str(repo / "configs" / name)
    assert setup_cfg(name) == expected
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {name}\nSEED: 3\n")
    mine = setup_cfg("mine.yaml")
    assert mine.SEED == 3 and mine.MODEL == expected.MODEL
    cfg = add_retina_config(get_cfg())
    cfg.merge_from_file(get_config_file(name))
    assert cfg.MODEL == expected.MODEL and cfg.SOLVER == expected.SOLVER


def test_file_wins_over_config_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "retina_R50_600.yaml").write_text("SEED: 5\nVERSION: 2\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: retina_R50_600.yaml\n")
    assert setup_cfg("retina_R50_600.yaml").SEED == 5
    assert setup_cfg("mine.yaml").SEED == 5


def test_unknown_config_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no config is named retina_R50_60\.yaml .*did you mean"):
        get_config_file("retina_R50_60.yaml")
    with pytest.raises(ConfigError, match=r"there is no file .*, and no config is named"):
        setup_cfg("retina_R50_60.yaml")


def test_bases_merge_as_in_detectron2(repo, tmp_path):
    """load_config equals Detectron2's loader on every config and on a list of bases."""
    cfg = get_cfg()
    (tmp_path / "list.yaml").write_text(
        f"_BASE_: [{repo}/configs/retina_R50_800.yaml, "
        f"{repo}/configs/_base_/protocol_detectron1.yaml]\nMODEL: {{WEIGHTS: ''}}\n"
    )
    files = [*(repo / "configs").rglob("*.yaml"), tmp_path / "list.yaml"]
    assert len(files) > 50
    for path in files:
        assert load_config(str(path)) == cfg.load_yaml_with_base(str(path)), path


@pytest.mark.parametrize("name", ["R_50_FPN_1x", "R_50_FPN_3x", "R_101_FPN_3x"])
def test_detectron2s_retinanet_configs_are_read(name):
    """They compute the anchors' sizes by a tag that runs Python code; here it is evaluated."""
    name = f"COCO-Detection/retinanet_{name}.yaml"
    cfg, expected = setup_cfg(model_zoo.get_config_file(name)), model_zoo.get_config(name)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][1] == 32 * 2 ** (1 / 3)
    for key, value in flatten(expected).items():
        if key != "OUTPUT_DIR":  # named after the file here
            assert flatten(cfg)[key] == value, key


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.yaml": "_BASE_: b.yaml", "b.yaml": "_BASE_: a.yaml"}, "a.yaml inherits itself"),
        ({"a.yaml": "_BASE_: a.yaml"}, "a.yaml inherits itself"),
        ({"a.yaml": "- 1"}, "a.yaml is not a mapping of keys"),
        ({"a.yaml": ""}, "a.yaml is not a mapping of keys"),
        ({"a.yaml": "_BASE_: b.yaml", "b.yaml": "[]"}, "b.yaml is not a mapping of keys"),
        ({"a.yaml": "MODEL: [\n"}, "cannot read a.yaml"),
        ({"a.yaml": "_BASE_: b.yaml\nX: {Y: 1}", "b.yaml": "X: 1"}, "X is a group of keys"),
        ({"a.yaml": "MODEL: 3"}, "a.yaml: MODEL is a group of keys, got 3"),
        ({"a.yaml": "MODEL: {RETINANET: [1]}"}, "MODEL.RETINANET is a group of keys, got [1]"),
        ({"a.yaml": "MODEL: {3: 4}"}, "a.yaml: the key 3 is not a name"),
        ({"a.yaml": "_BASE_: 3"}, "_BASE_ must be a file or a list of files, got 3"),
        ({"a.yaml": "_BASE_: [3]"}, "_BASE_ must be a file or a list of files, got [3]"),
    ],
)
def test_unreadable_config_is_one_line(monkeypatch, tmp_path, files, said):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        setup_cfg("a.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)
