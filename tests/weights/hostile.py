"""Objects whose unpickling would run code, and ways to hide them in a weights file."""

import builtins
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import torch


class Call:
    """Unpickling it calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):
        """A pickle may also call what a call returns; pickle.dumps asks whether it can."""


def text_pickle(module, name, argument):
    """A pickle of protocol 0 that calls ``module.name(argument)``."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def calls(marker):
    """Name -> an object whose unpickling would make the file ``marker``."""
    write = f"open({str(marker)!r}, 'w').close()"
    nested = pickle.dumps(Call(os.system, f"touch {marker}"))
    return {
        "os.system": Call(os.system, f"touch {marker}"),
        "subprocess": Call(subprocess.Popen, ["touch", str(marker)]),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(open, str(marker), "w"),
        "copy": Call(shutil.copy, sys.executable, str(marker)),
        "getattr": Call(Call(getattr, np.ndarray, "tofile"), np.ones(2), str(marker)),
        "getattr chain": Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {marker}"),
        "map": Call(list, Call(map, os.system, [f"touch {marker}"])),
        "nested pickle": Call(pickle.loads, nested),
        "torch.load": Call(torch.load, str(marker) + ".payload", None),
        "torch.save": Call(torch.save, [1], str(marker)),
        "torch.hub": Call(torch.hub.download_url_to_file, "file:///etc/hostname", str(marker)),
        "torch storage": Call(torch.UntypedStorage.from_file, str(marker), True, 8),
        "numpy.load": Call(np.load, str(marker) + ".npy", None, True),
        "numpy.save": Call(np.save, str(marker), [1]),
        "numpy.memmap": Call(np.memmap, str(marker), "u1", "w+", 0, (8,)),
        "numpy.tofile": Call(np.ndarray.tofile, np.ones(3), str(marker)),
        "numpy.vectorize": Call(np.vectorize, os.system),
        "numpy object array": np.array([Call(os.system, f"touch {marker}")], dtype=object),
        "builtins.print": Call(builtins.print, "ran"),
        "type": Call(type, "Made", (), {}),
        "module": Call(torch.nn.Linear, 2, 2),
    }


def stack_global(module, name, argument):
    """A pickle of protocol 4 that calls ``module.name``, where a name may have dots."""
    texts = [b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name, argument)]
    return b"\x80\x04" + texts[0] + texts[1] + b"\x93" + texts[2] + b"\x85R."


def tricks(marker):
    """Name -> bytes of a pickle that no pickler writes."""
    touch = f"touch {marker}"
    return {
        "text": text_pickle("os", "system", touch),
        "posix": text_pickle("posix", "system", touch),
        "Python 2": text_pickle("__builtin__", "eval", f"open({str(marker)!r}, 'w')"),
        "attribute of a module": stack_global("numpy", "os.system", touch),
        "attribute of a class": stack_global("numpy", "ndarray.__class__.__base__", touch),
        "globals": stack_global("collections", "OrderedDict.__init__.__globals__", touch),
        "module": stack_global("numpy.core", "multiarray", touch),
        "inst": f"(V{touch}\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nV{touch}\no.".encode(),
        "persistent id": b"Pos.system\n.",
        "extension": b"\x82\x01.",
        "new object": b"\x80\x02cnumpy\nndarray\n(t\x81.",
        "buffer": b"\x80\x05\x97.",
        "call of a text": b"Vx\n(tR.",
        "call of an array": b"\x80\x02cnumpy\ndtype\n(Vf4\ntR(tR.",
        "attributes of a function": b"\x80\x02cnumpy\nndarray\n}Vx\nVy\nsb.",
        "attributes of a dict": b"\x80\x02ccollections\nOrderedDict\n(tRN}Vitems\nVx\ns\x86b.",
    }


def torch_zip(path, pickled, name="archive"):
    """A zip file like torch.save's around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", pickled)
        archive.writestr(f"{name}/byteorder", "little")
        archive.writestr(f"{name}/version", "3\n")
