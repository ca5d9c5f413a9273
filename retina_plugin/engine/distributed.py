"""DistributedDataParallel with the options of ``SOLVER.DDP``."""

from __future__ import annotations

from typing import Any

from detectron2.engine import create_ddp_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from retina_plugin.errors import ConfigError

__all__ = ["check_ddp_options", "make_ddp_model"]

_COMPRESSIONS = ("none", "float16", "bfloat16")


def check_ddp_options(*, static_graph: bool, compression: str, passes: int) -> None:
    """The options of :func:`make_ddp_model` that can be judged without a model.

    Raises:
        ConfigError: a compression that is not known, or a static graph with several passes.
    """
    if compression not in _COMPRESSIONS:
        raise ConfigError(
            f"SOLVER.DDP.COMPRESSION: no '{compression}'; known: {', '.join(_COMPRESSIONS)}"
        )
    if static_graph and passes > 1:
        # PyTorch learns the graph in its first backward pass, which must exchange gradients
        raise ConfigError(
            "SOLVER.DDP.STATIC_GRAPH with SOLVER.ACCUMULATE > 1 is not supported by PyTorch: set "
            "SOLVER.DDP.STATIC_GRAPH False"
        )


def make_ddp_model(
    model: nn.Module,
    *,
    static_graph: bool = False,
    gradient_as_bucket_view: bool = False,
    compression: str = "none",
    passes: int = 1,
) -> nn.Module:
    """The model whose gradients are averaged over the processes; with one process the model itself.

    Args:
        model: on the device of this process.
        static_graph: the same parameters get gradients in every iteration, in the same order.
        gradient_as_bucket_view: gradients are views of the buffers that are sent: saves 1x their
            memory and a copy.
        compression: "none", or what gradients are sent as: "float16" (of little range) or
            "bfloat16" (of few digits); they are added up in it, half the traffic.
        passes: backward passes of a step; gradients are exchanged in the last one.

    Raises:
        ConfigError: see :func:`check_ddp_options`; a compression that this build of PyTorch
            cannot do.
    """
    check_ddp_options(static_graph=static_graph, compression=compression, passes=passes)
    options: dict[str, Any] = {
        "broadcast_buffers": False,
        # with one DDP would move the images itself, each by a copy that waits
        "device_ids": None,
        "static_graph": static_graph,
        "gradient_as_bucket_view": gradient_as_bucket_view,
    }
    model = create_ddp_model(model, **options)
    if isinstance(model, DistributedDataParallel) and compression != "none":
        hooks = {
            "float16": default_hooks.fp16_compress_hook,
            "bfloat16": default_hooks.bf16_compress_hook,
        }
        try:
            model.register_comm_hook(None, hooks[compression])
        except TypeError as error:
            raise ConfigError(
                f"SOLVER.DDP.COMPRESSION {compression}: {error}; set it to float16 or none"
            ) from None
    return model
