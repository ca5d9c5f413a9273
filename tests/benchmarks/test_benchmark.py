"""The benchmark's arithmetic, and that what it compares agrees."""

import json
import time
from itertools import islice

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import (
    benchmark,
    cases,
    loss,
    models,
    pipeline,
)
from benchmarks.cases import Contest


def test_ratios_are_of_the_rounds_against_the_first(monkeypatch):
    """Medians after a warm-up round, in turns; the spread is that of the rounds."""
    clock = iter([9.0, 9.0, 4.0, 2.0, 6.0, 1.0, 8.0, 2.0])  # warm-up, then peer and ours in turns
    order = []

    def stopwatch(run, device, times):
        run()
        took = next(clock)
        return took, took + 100

    monkeypatch.setattr(benchmark, "stopwatch", stopwatch)
    contest = Contest(
        "stage",
        "name",
        {"detectron2": lambda: order.append("theirs"), "ours": lambda: order.append("ours")},
        lambda results: "equal",
        memory=False,
    )
    theirs, ours = benchmark.compare(contest, rounds=3, device="cpu")
    assert order == ["theirs", "ours"] * 5  # the check, the warm-up, three rounds
    assert (theirs.milliseconds, theirs.ratio) == (6000.0, None)
    assert (ours.milliseconds, ours.ratio, ours.ratio_low, ours.ratio_high) == (2000.0, 4, 2, 6)
    assert ours.wall_milliseconds == 102000.0 and ours.agreement == "equal"


def test_a_single_round_is_one(monkeypatch):
    """No warm-up, nothing thrown away; what a run uses up is made anew, outside the stopwatch."""
    order = []

    def stopwatch(run, device, times):
        order.append("start")
        run()
        return 1.0, 1.0

    monkeypatch.setattr(benchmark, "stopwatch", stopwatch)
    contest = Contest(
        "stage",
        "name",
        {"ours": lambda: order.append("run")},
        lambda results: "alone",
        memory=False,
        prepare={"ours": lambda: order.append("prepare")},
    )
    (ours,) = benchmark.compare(contest, rounds=1, device="cpu")
    assert order == ["prepare", "run", "prepare", "start", "run"] and ours.rounds == 1


def test_short_runs_are_repeated_within_a_round():
    """As often as the warm-up says, the time being that of one; not what a run uses up."""
    runs = {"short": 0, "long": 0, "used up": 0}

    def run(name, seconds):
        def work():
            runs[name] += 1
            time.sleep(seconds)

        return work

    contest = Contest(
        "stage",
        "name",
        {"short": run("short", 0.005), "long": run("long", 0.025), "used up": run("used up", 0)},
        lambda results: "equal",
        memory=False,
        prepare={"used up": lambda: None},
    )
    short, _, _ = benchmark.compare(contest, rounds=2, device="cpu")
    # the check and the warm-up, then two rounds
    assert runs["long"] == runs["used up"] == 2 + 2
    assert runs["short"] > 2 + 2 and (runs["short"] - 2) % 2 == 0
    assert short.wall_milliseconds < 5 * (runs["short"] - 2) / 2


def test_several_threads_are_timed_by_the_wall_clock(monkeypatch):
    """The process's CPU time adds up over threads, so it says nothing about speed."""
    took = {"theirs": (4.0, 2.0), "ours": (6.0, 1.0)}
    monkeypatch.setattr(benchmark, "stopwatch", lambda run, device, times: took[run()])
    names = {"detectron2": lambda: "theirs", "ours": lambda: "ours"}
    contest = Contest("stage", "name", names, lambda results: "equal", memory=False)
    assert benchmark.compare(contest, 1, "cpu")[1].ratio == pytest.approx(4 / 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert benchmark.compare(contest, 1, "cpu")[1].ratio == 2
    assert benchmark.machine("cpu", 2)["clock"] == "wall clock"


@pytest.mark.parametrize("extra", [[], ["--default-malloc"]])
def test_threads_are_set_with_either_heap(extra):
    """Thread pools that are compared get as many threads; only the heap is an option."""
    options = benchmark.arguments().parse_args(["--threads", "3", *extra])
    wanted = benchmark.environment(options)
    assert wanted["OMP_NUM_THREADS"] == wanted["RAYON_NUM_THREADS"] == "3"
    assert ("MALLOC_TRIM_THRESHOLD_" in wanted) == (not extra)


def test_peers_have_a_colour_of_their_own(monkeypatch, tmp_path):
    """Also in 16 bit; the first contender has no bar, it is the line at 1."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    names = ("detectron2", "detectron2, 16 bit", "torchvision", "ours", "ours, 16 bit")
    results = [
        benchmark.Result("stage", "name", who, 1, 1, i or None, i, i, None, 1, "equal")
        for i, who in enumerate(names)
    ]
    benchmark.draw(results, "title", tmp_path / "a.png")
    colors = [bar.get_facecolor() for bar in figures[0].axes[0].patches]
    assert len(colors) == 4 and colors[0] == colors[1] != colors[2] == colors[3]


def test_nothing_is_timed_that_does_not_agree(monkeypatch):
    """A wrong result ends the benchmark before a time is taken."""
    monkeypatch.setattr(benchmark, "stopwatch", None)

    def check(results):
        assert results["ours"] == results["detectron2"]

    contest = Contest("stage", "name", {"detectron2": lambda: 1, "ours": lambda: 2}, check)
    with pytest.raises(AssertionError):
        benchmark.compare(contest, rounds=1, device="cpu")


def test_peak_memory_is_the_most_at_a_time():
    """Freed tensors do not count twice."""

    def run():
        for _ in range(5):
            torch.zeros(1 << 18)  # 1 MiB
        return torch.zeros(1 << 18) + torch.zeros(1 << 18)  # three at once

    assert 3 << 20 <= benchmark.peak_memory(run, "cpu") < 4 << 20


def test_the_command_writes_json_and_a_picture(monkeypatch, tmp_path, capsys):
    """Of a stage that takes a moment; the ratios in the file are those in the table."""
    quick = Contest(
        "matching",
        "tiny",
        {"detectron2": lambda: torch.ones(1 << 22).sum(), "ours": lambda: torch.ones(8).sum()},
        lambda results: "not compared",
    )
    monkeypatch.setitem(benchmark.STAGES, "matching", lambda device: iter([quick]))
    benchmark.main(["--stage", "matching", "--rounds", "2", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "cpu.json").read_text())
    ours = written["results"][1]
    assert ours["contender"] == "ours" and ours["ratio"] > 1
    assert f"{ours['ratio']:.2f}x" in capsys.readouterr().out
    machine = written["machine"]
    assert machine["threads"] == 1 and machine["torch"] == torch.__version__
    assert machine["clock"] == "CPU time of the process"
    assert machine["detectron2's compiled parts"] in ("yes", "no")
    assert (tmp_path / "cpu.png").stat().st_size > 1000

    other = Contest("mapper", "other", {"ours": lambda: 1}, lambda results: "")
    monkeypatch.setitem(benchmark.STAGES, "mapper", lambda device: iter([other]))
    benchmark.main(["--stage", "mapper", "--rounds", "1", "--output", str(tmp_path)])
    again = json.loads((tmp_path / "cpu.json").read_text())["results"]
    assert again[:2] == written["results"] and again[2]["stage"] == "mapper"  # what was there stays


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_one_line():
    """What is missing, without a traceback."""
    with pytest.raises(SystemExit, match="error: --device cuda: torch sees no CUDA device here"):
        benchmark.main(["--device", "cuda"])


def test_no_rounds_is_one_line():
    """What to give instead, without a traceback."""
    with pytest.raises(SystemExit, match="error: --rounds 0: give 1 or more"):
        benchmark.main(["--rounds", "0"])


def agreements(stage, **sizes):
    """Each contest of a stage is run once and checked."""
    for contest in stage("cpu", **sizes):
        results = contest.results()
        yield contest.check(results), contest, results


@pytest.mark.parametrize("stage", [cases.matching, cases.postprocess])
def test_stages_agree(stage):
    """Ours against Detectron2's, at the size that is timed; of matching up to 20 boxes."""
    said = [said for said, *_ in islice(agreements(stage), 2)]
    assert len(said) == 2 and all("equal to the bit" in one for one in said)


def test_checks_see_a_wrong_result():
    """A label, a class or a pixel that is not Detectron2's fails the contest's own check."""
    _, contest, results = next(agreements(cases.matching))
    results["torchvision"][7] -= 1
    with pytest.raises(AssertionError):
        contest.check(results)
    results["torchvision"][7] += 1
    results["ours"].label[7] += 1
    with pytest.raises(AssertionError):
        contest.check(results)
    _, contest, results = next(agreements(cases.postprocess))
    results["torchvision"][0]["labels"][0] += 1
    with pytest.raises(AssertionError):
        contest.check(results)
    results["torchvision"][0]["labels"][0] -= 1
    results["ours"].pred_classes[0] += 1
    with pytest.raises(AssertionError):
        contest.check(results)
    _, contest, results = next(agreements(pipeline.mapper))
    results["ours"][0]["image"][0, 0, 0] ^= 8
    with pytest.raises(AssertionError):
        contest.check(results)


def test_evaluation_agrees_on_few_images():
    """All metrics, of each class too."""
    ((said, *_),) = agreements(pipeline.evaluate, num_images=30, num_classes=3)
    assert said.startswith("9 numbers equal")


# levels of an image of 200 x 336 pixels: a sixteenth of the anchors that are timed
SMALL = ((25, 42), (13, 21), (7, 11), (4, 6), (2, 3))
# without the compiled ones, which take minutes
OPTIONS = {k: v for k, v in models.contenders("cpu").items() if "compile" not in k}


def test_losses_agree():
    """All contenders with Detectron2's, in both precisions, and the box loss."""
    checked = list(agreements(loss.loss, levels=SMALL))
    assert len(checked) == 3
    assert all(said.startswith("loss within 1e-") for said, *_ in checked)
    for _, _, results in checked[:2]:
        assert {"detectron2", "torchvision", "ours, eager"} <= results.keys()


@pytest.mark.parametrize("who", ["ours, eager", "torchvision"])
@pytest.mark.parametrize("number", [0, 1])
def test_checks_see_a_wrong_loss(who, number):
    """A loss or the largest entry of a gradient that is off, in either precision."""
    _, contest, results = next(islice(agreements(loss.loss, levels=SMALL), number, None))
    total, grads = results[who]
    results[who] = total * 1.02, grads
    with pytest.raises(AssertionError):
        contest.check(results)
    grads[1][grads[1].abs() == grads[1].abs().max()] *= 1.05
    results[who] = total, grads
    with pytest.raises(AssertionError):
        contest.check(results)


def test_overwriting_the_logits_saves_their_gradients_memory():
    """What is prepared counts for nobody: in place needs less than half of a gradient."""
    contest = next(loss.loss("cpu", levels=SMALL))
    names = [name for name in contest.contenders if name.startswith("ours, native")]
    if not names:
        pytest.skip("no C++ compiler for the native kernel")
    outside, inside = (benchmark.peak_memory(contest.ready(name), "cpu") for name in names)
    gradient = 4 * 2 * 9 * 80 * sum(h * w for h, w in SMALL)
    assert outside > gradient > 2 * inside


def test_training_steps_agree():
    """Losses of all contenders that need no compiler, on one small image."""
    sizes = [("R50", 1, 64, 96)]
    ((said, contest, results),) = agreements(models.train_step, sizes=sizes, options=OPTIONS)
    assert said.startswith("losses within 1e-4") and results.keys() == OPTIONS.keys()
    results["detectron2, 16 bit"]["loss_cls"] *= 1.1
    with pytest.raises(AssertionError):
        contest.check(results)


def test_detections_agree():
    """Those in 16 bit, too, have most of Detectron2's."""
    stage = agreements(models.inference, size=(128, 192), options=OPTIONS)
    said, contest, results = next(stage)
    assert all(name in said for name in OPTIONS if "16 bit" in name)
    results["ours, 16 bit channels_last"].pred_classes += 1
    with pytest.raises(AssertionError):
        contest.check(results)
