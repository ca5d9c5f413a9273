"""The cases of each stage: all implementations agree, and the checks see a wrong result."""

from itertools import islice

import pytest

from benchmarks.case import peak_memory
from benchmarks.evaluation import evaluate
from benchmarks.loss import loss
from benchmarks.mapper import mapper
from benchmarks.matching import matching
from benchmarks.models import default_options, inference, train_step
from benchmarks.postprocess import postprocess

# levels of an image of 200 x 336 pixels: a sixteenth of the anchors that are timed
SMALL = ((25, 42), (13, 21), (7, 11), (4, 6), (2, 3))
# without the compiled ones, which take minutes
OPTIONS = {k: v for k, v in default_options("cpu").items() if "compile" not in k}


def checked(cases):
    """Run and check each case; (what the check says, the case, its results)."""
    for case in cases:
        results = case.results()
        yield case.check(results), case, results


@pytest.mark.parametrize("stage", [matching, postprocess])
def test_results_equal_detectron2s(stage):
    """At the size that is timed; matching with up to 20 boxes."""
    agreements = [agreement for agreement, *_ in islice(checked(stage("cpu")), 2)]
    assert len(agreements) == 2 and all("equal to the bit" in text for text in agreements)


def test_wrong_results_fail_the_check():
    """One label, class or pixel that is not Detectron2's."""
    _, case, results = next(checked(matching("cpu")))
    results["torchvision"][7] -= 1
    with pytest.raises(AssertionError):
        case.check(results)
    results["torchvision"][7] += 1
    results["ours"].label[7] += 1
    with pytest.raises(AssertionError):
        case.check(results)
    _, case, results = next(checked(postprocess("cpu")))
    results["torchvision"][0]["labels"][0] += 1
    with pytest.raises(AssertionError):
        case.check(results)
    results["torchvision"][0]["labels"][0] -= 1
    results["ours"].pred_classes[0] += 1
    with pytest.raises(AssertionError):
        case.check(results)
    _, case, results = next(checked(mapper("cpu")))
    results["ours"][0]["image"][0, 0, 0] ^= 8
    with pytest.raises(AssertionError):
        case.check(results)


def test_evaluations_agree():
    """All metrics, AP of each class too, on few images."""
    ((agreement, *_),) = checked(evaluate("cpu", num_images=30, num_classes=3))
    assert agreement.startswith("9 numbers equal")


def test_losses_agree():
    """Every implementation with Detectron2's, in both precisions, and the box loss."""
    cases = list(checked(loss("cpu", levels=SMALL)))
    assert len(cases) == 3
    assert all(agreement.startswith("loss within 1e-") for agreement, *_ in cases)
    for _, _, results in cases[:2]:
        assert {"detectron2", "torchvision", "ours, eager"} <= results.keys()


@pytest.mark.parametrize("name", ["ours, eager", "torchvision"])
@pytest.mark.parametrize("number", [0, 1])
def test_wrong_loss_fails_the_check(name, number):
    """A loss, or the largest entry of a gradient, in either precision."""
    _, case, results = next(islice(checked(loss("cpu", levels=SMALL)), number, None))
    total, grads = results[name]
    results[name] = total * 1.02, grads
    with pytest.raises(AssertionError):
        case.check(results)
    grads[1][grads[1].abs() == grads[1].abs().max()] *= 1.05
    results[name] = total, grads
    with pytest.raises(AssertionError):
        case.check(results)


def test_loss_in_place_saves_the_memory_of_the_gradient():
    """It needs less than half of a gradient; copying its inputs beforehand does not count."""
    case = next(loss("cpu", levels=SMALL))
    names = [name for name in case.implementations if name.startswith("ours, native")]
    if not names:
        pytest.skip("no C++ compiler for the native kernel")
    usual, in_place = (peak_memory(case.prepared(name), "cpu") for name in names)
    gradient = 4 * 2 * 9 * 80 * sum(h * w for h, w in SMALL)
    assert usual > gradient > 2 * in_place


@pytest.mark.slow
def test_training_steps_agree():
    """Losses on one small image, of every implementation that is not compiled."""
    cases = train_step("cpu", sizes=[("R50", 1, 64, 96)], options=OPTIONS)
    ((agreement, case, results),) = checked(cases)
    assert agreement.startswith("losses within 1e-4") and results.keys() == OPTIONS.keys()
    results["detectron2, 16 bit"]["loss_cls"] *= 1.1
    with pytest.raises(AssertionError):
        case.check(results)


@pytest.mark.slow
def test_detections_agree():
    """In 16 bit most of Detectron2's are found."""
    agreement, case, results = next(checked(inference("cpu", size=(128, 192), options=OPTIONS)))
    assert all(name in agreement for name in OPTIONS if "16 bit" in name)
    results["ours, 16 bit channels_last"].pred_classes += 1
    with pytest.raises(AssertionError):
        case.check(results)
