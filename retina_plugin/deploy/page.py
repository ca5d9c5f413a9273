"""A folder of static files: a web page that detects in the browser, with the exported model."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from retina_plugin.cache import atomic_write, cache_root
from retina_plugin.errors import ConfigError

from .metadata import resampler_of
from .runtime import load_exported

__all__ = [
    "ONNXRUNTIME_WEB",
    "check_page",
    "check_page_config",
    "fetch_onnxruntime_web",
    "write_page",
]

# The version that the page was tested with, and the SHA-512 that npm's registry has of its file.
ONNXRUNTIME_WEB = "1.30.0"
_INTEGRITY = (
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)

# Of its package: what one thread on the CPU needs, of more than 500 files.
_RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)

_OWN_WAY = (
    "that prepares images in its own way, which a page cannot: set INPUT.MAPPER FastMapper, or "
    "leave out --page"
)

# What the first and the second model are called in the folder.
_MODELS = ("model.onnx", "second.onnx")


def write_page(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    onnxruntime_web: str | os.PathLike | None = None,
    second: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page that detects in a user's pictures, without a server that computes.

    Any server of static files will do, such as ``python -m http.server``. Files of an earlier page
    are replaced. Other files are kept.

        write_page("digits.onnx", "page", second="digits_int8.onnx")

    Args:
        model: a file of ``retina export --format onnx``, of the stage nms.
        output: the folder.
        onnxruntime_web: the npm package of that name, a .tgz. None: ``npm pack`` fetches the
            version :data:`ONNXRUNTIME_WEB`, once.
        second: another model, which is shown beside the first.
        overwrite: whether files in the folder that are not of an earlier page are replaced.

    Returns:
        The page, ``index.html``.

    Raises:
        ConfigError: a model cannot run on the page, or would be replaced by the other one; the
            folder has a file that is not of an earlier page; the npm package cannot be fetched or
            read; the folder cannot be written.
    """
    output = Path(output)
    models = [Path(path) for path in (model, second) if path is not None]
    for path in models:
        _check_model(path)
    _check_folder(output, models, overwrite)
    if onnxruntime_web is None:
        onnxruntime_web = fetch_onnxruntime_web()
    runtime = _runtime_files(Path(onnxruntime_web))
    try:
        output.mkdir(parents=True, exist_ok=True)
        entries = []
        stale = _models_of_page(output) - set(_MODELS[: len(models)])
        for path, file in zip(models, _MODELS):
            if path.resolve() != (output / file).resolve():
                with atomic_write(output / file) as temporary:
                    shutil.copyfile(path, temporary)
            entries.append({"file": file, "name": _title(path, models)})
        for file in stale:
            (output / file).unlink(missing_ok=True)
        files = {**runtime, **_static_files(), "models.json": json.dumps(entries).encode()}
        for name, content in files.items():
            with atomic_write(output / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            f"--page: cannot write {output} ({error.strerror or error}): choose another folder"
        ) from None
    return output / "index.html"


def check_page(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    onnxruntime_web: str | os.PathLike | None = None,
    second: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Whether :func:`write_page` can do its part, before a model is exported for minutes.

    Args:
        model: need not be there yet.
        output, onnxruntime_web, second, overwrite: see :func:`write_page`.

    Raises:
        ConfigError: as it would, but for what is in the model.
    """
    existing = next(path for path in (Path(output), *Path(output).parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"--page: {existing} is a file: choose another folder")
    if second is not None:
        _check_model(Path(second))
    models = [Path(path) for path in (model, second) if path is not None]
    _check_folder(Path(output), models, overwrite)
    _runtime_files(Path(onnxruntime_web or fetch_onnxruntime_web()))


def _check_model(path: Path) -> None:
    exported = load_exported(path, threads=1)
    if exported.format != "onnx":
        raise ConfigError(f"{path}: a page needs an ONNX file: export it with --format onnx")
    if exported.metadata.stage != "nms":
        raise ConfigError(
            f"{path} was exported with --output-stage {exported.metadata.stage}: a page needs the "
            "stage nms"
        )
    if exported.metadata.resampler == "custom":
        raise ConfigError(f"{path} was exported with an INPUT.MAPPER {_OWN_WAY}")


def check_page_config(cfg: CfgNode) -> None:
    """Whether a page can prepare the images of a config's model, before it is exported.

    Raises:
        ConfigError: ``INPUT.MAPPER`` does it in a way of its own.
    """
    if resampler_of(cfg) == "custom":
        raise ConfigError(f"--page: INPUT.MAPPER {cfg.INPUT.MAPPER} is one {_OWN_WAY}")


def _check_folder(output: Path, models: Sequence[Path], overwrite: bool) -> None:
    """
    Raises:
        ConfigError: the page would replace a model that it is made of, or a file of the user's.
    """
    places = dict(zip(_MODELS, models))
    for name, path in places.items():
        for other in set(_MODELS) - {name}:
            if path.resolve() == (output / other).resolve():
                raise ConfigError(
                    f"--page {output}: its {other} would not be {path}: choose another folder"
                )
    if overwrite:
        return
    ours = _models_of_page(output)
    names = [name for name, path in places.items() if path.resolve() != (output / name).resolve()]
    if not ours:  # else these are of the earlier page
        names += [*_static_files(), *_RUNTIME_FILES, "models.json"]
    for name in names:
        if name not in ours and (output / name).exists():
            raise ConfigError(
                f"--page: {output / name} is there already and is not of an earlier page: choose "
                "another folder, or --overwrite replaces it"
            )


def _title(path: Path, models: Sequence[Path]) -> str:
    """What the page calls a model: the file's name, with its folder's if both are called so."""
    if sum(model.stem == path.stem for model in models) == 1:
        return path.stem
    return f"{path.resolve().parent.name}/{path.stem}"


def _models_of_page(folder: Path) -> set[str]:
    """The files of the models of the page in a folder; none if there is no page of ours."""
    try:
        entries = json.loads((folder / "models.json").read_bytes())
        if all(entry.keys() == {"file", "name"} for entry in entries):
            return {entry["file"] for entry in entries} & set(_MODELS)
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    return set()


def _static_files() -> dict[str, bytes]:
    folder = importlib.resources.files(__package__).joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def fetch_onnxruntime_web(integrity: str = _INTEGRITY) -> Path:
    """The pinned npm package onnxruntime-web in the cache, fetched with ``npm pack`` if need be.

    Args:
        integrity: the file's SHA-512 in base64, as npm's registry writes it.

    Raises:
        ConfigError: npm is missing or cannot fetch it, or the file is not the pinned one.
    """
    cached = cache_root() / f"onnxruntime-web-{ONNXRUNTIME_WEB}.tgz"
    if cached.is_file() and _sha512(cached.read_bytes()) == integrity:
        return cached
    by_hand = (
        f"run `npm pack onnxruntime-web@{ONNXRUNTIME_WEB}` where it works, and give the file with "
        "--onnxruntime-web"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(
            f"a page needs npm to fetch onnxruntime-web, which is not here: {by_hand}"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [npm, "pack", f"onnxruntime-web@{ONNXRUNTIME_WEB}", "--ignore-scripts", "--silent"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )
            reason = next((x for x in done.stderr.splitlines() if x.strip()), "no file came")
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        fetched = Path(folder, cached.name)
        if not fetched.is_file():
            raise ConfigError(f"npm cannot fetch onnxruntime-web ({reason}): {by_hand}")
        content = fetched.read_bytes()
    if _sha512(content) != integrity:
        raise ConfigError(
            f"npm's onnxruntime-web {ONNXRUNTIME_WEB} has another SHA-512 than the published one: "
            f"it is not used; {by_hand}"
        )
    with atomic_write(cached) as temporary:
        temporary.write_bytes(content)
    return cached


def _sha512(content: bytes) -> str:
    return base64.b64encode(hashlib.sha512(content).digest()).decode()


def _runtime_files(package: Path) -> dict[str, bytes]:
    """The files of the npm package that the page loads."""
    files = {}
    try:
        with tarfile.open(package) as archive:
            about = json.loads(_read(archive, "package/package.json"))
            if about.get("name") != "onnxruntime-web":
                raise ConfigError(f"{package} is the package {about.get('name')}, another one")
            for name in _RUNTIME_FILES:
                files[name] = _read(archive, f"package/dist/{name}")
    except FileNotFoundError:
        raise ConfigError(f"--onnxruntime-web: {package} does not exist") from None
    except KeyError as error:
        raise ConfigError(f"--onnxruntime-web: {package} lacks {error.args[0]}") from None
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--onnxruntime-web: {package} is no npm package, or damaged ({error})"
        ) from None
    return files


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:  # a folder
        raise KeyError(name)
    return file.read()
