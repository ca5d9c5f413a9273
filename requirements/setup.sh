#!/bin/sh
# Make a virtual environment, or bring one up to date: requirements/setup.sh DIR [locked|latest]
#
# locked: the versions of requirements/lock.txt, which were tested together (`make setup`).
# latest: the newest versions that pyproject.toml allows (`make test-latest`).
# PYTHON names the interpreter. An environment that this script did not make is left alone, and so
# is a Detectron2 that you installed into one that it made.
set -eu
cd "$(dirname "$0")/.."
venv=$1 versions=${2:-locked} python=${PYTHON:-python3}
marker=$venv/made-by-retina-plugin

say() { echo "setup: $*"; }
fail() { say "$*" >&2; exit 1; }

"$python" - <<'CHECK' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("setup: Python 3.11 to 3.13 is needed, and this is %d.%d; "
             "try `PYTHON=python3.12 make setup`" % sys.version_info[:2])
CHECK
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ -e "$venv" ] && [ ! -e "$marker" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv is there and not made by this script: move it away, or choose another with VENV="
fi
if [ -e "$marker" ] && [ "$(cat "$marker")" != "$version" ]; then
    fail "$venv was made with Python $(cat "$marker"), not $version: remove it, or set PYTHON="
fi

say "installing into $venv with Python $version (new: some minutes and 6 GB)"
mkdir -p "$venv"
echo "$version" >"$marker"  # first, so that an interrupted run may be repeated
"$python" -m venv "$venv" ||
    fail "this Python cannot make an environment: install its venv module (Debian: python3-venv)"

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -qq "$@" ||
        fail "pip failed, see above: check network, package index and disk space, then run again"
}
if [ "$versions" = locked ]; then
    export PIP_CONSTRAINT=requirements/lock.txt  # takes the place of one in pip's configuration
    pip -r requirements/lock.txt
    pip --no-deps --no-build-isolation --editable .
else
    pip --upgrade --upgrade-strategy eager --editable '.[demo,fast,video,timm,export,openvino,report,supervision,dev]'
fi

# OpenCV's plain wheel needs libGL, which a machine without a desktop may lack.
if ! error=$("$venv/bin/python" -c 'import cv2' 2>&1); then
    case $error in *"cannot open shared object file"*) ;; *) fail "$error" ;; esac
    say "OpenCV lacks a system library here: installing its wheel without windows"
    opencv=$("$venv/bin/python" -m pip freeze | sed -n 's/^opencv-python==/==/p')
    PIP_CONSTRAINT='' pip --no-deps --force-reinstall "opencv-python-headless$opencv"
fi

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
ours=$(ls -d "$site"/sal_detectron2-*.dist-info 2>/dev/null || true)
if "$venv/bin/python" -m pip -q show detectron2 >/dev/null 2>&1 ||
    { [ -z "$ours" ] && "$venv/bin/python" -P -c 'import detectron2' 2>/dev/null; }; then
    say "keeping the Detectron2 that you installed"
else
    staging=$(mktemp -d)
    trap 'rm -rf "$staging"' EXIT
    pip --no-deps --only-binary=:all: --python-version=3.10 --require-hashes --target "$staging" \
        -r requirements/detectron2.txt
    # Left out: a binary for Python 3.10 and an old torch, which RetinaNet does not need, and a
    # folder `tools`, which would hide a `tools` of yours.
    rm -rf "$staging"/detectron2/_C.* "$site"/detectron2 "$site"/sal_detectron2-*.dist-info
    # The dist-info first: without it, a package that an interrupted run left behind looks like yours.
    mv "$staging"/sal_detectron2-*.dist-info "$site"
    mv "$staging"/detectron2 "$site"
fi
say "done"
