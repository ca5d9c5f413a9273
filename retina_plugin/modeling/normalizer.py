"""What the sums of the losses are divided by."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from retina_plugin.config import KEYS
from retina_plugin.errors import check_choice

from .transfer import sum_over_processes

__all__ = ["LossNormalizer"]


class LossNormalizer(nn.Module):
    """Divisors of both losses, from the number of anchors assigned to a ground-truth box.

    With S_n the sum over the anchors of image n and F_n its positives, the loss of a process is

    - per_image: mean over n of S_n / max(F_n, 1). The paper: "normalized by the number of anchors
      assigned to a ground-truth box" of the image (section 4.1); the mean over images is ours.
    - per_gpu: sum of S_n / sum of (F_n + 1), over the images of the process (Detectron).
    - global: sum of S_n / F with F = max(sum of F_n over the images of all W processes, 1) / W.
      DistributedDataParallel averages the gradients over processes, which gives those of one
      process with the whole batch.
    - ema: sum of S_n / E with E <- momentum E + (1 - momentum) F and the same F. In Detectron2 each
      process has its own: F = max(sum of F_n, 1). As there, E begins at 100 positives a process,
      so W processes are one process that begins at 100 W.

    E is the buffer ``ema``, so it moves with the model. The trainer's state dict holds it, so that
    a resumed training continues with it. The model's state dict does not: its keys are
    Detectron2's.

    Args:
        mode: one of the above (``NORMALIZER``).
        momentum, initial: of the moving average; Detectron2's .9 and 100.

    Raises:
        ConfigError: an unknown mode.
    """

    ema: Tensor

    def __init__(self, mode: str = "ema", momentum: float = 0.9, initial: float = 100.0) -> None:
        super().__init__()
        key = "MODEL.RETINANET.NORMALIZER"
        check_choice(key, mode, KEYS[key].choices)
        self.mode, self.momentum = mode, momentum
        self.register_buffer("ema", torch.tensor(float(initial)), persistent=False)

    def extra_repr(self) -> str:
        return self.mode

    def forward(self, num_positives_N: Tensor) -> Tensor:
        """(N,) float divisors d: the loss of this process is the sum over n of S_n / d_n.

        Args:
            num_positives_N: (N,) int64, from ``DenseTargets.num_positives_N``.
        """
        if self.mode == "per_image":
            return num_positives_N.clamp(min=1).float() * len(num_positives_N)
        if self.mode == "per_gpu":
            divisor = (num_positives_N + 1).sum().float()
        else:
            divisor = sum_over_processes(num_positives_N.sum().float()).clamp(min=1)
            divisor = divisor / comm.get_world_size()
            if self.mode == "ema":
                self.ema.mul_(self.momentum).add_(divisor, alpha=1 - self.momentum)
                divisor = self.ema.clone()
        return divisor.expand(len(num_positives_N))
