"""``retina init``: what it refuses, and from a dataset to a trained model."""

import pytest

from retina_plugin.cli import main
from retina_plugin.cli.init import make_recipe, write_recipe
from retina_plugin.doctor import StepCost
from retina_plugin.engine import Trainer, setup_cfg

REFERENCE = "REFERENCE_WORLD_SIZE"


@pytest.fixture
def spec(tiny_digits):
    return f"coco:{tiny_digits / 'train.json'}:{tiny_digits / 'train'}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "cars.txt"], "--output cars.txt: name a .yaml file"),
        (["--output", "there.yaml"], "there.yaml is there already: --overwrite replaces it"),
        (["--output", "a.yaml", "--hours", "0"], "--hours 0.0: give more than 0"),
        (["--output", "a.yaml", "--base", "retina_R50_60.yaml"], "no config is named"),
    ],
)
def test_bad_options_are_one_line(tmp_path, monkeypatch, spec, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(SystemExit) as end:
        main(["init", spec, *options])
    assert message in str(end.value) and "\n" not in str(end.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_a_set_without_boxes_is_refused(tmp_path, spec):
    content = '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], '
    (tmp_path / "none.json").write_text(
        content + '"annotations": [], "categories": [{"id": 1, "name": "x"}]}'
    )
    with pytest.raises(SystemExit, match="has no box that training would see in 1 images"):
        main(["init", f"coco:{tmp_path / 'none.json'}", "--output", str(tmp_path / "a.yaml")])
    assert not (tmp_path / "a.yaml").exists()


@pytest.fixture
def timed(monkeypatch):
    """Nothing is timed. A list of the batch and the REFERENCE_WORLD_SIZE that would have been."""
    found = []

    def measure(cfg, processes, clock):
        found.append((cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER[REFERENCE]))
        return StepCost(0.001, 2**30, 2**35, 2, processes, "cpu")

    monkeypatch.setattr("retina_plugin.cli.init.measure_step", measure)
    return found


def test_the_learning_rate_follows_a_batch_that_was_given(tmp_path, spec, timed):
    """It is the base's for the base's batch: .03 for 8 images."""
    given = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2"]
    recipe = make_recipe(spec, None, "quick/digits_R18.yaml", tmp_path / "a.yaml", 1.0, given)
    rate = recipe.settings["SOLVER.BASE_LR"]
    assert rate.value == pytest.approx(0.03 * 2 / 8)
    assert rate.reason.startswith("the base's 0.03 for 8 images, scaled linearly to 2")


@pytest.mark.parametrize("by_base", [True, False])
def test_the_values_are_those_of_this_machine(tmp_path, spec, timed, by_base):
    """Whatever number of GPUs the base, or the user, has in mind: the training scales nothing."""
    base, given = "quick/digits_R18.yaml", ["MODEL.DEVICE", "cpu"]
    if by_base:
        (tmp_path / "base.yaml").write_text(f'_BASE_: "{base}"\nSOLVER: {{{REFERENCE}: 2}}\n')
        base = str(tmp_path / "base.yaml")
    else:
        given += [f"SOLVER.{REFERENCE}", "2"]
    recipe = make_recipe(spec, None, base, tmp_path / "a.yaml", 1.0, given)
    assert timed == [(2, 0)]
    write_recipe(recipe, tmp_path / "a.yaml")
    cfg = setup_cfg(str(tmp_path / "a.yaml"))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER[REFERENCE]) == (4, 1)  # the base's 8 is for 2
    assert pytest.approx(0.03 * 4 / 8) == cfg.SOLVER.BASE_LR
    assert Trainer.auto_scale_workers(cfg, 1) is cfg


@pytest.mark.slow
def test_the_config_trains_at_once(tmp_path, repo, spec, capsys):
    base, output = repo / "configs" / "_base_" / "digits_R18.yaml", tmp_path / "ours.yaml"
    given = "MODEL.DEVICE cpu MODEL.RETINANET.LOSS_BACKEND eager MODEL.FPN.OUT_CHANNELS 16".split()
    main(["init", spec, "--val", spec, "--base", str(base), "--output", str(output), *given])
    assert "Train: retina train" in capsys.readouterr().out
    cfg = setup_cfg(str(output))
    assert cfg.DATASETS.TRAIN == cfg.DATASETS.TEST == (spec,)
    assert cfg.INPUT.RANDOM_FLIP == "none" and cfg.MODEL.FPN.OUT_CHANNELS == 16
    short = "SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 TEST.EVAL_PERIOD 0".split()
    folder = tmp_path / "out"
    main(["train", "--config-file", str(output), *short, "OUTPUT_DIR", str(folder)])
    assert (folder / "model_final.pth").is_file()
