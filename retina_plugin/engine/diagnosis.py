"""Where a step that is not finite goes wrong: which images, level, module, loss or gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .finite import found_nonfinite, kept_buffers, nonfinite_names

__all__ = ["Diagnosis", "ImageFacts", "diagnose", "file_names", "first_of"]

LARGE_WEIGHT = 1e6  # no trained detector has a weight near it
_LARGEST = 5  # gradients in the table
_HEAD_OUTPUTS = ("logits", "deltas")  # of Detectron2's RetinaNet and ours

Losses = dict[str, Tensor]


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


def diagnose(
    model: nn.Module,
    parts: Sequence[Sequence[Any]],
    losses_of: Callable[[nn.Module, Sequence[Any]], Losses],
    *,
    iteration: int = 0,
    images_alone: int = 0,
) -> Diagnosis:
    """Run a batch forward and backward again, and look at everything on the way.

    The model, its gradients and the random states are as before afterwards. Levels are named if the
    model has Detectron2's attributes ``backbone``, ``head`` and ``head_in_features``.

    Args:
        model: not wrapped by DistributedDataParallel.
        parts: the records of the batch, in the passes of the step.
        losses_of: (model, records) -> losses, with autocast where the step has it.
        iteration: of the event storage that the model sees.
        images_alone: how many images to run alone, too: each is a forward and a backward pass. All
            processes give the same number, because a model may communicate in its forward pass.
    """
    images = [record for part in parts for record in part]
    result = Diagnosis(images=[_input_facts(record) for record in images])
    result.weights = nonfinite_names([*model.named_parameters(), *model.named_buffers()])
    result.largest_weight = _largest([p.detach() for p in model.parameters()])
    with contextlib.ExitStack() as stack:
        stack.enter_context(_eager(model))
        stack.enter_context(kept_buffers(model))
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(EventStorage(iteration))
        with _watched(model, result):
            _run_batch(model, parts, losses_of, result)
        for i in range(images_alone):
            facts = _run_alone(model, images[min(i, len(images) - 1)], losses_of)
            if i < len(images):
                result.images[i].losses, result.images[i].gradient_is_finite = facts
    return result


def file_names(records: Sequence[Any]) -> list[str]:
    """The file of each record, or its image id, or ""."""
    return [
        str(x.get("file_name") or x.get("image_id", "")) if isinstance(x, Mapping) else ""
        for x in records
    ]


def _input_facts(record: Any) -> ImageFacts:
    facts = ImageFacts(file_names([record])[0])
    pixels = record.get("image") if isinstance(record, Mapping) else record
    if isinstance(pixels, Tensor) and not _is_finite(pixels):
        facts.bad_input = "pixels"
    elif isinstance(record, Mapping) and "instances" in record:
        boxes = getattr(record["instances"], "gt_boxes", None)
        if boxes is not None and not _is_finite(boxes.tensor):
            facts.bad_input = "boxes"
    return facts


def _run_batch(
    model: nn.Module,
    parts: Sequence[Sequence[Any]],
    losses_of: Callable[[nn.Module, Sequence[Any]], Losses],
    result: Diagnosis,
) -> None:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sums: list[Tensor | None] = [None] * len(named)
    for part in parts:
        losses = losses_of(model, part)
        for name, loss in losses.items():
            result.losses[name] = result.losses.get(name, 0.0) + loss.item() / len(parts)
        # Not backward(), which would change the gradients of the parameters.
        gradients = torch.autograd.grad(
            torch.stack(list(losses.values())).sum(), [p for _, p in named], allow_unused=True
        )
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                before = sums[i]
                sums[i] = gradient if before is None else before + gradient
    found = {name: g / len(parts) for (name, _), g in zip(named, sums) if g is not None}
    bad = nonfinite_names(found.items())
    largest = {name: _largest([g]) for name, g in found.items()}
    ordered = sorted((n for n in found if n not in bad), key=largest.__getitem__, reverse=True)
    result.gradients = {name: largest[name] for name in (bad + ordered)[: max(_LARGEST, len(bad))]}
    result.num_bad_gradients = len(bad)


def _run_alone(
    model: nn.Module,
    record: Any,
    losses_of: Callable[[nn.Module, Sequence[Any]], Losses],
) -> tuple[dict[str, float], bool | None]:
    try:
        losses = losses_of(model, [record])
    except ValueError:  # batch norm cannot normalise one value a channel
        return {}, None
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    found = found_nonfinite([g for g in gradients if g is not None], total.device)
    return {name: loss.item() for name, loss in losses.items()}, not found.item()


@contextlib.contextmanager
def _watched(model: nn.Module, result: Diagnosis) -> Iterator[None]:
    """While entered, outputs of modules, features and predictions are noted in ``result``.

    They are looked at when they are made: with LOSS_IN_PLACE the loss writes over the logits.
    """
    levels = list(getattr(model, "head_in_features", ()))
    names = {module: name for name, module in model.named_modules()}

    def note(level: str, kind: str, x: Tensor) -> None:
        values = x.detach().float().abs().flatten(1).amax(dim=1).tolist()
        result.levels.setdefault(level, {}).setdefault(kind, []).extend(values)
        if x.requires_grad and not kind.startswith("gradient"):
            x.register_hook(lambda g: note(level, f"gradient of the {kind}", g))

    def features(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Mapping):
            for level in levels:
                if level in output:
                    note(level, "features", output[level])

    def predictions(module: nn.Module, args: Any, output: Any) -> None:
        for kind, tensors in zip(_HEAD_OUTPUTS, output if isinstance(output, tuple) else ()):
            if isinstance(tensors, list) and len(tensors) == len(levels):
                for level, x in zip(levels, tensors):
                    note(level, kind, x)

    def any_module(module: nn.Module, args: Any, output: Any) -> None:
        if not result.module and not all(map(_is_finite, _tensors(output))):
            result.module = names.get(module, "") or type(module).__name__

    handles = [module.register_forward_hook(any_module) for module in model.modules()]
    for part, hook in (("backbone", features), ("head", predictions)):
        if isinstance(getattr(model, part, None), nn.Module):
            handles.append(getattr(model, part).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """While entered, no part is compiled: compiled code calls no hooks that are added later."""
    compiled = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    calls = [module._compiled_call_impl for module in compiled]
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(compiled, calls):
            module._compiled_call_impl = call


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for x in output:
            yield from _tensors(x)


def _is_finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.isfinite().all())


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN if a number is NaN."""
    values = [x.abs().amax().float() for x in tensors if x.numel()]
    return torch.stack(values).amax().item() if values else 0.0


def first_of(names: Sequence[str], count: int | None = None) -> str:
    """ "a and 2 more": the first name, and how many there are beside it."""
    more = (len(names) if count is None else count) - 1
    return names[0] + (f" and {more} more" if more else "")
