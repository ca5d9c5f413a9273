"""Files of ``torch.save``, in its zip format and in the old one, read without running code."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, ClassVar

import torch

from .pickles import STAND_INS, Unpickler, make_dict, replace_stand_ins

__all__ = ["OLD_FORMAT", "Unreadable", "load_storage", "read_old_format", "read_zip", "reasons"]

# The old format starts with this number, pickled.
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# Names that a file may hold besides those of STAND_INS, dtypes and storages.
_NAMES = {
    "argparse.Namespace",  # the options, in files of torchvision's training script; it has no code
    "builtins.set",
    "collections.Counter",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.Tensor",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v3",
}
# torch calls functions with whatever arguments a file has for them. These check them.
_STAND_INS: list = [
    (function, f"{module}.{name}")
    for (module, name), function in STAND_INS.items()
    if module.startswith("numpy") or module == "builtins"
] + [argparse.Namespace]

_lock = threading.Lock()  # torch's list of safe names and Python's warning filters are global


class Unreadable(Exception):
    """Completes the sentence "FILE is ..."."""


@contextlib.contextmanager
def reasons(kind: str) -> Iterator[None]:
    """Errors of reading a file become :class:`Unreadable`. Damaged bytes can end in any error.

    Args:
        kind: of file, e.g. "pickle".
    """
    try:
        yield
    except (Unreadable, OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise Unreadable(
            f"refused: a {kind} of weights may hold tensors, arrays, text and numbers only, and "
            f"{_line(error)}: save model.state_dict() alone, e.g. as .safetensors"
        ) from None
    except Exception as error:
        raise Unreadable(
            f"a damaged or incomplete {kind} ({_line(error)}): copy or download it again"
        ) from None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def read_zip(file: BinaryIO, size: int) -> Any:
    """What a file of ``torch.save`` holds, after its checksums were compared.

    Args:
        file: at its beginning.
        size: of the file, in bytes.
    """
    with reasons("file"), zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        content = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if any(name.endswith("/constants.pkl") for name in names):
            raise Unreadable(
                "a TorchScript program: save its weights with torch.save(module.state_dict())"
            )
        if len(content) != 1 or len(set(names)) < len(names):
            raise Unreadable("a zip archive that torch.save did not write: unpack it")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Unreadable("compressed: load it and save it again with torch.save")
        if sum(entry.file_size for entry in entries) > size:
            raise Unreadable("damaged: its parts claim to be larger than the file")
        broken = archive.testzip()  # torch.load does not compare checksums
        if broken is not None:
            raise Unreadable(f"damaged ({broken[:80]} has a wrong checksum): copy it again")
        _check_pickle(io.BytesIO(archive.read(content[0])))
        file.seek(0)
        return _load(file)


def read_old_format(file: BinaryIO) -> Any:
    """What a file of ``torch.save`` before PyTorch 1.6 holds. Its numbers have no checksums."""
    with reasons("file"):
        for _ in range(5):  # three about the format, the content, the names of its storages
            _check_pickle(file)
        file.seek(0)
        return _load(file)


def load_storage(data: bytes) -> torch.Tensor:
    """The memory of a tensor in a pickle, flat: a file of ``torch.save`` in the file."""
    if not data.startswith(OLD_FORMAT):
        raise pickle.UnpicklingError("it has a tensor in an unknown form")
    storage = read_old_format(io.BytesIO(data))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("it has a tensor without memory")
    return torch.empty(0, dtype=storage.dtype).set_(storage)


def _load(file: BinaryIO) -> Any:
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.serialization.safe_globals(_STAND_INS):
            # The keyword is explicit: an environment variable can turn the default off.
            return replace_stand_ins(torch.load(file, map_location="cpu", weights_only=True))


def _check_pickle(file: BinaryIO) -> None:
    """Read a pickle without making its tensors: stop at what :func:`_is_safe` does not know.

    torch's own list of names has more, e.g. quantised and sparse tensors.
    """
    replace_stand_ins(_Checker(file, _inert_function).load())


def _inert_function(names: tuple[str, str]) -> Callable | None:
    if not _is_safe(*names):
        return None
    return make_dict if names == ("collections", "OrderedDict") else _nothing


def _nothing(*_: Any) -> None:
    return None


def _is_safe(module: str, name: str) -> bool:
    full = f"{module}.{name}"
    if module in ("torch", "torch.cuda", "torch.storage") and re.fullmatch(r"\w+Storage", name):
        return not name.startswith("Q")
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return True
    return full in _NAMES or (module, name) in STAND_INS


class _Checker(Unpickler):
    """Follows a pickle of ``torch.save``, whose tensors refer to memory elsewhere in the file."""

    def load_reference(self) -> None:
        self.stack[-1] = None

    def load_build(self) -> None:
        self.stack.pop()

    dispatch: ClassVar[dict[int, Callable]] = Unpickler.dispatch | {
        pickle.BINPERSID[0]: load_reference,
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: Unpickler.load_reduce,
    }
