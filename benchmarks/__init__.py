"""Stages of RetinaNet timed here, in Detectron2 and in torchvision: ``python -m benchmarks``."""
