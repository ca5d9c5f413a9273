"""Reading config files and their bases. Nothing that a file holds is run."""

from __future__ import annotations

import copy
import os
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

from retina_plugin.config import get_config_file
from retina_plugin.errors import ConfigError

from .expressions import evaluate

__all__ = ["base_and_own", "find_config", "load_config", "merge"]

_MAX_BYTES = 2**18
_MAX_DEPTH = 50  # Detectron2's deepest key has four parts
_MAX_VALUES = 100_000  # with those of a YAML alias counted as often as it is used
_PYTHON = "tag:yaml.org,2002:python/"

Settings = dict[str, Any]


def load_config(config_file: str) -> Settings:
    """The settings of a YAML file, merged over those of its ``_BASE_``.

    ``_BASE_`` is a file, relative to the folder of the file that names it, or the name of one of
    the paper's configs. It may be a list of these; later ones win.

    Tags that make Python objects are refused, except for tuples and arithmetic, which
    :func:`~retina_plugin.engine.expressions.evaluate` describes.

    Args:
        config_file: a file, or a name for :func:`retina_plugin.get_config_file`.

    Raises:
        ConfigError: there is no such file or config, it is not a YAML mapping, it has a key twice
            or a tag that is refused, or its bases form a circle.
    """
    base, own = base_and_own(config_file)
    return merge(own, base)


def find_config(name: str, folder: str = "") -> str:
    """Path or URL of a config file.

    Args:
        name: a file, or a name for :func:`retina_plugin.get_config_file`.
        folder: a relative path is relative to it.

    Raises:
        ConfigError: there is no such file or config.
    """
    path = name if "://" in name else os.path.join(folder, os.path.expanduser(name))
    if "://" in path:
        return path
    if PathManager.isfile(path):
        return os.path.normpath(path)
    try:
        return get_config_file(name)
    except ConfigError as error:
        raise ConfigError(f"there is no file {path}, and {error}") from None


def base_and_own(config_file: str) -> tuple[Settings, Settings]:
    """The settings that a config inherits, and those that its file has itself.

    Args, Raises: see :func:`load_config`.
    """
    return _read_with_bases(find_config(config_file), (), {})


def merge(settings: Settings, base: Settings) -> Settings:
    """A copy of ``base`` with ``settings`` merged over it."""
    merged = copy.deepcopy(base)
    for key, value in settings.items():
        if isinstance(value, dict) and key in merged:
            if not isinstance(merged[key], dict):
                raise ConfigError(f"{key} is a group of keys, but a value in a base")
            merged[key] = merge(value, merged[key])
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _read_with_bases(
    path: str, inheriting: tuple[str, ...], done: dict[str, tuple[Settings, Settings]]
) -> tuple[Settings, Settings]:
    """See :func:`base_and_own`.

    Args:
        inheriting: the files that led here.
        done: real path -> result, because files may share bases.
    """
    chain = [*inheriting, path]
    identity = _identity(path)
    if identity in map(_identity, inheriting):
        raise ConfigError(f"{path} inherits itself by _BASE_: {' -> '.join(chain)}")
    if len(chain) > _MAX_DEPTH:
        raise ConfigError(f"{chain[0]} has more than {_MAX_DEPTH} bases of bases")
    if identity in done:
        return done[identity]
    own = _read_yaml(path)
    bases = own.pop("_BASE_", [])
    merged: Settings = {}
    for name in [bases] if isinstance(bases, str) else bases:
        try:
            base_path = find_config(name, os.path.dirname(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: _BASE_: {error}") from None
        inherited, settings = _read_with_bases(base_path, tuple(chain), done)
        merged = merge(merge(settings, inherited), merged)
    done[identity] = merged, own
    return merged, own


def _identity(path: str) -> str:
    """The same for all spellings of a path, and for links to a file."""
    return path if "://" in path else os.path.realpath(path)


def _read_yaml(path: str) -> Settings:
    try:
        with PathManager.open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes: it is no config")
        settings = _parse(content.decode("utf-8"), path)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path}: its values are nested too deeply") from None
    except Exception as error:
        # No file, not UTF-8, not YAML, a date that does not exist, ...; YAML's have several lines.
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a mapping of keys")
    _check_keys(settings, path)
    bases = settings.get("_BASE_", [])
    if not isinstance(bases, (str, list)) or not all(isinstance(name, str) for name in bases):
        raise ConfigError(f"{path}: _BASE_ must be a file or a list of files, got {bases!r:.100}")
    for name in [bases] if isinstance(bases, str) else bases:
        if not name or len(name) > 4096 or not name.isprintable():
            raise ConfigError(f"{path}: _BASE_: {name!r:.100} is not the name of a file")
    return settings


def _parse(text: str, path: str) -> Any:
    loader = _Loader(text)
    loader.path = path
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, path, {}, 0) > _MAX_VALUES:
            raise ConfigError(f"{path}: its aliases stand for more than {_MAX_VALUES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, path: str, done: dict[int, int], depth: int) -> int:
    """How many values a node has when all aliases are written out."""
    if depth > _MAX_DEPTH:  # or an alias that contains itself
        raise ConfigError(f"{path}: {_line(node)}: values are nested more than {_MAX_DEPTH} deep")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in done:
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        done[id(node)] = 1 + sum(_count_values(x, path, done, depth + 1) for x in children)
    return done[id(node)]


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _check_keys(settings: dict[Any, Any], path: str) -> None:
    for key, value in settings.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r:.100} is not a name")
        if isinstance(value, dict):
            _check_keys(value, path)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with tuples, arithmetic, and an error for a key that is there twice."""

    path = ""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[tuple[str, str], str] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                name = key.tag, key.value
                if name in lines:
                    raise ConfigError(
                        f"{self.path}: the key {key.value!r:.100} is there twice, in "
                        f"{lines[name]} and {_line(key)}: delete one"
                    )
                lines[name] = _line(key)
        return super().construct_mapping(node, deep)

    def construct_tuple(self, node: yaml.Node) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def construct_arithmetic(self, node: yaml.Node) -> Any:
        arguments = self.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
        if len(arguments) != 1 or not isinstance(arguments[0], str):
            return self.refuse(node)
        try:
            return evaluate(arguments[0])
        except ValueError as error:
            raise ConfigError(
                f"{self.path}: {_line(node)}: cannot evaluate {arguments[0][:200]!r}: {error}"
            ) from None

    def refuse(self, node: yaml.Node) -> Any:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!").encode("unicode_escape").decode()
        reason = (
            "makes Python objects, which could run code" if _PYTHON in node.tag else "is unknown"
        )
        raise ConfigError(
            f"{self.path}: {_line(node)}: the tag {tag:.100} {reason}: write the value itself"
        )


_Loader.add_constructor(f"{_PYTHON}tuple", _Loader.construct_tuple)
_Loader.add_constructor(f"{_PYTHON}object/apply:eval", _Loader.construct_arithmetic)
_Loader.add_constructor(None, _Loader.refuse)
