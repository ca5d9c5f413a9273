"""``retina diff``: which keys differ between two configs."""

import os
import subprocess
import sys

import pytest
from detectron2.config import get_cfg

from retina_plugin import add_retina_config
from retina_plugin.cli import main as retina
from retina_plugin.cli.diff import GROUPS, OTHER, compare, group_of
from retina_plugin.config import DETECTRON2_KEYS, KEYS, flatten


@pytest.fixture
def files(tmp_path, monkeypatch, repo):
    """a.yaml and b.yaml, which differ in at least one key of each group."""
    monkeypatch.chdir(tmp_path)
    base = repo / "configs" / "_base_" / "retinanet.yaml"
    (tmp_path / "a.yaml").write_text(f"_BASE_: {base}\nINPUT: {{MIN_SIZE_TRAIN: '(600,)'}}\n")
    (tmp_path / "b.yaml").write_text(
        f"""_BASE_: {base}
MODEL:
  RESNETS: {{DEPTH: 101}}
  ANCHOR_GENERATOR: {{SIZES: [[32], [64], [128], [256], [512]]}}
  RETINANET: {{OHEM: {{BATCH_SIZE: 512}}, SCORE_THRESH_TEST: 0.0}}
INPUT: {{MIN_SIZE_TRAIN: [600]}}
DATASETS: {{TRAIN: [other]}}
SOLVER: {{MAX_ITER: 7}}
SEED: 3
OUTPUT_DIR: elsewhere
"""
    )
    return "a.yaml", "b.yaml"


def run(capsys, *args):
    """The lines that it prints."""
    retina(["diff", *args])
    return capsys.readouterr().out.splitlines()


def test_differing_keys_by_group_with_sections(files, capsys):
    """Groups in order, key, both values and section in aligned columns; nothing else."""
    lines = run(capsys, *files)
    assert lines[:3] == ["A: a.yaml", "B: b.yaml", ""]
    header = lines[3]
    assert header.split() == ["key", "A", "B", "paper"]
    starts = [header.index(name) for name in ("key", "A", "B", "paper")]
    cells = []
    for line in lines[5:]:
        columns = [line[i:j].rstrip() for i, j in zip(starts, [*starts[1:], None])]
        assert all(not c.startswith(" ") for c in columns)
        cells.append(columns)
    found = [tuple(c) for c in cells if c[0]]
    assert found == [
        ("[model]", "", "", ""),
        (
            "MODEL.ANCHOR_GENERATOR.SIZES",
            "[32, 40.31747359663594,",  # goes on in the next lines
            "[32]",
            "4 Anchors, 5.2, Table 1c",
        ),
        ("MODEL.RESNETS.DEPTH", "50", "101", "5.1, Table 1e"),
        ("[loss and assignment]", "", "", ""),
        ("MODEL.RETINANET.OHEM.BATCH_SIZE", "128", "512", "5.1 OHEM, Table 1d"),
        ("[data and input]", "", "", ""),
        ("DATASETS.TRAIN", "['coco_2017_train']", "['other']", "5"),
        ("[schedule]", "", "", ""),
        ("SOLVER.MAX_ITER", "90000", "7", "4.1 Optimization, Table 2"),
        ("[test]", "", "", ""),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.05", "0.0", "4.1 Inference"),
        ("[other]", "", "", ""),
        ("SEED", "-1", "3", ""),
    ]
    text = " ".join(" ".join(columns[1] for columns in cells).split())
    assert "[512, 645.0795775461751, 812.7493386077181]" in text  # to the last digit
    assert [c[2] for c in cells if not c[0] and c[2]] == ["[64]", "[128]", "[256]", "[512]"]


def test_option_all_shows_every_key(files, capsys):
    lines = run(capsys, *files, "--all")
    keys = {line.split()[0] for line in lines[5:] if line[:1] not in ("[", " ")}
    assert keys == flatten(add_retina_config(get_cfg())).keys() - {"OUTPUT_DIR"}


def test_equal_configs(files, capsys):
    """File name, output folder, and list or tuple do not count."""
    with open("c.yaml", "w") as file:
        file.write("_BASE_: a.yaml\nINPUT: {MIN_SIZE_TRAIN: [600]}\nOUTPUT_DIR: c\n")
    assert run(capsys, "a.yaml", "c.yaml")[-1] == "no key differs"


def test_key_of_one_config_only():
    """A module of IMPORTS may add a key."""
    a, b = get_cfg(), get_cfg()
    b.MODEL.RETINANET.MINE = 1
    assert compare(a, b) == {"model": [("MODEL.RETINANET.MINE", "", "1", "")]}
    assert compare(b, a) == {"model": [("MODEL.RETINANET.MINE", "1", "", "")]}


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("MODEL.RETINANET.HEAD", "model"),
        ("MODEL.RETINANET.NUM_CLASSES", "model"),
        ("MODEL.RETINANET.ALPHA_PER_CLASS", "loss and assignment"),
        ("MODEL.RETINANET.FOCAL_STAR_BETA", "loss and assignment"),
        ("MODEL.RETINANET.OHEM.NMS_THRESH", "loss and assignment"),
        ("MODEL.RETINANET.NMS_THRESH_TEST", "test"),
        ("MODEL.PIXEL_MEAN", "data and input"),
        ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "data and input"),
        ("SOLVER.WARMUP_ITERS", "schedule"),
        ("TEST.EVAL_PERIOD", "test"),
        ("IMPORTS", "other"),
    ],
)
def test_groups(key, group):
    assert group_of(key) == group


def test_groups_and_sections_name_existing_keys():
    """No group and no section is left behind by a renamed key."""
    ours, plain = flatten(add_retina_config(get_cfg())), flatten(get_cfg())
    assert DETECTRON2_KEYS.keys() <= plain.keys()
    assert KEYS.keys() == ours.keys() - plain.keys()
    for start in (start for starts in GROUPS.values() for start in starts):
        assert any(key.startswith(start) for key in ours), start
    assert {key for key in KEYS if group_of(key) == OTHER} == {"IMPORTS", "TRACKING"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file bad.yaml"),
        ("MODEL: [", "bad.yaml"),
        ("MODEL: {RETINANET: {GAMMA: 2.0}}", "MODEL.RETINANET.GAMMA"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_unreadable_config_is_one_line(files, text, message):
    if text is not None:
        with open("bad.yaml", "w") as file:
            file.write(text)
    for args in (["bad.yaml", "a.yaml"], ["a.yaml", "bad.yaml"]):
        with pytest.raises(SystemExit) as error:
            retina(["diff", *args])
        assert str(error.value).startswith("error: ") and message in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_command_in_a_process(files, repo):
    """Exit status 0 with the table on stdout, 1 with the line on stderr."""
    command = [sys.executable, "-W", "ignore", "-m", "retina_plugin", "diff"]
    for file, status in (("b.yaml", 0), ("nothing.yaml", 1)):
        done = subprocess.run(
            [*command, "a.yaml", file],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(repo)},
        )
        assert done.returncode == status
        assert ("SOLVER.MAX_ITER" in done.stdout) == (status == 0)
        assert ("error: there is no file nothing.yaml" in done.stderr) == (status == 1)
