"""How a config key chooses a component."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from fvcore.common.registry import Registry  # the class that Detectron2's own registries are

from retina_plugin.errors import check_choice

__all__ = ["ComponentRegistry"]


class ComponentRegistry(Registry):
    """A Detectron2 registry whose entries are chosen by one config key.

    Entries are classes with a class method ``from_config(cfg, *args)``, which returns the
    constructor's arguments as a dict. A component can also be built directly, without a config.

    Args:
        key: the config key, e.g. "MODEL.RETINANET.CLS_LOSS".
        aliases: other spellings that the key accepts, each with the registered name.
    """

    def __init__(self, key: str, aliases: Mapping[str, str] | None = None) -> None:
        super().__init__(key)
        self.key = key
        self.aliases = dict(aliases or {})

    def build(self, cfg: Any, *args: Any) -> Any:
        """Build the component that the key names.

        Raises:
            ConfigError: nothing is registered under that name; the message lists what is.
        """
        return self.build_named(reduce(getattr, self.key.split("."), cfg), cfg, *args)

    def build_named(self, name: str, cfg: Any, *args: Any) -> Any:
        """Build the component of a name, which may be one of several that the key lists.

        Raises:
            ConfigError: see :meth:`build`.
        """
        check_choice(self.key, name, [*self.aliases, *sorted(k for k, _ in self)])
        cls = self.get(self.aliases.get(name, name))
        return cls(**cls.from_config(cfg, *args))
