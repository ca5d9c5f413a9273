"""pyproject.toml, the lock, the script that makes the environment, and the built package."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import retina_plugin

PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def project(repo):
    return tomllib.loads((repo / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def lock(repo):
    """The requirements of requirements/lock.txt."""
    lines = (repo / "requirements" / "lock.txt").read_text().splitlines()
    stripped = [line.split("#")[0].strip() for line in lines]
    return [Requirement(line) for line in stripped if line]


def test_version_is_the_same_everywhere(project, repo):
    assert project["version"] == retina_plugin.__version__
    assert f"\nversion: {project['version']}\n" in (repo / "CITATION.cff").read_text()


def test_supported_pythons(project):
    supported = SpecifierSet(project["requires-python"])
    assert all(supported.contains(f"{version}.0") for version in PYTHONS)
    assert not supported.contains("3.10.18")
    named = {c.rsplit(" ", 1)[1] for c in project["classifiers"] if "Python :: 3." in c}
    assert named == set(PYTHONS)


def test_installing_brings_no_detectron2(project):
    """It would replace the one that a user compiled."""
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        assert "detectron2" not in Requirement(line).name


def test_upper_bounds_say_why(repo):
    """A comment stands on the line of a bound, or on the line above."""
    lines = (repo / "pyproject.toml").read_text().splitlines()
    bounded = re.compile(r'^\s+"[A-Za-z][^"]*(<|==|~=|!=)[^"]*"')
    for above, line in itertools.pairwise(lines):
        if bounded.match(line):
            assert "#" in line or above.lstrip().startswith("#"), line


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_has_one_allowed_version_of_everything(project, lock, python):
    """For each supported Python on Linux, one pin that pyproject.toml allows."""
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    pins = {}
    for requirement in lock:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and requirement.name not in pins
            pins[requirement.name] = specifier.version
    extras = project["optional-dependencies"].values()
    for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line


def test_detectron2_is_pinned_by_hash(repo):
    lines = (repo / "requirements" / "detectron2.txt").read_text().splitlines()
    (pin,) = [line for line in lines if line and not line.startswith("#")]
    assert re.fullmatch(r"sal-detectron2==[\d.]+ --hash=sha256:[0-9a-f]{64}", pin)


# An interpreter that records what pip is asked for, and makes what the script looks for.
FAKE_PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" "$3/site" && cp "$0" "$3/bin/python" ;;
    *"pip -q show detectron2"*) exit $NO_OWN_DETECTRON2 ;;
    *"import cv2"*) ;;
    *"import detectron2"*) exit 1 ;;
    *purelib*) echo "$(dirname "$0")/../site" ;;
    *" install "*)
        echo "$*" >>"$CALLS"
        while [ "$#" -gt 0 ]; do
            if [ "$1" = --target ]; then
                mkdir -p "$2/detectron2" "$2/sal_detectron2-1.dist-info" "$2/tools"
                touch "$2/detectron2/_C.so" "$2/detectron2/engine.py"
            fi
            shift
        done ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def set_up(repo, tmp_path):
    """Runs requirements/setup.sh with the interpreter above; its output and what pip installed."""
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    calls = tmp_path / "calls.txt"

    def run(*args, own_detectron2=False):
        calls.write_text("")
        done = subprocess.run(
            [str(repo / "requirements" / "setup.sh"), *map(str, args)],
            env={
                **os.environ,
                "PYTHON": str(fake),
                "REAL_PYTHON": sys.executable,
                "CALLS": str(calls),
                "NO_OWN_DETECTRON2": "0" if own_detectron2 else "1",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, calls.read_text().splitlines()

    return run


def test_set_up_installs_the_lock_and_the_pinned_detectron2(set_up, tmp_path):
    venv = tmp_path / "venv"
    done, installed = set_up(venv)
    assert done.returncode == 0, done.stderr
    assert "-r requirements/lock.txt" in installed[0]
    assert "--no-deps" in installed[1] and "--editable ." in installed[1]
    assert "--require-hashes" in installed[2] and "requirements/detectron2.txt" in installed[2]
    assert len(installed) == 3
    # without the binary for another Python and without the folder `tools`
    found = sorted(str(p.relative_to(venv / "site")) for p in (venv / "site").rglob("*"))
    assert found == ["detectron2", "detectron2/engine.py", "sal_detectron2-1.dist-info"]


def test_set_up_can_be_repeated(set_up, tmp_path):
    for _ in range(2):
        done, installed = set_up(tmp_path / "venv")
        assert done.returncode == 0 and len(installed) == 3


def test_set_up_latest_takes_the_open_ranges(set_up, tmp_path):
    done, installed = set_up(tmp_path / "venv", "latest")
    assert done.returncode == 0
    assert (
        "--upgrade" in installed[0]
        and ".[demo,fast,video,timm,export,openvino,report,supervision,dev]" in installed[0]
    )
    assert not any("lock.txt" in call for call in installed)


def test_set_up_keeps_a_detectron2_of_the_user(set_up, tmp_path):
    set_up(tmp_path / "venv")
    built = tmp_path / "venv" / "site" / "detectron2" / "engine.py"
    built.write_text("compiled = True")
    done, installed = set_up(tmp_path / "venv", own_detectron2=True)
    assert done.returncode == 0 and "keeping the Detectron2" in done.stdout
    assert len(installed) == 2 and built.read_text() == "compiled = True"


def test_set_up_leaves_an_environment_of_the_user_alone(set_up, tmp_path):
    venv = tmp_path / "mine"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("home = /usr")
    done, installed = set_up(venv)
    assert done.returncode == 1 and installed == []
    assert "not made by this script: move it away, or choose another with VENV=" in done.stderr
    assert [p.name for p in venv.iterdir()] == ["pyvenv.cfg"]


def test_set_up_refuses_an_environment_of_another_python(set_up, tmp_path):
    set_up(tmp_path / "venv")
    (tmp_path / "venv" / "made-by-retina-plugin").write_text("3.9\n")
    done, installed = set_up(tmp_path / "venv")
    assert done.returncode == 1 and installed == []
    assert "was made with Python 3.9, not " in done.stderr


def test_package_works_without_a_checkout(repo, tmp_path):
    """The wheel has every file that is not Python; ``retina`` runs in an empty folder."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("retina_plugin", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).symlink_to(repo / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    tops = {path.split("/")[0] for path in (str(p.relative_to(site)) for p in site.rglob("*"))}
    assert tops == {"retina_plugin", f"retina_plugin-{retina_plugin.__version__}.dist-info"}
    for file in (
        "py.typed",
        "losses/backends/native.cpp",
        "analysis/page/report.html",
        "deploy/page/index.html",
        "deploy/page/page.js",
        "doctor/page.html",
        "configs/_base_/retinanet.yaml",
    ):
        assert (site / "retina_plugin" / file).is_file(), file
    entry_points = next(site.glob("*.dist-info")) / "entry_points.txt"
    assert "retina = retina_plugin.cli:main" in entry_points.read_text()

    def retina(*args):
        return subprocess.run(
            [sys.executable, "-m", "retina_plugin", *args],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert "retina COMMAND --help" in retina("--help").stdout
    compared = retina("diff", "retina_R50_600.yaml", "retina_R101_600.yaml").stdout
    assert "MODEL.RESNETS.DEPTH" in compared
