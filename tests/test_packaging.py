"""setup.py, requirements/ and the script that makes the environment. Nothing is installed."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PINNED_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py hands to setuptools."""
    seen = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: seen.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return seen


@pytest.fixture(scope="module")
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "requirements/bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uncommented_pins(text):
    """Requirements that shut out newer versions on a line that does not say why."""
    pin = re.compile(r'"[A-Za-z][^"]*(?:<|==|~=|!=)[^"]*"(?!.*#)')
    return [line.strip() for line in text.splitlines() if pin.search(line)]


def test_requirements(metadata):
    needed = {Requirement(line).name for line in metadata["install_requires"]}
    assert needed >= {
        *("torch", "torchvision", "numpy", "Pillow", "opencv-python"),
        *("pycocotools", "fvcore", "iopath"),
    }
    extras = {
        extra: [Requirement(line) for line in lines]
        for extra, lines in metadata["extras_require"].items()
    }
    assert {requirement.name for requirement in extras["demo"]} == {"scikit-learn"}
    dev = {requirement.name: str(requirement.specifier) for requirement in extras["dev"]}
    assert dev.keys() == {"pytest", "ruff", "mypy"}
    for gate in ("ruff", "mypy"):
        assert re.fullmatch(r"==\d+(\.\d+)+", dev[gate])
    # Installing the package must not bring a Detectron2 over the one that somebody compiled.
    for requirement in [*needed, *dev, "scikit-learn"]:
        assert "detectron2" not in requirement


def test_python_and_version(metadata):
    supported = SpecifierSet(metadata["python_requires"])
    assert all(supported.contains(f"3.{minor}.0") for minor in (10, 11, 12, 13))
    assert not supported.contains("3.9.18")
    text = (ROOT / "retina_plugin/__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{metadata["version"]}"' in text
    assert "retina_plugin" in metadata["packages"] and "tests" not in metadata["packages"]


def test_upper_pins_say_why():
    assert uncommented_pins('    "torch<3",\n    "numpy>=1,<2",\n    "ruff==1.0",  # a gate') == [
        '"torch<3",',
        '"numpy>=1,<2",',
    ]
    assert uncommented_pins((ROOT / "setup.py").read_text(encoding="utf-8")) == []


def test_detectron2_is_pinned_by_hash():
    lines = (ROOT / "requirements/detectron2.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        f"sal-detectron2==0.7.2 --hash=sha256:{PINNED_SHA256}"
    ]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/one.txt").write_text("one\n")
    (tmp_path / "setup.py").write_text("setup()\n")
    (tmp_path / "pyproject.toml").write_text('[build-system]\nrequires = ["a"]\n[tool.x]\ny = 1\n')
    return tmp_path


def test_fingerprint_follows_what_is_installed(bootstrap, checkout):
    def fingerprint(version="3.11"):
        return bootstrap.fingerprint(checkout, checkout / ".venv", version)

    before = fingerprint()
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("y = 1", "y = 2"))
    assert fingerprint() == before  # settings of the tools install nothing
    seen = {before, fingerprint("3.12")}
    pyproject.write_text(pyproject.read_text().replace('"a"', '"b"'))
    seen.add(fingerprint())
    (checkout / "setup.py").write_text("setup(1)\n")
    seen.add(fingerprint())
    (checkout / "requirements/one.txt").write_text("two\n")
    seen.add(fingerprint())
    (checkout / "requirements/one.txt").rename(checkout / "requirements/two.txt")
    seen.add(fingerprint())
    seen.add(bootstrap.fingerprint(checkout, checkout / "elsewhere", "3.11"))
    assert len(seen) == 7


@pytest.fixture
def venv(bootstrap, tmp_path):
    """A finished environment of this interpreter's version, in outline; its stamp is "old"."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").touch()
    (venv / "lib/python3/site-packages").mkdir(parents=True)
    (venv / bootstrap.MARKER).touch()
    (venv / bootstrap.STAMP).write_text("old")
    return venv


@pytest.fixture
def commands(bootstrap, venv, monkeypatch):
    """The commands that a set-up would have run."""
    seen = []
    site = venv / "lib/python3/site-packages"
    monkeypatch.setattr(bootstrap, "run", lambda command, advice: seen.append(" ".join(command)))
    monkeypatch.setattr(bootstrap, "probe", lambda venv: (bootstrap.python_version(), [site]))
    monkeypatch.setattr(bootstrap, "mend_opencv", lambda *args: None)
    monkeypatch.setattr(bootstrap, "install_detectron2", lambda *args: seen.append("detectron2"))
    return seen


def test_current(bootstrap, venv):
    assert bootstrap.is_current(venv, "old")
    assert not bootstrap.is_current(venv, "new")
    (venv / "bin/python").unlink()
    assert not bootstrap.is_current(venv, "old")


def test_new_requirements_rebuild(bootstrap, venv, commands):
    (venv / "lib/leftover").touch()
    bootstrap.set_up(venv, "new")
    assert not (venv / "lib/leftover").exists()
    assert (venv / bootstrap.STAMP).read_text() == "new"
    assert [re.search("venv|editable|detectron2", c).group() for c in commands] == [
        *("venv", "venv", "detectron2")
    ]
    assert "--editable .[demo,fast,dev]" in commands[1]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("step", ["empty", "run"])
def test_interrupted_is_not_current(bootstrap, venv, commands, monkeypatch, own, step):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bootstrap, step, interrupt)
    monkeypatch.setattr(bootstrap, "run", interrupt)
    monkeypatch.setattr(bootstrap, "own_detectron2", lambda paths: "a build" if own else "")
    with pytest.raises(KeyboardInterrupt):
        bootstrap.set_up(venv, "old")
    assert not (venv / bootstrap.STAMP).exists()
    assert (venv / bootstrap.MARKER).exists()  # the next try may go on


def test_own_detectron2(bootstrap, venv):
    site = venv / "lib/python3/site-packages"
    assert bootstrap.own_detectron2([site]) == ""
    (site / "detectron2").mkdir()
    assert bootstrap.own_detectron2([site]) == f"the Detectron2 in {site}"
    pinned = site / "sal_detectron2-0.7.2.dist-info"
    pinned.mkdir()
    (pinned / "METADATA").write_text("Name: sal-detectron2\nVersion: 0.7.2\n")
    assert bootstrap.own_detectron2([site]) == ""
    official = site / "detectron2-0.6.dist-info"
    official.mkdir()
    (official / "METADATA").write_text("Name: detectron2\nVersion: 0.6\n")
    assert bootstrap.own_detectron2([site]) == "Detectron2 0.6"


def test_own_detectron2_is_kept(bootstrap, venv, commands, monkeypatch):
    module = venv / "lib/python3/site-packages/detectron2/__init__.py"
    module.parent.mkdir()
    module.write_text("compiled = True\n")
    bootstrap.set_up(venv, "new")
    assert module.read_text() == "compiled = True\n"
    assert len(commands) == 1 and "--editable" in commands[0]
    assert bootstrap.is_current(venv, "new")

    monkeypatch.setattr(bootstrap, "python_version", lambda: "3.99")
    monkeypatch.setattr(bootstrap, "probe", lambda venv: ("3.11", [module.parent.parent]))
    with pytest.raises(bootstrap.SetupError, match="holds a Detectron2 of yours"):
        bootstrap.set_up(venv, "newer")
    assert module.exists()


def test_an_environment_of_the_users_is_not_emptied(bootstrap, venv, commands):
    (venv / bootstrap.MARKER).unlink()
    bootstrap.set_up(venv, "new")
    assert (venv / "lib/python3/site-packages").is_dir()
    assert commands[-1] == "detectron2" and "--editable" in commands[0]
