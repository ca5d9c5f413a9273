"""Reading weights files of any origin. Nothing that a file holds is run.

Detectron's and Detectron2's pickles, files of ``torch.save`` in both of its formats, and
safetensors. The content decides which it is, not the name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from retina_plugin.errors import ConfigError

from .pickles import STAND_INS, check_pickle, load_pickle, replace_stand_ins

__all__ = ["read_checkpoint"]

# torch.save's old format starts with this number, pickled.
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LFS_POINTER = b"version https://git-lfs"
_NOT_WEIGHTS = {  # beginning of the file -> what it is
    b"<": "a web page, perhaps that of a failed download: download the file again",
    _LFS_POINTER: "a git-lfs pointer and not the file itself: run `git lfs pull` where it is from",
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"\x89HDF": "an HDF5 file: save the weights with torch.save",
}

# Names that a file of torch.save may hold besides those of STAND_INS, dtypes and storages.
_TORCH_NAMES = {
    "collections.Counter",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.Tensor",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v3",
    "builtins.set",
}
# Stand-ins for NumPy's names, which torch would call without checking their arguments.
_NUMPY_STAND_INS: list = [
    (function, f"{module}.{name}")
    for (module, name), function in STAND_INS.items()
    if module.startswith("numpy")
]
_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}
# Where programs keep the state dict: Detectron2; Lightning and mmdetection; pycls; many.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")

_lock = threading.Lock()  # torch's list of safe names and Python's warning filters are global


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """What a weights file holds, in the form of Detectron2's checkpoints.

    The state dict may lie under "model", "state_dict", "model_state" or "model_state_dict", or be
    the whole file. Pickles without Detectron2's "__author__" are read as those of Caffe2 Detectron,
    whose names Detectron2 translates.

        weights = read_checkpoint("model_final.pth")["model"]

    Returns:
        {"model": name -> tensor or array, ...}, and for Detectron2's own files what else is in
        them.

    Raises:
        ConfigError: there is no such file, it is damaged, it is no weights file, or it holds more
            than numbers, text and containers. One line with the path and what to do.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise _Unreadable("a folder: name the file in it")
        with open(path, "rb") as file:
            head = file.read(1024)
            file.seek(0)
            loaded = _reader(head, size)(path, file)
        checkpoint = _unwrap(loaded, path)
        _check_tensors(checkpoint["model"], size)
    except _Unreadable as error:
        message = f"{path} is {error}"
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
    except MemoryError:
        message = f"cannot read {path}: there is not enough memory for it"
    else:
        return checkpoint
    # Names in the file may hold line breaks, or signs that a terminal obeys.
    raise ConfigError("".join(c if c.isprintable() else "?" for c in message))


class _Unreadable(Exception):
    """Completes the sentence "FILE is ..."."""


def _reader(head: bytes, size: int) -> Callable[[Path, BinaryIO], Any]:
    if not head:
        raise _Unreadable("empty: download or copy it again")
    if head.startswith(b"PK\x03\x04"):
        return _read_torch_zip
    if head.startswith(_OLD_TORCH):
        return _read_old_torch
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors
    text = head.lstrip().lower()
    for beginning, what in _NOT_WEIGHTS.items():
        if text.startswith(beginning):
            raise _Unreadable(what)
    if head[257:262] == b"ustar":
        raise _Unreadable("a tar archive: unpack it, or save the weights again with torch.save")
    if head[0] == pickle.PROTO[0] or re.match(rb"[(\]}c]", head):
        return _read_pickle
    if head.isascii() and b"\0" not in head:
        raise _Unreadable("a text file, not weights")
    raise _Unreadable("no weights file: known are .pth of torch.save, .safetensors and .pkl")


def _read_safetensors(path: Path, file: BinaryIO) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # the library has one exception, and torch has others
        raise _Unreadable(f"a damaged or incomplete safetensors file ({_line(error)})") from None


def _read_pickle(path: Path, file: BinaryIO) -> Any:
    try:
        loaded = load_pickle(file.read(), _load_storage)
    except pickle.UnpicklingError as error:
        raise _Unreadable(_refused("pickle", error)) from None
    except Exception as error:  # damaged bytes can end in anything
        raise _Unreadable(f"a damaged or incomplete pickle ({_line(error)})") from None
    if not isinstance(loaded, dict):
        raise _Unreadable(_no_dict(loaded))
    if "model" in loaded and "__author__" in loaded:
        return loaded  # Detectron2's model zoo
    if any(name in loaded for name in _WRAPPERS):
        return loaded
    blobs = loaded.get("blobs", loaded)  # ImageNet models have no "blobs"
    if not isinstance(blobs, dict):
        raise _Unreadable(_no_dict(blobs))
    blobs = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
    checkpoint = {"model": blobs, "matching_heuristics": True}
    if not any(str(name).endswith(".weight") for name in blobs):  # names of Caffe2 end with "_w"
        checkpoint["__author__"] = "Caffe2"
    return checkpoint


def _load_storage(data: bytes) -> torch.Tensor:
    """The memory of a tensor in a pickle: a file of torch.save in the file."""
    if not data.startswith(_OLD_TORCH):
        raise pickle.UnpicklingError("a tensor in an unknown form")
    storage = _load_old_torch(io.BytesIO(data))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without memory")
    return torch.empty(0, dtype=storage.dtype).set_(storage)


def _read_torch_zip(path: Path, file: BinaryIO) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            main = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
            if any(name.endswith("/constants.pkl") for name in names):
                raise _Unreadable(
                    "a TorchScript program: save its weights with torch.save(module.state_dict())"
                )
            if len(main) != 1 or len(set(names)) < len(names):
                raise _Unreadable("a zip archive that torch.save did not write: unpack it")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise _Unreadable("damaged: its parts claim to be larger than the file")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _Unreadable("compressed: load it and save it again with torch.save")
            broken = archive.testzip()  # torch.load does not look at the checksums
            if broken is not None:
                raise _Unreadable(f"damaged ({broken[:80]} has a wrong checksum): copy it again")
            check_pickle(io.BytesIO(archive.read(main[0])), _is_safe)
        file.seek(0)
        return _load_torch(file)
    except (_Unreadable, OSError):
        raise
    except pickle.UnpicklingError as error:
        raise _Unreadable(_refused("file", error)) from None
    except Exception as error:  # damaged bytes can end in anything
        raise _Unreadable(f"damaged or incomplete ({_line(error)}): copy it again") from None


def _read_old_torch(path: Path, file: BinaryIO) -> Any:
    try:
        return _load_old_torch(file)
    except (_Unreadable, OSError):
        raise
    except pickle.UnpicklingError as error:
        raise _Unreadable(_refused("file", error)) from None
    except Exception as error:
        raise _Unreadable(f"damaged or incomplete ({_line(error)}): copy it again") from None


def _load_old_torch(file: BinaryIO) -> Any:
    for _ in range(5):  # three of the format, the content, and the names of its memory blocks
        check_pickle(file, _is_safe)
    file.seek(0)
    return _load_torch(file)


def _load_torch(file: BinaryIO) -> Any:
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.serialization.safe_globals(_NUMPY_STAND_INS):
            # The keyword is explicit: an environment variable can turn the default off.
            return replace_stand_ins(torch.load(file, map_location="cpu", weights_only=True))


def _is_safe(module: str, name: str) -> bool:
    """Whether a file of torch.save may hold a name: those of tensors, arrays and containers.

    torch's own list also has quantised and sparse tensors, and types whose size the file chooses.
    """
    full = f"{module}.{name}"
    if full == "builtins.bytearray":
        return False  # torch lets a file choose its size
    if module in ("torch", "torch.cuda", "torch.storage") and re.fullmatch(
        r"[A-Z]\w*Storage", name
    ):
        return not name.startswith("Q")
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return True
    return (module, name) in STAND_INS or full in _TORCH_NAMES


def _refused(kind: str, error: Exception) -> str:
    return (
        f"refused, because a weights {kind} may hold tensors, arrays, text and numbers only, and "
        f"{_line(error)}: save model.state_dict() alone, e.g. as .safetensors"
    )


def _unwrap(loaded: Any, path: Path) -> dict[str, Any]:
    """{"model": state dict, ...} of what a program wrote around its state dict."""
    if not isinstance(loaded, dict):
        raise _Unreadable(_no_dict(loaded))
    checkpoint = loaded if isinstance(loaded.get("model"), Mapping) else {"model": loaded}
    for _ in range(5):  # wrappers in wrappers
        state = checkpoint["model"]
        name = next((w for w in _WRAPPERS if isinstance(state.get(w), Mapping)), None)
        if name is None:
            break
        checkpoint["model"] = state[name]
        if name == "model_state":  # pycls, whose names Detectron2 matches by their endings
            checkpoint["model"] = {
                k: v for k, v in state[name].items() if not str(k).endswith("num_batches_tracked")
            }
            checkpoint |= {"__author__": "pycls", "matching_heuristics": True}
    state = checkpoint["model"]
    entries = ", ".join(map(str, list(loaded)[:5]))
    for name in list(state):
        if isinstance(state[name], np.generic):
            state[name] = np.asarray(state[name])
        if not isinstance(name, str) or not isinstance(state[name], (torch.Tensor, np.ndarray)):
            del state[name]  # an epoch, a learning rate, ... among the weights
    if not state:
        raise _Unreadable(f"no weights file: it has no tensors, but {entries[:200] or 'nothing'}")
    return checkpoint


def _no_dict(loaded: Any) -> str:
    return (
        f"no weights file: it holds a {type(loaded).__name__} and not a state dict, which has a "
        "tensor for each name: save model.state_dict()"
    )


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
            raise _Unreadable(f"not readable: {name[:80]} is no tensor of plain numbers ({kind})")
        if math.prod(value.shape) * value.itemsize > max(size, 2**20):
            raise _Unreadable(f"damaged: {name[:80]} claims to be larger than the file")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
