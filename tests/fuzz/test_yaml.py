"""Config files: right, or one line. Nothing in them runs."""

import pytest
import yaml
from hypothesis import strategies as st

from retina_plugin.doctor import raise_errors
from retina_plugin.doctor.config import check_config
from retina_plugin.engine import load_config, setup_cfg
from tests.fuzz.counting import fuzz
from tests.fuzz.mutation import (
    JUNK,
    any_bytes,
    damaged_bytes,
    damaged_tree,
    randoms,
    read_or_one_line,
)

HOSTILE = [
    b'!!python/object/apply:os.system ["true"]',
    b'!!python/object/new:subprocess.Popen [["true"]]',
    b"!!python/name:os.system ",
    b"!!python/module:this ",
    b"!!python/object/apply:builtins.eval [\"__import__('os').system('true')\"]",
    *(b"&a [*a, *a]", b"*b", b"<<: *a\n", b"? [a, b]\n: c\n", b"!!binary x", b"!!set {a}", b"!x y"),
    *(b"\t", b": ", b"- ", b"'", b'"', b"%YAML 9.9\n", b"---\n", b"...\n", b"2001-01-01"),
    *(b"{{", b"1_0"),
]
FILE = "quick/digits_R18_short.yaml"


def check(path):
    """What happens before anything is built: the keys are read and their values checked."""
    cfg = setup_cfg(str(path))
    raise_errors(check_config(cfg))
    raise_errors(check_config(cfg, eval_only=True))
    return cfg


@pytest.fixture(scope="module")
def configs(repo):
    """Texts of valid files, and their trees without bases: a config with every key is one."""
    files = ["_base_/retinanet.yaml", FILE, "table1d_ohem/fl_R101_600.yaml"]
    texts = [(repo / "configs" / name).read_bytes() for name in files]
    everything = yaml.safe_load(setup_cfg(str(repo / "configs" / files[1])).dump())
    trees = [load_config(str(repo / "configs" / name)) for name in files] + [everything] * 2
    return texts + [yaml.safe_dump(everything).encode()], trees


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "config.yaml"


@fuzz(6, rng=randoms())
def test_damaged_keys_and_values(configs, path, rng):
    """Keys are dropped, renamed and swapped; values become others, of other types."""
    junk = [value for value in JUNK if value != "!!python/name:os.system"]
    tree = damaged_tree(rng.choice(configs[1]), rng, junk)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="replace")
    read_or_one_line(check, path)


@fuzz(6, rng=randoms())
def test_damaged_bytes(configs, path, rng):
    """Cut, flipped, doubled; tags that would run Python code put in."""
    path.write_bytes(damaged_bytes(rng.choice(configs[0]), rng, HOSTILE))
    read_or_one_line(check, path)


@fuzz(4, data=any_bytes())
def test_random_bytes(path, data):
    path.write_bytes(data)
    read_or_one_line(check, path)


@fuzz(4, rng=randoms(), hostile=st.sampled_from(HOSTILE))
def test_overrides(rng, hostile):
    """Values of the command line are text: numbers, lists, and anything else."""
    keys = ["SOLVER.BASE_LR", "SOLVER.STEPS", "MODEL.RETINANET.FOCAL_LOSS_ALPHA", "DATASETS.TEST"]
    values = [hostile.decode(), *(str(value) for value in JUNK), "__import__('os').system('true')"]
    opts = [rng.choice([*keys, "X", "", "SOLVER", "SOLVER.", "."]), rng.choice(values)]
    if rng.random() < 0.1:
        opts = opts[:1]
    read_or_one_line(lambda: raise_errors(check_config(setup_cfg(FILE, opts))))
