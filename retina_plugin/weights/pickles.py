"""A pickle reader for weights: numbers, text, containers, arrays and tensors, and nothing else.

A pickle is a program: it may name any function of any module and call it. Here only the names of
:data:`STAND_INS` exist, and each stands for code of this file that checks its arguments. NumPy and
PyTorch see them only afterwards.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

__all__ = ["STAND_INS", "Unpickler", "load_pickle", "make_dict", "replace_stand_ins"]

_MAX_DEPTH = 50  # containers in containers; a checkpoint has about five
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")
_KEYS = (str, int, float, bool, bytes, type(None))


class DType:
    """Stands for a ``numpy.dtype`` of numbers."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(
                f"an array of {str(code)[:50]!r} is not an array of numbers"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, ...); the rest describes records, which are no numbers.
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(x is not None for x in state[2:5]):
            raise pickle.UnpicklingError("an array of records is not an array of numbers")
        self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stands for a ``numpy.ndarray`` until its content has been read."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _to_array(data, dtype, shape, "F" if is_fortran else "C")


def _to_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(data, str):
        data = data.encode("latin1")  # written by Python 2
    if not isinstance(data, bytes) or not isinstance(dtype, DType) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without numbers")
    count = math.prod(_sizes(shape))
    if count * dtype.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array that needs another size than its {len(data)} bytes")
    values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    # A copy, because torch wants writable memory, in the machine's byte order.
    return values.astype(dtype.dtype.newbyteorder("="), order="C")


def _sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("a shape that is not one")
    return shape


def _reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.value = _to_array(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> np.generic:
    return _to_array(data, dtype, (), "C").reshape(1)[0]


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old protocol."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _bytes(data: Any = b"", encoding: str = "latin-1") -> bytes:
    return _encode(data, encoding) if isinstance(data, str) else bytes(memoryview(data))


def make_dict(items: Any = ()) -> dict:
    made: dict = {}
    for key, value in items:
        _set_item(made, key, value)
    return made


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """``torch._utils._rebuild_tensor_v2`` that stays inside its memory."""
    if not isinstance(storage, torch.Tensor) or type(offset) is not int or offset < 0:
        raise pickle.UnpicklingError("a tensor without memory")
    sizes, strides = _sizes(size), _sizes(stride)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    if len(sizes) > 16 or count > len(storage) or (count and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor that is larger than its memory")
    return storage.as_strided(sizes, strides, offset)


def _parameter(data: Any, *_: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise pickle.UnpicklingError("a parameter without numbers")
    return data


# (module, name) in a pickle -> what is called. Nothing is looked up in the module.
STAND_INS: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
    ("collections", "OrderedDict"): make_dict,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytearray"): _bytes,
    ("builtins", "bytes"): _bytes,  # without bytes, in an old protocol
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
for _core in ("numpy.core", "numpy._core"):  # the old name and the new one
    STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    STAND_INS[f"{_core}.multiarray", "scalar"] = _scalar
    STAND_INS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


def load_pickle(data: bytes, load_storage: Callable[[bytes], torch.Tensor]) -> Any:
    """What a pickle holds. Text of Python 2 is read as Latin-1, as the model zoos need.

    Args:
        data: the pickle.
        load_storage: reads a ``torch.save`` file inside it: the memory of a tensor, flat.

    Raises:
        Exception: of any kind. The data are damaged, or an UnpicklingError says what is in them
            that is not allowed.
    """
    functions = {**STAND_INS, ("torch.storage", "_load_from_bytes"): load_storage}
    return replace_stand_ins(Unpickler(io.BytesIO(data), functions.get).load())


# Its attributes are not in mypy's stubs.
_PYTHON_UNPICKLER: Any = pickle._Unpickler


class Unpickler(_PYTHON_UNPICKLER):
    """Python's own unpickler, in which only harmless instructions are left.

    The one in Python and not the faster one in C: its instructions can be taken away, and it gets
    no memory for what a damaged file merely announces.
    """

    def __init__(
        self, file: BinaryIO, functions: Callable[[tuple[str, str]], Callable | None]
    ) -> None:
        super().__init__(file, encoding="latin1")
        self._functions = functions

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:  # the base class looks the instruction up in `dispatch`
            raise pickle.UnpicklingError(f"an instruction that is not allowed: {error}") from None

    def find_class(self, module: str, name: str) -> _Function:
        module = {"__builtin__": "builtins"}.get(module, module)  # its name in Python 2
        function = self._functions((module, name))
        if function is None:
            raise pickle.UnpicklingError(f"it holds {module[:80]}.{name[:80]}")
        return _Function(function)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of something that is no function")
        self.append(function.made_from(arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (Array, DType)):
            target.__setstate__(state)
        elif not isinstance(target, dict):  # a state dict has attributes; they are not needed
            raise pickle.UnpicklingError("attributes of something that has none")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_item(self.stack[-1], key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set_item(self.stack[-1], key, value)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(make_dict(zip(items[::2], items[1::2], strict=True)))

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch: ClassVar[dict[int, Callable]] = {
        code: _PYTHON_UNPICKLER.dispatch[code]
        for name in (
            "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 "
            "LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
            "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE "
            "TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT GET BINGET LONG_BINGET "
            "PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
        ).split()
        for code in getattr(pickle, name)
    }
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Function:
    """A function on the unpickler's stack. It has no attributes that the file could set."""

    __slots__ = ("made_from",)

    def __init__(self, function: Callable) -> None:
        self.made_from = lambda arguments: function(*arguments)


def _set_item(target: Any, key: Any, value: Any) -> None:
    # The hash of tuples in tuples can take for ever.
    if not isinstance(target, dict) or not isinstance(key, _KEYS):
        raise pickle.UnpicklingError("a key that is no name")
    target[key] = value


def replace_stand_ins(value: Any) -> Any:
    """``value`` with an array for each :class:`Array`. Dicts and lists are changed in place."""
    done: dict[int, Any] = {}

    def replaced(value: Any, depth: int) -> Any:
        if not isinstance(value, (dict, list, Array, DType)) and type(value) is not tuple:
            if isinstance(value, _Function):
                raise pickle.UnpicklingError("a function is not a number")
            return value
        if depth > _MAX_DEPTH:
            raise pickle.UnpicklingError("containers that are nested too deeply")
        if id(value) in done:  # shared, or it contains itself
            return done[id(value)][1]
        if isinstance(value, (Array, DType)):
            result: Any = value.value if isinstance(value, Array) else str(value.dtype)
            if result is None:
                raise pickle.UnpicklingError("an array without content")
        elif isinstance(value, tuple):
            # A shared tuple is walked once, and one that contains itself only through a list.
            result = tuple(replaced(x, depth + 1) for x in value)
        else:
            done[id(value)] = value, value
            for key, x in list(value.items() if isinstance(value, dict) else enumerate(value)):
                value[key] = replaced(x, depth + 1)
            return value
        done[id(value)] = value, result
        return result

    return replaced(value, 0)
