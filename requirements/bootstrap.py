"""Bring the project's virtual environment up to date; do nothing when it already is.

    python3 requirements/bootstrap.py [--venv DIR]

`make setup` runs this. Standard library only, because it runs before anything is installed.
The syntax stays that of Python 3.6, so that an old interpreter reaches the message below.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - the one place that an old interpreter gets to
    sys.exit(
        "setup: Python 3.10 to 3.13 is needed, and this is {}.{}; try `PYTHON=python3.12 make "
        "setup`".format(*sys.version_info[:2])
    )

NEWEST_TESTED = (3, 13)
ROOT = Path(__file__).resolve().parent.parent
STAMP = "retina-plugin-stamp"  # what the finished environment was made from; written last
MARKER = "retina-plugin-made-this"  # this script made the environment, so it may empty it

PROBE = (
    "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('purelib'), "
    "*sys.path[1:], sep='\\n')"
)


class SetupError(Exception):
    """One line for the user: what is wrong and what to do."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def python_version() -> str:
    return "{}.{}".format(*sys.version_info[:2])


def fingerprint(root: Path, venv: Path, version: str) -> str:
    """Digest of all that the environment follows from."""
    digest = hashlib.sha256()
    # The editable install and the scripts hold absolute paths: a moved checkout is a new one.
    parts = [version.encode(), os.fsencode(root), os.fsencode(venv)]
    requirements = sorted((root / "requirements").iterdir())
    for path in [root / "setup.py", *(p for p in requirements if p.suffix in (".txt", ".py"))]:
        parts += [path.name.encode(), path.read_bytes()]
    pyproject = root / "pyproject.toml"
    if pyproject.exists():  # only how to build: the rest is settings of lint and test tools
        text = pyproject.read_text(encoding="utf-8")
        section = re.search(r"^\[build-system\].*?(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
        parts.append(section.group().strip().encode() if section else b"")
    for part in parts:
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def is_current(venv: Path, wanted: str) -> bool:
    try:
        recorded = (venv / STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    # exists() follows the link: the interpreter behind it may have been removed since.
    return recorded == wanted and python_of(venv).exists()


def probe(venv: Path) -> tuple[str, list[Path]]:
    """The version of the environment's Python ('' if none runs) and its import path.

    The first entry of the path is site-packages.
    """
    try:
        done = subprocess.run(
            [str(python_of(venv)), "-c", PROBE],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "", sorted(venv.glob("lib/python*/site-packages"))
    version, *paths = done.stdout.splitlines()
    return version, [Path(path) for path in paths]


def own_detectron2(paths: list[Path]) -> str:
    """Which Detectron2 other than the pinned wheel is on the import path ('' if none)."""
    from importlib.metadata import distributions  # not in the oldest Pythons this file meets

    for dist in distributions(name="detectron2", path=[str(path) for path in paths]):
        return f"Detectron2 {dist.version}"
    for path in paths:
        if (path / "detectron2").exists() and not any(path.glob("sal_detectron2-*.dist-info")):
            return f"the Detectron2 in {path}"
    return ""


def run(command: list[str], advice: str) -> None:
    """Run quietly; when it fails, show what it said."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        close_fds=False,  # hand on the lock: a pip that outlives this script still holds it
    )
    if done.returncode:
        print(done.stdout.rstrip(), flush=True)
        raise SetupError(advice)


def empty(venv: Path) -> None:
    """Empty an environment that this script made; the marker stays, for the next try."""
    for child in venv.iterdir():
        if child.name != MARKER:
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()


def create(venv: Path) -> None:
    venv.mkdir(parents=True, exist_ok=True)
    (venv / MARKER).touch()
    empty(venv)
    run(
        [sys.executable, "-m", "venv", str(venv)],
        "this Python cannot make a virtual environment: install its venv module "
        "(Debian: python3-venv) or choose another with PYTHON=",
    )


def install_detectron2(venv: Path, site: Path, pip: list[str], advice: str) -> None:
    """Put the wheel of requirements/detectron2.txt into site-packages."""
    with tempfile.TemporaryDirectory(dir=venv) as folder:
        staging = Path(folder)
        options = ["--no-deps", "--only-binary=:all:", "--python-version=3.10", "--require-hashes"]
        requirement = str(ROOT / "requirements" / "detectron2.txt")
        run([*pip, *options, "--target", folder, "-r", requirement], advice)
        # A binary for Python 3.10 and one old torch: useless elsewhere, and RetinaNet needs none.
        for binary in staging.glob("detectron2/_C.*"):
            binary.unlink()
        for old in [site / "detectron2", *site.glob("sal_detectron2-*.dist-info")]:
            if old.exists():
                shutil.rmtree(old)
        # Only these two: the wheel's third folder, `tools`, would be importable under that name
        # and hide a `tools` folder of the user's. The dist-info goes first: see own_detectron2.
        for new in [*staging.glob("sal_detectron2-*.dist-info"), staging / "detectron2"]:
            shutil.move(str(new), str(site / new.name))


def mend_opencv(venv: Path, pip: list[str], advice: str) -> None:
    """OpenCV's plain wheel needs libGL, which a machine without a desktop may lack."""
    command = [str(python_of(venv)), "-c", "import cv2"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if re.search(r"ImportError: \S+\.so", done.stderr):
        say("OpenCV lacks a system library here: using its wheel without windows")
        run([*pip, "--no-deps", "--force-reinstall", "opencv-python-headless"], advice)


def set_up(venv: Path, wanted: str) -> None:
    version, paths = probe(venv)
    own = own_detectron2(paths)
    exists = venv.is_dir() and any(venv.iterdir())
    # Someone's own environment, or a Detectron2 that took effort to build: never emptied.
    keep = exists and (own or not (venv / MARKER).exists())
    if keep and version != python_version():
        raise SetupError(
            f"{venv} (Python {version or 'missing'}) was not made by this script or holds a "
            f"Detectron2 of yours: move it away, or use its Python (PYTHON=), "
            f"not {python_version()}"
        )
    (venv / STAMP).unlink(missing_ok=True)  # from here on it is not current, however this ends
    if keep:
        say(f"updating {venv.name} in place (Python {version})")
    else:
        say(f"making {venv.name} with Python {python_version()}")
        create(venv)
    say("installing the requirements (new: about two minutes and 6 GB)")
    pip = [str(python_of(venv)), "-m", "pip", "install", "-qq"]
    advice = (
        "pip failed, its words are above: check the network, the package index that pip is set "
        "to use and the disk space, then run `make setup` again"
    )
    run([*pip, "--editable", ".[demo,fast,dev]"], advice)
    mend_opencv(venv, pip, advice)
    if own:
        say(f"keeping {own}")
    else:
        say("installing Detectron2 (requirements/detectron2.txt)")
        install_detectron2(venv, probe(venv)[1][0], pip, advice)
    (venv / STAMP).write_text(wanted, encoding="utf-8")  # last: only a finished one is current
    say("done")


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring the virtual environment up to date.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    venv = Path(os.path.abspath(parser.parse_args().venv))
    wanted = fingerprint(ROOT, venv, python_version())
    if is_current(venv, wanted):
        say(f"{venv.name} is current (Python {python_version()})")
        return 0
    if sys.version_info[:2] > NEWEST_TESTED:
        newest = "{}.{}".format(*NEWEST_TESTED)
        say(f"warning: tested up to Python {newest}, and this is {python_version()}")
    try:
        with Path(__file__).open() as lock:
            os.set_inheritable(lock.fileno(), True)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another set-up is running: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_current(venv, wanted):
                set_up(venv, wanted)
    except (SetupError, OSError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run `make setup` again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
