"""Stages of RetinaNet timed: ours, Detectron2's and torchvision's. ``python -m benchmarks``."""
