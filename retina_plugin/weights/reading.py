"""Reading weights files of any origin. Nothing that a file holds is run.

Detectron's and Detectron2's pickles, files of ``torch.save`` in both of its formats, and
safetensors. The content decides which it is, not the name.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from retina_plugin.errors import ConfigError

from .pickles import load_pickle
from .torch_files import OLD_FORMAT, Unreadable, load_storage, read_old_format, read_zip, reasons

__all__ = ["read_checkpoint"]

_NOT_WEIGHTS = {  # beginning of the file -> what it is
    b"<": "a web page, perhaps that of a failed download: download the file again",
    b"version https://git-lfs": "a git-lfs pointer: run `git lfs pull` in the checkout that it is "
    "from",
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"\x89HDF": "an HDF5 file: save the weights with torch.save",
}

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}
# Where programs keep the state dict: Detectron2; Lightning and mmdetection; pycls; many.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """What a weights file holds, in the form of Detectron2's checkpoints.

    The state dict may lie under "model", "state_dict", "model_state" or "model_state_dict", or be
    the whole file. Pickles without Detectron2's "__author__" are read as those of Caffe2 Detectron,
    whose names Detectron2 translates.

        weights = read_checkpoint("model_final.pth")["model"]

    Returns:
        {"model": name -> tensor or array, ...}, and for Detectron2's own files what else is in
        them. "class_names" is a list of text, in the order of the classes, if the file has them:
        checkpoints of this plugin, safetensors with the metadata "class_names" (JSON), and
        MMDetection's files ("meta").

    Raises:
        ConfigError: there is no such file, it is damaged, it is no weights file, or it holds more
            than numbers, text and containers. One line with the path and what to do.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise Unreadable("a folder: name the file in it")
        with open(path, "rb") as file:
            loaded = _read(path, file, size)
        with reasons("file"):
            checkpoint = _unwrap(loaded)
            _check_tensors(checkpoint["model"], size)
            _add_class_names(checkpoint, loaded)
    except Unreadable as error:
        message = f"{path} is {error}"
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
    except MemoryError:
        message = f"cannot read {path}: there is not enough memory for it"
    else:
        return checkpoint
    # Names in the file may hold line breaks, or signs that a terminal obeys.
    raise ConfigError("".join(c if c.isprintable() else "?" for c in message))


def _read(path: Path, file: BinaryIO, size: int) -> Any:
    head = file.read(1024)
    file.seek(0)
    if not head:
        raise Unreadable("empty: copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return read_zip(file, size)
    if head.startswith(OLD_FORMAT):
        return read_old_format(file)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors(path)
    text = head.lstrip().lower()
    for beginning, what in _NOT_WEIGHTS.items():
        if text.startswith(beginning):
            raise Unreadable(what)
    if head[257:262] == b"ustar":
        raise Unreadable("a tar archive: unpack it, or save the weights again with torch.save")
    if head[0] == pickle.PROTO[0] or re.match(rb"[(\]}c]", head):
        return _read_pickle(file)
    if head.isascii() and b"\0" not in head:
        raise Unreadable("a text file and no weights")
    raise Unreadable("no weights file: known are .pth of torch.save, .safetensors and .pkl")


def _read_safetensors(path: Path) -> Any:
    with reasons("safetensors file"):
        state: dict[str, Any] = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "class_names" not in metadata:
            return state
        try:
            names = json.loads(metadata["class_names"])
        except (ValueError, RecursionError):
            names = None  # as if it had none
        return {"model": state, "class_names": names}


def _read_pickle(file: BinaryIO) -> Any:
    with reasons("pickle"):
        loaded = load_pickle(file.read(), load_storage)
    if not isinstance(loaded, dict):
        raise Unreadable(_no_dict(loaded))
    if "model" in loaded and "__author__" in loaded:
        return loaded  # Detectron2's model zoo
    if any(name in loaded for name in _WRAPPERS):
        return loaded
    blobs = loaded.get("blobs", loaded)  # ImageNet models have no "blobs"
    if not isinstance(blobs, dict):
        raise Unreadable(_no_dict(blobs))
    blobs = {k: v for k, v in blobs.items() if isinstance(k, str) and not k.endswith("_momentum")}
    checkpoint = {"model": blobs, "matching_heuristics": True}
    if not any(name.endswith(".weight") for name in blobs):  # names of Caffe2 end with "_w"
        checkpoint["__author__"] = "Caffe2"
    return checkpoint


def _unwrap(loaded: Any) -> dict[str, Any]:
    """{"model": state dict, ...} of what a program wrote around its state dict."""
    if not isinstance(loaded, dict):
        raise Unreadable(_no_dict(loaded))
    checkpoint = loaded if isinstance(loaded.get("model"), Mapping) else {"model": loaded}
    for _ in range(5):  # wrappers in wrappers
        state = checkpoint["model"]
        name = next((w for w in _WRAPPERS if isinstance(state.get(w), Mapping)), None)
        if name is None:
            break
        checkpoint["model"] = state[name]
        if name == "model_state":  # pycls, whose names Detectron2 matches by their endings
            for key in [k for k in state[name] if str(k).endswith("num_batches_tracked")]:
                del state[name][key]
            checkpoint |= {"__author__": "pycls", "matching_heuristics": True}
    state = checkpoint["model"]
    entries = ", ".join(name for name in loaded if isinstance(name, str))
    for name in list(state):
        if isinstance(state[name], np.generic):
            state[name] = np.asarray(state[name])
        if not isinstance(name, str) or not isinstance(state[name], (torch.Tensor, np.ndarray)):
            del state[name]  # an epoch, a learning rate, ... among the weights
    if not state:
        raise Unreadable(f"no weights file: it has no tensors, but {entries[:200] or 'nothing'}")
    return checkpoint


def _add_class_names(checkpoint: dict[str, Any], loaded: Any) -> None:
    """Put the names of the classes where they belong; no or unusable ones: the key is absent."""
    meta = loaded.get("meta")  # of MMDetection 2, and of 3, which has them a level deeper
    meta = meta if isinstance(meta, Mapping) else {}
    inner = meta.get("dataset_meta")
    inner = inner if isinstance(inner, Mapping) else {}
    found = (loaded.get("class_names"), meta.get("CLASSES"), inner.get("classes"))
    names = next((x for x in (*found, inner.get("CLASSES")) if isinstance(x, (list, tuple))), ())
    checkpoint.pop("class_names", None)
    if names and all(isinstance(name, str) for name in names):
        checkpoint["class_names"] = list(names)


def _check_tensors(state: dict[str, Any], size: int) -> None:
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
            state[name] = value
        if (
            value.layout != torch.strided
            or value.device.type != "cpu"
            or value.dtype not in _DTYPES
        ):
            kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
            raise Unreadable(f"not readable: {name[:80]} is no tensor of plain numbers ({kind})")
        if math.prod(value.shape) * value.itemsize > max(size, 2**20):
            raise Unreadable(f"damaged: {name[:80]} claims to be larger than the file")


def _no_dict(loaded: Any) -> str:
    return (
        f"no weights file: it holds a {type(loaded).__name__} and not a state dict, which has a "
        "tensor for each name: save model.state_dict()"
    )
