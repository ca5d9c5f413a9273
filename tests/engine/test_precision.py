"""Which precision inference and training have, and where it ends."""

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from retina_plugin.engine import Trainer, report
from retina_plugin.engine.precision import Autocast, inference_dtype, training_dtype
from retina_plugin.errors import ConfigError


class Probe(nn.Module):
    """Notes the type of a convolution's output, and its mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.seen = []

    def forward(self, inputs):
        self.seen.append((self.conv(torch.rand(1, 1, 2, 2)).dtype, self.training))
        return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_of_a_forward_pass(dtype):
    """In the model and nowhere else; the mode of the wrapper is the model's."""
    probe = Probe()
    model = Autocast(probe, "cpu", dtype)
    assert model([1]) == [1] and model.training
    assert model.eval()([2]) == [2] and not Autocast(probe, "cpu", dtype).training
    assert probe.seen == [(dtype, True), (dtype, False)]
    assert probe.conv(torch.rand(1, 1, 2, 2)).dtype == torch.float32


def test_float32_changes_nothing():
    """Neither does it switch off the autocast of a caller."""
    probe = Probe().eval()
    with torch.autocast("cpu", torch.bfloat16):
        Autocast(probe, "cpu", torch.float32)([1])
    assert probe.seen == [(torch.bfloat16, False)]


@pytest.fixture
def evaluated(tiny_cfg, monkeypatch):
    """What ``Trainer.test`` and the sheet see in their model and in their evaluator."""

    class Evaluator(DatasetEvaluator):
        def process(self, inputs, outputs):
            # an evaluator's own products are float32 whatever TEST.PRECISION is
            seen["evaluator"] = (torch.rand(2, 2) @ torch.rand(2, 2)).dtype
            seen["detections"] = outputs[0]["instances"]

        def evaluate(self):
            return {}

    seen = {}
    monkeypatch.setattr(Trainer, "build_evaluator", classmethod(lambda cls, cfg, name: Evaluator()))

    def run(precision, channels_last=False):
        tiny_cfg.TEST.PRECISION, tiny_cfg.MODEL.CHANNELS_LAST = precision, channels_last
        tiny_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        torch.manual_seed(0)
        model = Trainer.build_model(tiny_cfg)
        nn.init.normal_(model.head.cls_score.weight, 0, 0.05)
        dtypes = seen["model"] = []
        model.head.cls_score.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
        Trainer.test(tiny_cfg, model)
        images = len(dtypes)
        report.draw_detections(tiny_cfg, model, tiny_cfg.OUTPUT_DIR + "sheet.png", num_images=1)
        assert len(dtypes) > images > 0 and model.training
        return dict(seen)

    return run


def test_evaluation_in_bfloat16(evaluated):
    """Metrics and the sheet; boxes stay float32 and scores are near."""
    plain, found = evaluated("float32"), evaluated("bfloat16", channels_last=True)
    assert set(plain["model"]) == {torch.float32} and set(found["model"]) == {torch.bfloat16}
    assert plain["evaluator"] == found["evaluator"] == torch.float32
    ours, theirs = found["detections"], plain["detections"]
    assert ours.pred_boxes.tensor.dtype == torch.float32
    number = min(len(ours), len(theirs))
    assert number > 20
    # in decreasing order; which of two equal ones comes first may differ
    torch.testing.assert_close(
        ours.scores[:number].float(), theirs.scores[:number], atol=0.01, rtol=0.05
    )


def test_names_of_precisions(tiny_cfg):
    """float32 and off by default; an unknown name lists the known ones."""
    assert inference_dtype(tiny_cfg) == torch.float32
    assert training_dtype(tiny_cfg) is None
    tiny_cfg.SOLVER.AMP.ENABLED, tiny_cfg.SOLVER.AMP.PRECISION = True, "bfloat16"
    assert training_dtype(tiny_cfg) == torch.bfloat16
    tiny_cfg.SOLVER.AMP.PRECISION = tiny_cfg.TEST.PRECISION = "fp16"
    with pytest.raises(ConfigError, match="AMP.PRECISION: no 'fp16'; known: float16, bfloat16$"):
        training_dtype(tiny_cfg)
    with pytest.raises(
        ConfigError, match="PRECISION: no 'fp16'; known: float32, bfloat16, float16"
    ):
        inference_dtype(tiny_cfg)


def test_float16_is_for_gpus(tiny_cfg):
    """Names the fix."""
    tiny_cfg.SOLVER.AMP.ENABLED = True
    tiny_cfg.SOLVER.AMP.PRECISION = tiny_cfg.TEST.PRECISION = "float16"
    for read, key in ((training_dtype, "SOLVER.AMP"), (inference_dtype, "TEST")):
        with pytest.raises(ConfigError) as error:
            read(tiny_cfg)
        line = f"{key}.PRECISION float16 needs a GPU: set {key}.PRECISION bfloat16"
        assert str(error.value) == line
    tiny_cfg.MODEL.DEVICE = "cuda:0"
    assert training_dtype(tiny_cfg) == inference_dtype(tiny_cfg) == torch.float16
