"""Class surgery: weights of a detector for other classes, as a start for one's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["adapt_classes"]

logger = logging.getLogger("retina_plugin")


def adapt_classes(
    checkpoint: dict[str, Any], model: Mapping[str, Tensor], class_names: Sequence[str]
) -> None:
    """Fit the last classification conv of a checkpoint to other classes, in place.

    ``cls_score`` has A*K channels, for A anchors a location and K classes. A class that the
    checkpoint has too, by its name, keeps its A channels, at its new place. Other classes have the
    model's own, which are those of its initialisation (section 4.1: the bias is the prior's). One
    line says what was kept.

    With as many classes as before and no name in common, classes are taken to be renamed, and keep
    their places. If the checkpoint does not tell its names, classes of another number are all new.

    Args:
        checkpoint: "model" and, if known, "class_names" (see
            :func:`retina_plugin.weights.read_checkpoint`).
        model: state dict of the model, as it was initialised.
        class_names: of the model's classes, in their order.
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
        if not isinstance(theirs, list) or len(theirs) != count or _repeat(theirs) or _repeat(ours):
            theirs = None
        pairs, line = _plan(theirs, count, ours)
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


def _plan(
    theirs: list[str] | None, count: int, ours: list[str]
) -> tuple[list[tuple[int, int]] | None, str]:
    """Pairs (place in the model, place in the checkpoint), and the line about them.

    None instead of pairs: nothing is to do.
    """
    if theirs == ours or (theirs is None and count == len(ours)):
        return None, ""
    if theirs is None:
        return [], f"cls_score: {count} classes without known names are not used, {len(ours)} new"
    places = {name: place for place, name in enumerate(theirs)}
    pairs = [(here, places[name]) for here, name in enumerate(ours) if name in places]
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


def _some(names: Sequence[str]) -> str:
    """E.g. "car, bus, ..."; names may hold anything."""
    shown = ", ".join(name[:40] for name in names[:3])
    text = shown + (", ..." if len(names) > 3 else "")
    return "".join(c if c.isprintable() else "?" for c in text)


def _repeat(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)
