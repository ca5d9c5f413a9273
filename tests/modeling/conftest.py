"""What the tests of the detector's parts share."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode


class PretendGPU(TorchFunctionMode):
    """A tensor that claims to be on a GPU, so that the code for GPUs runs on the CPU."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor = tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__ and args[0] is self.tensor:
            return torch.device("cuda")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pretend():
    """pretend(device, tensor): a context in which the tensor's device is "cpu" or "cuda"."""
    return lambda device, tensor: (
        PretendGPU(tensor) if device == "cuda" else contextlib.nullcontext()
    )
