"""Every key of ``retina_plugin.config.KEYS`` is read, and accepts its choices and nothing else."""

import re
from functools import reduce

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from retina_plugin import add_retina_config
from retina_plugin.cli import train as train_command
from retina_plugin.config import DETECTRON2_KEYS, KEYS, REMOVED_KEYS, flatten
from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.engine import Trainer, check_config, check_devices, import_user_modules
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import EVALUATOR_REGISTRY
from retina_plugin.losses import BOX_LOSS_REGISTRY, CLS_LOSS_REGISTRY
from retina_plugin.modeling import ANCHOR_SAMPLER_REGISTRY, RETINANET_HEAD_REGISTRY

REGISTRIES = {
    registry.key: registry
    for registry in (
        RETINANET_HEAD_REGISTRY,
        CLS_LOSS_REGISTRY,
        ANCHOR_SAMPLER_REGISTRY,
        BOX_LOSS_REGISTRY,
        DATASET_MAPPER_REGISTRY,
        EVALUATOR_REGISTRY,
    )
}
CHOICES = {key: known.choices for key, known in KEYS.items() if known.choices}
NAMES = {
    **CHOICES,
    **{key: [*r.aliases, *sorted(name for name, _ in r)] for key, r in REGISTRIES.items()},
}
# Choices that need a GPU or a compiler: the error says so.
NEED_HARDWARE = ("native", "triton", "float16")


def set_key(cfg, key, value):
    *path, leaf = key.split(".")
    if key == EVALUATOR_REGISTRY.key and isinstance(value, str):
        value = (value,)  # a list of names
    reduce(getattr, path, cfg)[leaf] = value


def use(cfg):
    """Check the config and build everything it names, as a training does before its first step."""
    import_user_modules(cfg)
    check_config(cfg)
    check_devices(cfg, num_gpus=0)
    build_model(cfg)
    Trainer.build_train_loader(cfg)
    Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])


def test_keys_are_those_that_add_retina_config_adds():
    plain, ours = flatten(get_cfg()), flatten(add_retina_config(get_cfg()))
    assert ours.keys() - plain.keys() == KEYS.keys()
    assert all(ours[key] == known.default for key, known in KEYS.items())
    assert DETECTRON2_KEYS.keys() <= plain.keys()
    assert not REMOVED_KEYS.keys() & ours.keys()


def test_every_key_is_read(tiny_cfg, monkeypatch):
    """A key that nothing reads has no effect. The planted key shows that the test finds one."""
    cfg = tiny_cfg
    cfg.MODEL.RETINANET.NOT_READ = 1
    prefixes = {id(cfg): ""}

    def find_nodes(node):
        for key, value in node.items():
            if isinstance(value, CfgNode):
                prefixes[id(value)] = f"{prefixes[id(node)]}{key}."
                find_nodes(value)

    find_nodes(cfg)
    read = set()
    original = CfgNode.__getattr__

    def recording(self, key):
        if id(self) in prefixes:
            read.add(prefixes[id(self)] + key)
        return original(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(CfgNode, "__getattr__", recording)
        for key, registry in REGISTRIES.items():  # a component may have keys of its own
            default = reduce(getattr, key.split("."), cfg)
            for name, _ in registry:
                set_key(cfg, key, name)
                use(cfg)
            set_key(cfg, key, default)
        backbone = cfg.MODEL.BACKBONE.NAME
        cfg.MODEL.BACKBONE.NAME = "build_timm_retina_fpn_backbone"
        cfg.MODEL.TIMM.NAME = "resnet18"
        build_model(cfg)
        cfg.MODEL.BACKBONE.NAME = backbone
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.PRECISION = True, "bfloat16"
        cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES = True, (64,)
        Trainer.test(cfg, Trainer(cfg).model)
        # what only the command reads, before it starts the processes
        patch.setattr(train_command, "setup_cfg", lambda file, opts: cfg)
        patch.setattr(train_command, "run", lambda *args, **options: None)
        train_command.main(["--config-file", "retina_R50_400.yaml", "--num-gpus", "0"])
    assert KEYS.keys() - read == set()
    assert "MODEL.RETINANET.NOT_READ" not in read


@pytest.mark.parametrize("key", NAMES)
def test_unknown_choice_raises_and_lists_the_choices(tiny_cfg, key):
    tiny_cfg.SOLVER.AMP.ENABLED = True
    set_key(tiny_cfg, "SOLVER.AMP.PRECISION", "bfloat16")
    set_key(tiny_cfg, key, "Unheard")
    with pytest.raises(ConfigError) as error:
        use(tiny_cfg)
    message, _, known = str(error.value).partition("; known: ")
    assert message == f"{key}: unknown 'Unheard'"
    assert known.split(", ") == list(NAMES[key])


@pytest.mark.parametrize(("key", "name"), [(key, name) for key in NAMES for name in NAMES[key]])
def test_every_choice_works(tiny_cfg, key, name):
    tiny_cfg.SOLVER.AMP.ENABLED = True
    set_key(tiny_cfg, "SOLVER.AMP.PRECISION", "bfloat16")
    set_key(tiny_cfg, key, name)
    try:
        use(tiny_cfg)
    except ConfigError as error:
        assert name in NEED_HARDWARE
        assert re.match(rf"{key}: {name} (is not available|needs a GPU)", str(error))


@pytest.mark.parametrize("key", REGISTRIES)
def test_users_may_add_names_to_a_registry_and_the_default_is_one(key):
    known = KEYS.get(key) or DETECTRON2_KEYS[key]
    assert "_REGISTRY`" in known.meaning and not known.choices
    default = reduce(getattr, key.split("."), add_retina_config(get_cfg()))
    assert set([default] if isinstance(default, str) else default) <= set(NAMES[key])
