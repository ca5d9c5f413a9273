"""docs/paper.yaml is complete and consistent, and a broken file is reported."""

import re

import pytest

from reproduction import paper
from reproduction.paper import Claim, Row, load_claims, load_paper
from reproduction.plan import run_key
from retina_plugin.config import section_of
from retina_plugin.errors import ConfigError

TABLES = load_paper()
ROWS = {str(row): row for table in TABLES.values() for row in table.rows}
SIZES = "MODEL.ANCHOR_GENERATOR.SIZES"


def test_every_table_has_all_its_rows():
    counts = {key: len(table.rows) for key, table in TABLES.items()}
    ablations = {"5.1": 2, "1a": 7, "1b": 7, "1c": 7, "1d": 10}
    assert counts == {**ablations, "1e": 10, "2": 2, "3": 4}
    assert all(row.table == key for key, table in TABLES.items() for row in table.rows)


def test_main_results_are_on_test_dev_and_ablations_on_minival():
    on_test_dev = {key for key, table in TABLES.items() if table.split == "test-dev"}
    assert on_test_dev == {"1e", "2"}
    assert {table.split for table in TABLES.values()} == {"minival", "test-dev"}


def test_rows_have_the_columns_of_their_table():
    """Section 5.1 has one AP in the text, and a run that diverges."""
    columns = {"1e": (*paper.METRICS, "ms"), "2": paper.METRICS}
    for row in ROWS.values():
        if row.table != "5.1":
            assert tuple(row.metrics) == columns.get(row.table, ("AP", "AP50", "AP75"))
            ap, ap50, ap75 = (row.metrics[m] for m in ("AP", "AP50", "AP75"))
            assert 0 <= ap <= ap75 <= ap50 < 100
    assert [name for name, row in ROWS.items() if row.diverges] == ["5.1 pi=0.5"]
    assert tuple(ROWS["5.1 pi=0.01"].metrics) == ("AP",)


def test_same_settings_have_the_same_numbers():
    """The paper repeats experiments. CE is FL with gamma 0. Table 1e is on another split."""
    experiments = {}
    for row in ROWS.values():
        key = run_key(row.settings, (), seed=1), TABLES[row.table].split
        experiments.setdefault(key, []).append(row)
    repeated = [[str(row) for row in rows] for rows in experiments.values() if len(rows) > 1]
    assert sorted(repeated) == [
        ["1a alpha=0.75", "1b gamma=0", "3 CE"],
        ["1b gamma=2", "1c 3x3", "3 FL"],
    ]
    for rows in experiments.values():
        assert all(row.metrics == rows[0].metrics for row in rows)


NAMES = {
    "5.1": "pi={PRIOR_PROB:g}",
    "1a": "alpha={FOCAL_LOSS_ALPHA:g}",
    "1b": "gamma={FOCAL_LOSS_GAMMA:g}",
    "1c": "{scales}x{ratios}",
    "1d": "{OHEM} {BATCH_SIZE} {NMS_THRESH}",
    "1e": "{network}-{MIN_SIZE_TEST}",
    "2": "{network}-{MIN_SIZE_TEST}",
    "3": "FL* gamma={FOCAL_STAR_GAMMA:g} beta={FOCAL_STAR_BETA:g}",
}


@pytest.mark.parametrize("row", ROWS.values(), ids=str)
def test_name_of_a_row_states_its_settings(row):
    loss = row.settings["MODEL.RETINANET.CLS_LOSS"]
    if row.name in ("CE", "FL"):
        assert loss == {"CE": "CrossEntropy", "FL": "FocalLoss"}[row.name]
        return
    values = {key.rpartition(".")[2]: value for key, value in row.settings.items()}
    values["scales"], values["ratios"] = len(values["SIZES"][0]), len(values["ASPECT_RATIOS"][0])
    values["OHEM"] = "OHEM 1:3" if values.get("POSITIVE_FRACTION") == 0.25 else "OHEM"
    values["network"] = "R{DEPTH}"
    if values["NUM_GROUPS"] > 1:
        values["network"] = "X{DEPTH}-{NUM_GROUPS}x{WIDTH_PER_GROUP}d"
    values["network"] = values["network"].format(**values)
    assert row.name == NAMES[row.table].format(**values)
    expected = {"1b": "FocalLoss", "1c": "FocalLoss", "1e": "FocalLoss", "2": "FocalLoss"}
    assert loss == {**expected, "3": "FocalLossStar"}.get(row.table, "CrossEntropy")


def test_config_states_the_section_of_every_setting():
    keys = {key for row in ROWS.values() for key in row.settings}
    assert [key for key in keys if not section_of(key)] == []


def test_claims_name_rows_and_their_numbers():
    claims = load_claims()
    assert len(claims) > 10
    for claim in claims:
        better, worse = ROWS[claim.better], [ROWS[name] for name in claim.worse]
        for stated in re.findall(r"(\d+\.\d) against (\d+\.\d)", claim.text):
            best = max(row.metrics["AP"] for row in worse)
            assert {float(n) for n in stated} == {better.metrics["AP"], best}, claim.text


SHARED = {"size": 600, "sides": [32, 64], "scales": 1, "alpha": 0.25}


@pytest.fixture
def write(tmp_path):
    """A file with one table of these rows."""

    def write(rows, claims="[]"):
        path = tmp_path / "paper.yaml"
        path.write_text(
            f"names: {{alpha: MODEL.RETINANET.FOCAL_LOSS_ALPHA}}\nshared: {SHARED}\n"
            f"tables:\n  '9':\n    title: t\n    section: '5'\n    split: minival\n"
            f"    rows: [{rows}]\nclaims: {claims}\n"
        )
        return path

    return write


def test_a_row_is_read(write):
    fields = "{name: a, config: c.yaml, AP75: 2, AP: 1, alpha: 0.5, scales: 2, SOLVER.GAMMA: 0.1}"
    (row,) = load_paper(write(fields))["9"].rows
    settings = {
        "INPUT.MIN_SIZE_TRAIN": [600],
        "INPUT.MIN_SIZE_TEST": 600,
        SIZES: [[32, pytest.approx(32 * 2**0.5)], [64, pytest.approx(64 * 2**0.5)]],
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.5,
        "SOLVER.GAMMA": 0.1,
    }
    assert row == Row("9", "a", "c.yaml", {"AP": 1.0, "AP75": 2.0}, False, settings)
    assert list(row.metrics) == ["AP", "AP75"]


def test_a_claim_is_read(write):
    path = write("", "[{text: t, better: 9 a, worse: [9 b, 9 c], within: 2}]")
    assert load_claims(path) == [Claim("t", "9 a", ("9 b", "9 c"), within=2)]


def test_missing_file_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"no-paper\.yaml") as error:
        load_paper(tmp_path / "no-paper.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{name: a, config: c, AP: 1}, {name: a, config: d, AP: 1}", "two rows of one name"),
        ("{name: a, config: c, AP: 1, AP90: 1}", "row a: unknown 'AP90'"),
        ("{name: a, config: c}", "either metrics or diverges"),
        ("{name: a, config: c, AP: 1, diverges: true}", "either metrics or diverges"),
        ("{name: a, AP: 1}", "config"),
        ("{name: a, config: c, AP: high}", "high"),
        ("{name: a", "expected"),
    ],
)
def test_broken_file_raises(write, rows, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_paper(write(rows))
    assert "\n" not in str(error.value)
