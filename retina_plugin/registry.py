"""The one way in which a config key chooses a component."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from fvcore.common.registry import Registry  # the class that Detectron2's own registries are

from retina_plugin.errors import ConfigError

__all__ = ["ComponentRegistry"]


class ComponentRegistry(Registry):
    """A Detectron2 registry whose entries are named by one config key.

    An entry is a class with ``from_config(cfg, *args) -> dict`` of its constructor's arguments, as
    Detectron2's ``@configurable`` has it, so that everything can be built without a config too.

    Args:
        key: the config key, e.g. "MODEL.RETINANET.CLS_LOSS".
        aliases: other spellings of some names that the key accepts.
    """

    def __init__(self, key: str, aliases: Mapping[str, str] | None = None) -> None:
        super().__init__(key)
        self.key = key
        self.aliases = dict(aliases or {})

    def build(self, cfg: Any, *args: Any) -> Any:
        """Build the component that the key names.

        Raises:
            ConfigError: there is none of that name; the message lists the ones that exist.
        """
        name = reduce(getattr, self.key.split("."), cfg)
        registered = self.aliases.get(name, name)
        if registered not in self:
            known = ", ".join([*self.aliases, *sorted(k for k, _ in self)])
            raise ConfigError(f"{self.key}: nothing is registered as '{name}'; known: {known}")
        cls = self.get(registered)
        return cls(**cls.from_config(cfg, *args))
