"""Datasets by a name that says where they are: COCO, Pascal VOC, YOLO and CSV.

``DATASETS.TRAIN: ("voc:VOC2012:trainval",)`` needs no Python. Each module describes its format.

The formats are read here and not by a library. hotcoco 1.3 converts VOC and YOLO too, and the tests
compare with it where it is right. It is not used, because it

- VOC: leaves out files in folders of ``Annotations`` and files called ``.XML``, reads every split
  as all images, gives images without ``<size>`` the size 0, refuses encodings other than UTF-8,
  reads ``a &amp; b`` as "b", and takes ``<filename>`` even where that is another file
  than the image;
- YOLO: drops the ending of file names, images without labels, and folders within a split; refuses
  ``names: {0: car}``, byte-order marks and polygons; does not turn images by their EXIF
  orientation; and lets NaN pass.
"""

from .catalog import register_datasets
from .spec import FORMATS, Spec, folder_name, parse, similar_datasets, unknown_dataset

__all__ = [
    "FORMATS",
    "Spec",
    "folder_name",
    "parse",
    "register_datasets",
    "similar_datasets",
    "unknown_dataset",
]
