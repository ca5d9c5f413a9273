"""docs/paper.yaml, the config of each of its rows, and the protocol presets."""

import re

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.solver import build_optimizer

from reproduction import paper
from reproduction.paper import Row, header_numbers, load_paper
from retina_plugin import add_retina_config
from retina_plugin.cli.diff import flatten
from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError

TABLES = load_paper()
ROWS = [row for table in TABLES.values() for row in table.rows]
FL = {
    "MODEL.RETINANET.CLS_LOSS": "FocalLoss",
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 2.0,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.25,
}
CE_75 = {"MODEL.RETINANET.CLS_LOSS": "CrossEntropy", "MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.75}
CE = {"MODEL.RETINANET.CLS_LOSS": "CrossEntropy", "MODEL.RETINANET.FOCAL_LOSS_ALPHA": None}
BEST_ALPHA = {0: 0.75, 0.1: 0.75, 0.2: 0.75, 0.5: 0.5, 1: 0.25, 2: 0.25, 5: 0.25}  # Table 1b
SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"
# Reference: what Detectron, the authors' first code, does.
DETECTRON1 = {
    "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
    "MODEL.RETINANET.NORMALIZER": "per_gpu",
    "MODEL.RETINANET.LOW_QUALITY_MATCHES": "above_background",
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.11,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "SOLVER.BIAS_LR_FACTOR": 2.0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "SOLVER.WARMUP_FACTOR": 1 / 3,
    "SOLVER.WARMUP_ITERS": 500,
}
PRESETS = ("paper", "detectron1", "detectron2")


def find(table, name):
    (row,) = (row for row in TABLES[table].rows if row.name == name)
    return row


def resolve(repo, row):
    """Key -> value of the row's config."""
    return flatten(setup_cfg(str(repo / row.config)))


def numbers_of(name):
    """The numbers in a row's name."""
    return [float(n) for n in re.findall(r"[\d.]+", name)]


def sizes(scales):
    """Areas 32^2 to 512^2 on P3 to P7 times 2^(k/scales)."""
    return [[side * 2 ** (k / scales) for k in range(scales)] for side in (32, 64, 128, 256, 512)]


def said_by_name(row):
    """(depth, key -> value) that the row's table and name say, with ResNet-depth at 600 px."""
    n = numbers_of(row.name)
    if row.table == "5.1":
        return 50, {**CE, "MODEL.RETINANET.PRIOR_PROB": n[0]}
    if row.table == "1a":
        return 50, {**CE, "MODEL.RETINANET.FOCAL_LOSS_ALPHA": n[0]}
    if row.table == "1b":
        alpha = {"MODEL.RETINANET.FOCAL_LOSS_ALPHA": BEST_ALPHA[n[0]]}
        return 50, {**FL, "MODEL.RETINANET.FOCAL_LOSS_GAMMA": n[0], **alpha}
    if row.table == "1c":
        ratios = {1: [[1.0]], 3: [[0.5, 1.0, 2.0]]}[n[1]]
        anchors = {SIZES: sizes(int(n[0])), "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": ratios}
        return 50, {**FL, **anchors}
    if row.table == "1d" and row.name == "FL":
        return 101, {**FL, "MODEL.RETINANET.SAMPLER": "AllAnchors"}
    if row.table == "1d":
        ohem = {"MODEL.RETINANET.SAMPLER": "OHEM"}
        ohem["MODEL.RETINANET.OHEM.BATCH_SIZE"] = n[-2]
        ohem["MODEL.RETINANET.OHEM.NMS_THRESH"] = n[-1]
        ohem["MODEL.RETINANET.OHEM.POSITIVE_FRACTION"] = 0.25 if "1:3" in row.name else None
        return 101, {**CE, **ohem}
    assert row.table == "3"
    if row.name in ("CE", "FL"):
        return 50, CE_75 if row.name == "CE" else FL
    star = {"MODEL.RETINANET.CLS_LOSS": "FocalLossStar", "MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.25}
    star["MODEL.RETINANET.FOCAL_STAR_GAMMA"], star["MODEL.RETINANET.FOCAL_STAR_BETA"] = n
    return 50, star


def row_id(row):
    return f"{row.table}: {row.name}"


every_row = pytest.mark.parametrize("row", ROWS, ids=row_id)
ablation_row = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.table not in ("1e", "2")], ids=row_id
)


# ---- docs/paper.yaml


def test_tables_and_their_rows():
    """Every table is there with as many rows as in the paper."""
    counts = {key: len(table.rows) for key, table in TABLES.items()}
    ablations = {"5.1": 2, "1a": 7, "1b": 7, "1c": 7, "1d": 10}
    assert counts == {**ablations, "1e": 10, "2": 2, "3": 4}
    on_test_dev = {key for key, table in TABLES.items() if table.split == "test-dev"}
    assert on_test_dev == {"1e", "2"}
    assert {table.split for table in TABLES.values()} == {"minival", "test-dev"}
    assert all(row.table == key for key, table in TABLES.items() for row in table.rows)


@pytest.mark.parametrize(
    ("table", "name", "expected"),
    [
        ("1a", "alpha=0.999", {"AP": 25.1, "AP50": 41.7, "AP75": 26.1}),
        ("1b", "gamma=0.5", {"AP": 32.9, "AP50": 51.7, "AP75": 35.2}),
        ("1c", "2x3", {"AP": 34.2, "AP50": 53.1, "AP75": 36.5}),
        ("1d", "OHEM 1:3 512 0.5", {"AP": 24.0, "AP50": 35.5, "AP75": 25.8}),
        ("1d", "OHEM 256 0.7", {"AP": 31.8, "AP50": 48.8, "AP75": 33.9}),
        ("3", "FL* gamma=2 beta=1", {"AP": 33.8, "AP50": 52.7, "AP75": 36.3}),
        ("5.1", "pi=0.01", {"AP": 30.2}),
    ],
)
def test_numbers_typed_by_hand(table, name, expected):
    assert find(table, name).metrics == expected


def test_every_metric_is_typed_by_hand_once():
    row = find("1e", "R101-500")
    small_to_large = {"APs": 14.7, "APm": 38.5, "APl": 49.1}
    assert row.metrics == {"AP": 34.4, "AP50": 53.1, "AP75": 36.8, **small_to_large, "ms": 90}


def test_which_metrics_a_table_has():
    """Columns as printed; section 5.1 has an AP in the text, and a run that diverges."""
    columns = {"1e": 7, "2": 6}
    for row in ROWS:
        if row.table != "5.1":
            assert tuple(row.metrics) == paper.METRICS[: columns.get(row.table, 3)]
            ap, ap50, ap75 = (row.metrics[m] for m in ("AP", "AP50", "AP75"))
            assert 0 <= ap <= ap75 <= ap50 < 100
    assert [row_id(row) for row in ROWS if row.diverges] == ["5.1: pi=0.5"]
    assert find("5.1", "pi=0.5").metrics == {}


def test_header_numbers():
    metrics = {"AP": 34.0, "AP50": 52.5, "AP75": 36.5}
    assert header_numbers(Row("x", "y", "z", metrics)) == "AP 34.0, AP50 52.5, AP75 36.5"
    more = {"APs": 0.0, "APm": 8.9, "APl": 9.0, "ms": 64.0}
    expected = "AP 34.0, AP50 52.5, AP75 36.5, APs 0.0, APm 8.9, APl 9.0"
    assert header_numbers(Row("x", "y", "z", metrics | more)) == expected
    assert header_numbers(Row("x", "y", "z", {}, diverges=True)) == "diverges"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package without a checkout around it, and a working directory that is none."""
    monkeypatch.setattr(paper, "__file__", str(tmp_path / "site" / "reproduction" / "p"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_paper(folder, rows):
    (folder / "docs").mkdir()
    text = f"tables:\n  '9':\n    title: t\n    split: minival\n    rows: [{rows}]\n"
    (folder / "docs" / "paper.yaml").write_text(text)


def test_without_a_checkout(elsewhere):
    with pytest.raises(ConfigError, match="run this in a checkout") as error:
        load_paper()
    assert "paper.yaml" in str(error.value) and "\n" not in str(error.value)


def test_the_current_directory_is_looked_at(elsewhere):
    write_paper(elsewhere, "{name: a, config: c.yaml, AP75: 2, AP: 1}")
    assert paper.checkout() == elsewhere
    (row,) = load_paper()["9"].rows
    assert row == Row("9", "a", "c.yaml", {"AP": 1.0, "AP75": 2.0}, False)
    assert list(row.metrics) == ["AP", "AP75"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{name: a, config: c, AP: 1}, {name: a, config: d, AP: 1}", "two rows of one name"),
        ("{name: a, config: c, AP90: 1}", "unknown AP90"),
        ("{name: a, config: c}", "either metrics or diverges"),
        ("{name: a, config: c, AP: 1, diverges: true}", "either metrics or diverges"),
        ("{name: a, AP: 1}", "config"),
        ("{name: a, config: c, AP: high}", "high"),
        ("{name: a", "expected"),
    ],
)
def test_a_broken_file(elsewhere, rows, message):
    write_paper(elsewhere, rows)
    with pytest.raises(ConfigError, match=message) as error:
        load_paper()
    assert "\n" not in str(error.value)


# ---- the configs of the rows


def test_every_config_belongs_to_one_row(repo):
    folder = repo / "configs"
    found = [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    found = [f"configs/{p.as_posix()}" for p in found if p.parts[0] not in ("_base_", "quick")]
    assert sorted(row.config for row in ROWS) == sorted(found)


@every_row
def test_header_of_its_config(repo, row):
    """Table, the row's numbers and split, what is a choice, the command."""
    lines = (repo / row.config).read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment and max(map(len, lines)) <= 100
    text = " ".join(line.removeprefix("# ") for line in comment)
    where = "Section 5.1" if row.table == "5.1" else f"Table {row.table}"
    assert text.startswith(f"{where}, ")
    split = TABLES[row.table].split
    stated, _, rest = text.partition(f"on {split} the paper has ")
    assert header_numbers(row) + "." in rest and not re.search(r"\bAP", stated)
    assert re.findall(r"\bAP\w* \d\S+", text) == re.findall(
        r"AP\w* \d\S+", header_numbers(row) + "."
    )
    assert "Trains on trainval35k; evaluates on minival." in text
    assert re.search(r"Choices?: ", text)
    assert text.endswith(f" python train_net.py --config-file {row.config} --num-gpus 8")


@every_row
def test_its_config_is_a_short_delta(repo, row):
    lines = (repo / row.config).read_text().splitlines()
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines) <= 15


@ablation_row
def test_its_config_is_what_its_name_says(repo, row):
    """What the name says, and in all else the default of its depth."""
    depth, said = said_by_name(row)
    default = resolve(repo, find("1e", f"R{depth}-600"))
    got = resolve(repo, row)
    assert said.keys() <= default.keys()
    expected = {**default, **said}
    for got_level, level in zip(got.pop(SIZES), expected.pop(SIZES), strict=True):
        assert got_level == pytest.approx(level, rel=1e-12)
    assert got == expected


@ablation_row
def test_anchors_of_a_location(repo, row):
    """What the generator makes of it: as many anchors, with these areas and ratios."""
    cfg = setup_cfg(str(repo / row.config))
    scales, ratios = map(int, numbers_of(row.name)) if row.table == "1c" else (3, 3)
    shapes = [type("Shape", (), {"stride": 8 * 2**level}) for level in range(5)]
    generator = build_anchor_generator(cfg, shapes)
    assert generator.num_anchors == [scales * ratios] * 5
    for cell, sides in zip(generator.cell_anchors, sizes(scales), strict=True):
        width, height = (cell[:, 2:] - cell[:, :2]).unbind(1)
        areas = torch.tensor(sides).square().repeat_interleave(ratios)
        assert torch.allclose((width * height).sort().values, areas, rtol=1e-4)
        expected = torch.tensor([1.0] if ratios == 1 else [0.5, 1.0, 2.0]).repeat(scales)
        assert torch.allclose((height / width).sort().values, expected.sort().values, rtol=1e-4)


@pytest.mark.parametrize("row", TABLES["1e"].rows, ids=row_id)
def test_depth_and_scale_of_table_1e(repo, row):
    depth, size = map(int, numbers_of(row.name))
    got = resolve(repo, row)
    assert got["MODEL.RESNETS.DEPTH"] == depth
    assert got["MODEL.WEIGHTS"].endswith(f"R-{depth}.pkl")
    assert (got["INPUT.MIN_SIZE_TRAIN"], got["INPUT.MIN_SIZE_TEST"]) == ((size,), size)
    for key in ("INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST"):
        assert got[key] == pytest.approx(1333 / 800 * size, abs=1)
    assert FL.items() <= got.items()
    assert got["MODEL.RETINANET.SAMPLER"] == "AllAnchors"
    assert got["MODEL.RETINANET.PRIOR_PROB"] == 0.01
    assert got[SIZES] == [pytest.approx(level) for level in sizes(3)]
    assert got["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0]]


@pytest.mark.parametrize("row", TABLES["2"].rows, ids=row_id)
def test_recipe_of_table_2(repo, row):
    got = resolve(repo, row)
    groups = (32, 8) if row.name.startswith("X101-32x8d") else (1, 64)
    assert got["MODEL.RESNETS.DEPTH"] == 101
    assert (got["MODEL.RESNETS.NUM_GROUPS"], got["MODEL.RESNETS.WIDTH_PER_GROUP"]) == groups
    assert len(got["INPUT.MIN_SIZE_TRAIN"]) > 1 and max(got["INPUT.MIN_SIZE_TRAIN"]) == 800
    assert got["INPUT.MIN_SIZE_TEST"] == 800
    assert (got["SOLVER.MAX_ITER"], got["SOLVER.STEPS"]) == (135_000, (90_000, 120_000))


def test_one_experiment_in_several_tables(repo):
    """Rows that have the same numbers are the same config, but for CE as FL with gamma 0."""
    fl = [("1b", "gamma=2"), ("1c", "3x3"), ("3", "FL")]
    ce = [("1a", "alpha=0.75"), ("3", "CE"), ("1b", "gamma=0")]
    for names in (fl, ce):
        rows = [find(*name) for name in names]
        assert rows[0].metrics == rows[1].metrics == rows[2].metrics
        first, second, third = (resolve(repo, row) for row in rows)
        assert first == second
        differ = {key for key in first if first[key] != third[key]}
        assert differ == (
            {f"MODEL.RETINANET.{k}" for k in ("CLS_LOSS", "FOCAL_LOSS_GAMMA")}
            if names is ce
            else set()
        )


def test_output_folders_of_the_ablations_differ(repo):
    """OUTPUT_DIR follows the file's name, so no two of them have the same."""
    names = [setup_cfg(str(repo / row.config)).OUTPUT_DIR for row in ROWS]
    assert len(set(names)) == len(names)


# ---- the protocol presets


def preset_path(repo, preset):
    return repo / "configs" / "_base_" / f"protocol_{preset}.yaml"


def preset_keys(repo, preset):
    """Key -> value as the YAML has it."""

    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from (
                leaves(value, f"{prefix}{key}.")
                if isinstance(value, dict)
                else [(prefix + key, value)]
            )

    return dict(leaves(yaml.safe_load(preset_path(repo, preset).read_text())))


@pytest.fixture
def inherit(tmp_path, repo):
    """(row, presets) -> key -> value of a config that inherits them in this order."""

    def merged(row, *presets):
        paths = [repo / row.config, *(preset_path(repo, p) for p in presets)]
        path = tmp_path / "merged.yaml"
        path.write_text(yaml.safe_dump({"_BASE_": [str(p) for p in paths]}))
        return flatten(setup_cfg(str(path)))

    return merged


def test_presets_set_the_same_keys(repo):
    """So that any can replace any; none has a base."""
    for preset in PRESETS:
        assert preset_keys(repo, preset).keys() == DETECTRON1.keys()


@pytest.mark.parametrize("row", TABLES["1e"].rows, ids=row_id)
def test_presets_merge_over_table_1e(repo, row, inherit):
    """They change their own keys and nothing else, and the last one wins."""
    plain = resolve(repo, row)
    alone = {preset: inherit(row, preset) for preset in PRESETS}
    for preset, got in alone.items():
        assert {key for key in plain if plain[key] != got[key]} <= DETECTRON1.keys()
        assert got.keys() == plain.keys()
        for other in PRESETS:
            assert inherit(row, other, preset) == got
    assert len({str(got) for got in alone.values()}) == 3


def test_the_papers_preset_is_the_default_at_800_px(repo, inherit):
    for name in ("R50-800", "R101-800"):
        row = find("1e", name)
        assert inherit(row, "paper") == resolve(repo, row)


def test_detectrons_preset(repo, inherit):
    got = inherit(find("1e", "R50-800"), "detectron1")
    assert {key: got[key] for key in DETECTRON1} == DETECTRON1
    text = preset_path(repo, "detectron1").read_text()
    for without_key in ("rounded", '"+1"', "0 at P7", "128"):
        assert without_key in text.partition("No key for:")[2].partition("MODEL:")[0]


def test_detectron2s_preset_is_its_own_config(inherit):
    """The model zoo's YAML on top of Detectron2's defaults, key by key."""
    cfg = add_retina_config(get_cfg())
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    theirs, ours = flatten(cfg), inherit(find("1e", "R50-800"), "detectron2")
    assert {key: ours[key] for key in DETECTRON1} == {key: theirs[key] for key in DETECTRON1}


def test_biases_of_the_built_optimizer(tmp_path, repo):
    """Detectron: twice the learning rate, no decay; the others: as the weights."""
    row = repo / find("1e", "R50-800").config
    for preset, expected in {"detectron1": (0.02, 0), "paper": (0.01, 1e-4)}.items():
        path = tmp_path / "optimizer.yaml"
        path.write_text(yaml.safe_dump({"_BASE_": [str(row), str(preset_path(repo, preset))]}))
        layer = torch.nn.Conv2d(1, 1, 1)
        groups = build_optimizer(setup_cfg(str(path)), layer).param_groups
        found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert found == {id(layer.weight): (0.01, 1e-4), id(layer.bias): expected}
