"""``MODEL.WEIGHTS: timm://NAME``: ImageNet weights that timm fetches, for its backbones."""

from __future__ import annotations

from pathlib import Path

from detectron2.utils.file_io import PathHandler, PathManager
from safetensors.torch import save_file

from retina_plugin.cache import cache_root
from retina_plugin.errors import ConfigError, first_line
from retina_plugin.modeling.timm_models import (
    check_timm_name,
    create_features,
    feature_index,
    feature_strides,
    import_timm,
)

from .downloads import converted_file

__all__ = ["PREFIX", "TimmHandler", "timm_weights"]

PREFIX = "timm://"


class TimmHandler(PathHandler):
    """Gives ``PathManager`` the local file of ``timm://resnet18.a1_in1k``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: object) -> str:
        return str(timm_weights(path.removeprefix(PREFIX)))


def timm_weights(name: str) -> Path:
    """The weights of a backbone of timm, with the names of ``build_timm_retina_fpn_backbone``.

    timm fetches them into its own cache, builds its model with them, and the features' part is kept
    in ours.

    Args:
        name: "resnet18.a1_in1k", or "resnet18" for the weights that timm prefers.

    Raises:
        ConfigError: timm has no such weights, or cannot fetch them.
    """
    key = "MODEL.WEIGHTS"
    check_timm_name(name, key)
    timm = import_timm()
    source = timm.get_pretrained_cfg(name)
    if not source.has_weights:
        raise ConfigError(
            f"{key}: timm has no weights of '{name}': set it to '' to start from random weights, "
            "or take another model; timm.list_models(pretrained=True) has those with weights"
        )
    strides = feature_strides(name)
    indices = [feature_index(name, strides, stride) for stride in (8, 16, 32)]

    def write(file: Path) -> None:
        try:
            features = create_features(name, indices, pretrained=True)
        except Exception as error:  # a download can fail in many ways
            reason = first_line(error)
            where = f"https://huggingface.co/{source.hf_hub_id}" if source.hf_hub_id else source.url
            raise ConfigError(
                f"{key}: timm cannot fetch the weights of '{name}' from {where} ({reason}): run "
                f"`python -c \"import timm; timm.create_model('{name}', pretrained=True)\"` where "
                "there is a network and copy timm's cache (the folder that HF_HOME names, "
                "~/.cache/huggingface by default), or set MODEL.WEIGHTS to '' to start from random "
                "weights"
            ) from None
        state = {
            f"backbone.bottom_up.features.{name}": value.contiguous()
            for name, value in features.state_dict().items()
            if not name.endswith("num_batches_tracked")  # a frozen batch norm has no counter
        }
        save_file(state, file)

    # The names of a model's parts may change between versions of timm.
    full_name = ".".join(filter(None, (source.architecture, source.tag)))
    folder = cache_root() / "timm" / timm.__version__
    return converted_file(folder / f"{full_name}.safetensors", write)


PathManager.register_handler(TimmHandler(), allow_override=True)
