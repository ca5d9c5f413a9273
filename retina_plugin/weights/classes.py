"""Class surgery: weights of a detector for other classes, as a start for one's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retina_plugin.errors import ConfigError

__all__ = ["adapt_classes"]

logger = logging.getLogger("retina_plugin")


# Pairs (place in the model, place in the checkpoint), or None: nothing is to do; and what to say.
_Plan = tuple[list[tuple[int, int]] | None, str]


def adapt_classes(
    checkpoint: dict[str, Any],
    model: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    complete: bool = False,
) -> None:
    """Fit the last classification conv of a checkpoint to other classes, in place.

    ``cls_score`` has A*K channels, for A anchors a location and K classes. A class that the
    checkpoint has too, by its name, keeps its A channels, at its new place. Other classes have the
    model's own, which are those of its initialisation (section 4.1: the bias is the prior's). One
    line says what was kept.

    With as many classes as before and no name in common, classes are taken to be renamed, and keep
    their places. If the checkpoint does not tell its names, classes of another number are all new.
    A name that the checkpoint has twice, as torchvision's "N/A", is none.

    Args:
        checkpoint: "model" and, if known, "class_names" (see
            :func:`retina_plugin.weights.read_checkpoint`).
        model: state dict of the model, as it was initialised.
        class_names: of the model's classes, in their order.
        complete: for an evaluation, which needs all of its classes. They are taken by name if the
            checkpoint has all of them; else all keep their places.

    Raises:
        ConfigError: ``complete``, and one of the classes has another place in the checkpoint.
    """
    state = checkpoint["model"]
    ours = list(class_names)
    for weight in [name for name in model if name.endswith("cls_score.weight")]:
        layer = weight.removesuffix(".weight")
        boxes = f"{layer.removesuffix('cls_score')}bbox_pred.weight"
        if weight not in state or boxes not in state or boxes not in model:
            continue
        anchors = len(model[boxes]) // 4
        same = state[boxes].shape == model[boxes].shape
        if not same or not anchors or state[weight].shape[1:] != model[weight].shape[1:]:
            continue  # another model
        if len(state[weight]) % anchors or len(model[weight]) != anchors * len(ours):
            continue
        count = len(state[weight]) // anchors
        theirs = checkpoint.get("class_names")
        if not isinstance(theirs, list) or len(theirs) != count:
            theirs = None
        pairs, line = (_plan_complete if complete else _plan)(theirs, count, ours)
        if line:
            logger.warning("%s", line)  # the user may not know that the classes differ
        if pairs is None:
            continue
        for name in (weight, f"{layer}.bias"):
            if name in state and name in model and len(state[name]) == anchors * count:
                new = model[name].detach().cpu().clone()
                rows, old = new.unflatten(0, (anchors, -1)), state[name].unflatten(0, (anchors, -1))
                for here, there in pairs:
                    rows[:, here] = old[:, there].to(new.dtype)
                state[name] = new


def _plan(theirs: list[str] | None, count: int, ours: list[str]) -> _Plan:
    if theirs == ours or (theirs is None and count == len(ours)):
        return None, ""
    if theirs is None:
        return [], f"cls_score: {count} classes without known names are not used, {len(ours)} new"
    pairs = _by_name(theirs, ours)
    if not pairs and count == len(ours):
        return None, (
            f"cls_score: {count} classes keep their places, because none of their names "
            f"({_some(theirs)}) is one of the dataset's ({_some(ours)})"
        )
    kept = [ours[here] for here, _ in pairs]
    moved = sum(here != there for here, there in pairs)
    line = f"cls_score: {len(kept)} of {len(ours)} classes kept by name"
    if kept:
        line += f" ({_some(kept)})"
    if moved and count == len(ours):
        line += f", {moved} of them moved because the dataset has them in another order"
    return pairs, f"{line}, {len(ours) - len(kept)} new"


def _plan_complete(theirs: list[str] | None, count: int, ours: list[str]) -> _Plan:
    if theirs is None or theirs == ours:
        return None, ""
    pairs = _by_name(theirs, ours)
    if len(pairs) == len(ours):
        return _plan(theirs, count, ours)
    if count != len(ours):
        return None, ""  # the checkpointer says that the numbers differ
    for here, there in pairs:
        if here != there:
            raise ConfigError(
                f"class {there} of the weights is '{_some([theirs[there]])}', which is "
                f"class {here} of the dataset, and the dataset has classes that the weights lack: "
                "AP would be of other classes; evaluate on a dataset of the weights' classes, or "
                "fine-tune"
            )
    k = next(k for k, (a, b) in enumerate(zip(theirs, ours)) if a != b)
    return None, (
        f"cls_score: the weights and the dataset name {len(ours) - len(pairs)} classes differently "
        f"(class {k}: {_some([theirs[k], ours[k]])}); they keep their places"
    )


def _by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (place in ``ours``, place in ``theirs``) of the names that each has once."""
    places = {name: place for place, name in enumerate(theirs) if theirs.count(name) == 1}
    return [
        (here, places[name])
        for here, name in enumerate(ours)
        if name in places and ours.count(name) == 1
    ]


def _some(names: Sequence[str]) -> str:
    """E.g. "car, bus, ..."; names may hold anything."""
    shown = ", ".join(name[:40] for name in names[:3])
    text = shown + (", ..." if len(names) > 3 else "")
    return "".join(c if c.isprintable() else "?" for c in text)
