"""Write docs/models.md from the table of public models: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from retina_plugin.weights.public_models import MODELS

PAGE = Path(__file__).with_name("models.md")

INTRODUCTION = """\
# Models of others

Which published RetinaNets can I use by their name, and which backbones can I train one on?

This page is generated from `retina_plugin/weights/public_models.py` by `make docs`.

## Public RetinaNets

`retina predict --model NAME photo.jpg` detects with one of them;
`retina_plugin.weights.public_models.prepare_model(NAME)` gives its config and its weights as local
files. At first use the weights are fetched by the means of their own library: torchvision's by
`torch.hub` into its cache, all others by Detectron2's `PathManager` into `$FVCORE_CACHE`
(`~/.torch/iopath_cache`). They are read without running code from the file, converted, and kept in
`$RETINA_PLUGIN_CACHE/models` (`~/.cache/retina_plugin`). Later both files are taken from there,
after a look at whether they are as they were written. Without a network, one line says which file
to download and where to put it.

The AP is box AP on COCO val2017 as its authors published it; it was not measured here. All models
were trained on COCO train2017, or on the same images under their older names. The licence is what
the authors state for the weights; who uses them has to read it there.
"""

UNTRIED = """\
### What was not tried

**No published file was downloaded here, and no AP of this page was reproduced.** Everything behind
the download is tested with random weights in the layout of the published files: where the library
looks for them, their checksums, reading, conversion, and detections. For torchvision's and
Detectron2's models the tests hold these equal to those of the library's own model. The URLs are
those of the pages that the table links to; those of torchvision and Detectron2 are compared with
the installed library.

File names of torchvision, Detectron2 and MMDetection hold the first digits of a checksum, which is
compared before a conversion. Those of Detectron do not.

## Backbones of timm

`MODEL.BACKBONE.NAME: build_timm_retina_fpn_backbone` builds the pyramid P3 to P7 on the model
`MODEL.TIMM.NAME` of [timm](https://github.com/huggingface/pytorch-image-models), from its features
of the strides 8, 16 and 32. It needs the extra `timm`. `configs/timm/resnet50_600.yaml` is an
example; with another model:

```yaml
_BASE_: "retina_R50_600.yaml"
MODEL:
  WEIGHTS: "timm://convnext_tiny.fb_in1k"
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE:
    NAME: "build_timm_retina_fpn_backbone"
  TIMM:
    NAME: "convnext_tiny"
INPUT:
  FORMAT: "RGB"
```

- **Weights.** `MODEL.WEIGHTS: timm://NAME` has timm fetch its ImageNet weights into its own cache.
  The features' part is kept in `$RETINA_PLUGIN_CACHE/timm`, so neither an evaluation nor a resumed
  training needs timm's file or the network. `""` starts from random weights, with
  `MODEL.TIMM.NORM: BN` and `MODEL.BACKBONE.FREEZE_AT: 0`.
- **Pixels.** timm's weights are for RGB images with a mean and a standard deviation of their own. A
  training whose `INPUT.FORMAT`, `MODEL.PIXEL_MEAN` or `MODEL.PIXEL_STD` is another one stops with a
  line that has the three settings.
- **Frozen layers.** `MODEL.BACKBONE.FREEZE_AT` n freezes all that the feature of stride 2^n is
  computed with. For a ResNet that is Detectron2's meaning: 1 is the stem, 2 also the first stage.
  Where a model has no feature of that stride, the error lists the values that it takes.
  `MODEL.TIMM.NORM: FrozenBN`, the default, keeps batch norm as it is in the weights.
- **Which models.** Of the 98 families of timm 1.0.31 (the first model of each file), 59 can be
  used. The others have no features of these strides (most vision transformers), take images of one
  size only, or have features that do not cover the image (Inception); each gives one line that says
  so.
- **In Python** it is one module:

```python
import torch

from retina_plugin.modeling import TimmFeatures

features = TimmFeatures("convnext_atto", ["res3", "res4", "res5"])
maps = features(torch.zeros(1, 3, 256, 256))
assert maps["res3"].shape == (1, 80, 32, 32)
```

No model on a timm backbone was trained on COCO here.
"""


def page() -> str:
    """The whole page."""
    rows = ["| name | AP | licence of the weights |", "|---|---|---|"]
    for name, model in MODELS.items():
        rows.append(f"| `{name}` | [{model.ap:.1f}]({model.published}) | {model.licence} |")
    return "\n".join([INTRODUCTION, *rows, "", UNTRIED])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
