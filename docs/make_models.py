"""Write docs/models.md from the table of public models: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from retina_plugin.weights.public_models import MODELS

PAGE = Path(__file__).with_name("models.md")

INTRODUCTION = """\
# Models of others

Which published RetinaNets can I use by their name? How do I use a RetinaNet that was trained with
another library, or train on from one for other classes? Which backbones can I train one on?

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

## Weights of other libraries

`retina convert IN --output OUT.pth` (or `OUT.safetensors`) writes the weights with our names and,
as `OUT.yaml`, the config that belongs to them. It recognises the library by the names of the
tensors; `--from` chooses one. What it prints, and writes at the top of the config, says what was
assumed, because it is not in the file. Here for a RetinaNet of torchvision, and for a checkpoint
of `make demo`, whose config is in it:

```sh
retina convert net.pth --output cars.pth
retina convert output/digits_R18/model_final.pth --output digits.safetensors
retina predict street.jpg --config-file digits.yaml
```

| library (`--from`) | models | not in the file, so assumed |
|---|---|---|
| `torchvision` | both versions, all ResNets and ResNeXts | its own anchors, batch norm's eps |
| `detectron` | the first Detectron's (Caffe2), `.pkl` | its own anchors, STRIDE_1X1 |
| `mmdetection` | versions 2 and 3, ResNets and ResNeXts | its base config's anchors, the pixels |
| `detectron2` | its model zoo's, and this plugin's | its model zoo's anchors, pixels, strides |
| `imagenet` | ResNets and ResNeXts alone: torchvision's, MSRA's | the pixels' mean and std |

- **`MODEL.WEIGHTS` takes some of them as they are**: Detectron2's, Detectron's and ResNets. Where
  the config has other pixels or strides than the weights were trained with, a warning names the
  settings. For torchvision's and MMDetection's RetinaNets, one line asks for `retina convert`.
- **`MODEL.WEIGHTS` in `OUT.yaml` is an absolute path**, as Detectron2 takes a relative one from
  the folder in which a command is run. After moving the files, change it or give `--weights`.
- **No file of weights runs code**, whatever its format ([security](../SECURITY.md)).

torchvision's first version has batch norm with eps 0 in its COCO weights and what is fine-tuned
from them, but 1e-5 in a model that began with a backbone's weights alone. The converter takes 0
for frozen batch norm. For 1e-5:

```python
from retina_plugin.weights import read_checkpoint
from retina_plugin.weights.conversion import write_converted
from retina_plugin.weights.conversion.torchvision import convert

converted = convert(read_checkpoint("net.pth")["model"], bn_eps=1e-5)
write_converted(converted, "cars.pth", "net.pth")
```

## Other classes

A checkpoint carries the names of its classes. Set `MODEL.WEIGHTS` to it in a training on other
classes, with their `NUM_CLASSES`:

```yaml
_BASE_: "digits.yaml"
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
MODEL:
  RETINANET:
    NUM_CLASSES: 80
```

Everything but the last classification conv is kept. In that one, classes of the same name keep
their weights, whatever their order; the others begin with the prior. With as many classes as
before and no name in common, all keep their places, as in Detectron2. One line says what was
done. `--resume` changes nothing.

An evaluation (`--eval-only`) takes classes by name too, if the checkpoint has all of the
dataset's. So torchvision's 91 classes are evaluated on COCO's 80 with
`MODEL.RETINANET.NUM_CLASSES 80`. If it has only some of them, at other places, the evaluation
stops with one line.

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
