"""FPN with levels P3 to P7 on any backbone of timm that gives feature maps."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from retina_plugin.config import KEYS
from retina_plugin.errors import ConfigError, check_choice

from .pyramid import build_pyramid, p6_source
from .timm_models import ADVICE, NAME, create_features, feature_index, feature_strides, image_size

__all__ = ["TimmFeatures", "build_timm_retina_fpn_backbone"]

_IN_FEATURES = "MODEL.FPN.IN_FEATURES"
# Detectron2's names: res3 is the feature map of stride 8.
_STRIDES = {f"res{level}": 2**level for level in range(1, 6)}
# Two sides that are multiples of 32 and no usual training size: models of a fixed size refuse them.
_PROBE_SIZE = (96, 160)


@BACKBONE_REGISTRY.register()
def build_timm_retina_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The model ``MODEL.TIMM.NAME`` of timm and an FPN with levels P3 to P7.

    ``res3``, ``res4`` and ``res5`` of ``MODEL.FPN.IN_FEATURES`` are its features of the strides 8,
    16 and 32. ``P6_SOURCE``, ``RELU_BEFORE_P7`` and the FPN's keys mean what they mean for
    :func:`~retina_plugin.modeling.backbone.build_retina_fpn_backbone`. Weights are random:
    ``MODEL.WEIGHTS: timm://NAME`` loads timm's. Needs the extra ``timm``.

    Raises:
        ConfigError: timm is missing, or has no such model; the model gives no features of these
            strides, or takes images of one size only; ``MODEL.BACKBONE.FREEZE_AT`` names a stride
            that it does not have.
    """
    source = p6_source(cfg)
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    if not in_features:
        raise ConfigError(f'{_IN_FEATURES}: is empty: set it to ["res3", "res4", "res5"]')
    for name in in_features:
        check_choice(_IN_FEATURES, name, _STRIDES)
    bottom_up = TimmFeatures(
        cfg.MODEL.TIMM.NAME,
        in_features if source == "p5" else sorted({*in_features, source}),
        in_channels=input_shape.channels,
        norm=cfg.MODEL.TIMM.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return build_pyramid(cfg, bottom_up)


class TimmFeatures(Backbone):
    """Feature maps of a model of timm, as Detectron2's ResNet gives them.

    Which feature has which stride is what timm says (``feature_info.reduction()``); of several with
    the same stride it is the last. Parameters that none of the features depends on are frozen, so
    that training on several GPUs does not wait for their gradients.

    Args:
        name: of the model, with or without the tag of its weights: "resnet18", "resnet18.a1_in1k".
        out_features: names ``res1`` to ``res5``, for the strides 2 to 32.
        in_channels: of the images.
        norm: what becomes of batch norm: "FrozenBN" keeps statistics and affine parameters as they
            are, "BN" trains them, "SyncBN" also computes the statistics over all GPUs. Other norms
            stay as they are.
        freeze_at: 0 freezes nothing; n freezes all that the feature of stride 2^n is computed with,
            and its batch norms. For a ResNet that is Detectron2's meaning: 1 is the stem, 2 also
            the first stage.

    Raises:
        ConfigError: see :func:`build_timm_retina_fpn_backbone`.

    Example::

        features = TimmFeatures("convnext_atto", ["res3", "res4", "res5"])
        features(torch.zeros(1, 3, 256, 256))["res3"].shape  # (1, 80, 32, 32)
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        *,
        in_channels: int = 3,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        check_choice("MODEL.TIMM.NORM", norm, KEYS["MODEL.TIMM.NORM"].choices)
        strides = feature_strides(name)
        indices = {
            feature: feature_index(name, strides, _STRIDES[feature]) for feature in out_features
        }
        last_frozen = None
        if freeze_at > 0:
            last_frozen = feature_index(name, strides, 2**freeze_at, "MODEL.BACKBONE.FREEZE_AT")
        self.features = create_features(name, sorted(indices.values()), in_channels=in_channels)
        self._names = sorted(indices, key=indices.__getitem__)
        self._out_features = list(out_features)
        self._out_feature_strides = {feature: _STRIDES[feature] for feature in out_features}
        channels = self.features.feature_info.channels()
        self._out_feature_channels = dict(zip(self._names, channels))
        # mobilenets and a few others have no output_fmt: theirs is NCHW
        self._is_nhwc = getattr(self.features, "output_fmt", "NCHW") == "NHWC"
        self._freeze(*_probe(name, sorted(indices.values()), last_frozen, in_channels), norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) -> {"res3": (N, channels, H / 8, W / 8), ...}."""
        maps = self.features(x)
        if self._is_nhwc:
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        found = dict(zip(self._names, maps))
        return {name: found[name] for name in self._out_features}

    def blocks(self) -> list[nn.Module]:
        """The parts whose activations can be computed again, each from one tensor.

        They are the entries of the outermost ``nn.Sequential`` objects, which timm puts blocks
        into. A model without such blocks is one part.
        """
        found: list[nn.Module] = []

        def visit(module: nn.Module) -> None:
            for child in module.children():
                if isinstance(child, nn.Sequential):
                    found.extend(filter(_is_block, child))
                else:
                    visit(child)

        visit(self.features)
        return found or [self]

    def _freeze(self, used: set[str], frozen: set[str], norm: str) -> None:
        """Args: names of the parameters that features depend on, and of those to freeze."""
        layers = importlib.import_module("timm.layers")
        for name, parameter in self.features.named_parameters():
            parameter.requires_grad = name in used - frozen
        if norm == "FrozenBN":
            self.features = layers.freeze_batch_norm_2d(self.features)
        else:
            for name, module in list(self.features.named_modules()):
                parameters = list(module.parameters(recurse=False))
                if isinstance(module, nn.BatchNorm2d) and not any(
                    p.requires_grad for p in parameters
                ):
                    self.features.set_submodule(name, layers.freeze_batch_norm_2d(module))
        if norm == "SyncBN":
            self.features = layers.convert_sync_batchnorm(self.features)


def _is_block(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if not any(m.children())]
    # A block that writes over its input cannot be computed again from it.
    return len(leaves) > 1 and not getattr(leaves[0], "inplace", False)


def _probe(
    name: str, indices: list[int], last_frozen: int | None, in_channels: int
) -> tuple[set[str], set[str]]:
    """Names of the parameters that features depend on, and of those to freeze.

    Found by a backward pass without memory, on PyTorch's meta device: the order in which modules
    are registered need not be that of the computation. The forward pass also shows whether the
    model takes images of any size.

    Args:
        indices: numbers of the features.
        last_frozen: number of the feature whose parameters are to be frozen.
    """
    wanted = sorted({*indices, *([] if last_frozen is None else [last_frozen])})
    height, width = _PROBE_SIZE
    with torch.device("meta"), torch.enable_grad():
        model = create_features(name, wanted, in_channels=in_channels).eval()
        reductions = model.feature_info.reduction()
        dimensions = slice(1, 3) if getattr(model, "output_fmt", "") == "NHWC" else slice(2, 4)
        try:
            maps = model(torch.zeros(1, in_channels, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ConfigError(
                f"{NAME}: timm's {name} takes images of {image_size(name)} only, and a detector "
                f"must take any size: {ADVICE} ({error})"
            ) from None
        for feature, stride in zip(maps, reductions):
            if feature.shape[dimensions] != (height // stride, width // stride):
                raise ConfigError(
                    f"{NAME}: the feature of stride {stride} of timm's {name} does not cover the "
                    f"image: {tuple(feature.shape[dimensions])} for {height} x {width} pixels: "
                    f"{ADVICE}"
                )
    by_index = dict(zip(wanted, maps))
    used = _parameters_of([by_index[index] for index in indices], model)
    frozen = set() if last_frozen is None else _parameters_of([by_index[last_frozen]], model)
    return used, frozen


def _parameters_of(features: list[Tensor], model: nn.Module) -> set[str]:
    names, parameters = zip(*model.named_parameters())
    total = torch.stack([feature.sum() for feature in features]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(names, gradients) if gradient is not None}
