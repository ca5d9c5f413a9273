"""Where a step that is not finite goes wrong: which images, level, module, loss or gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LARGE_WEIGHT", "Diagnosis", "ImageFacts", "file_names", "first_of"]

LARGE_WEIGHT = 1e6  # no trained detector has a weight near it


@dataclass
class ImageFacts:
    """What is known of one image of a batch.

    Args:
        file_name: "" if its record has none.
        bad_input: "pixels" or "boxes" if these are not finite, else "".
        losses: name -> the loss of this image alone; empty if that cannot be computed.
        gradient_is_finite: of the image's loss; None if that cannot be computed.
    """

    file_name: str
    bad_input: str = ""
    losses: dict[str, float] = field(default_factory=dict)
    gradient_is_finite: bool | None = None

    @property
    def is_finite(self) -> bool:
        """Nothing that is not finite was found in the image alone."""
        losses_finite = all(map(math.isfinite, self.losses.values()))
        return not self.bad_input and losses_finite and self.gradient_is_finite is not False


@dataclass
class Diagnosis:
    """The numbers of a step, from input to gradient. In the order of the computation.

    Args:
        losses: name -> loss of the batch.
        images: of the batch.
        weights: names of weights and buffers that are not finite before the step.
        largest_weight: the largest absolute value of a parameter.
        levels: level ("p5") -> "features", "logits", "deltas" or "gradient of the logits" ... ->
            the largest absolute value for each image.
        module: the first module whose output is not finite; "" if there is none.
        gradients: name -> largest absolute value: those that are not finite, then the largest.
        num_bad_gradients: parameters whose gradient is not finite.
    """

    losses: dict[str, float] = field(default_factory=dict)
    images: list[ImageFacts] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    largest_weight: float = 0.0
    levels: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    module: str = ""
    gradients: dict[str, float] = field(default_factory=dict)
    num_bad_gradients: int = 0

    @property
    def is_finite(self) -> bool:
        """The total loss and every gradient is finite."""
        return math.isfinite(sum(self.losses.values())) and not self.num_bad_gradients

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**asdict(self), "is_finite": self.is_finite}

    def cause(self) -> str:
        """The first thing in the order of the computation that is not finite, and on which levels,
        e.g. "the logits of level p5". "" if everything is finite.
        """
        kinds = list(dict.fromkeys(k for values in self.levels.values() for k in values))
        forward = [k for k in kinds if not k.startswith("gradient")]
        backward = [k for k in kinds if k.startswith("gradient")]
        levels = next((bad for kind in forward if (bad := self._bad_levels(kind))), [])
        seen = f", seen on level {', '.join(levels)}" if levels else ""
        inputs = {image.bad_input for image in self.images}
        if "pixels" in inputs:
            return f"the pixels{seen}"
        if "boxes" in inputs:
            return f"the ground-truth boxes{seen}"
        if self.weights:
            return f"the weights before the step ({first_of(self.weights)}){seen}"
        large = (
            f" (weights are up to {self.largest_weight:.3g})"
            if self.largest_weight > LARGE_WEIGHT
            else ""
        )
        for kind in forward:
            if bad := self._bad_levels(kind):
                return f"the {kind} of level {', '.join(bad)}{large}"
        if not math.isfinite(sum(self.losses.values())):
            return self._loss_cause(forward) + large
        for kind in backward:
            if bad := self._bad_levels(kind):
                return f"the {kind} of level {', '.join(bad)}{large}"
        if self.num_bad_gradients:
            names = [name for name, value in self.gradients.items() if not math.isfinite(value)]
            return f"the gradient of {first_of(names, self.num_bad_gradients)}{large}"
        return ""

    def _bad_levels(self, kind: str) -> list[str]:
        return [
            level
            for level, values in self.levels.items()
            if not all(map(math.isfinite, values.get(kind, [])))
        ]

    def _loss_cause(self, kinds: Sequence[str]) -> str:
        """The loss itself. The level with the largest input of the loss is where to look."""
        outputs = [k for k in kinds if k != "features"]
        largest = {
            (max(values[kind], default=0.0), kind, level)
            for level, values in self.levels.items()
            for kind in outputs
            if kind in values
        }
        text = "the loss of finite predictions"
        if largest:
            value, kind, level = max(largest)
            text += f", whose largest {kind} are {value:.3g} on level {level}"
        return text

    def bad_images(self) -> list[str]:
        """File names of the images that are not finite alone or whose predictions are not; of all
        images of the batch, if none can be told from the others.
        """
        if any(image.bad_input for image in self.images):
            # Batch norm spreads what is not finite over all images.
            return [image.file_name for image in self.images if image.bad_input]
        bad = {i for i, image in enumerate(self.images) if not image.is_finite}
        for kinds in self.levels.values():
            for values in kinds.values():
                bad |= {i for i, value in enumerate(values) if not math.isfinite(value)}
        return [x.file_name for i, x in enumerate(self.images) if i in bad or not bad]


def file_names(records: Sequence[Any]) -> list[str]:
    """The file of each record, or its image id, or ""."""
    return [
        str(x.get("file_name") or x.get("image_id", "")) if isinstance(x, Mapping) else ""
        for x in records
    ]


def first_of(names: Sequence[str], count: int | None = None) -> str:
    """ "a and 2 more": the first name, and how many there are beside it."""
    more = (len(names) if count is None else count) - 1
    return names[0] + (f" and {more} more" if more else "")
