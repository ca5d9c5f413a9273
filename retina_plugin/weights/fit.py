"""How well the weights of a file fit a model: what was loaded, and what was not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from retina_plugin.errors import ConfigError

__all__ = ["Fit", "Shapes", "check_finite", "class_counts", "remove_prefixes"]

# (name, shape in the file, shape in the model)
Shapes = tuple[str, tuple[int, ...], tuple[int, ...]]

# What programs put before the names of a state dict: DistributedDataParallel, Lightning; and
# torch.compile before the names of each module that it compiled.
_PREFIXES = ("module.", "model.", "_orig_mod.")


def remove_prefixes(state: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``state`` without the prefixes that keep its names from being those of the model.

    Up to three are removed. They stay if the names fit as well with them.

    Args:
        state: name -> tensor, of a file.
        names: those of the model.
    """
    known = set(names)
    return max(
        (
            _renamed(state, prefixes)
            for number in range(4)
            for prefixes in itertools.product(_PREFIXES, repeat=number)
        ),
        key=lambda renamed: len(known & renamed.keys()),  # the first of equals
    )


def _renamed(state: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    renamed = state
    for prefix in prefixes:
        renamed = {
            name.replace(prefix, "") if prefix == "_orig_mod." else name.removeprefix(prefix): value
            for name, value in renamed.items()
        }
    return renamed if len(renamed) == len(state) else {}  # two names became one


def check_finite(state: Mapping[str, torch.Tensor], path: str) -> None:
    """Raise a :class:`ConfigError` that names the first tensor with a NaN or an infinity."""
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise ConfigError(
            f"{path} is not usable: {len(broken)} of its {len(state)} tensors have NaN or infinite "
            f"numbers, the first is {broken[0]}: take an earlier checkpoint"
        )


@dataclass(frozen=True)
class Fit:
    """What of a file was loaded into a model.

    Args:
        path: the file.
        total: tensors of the model, without the counters of batch norm, which no forward pass
            uses.
        missing: names of the model that the file does not have.
        other_shape: (name, shape in the file, shape in the model).
        unused: names in the file that the model does not have.
        classes: see :func:`class_counts`.
    """

    path: str
    total: int
    missing: tuple[str, ...] = ()
    other_shape: tuple[Shapes, ...] = ()
    unused: tuple[str, ...] = ()
    classes: tuple[str, int, int] | None = None

    @property
    def loaded(self) -> int:
        """How many of the model's tensors were loaded."""
        return self.total - len(self.missing) - len(self.other_shape)

    def __str__(self) -> str:
        """E.g. "265 of 301 tensors from R-50.pkl; not in it: 36, e.g. head.cls_score.bias"."""
        parts = [f"{self.loaded} of {self.total} tensors from {self.path}"]
        if self.missing:
            parts.append(f"not in it: {len(self.missing)}, e.g. {self.missing[0]}")
        if self.other_shape:
            name, there, here = self.other_shape[0]
            parts.append(
                f"of another shape: {len(self.other_shape)}, e.g. {name} {there} for {here}"
            )
        if self.unused:
            parts.append(f"not used: {len(self.unused)}, e.g. {self.unused[0]}")
        return "; ".join(parts)

    def check_any(self) -> None:
        """Raise a :class:`ConfigError` if nothing was loaded.

        A training would start from random weights, and its user would learn of it from the AP.
        """
        if self.loaded > 0:
            return
        if self.other_shape:
            name, there, here = self.other_shape[0]
            reason = f"{name} has the shape {there} there and {here} in the model"
        else:
            reason = f"it has {_example(self.unused)} and the model {_example(self.missing)}"
        raise ConfigError(
            f"{self.path} does not fit the model: nothing of it can be loaded, e.g. {reason}: set "
            "MODEL.WEIGHTS to weights of this model or of its backbone, or to '' to start from "
            "random weights"
        )

    def check_complete(self) -> None:
        """Raise a :class:`ConfigError` if a tensor was not loaded: an evaluation needs them all."""
        self.check_any()
        if self.classes is not None:
            key, theirs, ours = self.classes
            raise ConfigError(
                f"{self.path} has a head of {theirs} classes ({key}), but MODEL.RETINANET."
                f"NUM_CLASSES is {ours}: set MODEL.RETINANET.NUM_CLASSES {theirs}, or "
                f"MODEL.WEIGHTS to a checkpoint of {ours} classes"
            )
        if self.other_shape:
            name, there, here = self.other_shape[0]
            raise ConfigError(
                f"{self.path} does not fit the model: {name} has the shape {there} there and "
                f"{here} in the model ({len(self.other_shape)} such tensors): evaluate it with the "
                "config that it was trained with"
            )
        if self.missing:
            raise ConfigError(
                f"{self.path} does not fit the model: it lacks {len(self.missing)} of "
                f"{self.total} tensors, e.g. {self.missing[0]}: evaluate a trained checkpoint of "
                "this model, with the config that it was trained with"
            )


def class_counts(
    other_shape: Iterable[Shapes],
    model: Mapping[str, torch.Tensor],
) -> tuple[str, int, int] | None:
    """(name, classes in the file, classes of the model), if the heads differ in their classes.

    ``cls_score`` has A*K channels and ``bbox_pred`` A*4, for A anchors a location and K classes.
    """
    rows = {key: (there[0], here[0]) for key, there, here in other_shape if there and here}
    for key, (rows_there, rows_here) in rows.items():
        boxes = key.replace("cls_score", "bbox_pred")
        if boxes == key or boxes in rows or boxes not in model:
            continue
        anchors = len(model[boxes]) // 4
        if anchors and rows_there % anchors == rows_here % anchors == 0:
            return key, rows_there // anchors, rows_here // anchors
    return None


def _example(names: tuple[str, ...]) -> str:
    return f"'{names[0]}'" if names else "nothing else"
