"""Config files: bases, tags, and files that are broken or hostile."""

import os
import re

import pytest

from retina_plugin.engine import load_config, setup_cfg
from retina_plugin.errors import ConfigError

EVAL = "!!python/object/apply:eval"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """``write(text, name)`` writes a config in the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text, name="a.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write_file


def error(name, load=load_config):
    """The one line that loading ends with."""
    with pytest.raises(ConfigError) as raised:
        load(name)
    text = str(raised.value)
    assert text.isprintable() and len(text) < 1000
    return text


HOSTILE = {
    "apply": "A: !!python/object/apply:os.system ['touch ran']",
    "apply mapping": "A: !!python/object/apply:os.system {args: ['touch ran']}",
    "new": "A: !!python/object/new:os.system ['touch ran']",
    "subprocess": "A: !!python/object/apply:subprocess.check_output [['touch', 'ran']]",
    "name": "A: !!python/name:os.system",
    "module": "A: !!python/module:antigravity",
    "object": "A: !!python/object:os._wrap_close {}",
    "full tag": "A: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch ran']",
    "prefix": "%TAG !p! tag:yaml.org,2002:python/\n---\nA: !p!object/apply:os.system ['touch ran']",
    "key": "? !!python/object/apply:os.system ['touch ran']\n: 1",
    "base": "_BASE_: !!python/object/apply:os.system ['touch ran']",
    "merge": "<<: !!python/object/apply:os.system ['touch ran']",
    "in a list": "A: [1, [!!python/object/apply:os.system ['touch ran']]]",
    "in eval": f"A: {EVAL} [!!python/object/apply:os.system ['touch ran']]",
    "eval call": f"""A: {EVAL} ["__import__('os').system('touch ran')"]""",
    "eval open": f"""A: {EVAL} ["open('ran', 'w')"]""",
    "eval attribute": f"""A: {EVAL} ["[c for c in [].__class__.__base__.__subclasses__()]"]""",
    "eval globals": f"A: {EVAL} ['1', {{x: 1}}]",
    "eval mapping": f"A: {EVAL} {{args: ['1']}}",
    "eval nothing": f"A: {EVAL} []",
    "eval scalar": f"A: {EVAL} '1'",
    "exec": 'A: !!python/object/apply:exec [\'open("ran", "w")\']',
    "builtins": "A: !!python/object/apply:builtins.eval ['1']",
    "local tag": "A: !ran 1",
}


@pytest.mark.parametrize("where", ["file", "base", "base of a base"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tags_are_refused(write, tmp_path, text, where):
    """Wherever they stand: one line with the file and its line, and nothing is run."""
    write(text, "hostile.yaml")
    write("_BASE_: hostile.yaml", "middle.yaml")
    name = {"file": "hostile.yaml", "base": "middle.yaml"}.get(where, "top.yaml")
    write("_BASE_: [middle.yaml]", "top.yaml")
    files = set(tmp_path.iterdir())
    said = error(name, setup_cfg)
    assert re.match(r"(cannot read )?hostile.yaml: .*line \d", said), said
    assert set(tmp_path.iterdir()) == files


def test_arithmetic_and_tuples_are_read(write):
    """The tags of Detectron2's configs."""
    name = write(f"A: {EVAL} ['[[x, x * 2] for x in [1, 2]]']\nB: !!python/tuple [1, [2]]")
    assert load_config(name) == {"A": [[1, 2], [2, 4]], "B": (1, [2])}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A: 1\nB: 2\nA: 3", "a.yaml: the key 'A' is there twice, in line 1 and line 3"),
        ("S:\n  X: 1\n  'X': 1", "the key 'X' is there twice, in line 2 and line 3"),
        ("S: {X: {Y: 1, Y: 2}}", "the key 'Y' is there twice, in line 1 and line 1"),
        ("_BASE_: b.yaml\n_BASE_: c.yaml", "the key '_BASE_' is there twice"),
        ("_BASE_: 3", "_BASE_ must be a file or a list of files, got 3"),
        ("_BASE_: null", "_BASE_ must be"),
        ("_BASE_: {a: b}", "_BASE_ must be"),
        ("_BASE_: [3]", "_BASE_ must be"),
        ("_BASE_: ''", "_BASE_: '' is not the name of a file"),
        ('_BASE_: "a\\0b"', "is not the name of a file"),
        ('_BASE_: "a\\nb"', "is not the name of a file"),
        ("_BASE_: .", "there is no file "),
        ("_BASE_: none.yaml", "there is no file none.yaml"),
        ("", "is not a mapping"),
        ("# nothing", "is not a mapping"),
        ("[1]", "is not a mapping"),
        ("3", "is not a mapping"),
        ("A: *nothing", "undefined alias"),
        ("A: 1\n---\nB: 1", "single document"),
        ("A: [", "cannot read a.yaml"),
        ("A:\n\t- 1", "cannot read a.yaml"),
        ("1: 2", "the key 1 is not a name"),
        ("? [1]\n: 2", "unhashable"),
        ("A: 2001-99-99", "cannot read a.yaml"),
        ("A: !!int abc", "cannot read a.yaml"),
        ("A: !!timestamp abc", "cannot read a.yaml"),
        ("A: 0b_", "cannot read a.yaml"),
        ("A: " + "1" * 5000, "cannot read a.yaml"),
        (b"\0\0", "cannot read a.yaml"),
        (b"A: 1\0", "cannot read a.yaml"),
        ("A: ü".encode("latin1"), "cannot read a.yaml: 'utf-8' codec"),
        ("A: 1".encode("utf-16"), "cannot read a.yaml: 'utf-8' codec"),
        ("A: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("A: " + "[" * 5000, "nested too deeply"),
        ("A: &a [*a]", "nested more than 50 deep"),
        ("A: &a {b: *a}", "nested more than 50 deep"),
        ("A: '" + "x" * 2**18 + "'", "larger than 262144 bytes"),
        ("VERSION: 3", "VERSION must be 1 or 2, got 3"),
        ("VERSION: .nan", "VERSION must be 1 or 2"),
        ("SEED: 2001-01-01", "SEED"),
        ("SEED: '" + "-" * 100_000 + "1'", "nested too deeply"),
        ("MODEL: 3", "MODEL is a group of keys"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_broken_file_is_one_line(write, text, expected):
    """With the file and what is wrong in it."""
    assert expected in error(write(text), setup_cfg)


def test_byte_order_mark_is_read(write):
    """Some editors write one."""
    assert load_config(write(b"\xef\xbb\xbfSEED: 1")) == {"SEED": 1}


def test_merge_keys_are_no_double_keys(write):
    """A mapping may override what an alias brings."""
    name = write("A: &a {x: 1, y: 1}\nB: {<<: *a, x: 2}")
    assert load_config(name)["B"] == {"x": 2, "y": 1}


@pytest.mark.parametrize("kind", ["lists", "mappings"])
def test_aliases_cannot_grow_without_bound(write, kind):
    """Forty lines that stand for a million million values."""
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 41):
        pair = f"[*a{i - 1}, *a{i - 1}]" if kind == "lists" else f"{{p: *a{i - 1}, q: *a{i - 1}}}"
        lines.append(f"a{i}: &a{i} {pair}")
    assert "aliases stand for more than" in error(write("\n".join(lines)))


@pytest.mark.parametrize("spelling", ["a.yaml", "./a.yaml", "sub/../a.yaml", "link.yaml", "FULL"])
@pytest.mark.parametrize("files", [1, 2])
def test_circle_of_bases_raises(write, tmp_path, spelling, files):
    """However the path is written, and through a link. The line names the files."""
    (tmp_path / "sub").mkdir()
    os.symlink("a.yaml", "link.yaml")
    back = str(tmp_path / "a.yaml") if spelling == "FULL" else spelling
    write(f"_BASE_: {back if files == 1 else 'b.yaml'}")
    write(f"_BASE_: {back}", "b.yaml")
    said = error("a.yaml")
    assert "inherits itself by _BASE_: a.yaml -> " in said
    assert ("b.yaml" in said) == (files == 2)


def test_bases_that_share_bases_are_read_once(write):
    """Two to the power of forty reads would not end. A chain of a hundred files raises."""
    for i in range(100):
        write(f"_BASE_: [c{i + 1}.yaml, c{i + 1}.yaml]\nA{i}: 1", f"c{i}.yaml")
    write("SEED: 1", "c100.yaml")
    assert load_config("c60.yaml") == {f"A{i}": 1 for i in range(60, 100)} | {"SEED": 1}
    assert "more than 50 bases" in error("c0.yaml")
