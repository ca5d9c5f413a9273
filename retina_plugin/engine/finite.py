"""Keeps a step whose loss or gradient is not finite away from the model, without waiting for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from retina_plugin.errors import ConfigError

from .buffers import WrittenBuffers

__all__ = [
    "NonFiniteError",
    "StepGate",
    "found_nonfinite",
    "fused_step",
    "nonfinite_names",
]

# The modules whose ``step`` is known to leave the update to PyTorch's fused kernel.
_GATED_MODULES = ("torch.optim.", "detectron2.solver.build")


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a weight is not finite: one line with iteration, cause and images.

    Every process of a training raises it with the same text. The commands print the line without a
    traceback.
    """


class StepGate:
    """Lets a training step change the model only if its loss and its gradients are finite.

    The flag that decides is computed on the device, and the device applies it, so the host does not
    wait for an accelerator. A step that is not let through leaves weights, optimizer buffers,
    statistics of batch norm and the loss normaliser's moving average as they were. After more than
    ``max_skipped`` such steps no step is let through any more: the model stays as it was, until the
    host reads the flags and stops the training.

    On an accelerator the optimizer's step is gated by PyTorch's fused kernel, as ``GradScaler``
    does it. That works for ``torch.optim.SGD``, with Detectron2's gradient clipping too, and for an
    ``Adam`` or ``AdamW`` that was made with ``fused=True``. With any other optimizer, the host
    reads the flag in each step, which synchronises. So does the first step of SGD with momentum,
    because the fused kernel would leave its new buffers uninitialised.

        gate = StepGate(model, optimizer, max_skipped=0)
        gate.before_forward()
        loss = model(batch)
        loss.backward()
        flag = gate.step(loss.detach())  # 1.0 on the device if the step is not finite

    Args:
        model: whose floating-point parameters are on one device.
        optimizer: of its parameters.
        max_skipped: steps that may be skipped.

    Raises:
        ConfigError: ``max_skipped`` is negative.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_skipped: int = 0
    ) -> None:
        if max_skipped < 0:
            raise ConfigError(
                f"SOLVER.MAX_SKIPPED_STEPS {max_skipped}: set the number of steps that may be "
                "skipped, or 0 to stop at the first one that is not finite"
            )
        self.optimizer = optimizer
        self.max_skipped = max_skipped
        self._device = next(model.parameters()).device
        self._buffers = WrittenBuffers(model)
        self._count = torch.zeros((), device=self._device)

    def set_count(self, skipped: int) -> None:
        """The number of steps that were skipped before, for example before a resume."""
        self._count = torch.full((), float(skipped), device=self._device)

    def before_forward(self) -> None:
        """Remember what the forward pass may write."""
        self._buffers.keep()

    @torch.no_grad()
    def step(self, total_loss: Tensor, grad_scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """The optimizer's step, if it is let through. All processes must call it.

        Args:
            total_loss: a scalar of this process.
            grad_scaler: an overflow of gradients is the scaler's business: it skips the step and
                lowers the scale. Only at a scale of 1 or less it is no overflow any more.

        Returns:
            A float32 scalar on the device, the same in all processes: 1 if the total loss of a
            process or a gradient is not finite, else 0.
        """
        gradients = _gradients(self.optimizer)
        total_loss = total_loss.float()
        if grad_scaler is None:
            flag = found_nonfinite([total_loss, *gradients], self._device)
        else:
            scale = grad_scaler.scale(torch.ones((), device=self._device))
            flag = found_nonfinite(gradients, self._device) * (scale <= 1)
            flag = torch.maximum(flag, found_nonfinite([total_loss], self._device))
        if comm.get_world_size() > 1:
            # Gradients are averages over the processes, but a loss is of this process alone.
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        self._count = self._count + flag
        closed = (flag > 0) | (self._count > self.max_skipped)
        self._buffers.restore(closed)
        if grad_scaler is None:
            _step(self.optimizer, closed)
        else:
            _scaled_step(self.optimizer, grad_scaler, closed, gradients)
        return flag


def found_nonfinite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """1.0 if any number is not finite, else 0.0: a float32 scalar on ``device``.

    It does not synchronise. The kernel is ``GradScaler``'s: one pass over all tensors of a type. A
    sum or a 2-norm could overflow where every number is finite.

    Args:
        tensors: floating-point, on ``device``. They are multiplied by 1 in place.
    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        dense = x._values() if x.is_sparse else x
        if dense.numel():
            groups.setdefault(dense.dtype, []).append(dense)
    found, scale = torch.zeros((), device=device), torch.ones((), device=device)
    for group in groups.values():
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, scale)
    return found


def nonfinite_names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with a number that is not finite. Synchronises once.

    Args:
        named: pairs of name and tensor. Integers are passed over.
    """
    floating = [(name, x.detach()) for name, x in named if x.is_floating_point() and x.numel()]
    if not floating:
        return []
    # The extremes of a tensor with a NaN are NaN. Three times as fast as isfinite on the CPU.
    extremes = torch.stack([torch.stack(torch.aminmax(x)).double() for _, x in floating])
    finite = extremes.isfinite().all(dim=1).tolist()
    return [name for (name, _), is_finite in zip(floating, finite, strict=True) if not is_finite]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]


def _step(optimizer: torch.optim.Optimizer, closed: Tensor) -> None:
    if closed.device.type != "cpu" and _can_be_gated(optimizer):
        fused_step(optimizer, closed)
    elif not closed:  # on an accelerator, this waits for it
        optimizer.step()


def _scaled_step(
    optimizer: torch.optim.Optimizer,
    grad_scaler: torch.amp.GradScaler,
    closed: Tensor,
    gradients: list[Tensor],
) -> None:
    # The scaler skips the step if a gradient is not finite, so it needs to know of nothing else.
    gradients[0].masked_fill_(closed, torch.nan)
    # Before the step, because gradients are clipped in the step.
    grad_scaler.unscale_(optimizer)
    gated = closed.device.type != "cpu" and _can_be_gated(optimizer)
    with _fused(optimizer) if gated else contextlib.nullcontext():
        grad_scaler.step(optimizer)
    grad_scaler.update()


def fused_step(optimizer: torch.optim.Optimizer, closed: Tensor) -> None:
    """The optimizer's step by PyTorch's fused kernel, which does nothing where ``closed`` is true.

    Args:
        optimizer: ``torch.optim.SGD`` whose buffers exist, or one that was made with ``fused``.
        closed: a bool scalar on the device of the parameters.
    """
    with _fused(optimizer):
        # What GradScaler tells a fused optimizer (torch/amp/grad_scaler.py).
        optimizer.found_inf = closed.float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]


@contextlib.contextmanager
def _fused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While entered, the optimizer uses its fused kernel. Its state dict does not know of it."""
    before = [(group["fused"], group["foreach"]) for group in optimizer.param_groups]
    supported = getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer._step_supports_amp_scaling = supported  # type: ignore[attr-defined]
        for group, (fused, foreach) in zip(optimizer.param_groups, before, strict=True):
            group["fused"], group["foreach"] = fused, foreach


def _can_be_gated(optimizer: torch.optim.Optimizer) -> bool:
    """Whether :func:`fused_step` does what the optimizer's own step does."""
    steps = [vars(cls)["step"] for cls in type(optimizer).__mro__ if "step" in vars(cls)]
    if not all(step.__module__.startswith(_GATED_MODULES) for step in steps):
        return False  # a user's subclass may not hand the flag on
    if any(gradient.is_sparse for gradient in _gradients(optimizer)):
        return False
    if not isinstance(optimizer, torch.optim.SGD):
        fused = all(group.get("fused") for group in optimizer.param_groups)
        return fused and isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return all(
        group["momentum"] == 0 or optimizer.state.get(p, {}).get("momentum_buffer") is not None
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    )
