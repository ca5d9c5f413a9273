"""Runs a step again, and looks at every number on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .buffers import kept_buffers
from .diagnosis import Diagnosis, ImageFacts, file_names
from .finite import found_nonfinite, nonfinite_names

__all__ = ["diagnose"]

_LARGEST = 5  # gradients in the table
_HEAD_OUTPUTS = ("logits", "deltas")  # of Detectron2's RetinaNet and ours

Losses = dict[str, Tensor]


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
