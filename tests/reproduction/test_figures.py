"""The figures show the package's own numbers; a trained model's are those of sorted losses."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes

from reproduction.figures import FIGURES, main
from reproduction.ledger import Ledger
from reproduction.paper import load_figures, load_paper
from reproduction.plan import row_key, select_rows
from reproduction.plots.loss_distribution import LossDistribution
from reproduction.plots.speed import Point, read_points, speed_and_accuracy
from reproduction.plots.star import of_ledger, of_paper, settings
from reproduction.plots.trained_model import measure
from retina_plugin.data.mapper import DATASET_MAPPER_REGISTRY
from retina_plugin.errors import ConfigError

GAMMAS = load_figures()["4"]["gamma"]


def table(path):
    """Column -> values, numbers where they are."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    return {name: np.array([value(row[name]) for row in rows]) for name in rows[0]}


def settings_of(column):
    """ "FL* gamma=2 beta=1" -> "FL*", 2.0, 1.0."""
    name, *numbers = column.replace(",", "").split()
    return name, *(float(number.split("=")[1]) for number in numbers)


def plain_loss(name, x_t, gamma=0.0, beta=0.0):
    """Equations 4 and 8 as they stand in the paper, in float64."""
    if name == "FL*":
        return -torch.log(torch.sigmoid(gamma * x_t + beta)) / gamma
    p_t = torch.sigmoid(x_t)
    return -((1 - p_t) ** gamma) * torch.log(p_t)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of all figures that need no model."""
    folder = tmp_path_factory.mktemp("figures")
    main([*(name for name in FIGURES if name != "fig4"), "--output", str(folder)])
    return folder


# Curves


def test_figure_1_is_equation_4(drawn):
    columns = table(drawn / "fig1.csv")
    p_t = columns.pop("p_t")
    assert [settings_of(name)[1] for name in columns] == [0, 0.5, 1, 2, 5]
    for name, y in columns.items():
        np.testing.assert_allclose(
            y, -((1 - p_t) ** settings_of(name)[1]) * np.log(p_t), rtol=1e-8, atol=1e-12
        )


def test_figures_5_to_7_are_the_equations_and_6_their_autograd(drawn):
    values, slopes = table(drawn / "fig5.csv"), table(drawn / "fig6.csv")
    assert list(values) == list(slopes) and len(values) == 1 + len(load_paper()["3"].rows)
    grid = table(drawn / "fig7.csv")
    assert {settings_of(name) for name in values if "*" in name} < {
        settings_of(name) for name in grid if "*" in name
    }
    for columns in (values, grid):
        x_t = torch.tensor(columns.pop("x_t"), requires_grad=True)
        for name, y in columns.items():
            expected = plain_loss(settings_of(name)[0], x_t, *settings_of(name)[1:])
            np.testing.assert_allclose(y, expected.detach(), rtol=1e-8, atol=1e-12)
            if columns is values:
                (slope,) = torch.autograd.grad(expected.sum(), x_t)
                np.testing.assert_allclose(slopes[name], slope, rtol=1e-7, atol=1e-10)


# Distribution of a trained model's loss (Figure 4)


def exact(x_t, gamma):
    """Fraction and share by sorting every loss, in float64."""
    loss = plain_loss("FL", x_t.double(), gamma).sort().values.numpy()
    return np.arange(len(loss) + 1) / len(loss), np.append(0, loss.cumsum()) / loss.sum()


SAMPLES = {
    "normal": lambda g: torch.randn(100_000, generator=g) * 3 + 4,
    "two groups": lambda g: torch.cat([torch.randn(99_000, generator=g) + 9, torch.ones(1000)]),
    "ties": lambda g: torch.tensor([0.25, 5.0, 30.0]).repeat(1000),
    "narrow": lambda g: 2 + torch.rand(10_000, generator=g) / 4096,
    "wide": lambda g: torch.rand(50_000, generator=g) * 60 - 30,
    "half": lambda g: torch.randn(10_000, generator=g).half(),
    "one": lambda g: torch.tensor([3.0]),
}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("samples", SAMPLES)
def test_distribution_is_that_of_sorted_losses(samples, gamma):
    x_t = SAMPLES[samples](torch.Generator().manual_seed(0))
    distribution = LossDistribution()
    for piece in x_t.split(3001):
        distribution.add(piece)
    assert len(distribution) == len(x_t)
    curve = distribution.curve(gamma)
    fraction, share = exact(x_t, gamma)
    assert np.abs(curve.at(fraction) - share).max() <= curve.error + 1e-9
    assert curve.error < 1e-3
    expected = 1 - np.interp(0.99, fraction, share)
    assert curve.hardest(0.01) == pytest.approx(expected, abs=1e-3)


def test_hard_samples_are_counted():
    distribution = LossDistribution()
    distribution.add(torch.tensor([-1e-3, 1e-3, 0.5, -30.0, 100.0]))
    assert [distribution.below(x) for x in (-50.0, 0.0, 0.01, 127.0)] == [0, 2, 3, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 128.0, -129.0])
def test_logits_of_no_trained_model_are_refused(value):
    distribution = LossDistribution()
    with pytest.raises(ConfigError, match="finite and below 128"):
        distribution.add(torch.tensor([1.0, value]))
    assert len(distribution) == 0


def test_trained_model_is_measured_as_training_labels_its_anchors(detector, tiny_digits):
    """Every output of every anchor that is not ignored, once."""
    cfg, model = detector("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", "(32,)")
    records = DatasetCatalog.get("digits_scenes_val")
    found = measure(cfg, model, records)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = "none", (cfg.INPUT.MIN_SIZE_TEST,)
    mapper = DATASET_MAPPER_REGISTRY.build(cfg, True)
    K = cfg.MODEL.RETINANET.NUM_CLASSES
    expected = {"positives": [], "negatives": []}
    num_ignored = 0
    with torch.no_grad():
        for record in records:
            x = mapper(record)
            features = model.backbone(model.preprocess_image([x]).tensor)
            features = [features[f] for f in model.head_in_features]
            anchors = Boxes.cat(model.anchor_generator(features)).tensor
            label_R = model.labeler(anchors, [x["instances"]]).label_NR[0]
            logits_RK = torch.cat(
                [y[0].permute(1, 2, 0).reshape(-1, K) for y in model.head(features)[0]]
            )
            for label, logits_K in zip(label_R.tolist(), logits_RK):
                if label == -2:
                    num_ignored += 1
                    continue
                is_class = torch.arange(K) == label
                expected["positives"].append(logits_K[is_class])
                expected["negatives"].append(-logits_K[~is_class])
    assert num_ignored > 0
    for name, pieces in expected.items():
        x_t = torch.cat(pieces)
        assert len(found[name]) == len(x_t) > 0
        for gamma in GAMMAS:
            fraction, share = exact(x_t, gamma)
            curve = found[name].curve(gamma)
            assert np.abs(curve.at(fraction) - share).max() <= curve.error + 1e-9


@pytest.fixture
def model_files(detector, tiny_digits, tmp_path):
    """A config, and its random weights."""
    cfg, model = detector()
    config, weights = tmp_path / "tiny.yaml", tmp_path / "model_final.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    return ["--config-file", str(config), "--weights", str(weights)]


def test_figure_4_writes_its_shares(model_files, tmp_path, capsys):
    output = tmp_path / "my figures"
    main(["fig4", *model_files, "--output", str(output), "--images", "2"])
    names = ["fig4.csv", "fig4.png", "fig4.svg", "fig4_shares.csv"]
    assert sorted(path.name for path in output.iterdir()) == names
    curves, shares = table(output / "fig4.csv"), table(output / "fig4_shares.csv")
    assert len(curves) == 1 + 2 * len(GAMMAS)
    for i, (samples, gamma) in enumerate(zip(shares["samples"], shares["gamma"])):
        curve = curves[f"{samples} gamma={gamma:g}"]
        at = np.interp(0.99, curves["fraction"], curve)
        assert shares["hardest 1 %"][i] == pytest.approx(1 - at, abs=1e-9)
        assert curve[0] == 0 and curve[-1] == pytest.approx(1) and (np.diff(curve) >= 0).all()
    printed = capsys.readouterr().out
    assert "hardest 1 %" in printed and "Negatives with a score above .05: " in printed


def _no_objects():
    records = DatasetCatalog.get("digits_scenes_val")
    return [{**record, "annotations": []} for record in records]


def _unlabelled():
    records = DatasetCatalog.get("digits_scenes_val")
    return [{k: v for k, v in record.items() if k != "annotations"} for record in records]


@pytest.mark.parametrize(
    ("arguments", "function", "message"),
    [
        (["--dataset", "digits_scenes_vall"], None, "did you mean 'digits_scenes_val'"),
        (["--dataset", "figures_other"], _no_objects, "figures_other has no positives"),
        (["--dataset", "figures_other"], lambda: [], "figures_other has no positives"),
        (["--dataset", "figures_other"], _unlabelled, "has no annotations"),
        (["--images", "0"], None, "--images 0"),
        (["--weights", "no.pth"], None, "no.pth"),
    ],
)
def test_what_figure_4_cannot_use_is_one_line(model_files, tmp_path, arguments, function, message):
    if function is not None:
        DatasetCatalog.register("figures_other", function)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["fig4", *model_files, *arguments, "--output", str(tmp_path / "out")])
    finally:
        if function is not None:
            DatasetCatalog.remove("figures_other")
    assert message in str(ended.value) and "\n" not in str(ended.value)
    assert not (tmp_path / "out").exists()


def test_without_a_trained_model_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="make demo"):
        main(["all"])
    assert not list(tmp_path.iterdir())


# FL* by gamma and beta (Figure 7)


def run(row, AP, *more):
    """A result; ``more`` are overrides of ``--set``."""
    return {"rows": [row], "opts": [*more, "SEED", "1"], "set": [*more], "AP": AP}


def star_ledger(tmp_path, *results):
    rows = {str(row): row for row in select_rows(["1b", "3"], [])}
    keys = [
        row_key(rows[result["rows"][0]], "mini", result["set"], seed)
        for seed, result in enumerate(results)
    ]
    (tmp_path / "ledger.json").write_text(json.dumps({"mini": dict(zip(keys, results))}))
    return Ledger(tmp_path / "ledger.json", claims=())


STAR, FL = "3 FL* gamma=2 beta=1", "3 FL"
GAMMA, BETA = "MODEL.RETINANET.FOCAL_STAR_GAMMA", "MODEL.RETINANET.FOCAL_STAR_BETA"


def test_papers_settings_are_effective():
    source = of_paper()
    assert [(s.gamma, s.beta, s.AP) for s in source.settings] == [(2, 1, 33.8), (4, 0, 33.9)]
    assert all(source.is_effective(s) for s in source.settings)


def test_setting_is_effective_within_half_a_point_of_fl(tmp_path):
    more = [GAMMA, "5", BETA, "0"]
    diverged = {"rows": [STAR], "opts": more, "set": more, "diverged_at": 7}
    ledger = star_ledger(
        tmp_path,
        run(FL, 50.0),
        run(STAR, 49.4),
        run(STAR, 49.8),  # another seed: the mean counts
        run(STAR, 49.4, GAMMA, "3", BETA, "0.5"),
        diverged,
        run("1b gamma=5", 99.0),
    )
    source = of_ledger(ledger, "mini")
    found = {(s.gamma, s.beta): source.is_effective(s) for s in source.settings}
    assert found == {(2, 1): True, (3, 0.5): False, (5, 0): False}
    assert source.threshold == pytest.approx(49.5)


def test_runs_with_another_schedule_are_not_compared(tmp_path):
    longer = ["SOLVER.MAX_ITER", "1200"]
    ledger = star_ledger(tmp_path, run(FL, 40.0), run(STAR, 41.0), run(STAR, 70.0, *longer))
    (setting,) = of_ledger(ledger, "mini").settings
    assert setting.APs == (41.0,)
    assert of_ledger(star_ledger(tmp_path, run(FL, 40.0), run(STAR, 70.0, *longer)), "mini") is None


def test_runs_of_changed_configs_are_not_averaged_with_todays(tmp_path):
    star_ledger(tmp_path, run(FL, 40.0), run(STAR, 41.0))
    path = tmp_path / "ledger.json"
    data = json.loads(path.read_text())
    data["mini"] |= {"0000000000-seed1": run(FL, 10.0), "1111111111-seed1": run(STAR, 80.0)}
    path.write_text(json.dumps(data))
    source = of_ledger(Ledger(path, claims=()), "mini")
    assert [s.APs for s in source.settings] == [(41.0,)]
    assert source.threshold == pytest.approx(39.5)


def test_figure_7_says_whose_settings_they_are(tmp_path):
    star_ledger(tmp_path, run(FL, 50.0), run(STAR, 51.0), run(STAR, 9.0, GAMMA, "1", BETA, "3"))
    tables = settings(tmp_path / "ledger.json").tables
    _, rows = tables["settings"]
    assert [(*row[:4], row[6]) for row in rows] == [
        ("the paper, COCO minival", 2, 1, 33.8, "yes"),
        ("the paper, COCO minival", 4, 0, 33.9, "yes"),
        ("the ledger, mini scale", 1, 3, 9.0, "no"),
        ("the ledger, mini scale", 2, 1, 51.0, "yes"),
    ]
    assert "FL* gamma=1 beta=3" in tables[""][0]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"mini": 3}', '{"mini": {"a": {}}}'])
def test_damaged_ledger_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(SystemExit, match="error: .*ledger.json"):
        main(["fig7", "--ledger", str(tmp_path / "ledger.json"), "--output", str(tmp_path / "o")])


# Speed and accuracy (Figure 2, Table 1e)


def test_figure_2_and_table_1e_have_the_papers_numbers(drawn):
    found = table(drawn / "fig2.csv")
    by_name = dict(zip(found["name"], zip(found["ms"], found["AP"])))
    assert len(by_name) == 10 + len(load_figures()["2"]["others"])
    assert by_name["R101-600"] == (122, 36.0) and by_name["Faster R-CNN w FPN"] == (172, 36.2)
    models = table(drawn / "table1e.csv")
    assert len(models["model"]) == 10 and models["APs"][-1] == 20.2


def test_figure_2_has_ones_own_models(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("\ufeffname, ms, AP, note\nGrößer $x$,9.5,37.1,\n模型,1e3,0,old\n", "utf-8")
    plot = speed_and_accuracy(path)
    _, rows = plot.tables[""]
    own = [("yours", "Größer $x$", 9.5, 37.1), ("yours", "模型", 1000, 0)]
    assert [tuple(row) for row in rows][-2:] == own
    (axes,) = plot.figure.axes
    assert {"Größer \\$x\\$", "模型"} < {text.get_text() for text in axes.texts}


def test_points_may_be_json(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('[{"name": "a", "ms": 5, "AP": 40.5, "GPU": "H100"}]')
    assert read_points(path) == [Point("a", 5.0, 40.5)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.csv", None, "No such file"),
        ("a.txt", "name,ms,AP\n", "give a .csv or .json file"),
        ("a.csv", "", "has no entries"),
        ("a.csv", "name,ms,AP\n", "has no entries"),
        ("a.csv", "name,ms\na,5\n", "entry 1: it needs name, ms and AP"),
        ("a.csv", "name,ms,AP\na,5,40\nb,fast,40\n", "entry 2: ms is 'fast'"),
        ("a.csv", "name,ms,AP\na,0,40\n", "ms is '0'"),
        ("a.csv", "name,ms,AP\na,nan,40\n", "ms is 'nan'"),
        ("a.csv", "name,ms,AP\na,inf,40\n", "ms is 'inf'"),
        ("a.csv", "name,ms,AP\na,5\n", "AP is None"),
        ("a.csv", "name,ms,AP\na,5,101\n", "AP is '101': give percent"),
        ("a.csv", b"\xff\xfe\x00", "utf-8"),
        ("a.json", "{}", "has no entries"),
        ("a.json", "[1]", "entry 1: it needs"),
        ("a.json", "[", "Expecting value"),
        ("a.json", "[" * 100_000, "recursion"),
    ],
)
def test_bad_points_are_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"--points .*{message}"):
        read_points(tmp_path / name)


# The command


def test_unknown_name_lists_the_figures(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fig1", "fig3"])
    assert "unknown 'fig3'" in str(ended.value)
    assert all(name in str(ended.value) for name in [*FIGURES, "all"])
    assert not capsys.readouterr().out


def test_same_input_gives_the_same_files(drawn, tmp_path):
    main(["fig6", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fig6.csv", "fig6.png", "fig6.svg"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (drawn / path.name).read_bytes()


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(SystemExit, match="error: .*taken cannot be written to"):
        main(["fig1", "--output", str(tmp_path / "taken")])


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "reproduction.figures"], ["reproduction/figures.py"]])
def test_command_runs_as_a_module_and_as_a_file(repo, tmp_path, command):
    arguments = ["fig1", "--output", str(tmp_path)]
    subprocess.run([sys.executable, *command, *arguments], cwd=repo, check=True)
    assert (tmp_path / "fig1.png").is_file()
