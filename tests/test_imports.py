"""Imports go one way: losses.functional -> losses.* -> modeling.* -> engine -> train_net, tools."""

import ast

import pytest

PACKAGE = "retina_plugin"

# What each room may import of the package besides itself; the longest matching name counts.
ALLOWED = {
    "losses.functional": {"errors"},
    "losses": {"cache", "errors", "registry"},
    "modeling": {"errors", "registry", "losses"},
    "data": {"cache", "errors", "registry"},
    "evaluation": {"errors", "registry", "data"},
    "engine": {"cache", "config", "data", "errors", "evaluation", "losses", "modeling", "registry"},
    "tools": {"config", "data", "engine", "errors", "evaluation", "losses", "modeling", "registry"},
    "config": set(),
    "cache": set(),
    "errors": set(),
    "registry": {"errors"},
    "": {"config", "data", "errors", "evaluation", "losses", "modeling", "registry"},  # __init__
}
WIRING = {"modeling", "modeling.detector"}  # __init__ and the detector import their siblings
SHARED_IN_MODELING = {"modeling.shapes"}


def imports(source, module, is_package):
    """Full names of everything that a source file imports, also inside functions."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            # "from . import a" may name a module
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name):
    """The key of ALLOWED that a module of the package falls under; "" is the package itself."""
    return max((r for r in ALLOWED if f"{name}.".startswith(f"{r}.")), key=len, default="")


def violations(source, module, is_package=False, modules=frozenset()):
    """Imports that ``module`` (without the package's name) must not have.

    Args:
        modules: names of modules in modeling, to tell them from what a module defines.
    """
    found = []
    room = room_of(module)
    for name in imports(source, f"{PACKAGE}.{module}".rstrip("."), is_package):
        top, _, target = name.partition(".")
        if top in ("train_net", "tests", "conftest"):
            found.append(name)
        if room.startswith("losses") and top == "detectron2":
            found.append(name)
        if top != PACKAGE:
            continue
        target_room = room_of(target)
        outside = target_room != room and target_room not in ALLOWED[room]
        if room == "losses" and target_room == "losses.functional":
            outside = False
        sibling = next((m for m in modules if f"{target}.".startswith(f"{m}.")), target)
        if (
            room == target_room == "modeling"
            and module not in WIRING
            and sibling not in {module, *SHARED_IN_MODELING}
        ):
            outside = True
        if outside:
            found.append(name)
    return found


@pytest.fixture(scope="module")
def sources(repo):
    """module -> (source, whether it is a package's __init__)."""
    root = repo / PACKAGE
    found = {}
    for path in root.rglob("*.py"):
        parts = list(path.relative_to(root).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if is_package else parts)] = (path.read_text(), is_package)
    return found


def test_imports_go_one_way(sources):
    """Every file of the package keeps to its room's list."""
    assert {"losses.functional", "modeling.detector", "engine", ""} <= set(sources)
    modules = {name for name in sources if name.startswith("modeling.")}
    found = {
        name: bad
        for name, (source, is_package) in sources.items()
        if (bad := violations(source, name, is_package, modules))
    }
    assert found == {}


def test_every_file_belongs_to_a_room(sources):
    """A new top-level file or folder has to be placed in the list above."""
    assert [name for name in sources if name and not room_of(name)] == []


def test_tools_are_leaves(sources, repo):
    """Nothing but another tool imports them, and train_net needs none."""
    train_net = (repo / "train_net.py").read_text()
    for name, (source, is_package) in {**sources, "train_net": (train_net, False)}.items():
        if name.split(".")[0] != "tools":
            imported = imports(source, f"{PACKAGE}.{name}", is_package)
            assert not [i for i in imported if i.startswith(f"{PACKAGE}.tools")], name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.functional", "from .targets import DenseTargets"),
        ("losses.functional", "from retina_plugin.registry import ComponentRegistry"),
        ("losses.dense", "import detectron2.layers"),
        ("losses.dense", "def f():\n    from detectron2.structures import Boxes"),
        ("losses.dense", "from retina_plugin.modeling import shapes"),
        ("losses.dense", "from ..modeling.shapes import gather_anchors"),
        ("modeling.head", "from .backbone import P6_SOURCES"),
        ("modeling.head", "from . import backbone"),
        ("modeling.head", "from retina_plugin.modeling import RetinaHead"),
        ("modeling.head", "from retina_plugin.engine import Trainer"),
        ("modeling.shapes", "from .head import RetinaHead"),
        ("data.checks", "from retina_plugin.engine import setup"),
        ("evaluation", "from retina_plugin.modeling import RetinaHead"),
        ("engine.trainer", "import train_net"),
        ("engine.trainer", "from retina_plugin.tools import show"),
        ("", "from .engine import Trainer"),
    ],
)
def test_what_must_not_be_imported(module, source):
    """The check above sees it."""
    modules = {"modeling.head", "modeling.backbone", "modeling.shapes"}
    assert violations(source, module, is_package=module in ("", "evaluation"), modules=modules)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses.dense", "from .functional import focal\nimport torch\nimport fvcore"),
        ("modeling.head", "from .shapes import gather_anchors\nimport detectron2"),
        ("modeling.head", "from retina_plugin.losses.targets import DenseTargets"),
        ("modeling.detector", "from .head import RetinaHead"),
        ("engine.trainer", "from retina_plugin.modeling.normalizer import LossNormalizer"),
        ("engine.trainer", "from . import report"),
    ],
)
def test_what_may_be_imported(module, source):
    """The check above lets it pass."""
    modules = {"modeling.head", "modeling.backbone", "modeling.shapes"}
    assert violations(source, module, modules=modules) == []
