"""Damage: to a tree of lists and dicts, and to bytes. And what a reader may do with it."""

import contextlib
import copy
import math
import random
import sys

from hypothesis import strategies as st

from retina_plugin.errors import ConfigError

JUNK = [
    *(None, True, False, 0, -1, 7, 1.5, -0.0, math.nan, math.inf, 1e30, 10**30, 10**400),
    *("", "x", "3", "0.1", "\0", "é\ud800", "a\nb", "!!python/name:os.system", "x" * 5000),
    *([], [1], [[]], ["x", None], [1, 2, 3, 4], [math.nan] * 4, {}, {"a": 1}, {"": []}),
]

# What runs programs, opens connections or changes files: none of it is a reader's work.
_FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.kill"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "ctypes.dlopen", "pty.spawn"),
    *("shutil.copyfile", "shutil.move", "os.chmod", "os.rename"),
}
_watched = False


def _watch(event, arguments):
    if _watched and event in _FORBIDDEN:
        raise AssertionError(f"the file made the reader call {event}{arguments}")


sys.addaudithook(_watch)  # it cannot be taken away, so it has a switch


@contextlib.contextmanager
def nothing_runs():
    """Fails if a program is started, a connection made or a file moved."""
    global _watched
    _watched = True
    try:
        yield
    finally:
        _watched = False


def read_or_one_line(read, *args):
    """What ``read`` returns, or None after a ConfigError of one line; anything else is a fault."""
    try:
        with nothing_runs():
            return read(*args)
    except ConfigError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, repr(str(error))
        return None


def randoms():
    """A random generator: hypothesis would draw the many numbers one by one, slowly."""
    return st.integers(0, 2**32).map(random.Random)


def any_bytes():
    """Bytes, and text of any language."""
    return st.binary(max_size=300) | st.text(max_size=200).map(
        lambda t: t.encode("utf-8", "replace")
    )


def _places(tree, found):
    """(container, key) of everything in the tree."""
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        found.append((tree, key))
        if isinstance(tree[key], (list, dict)):
            _places(tree[key], found)
    return found


def damaged_tree(tree, rng, junk=JUNK):
    """A copy in which one to three places are dropped, doubled, replaced, renamed or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(tree, [])
        if not places:
            break
        # a depth first, so that the few keys at the top are met as often as the many below
        container, key = rng.choice(rng.choice([places, places[: 1 + len(tree) * 2]]))
        how = rng.choice("drop double replace replace replace rename swap type".split())
        if how == "drop":
            del container[key]
        elif how == "double" and isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
        elif how == "rename" and isinstance(container, dict):
            container[rng.choice([f"{key}s", str(key).upper(), "", "x"])] = container.pop(key)
        elif how == "swap":
            other, there = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                value = copy.deepcopy(container[key])
                container[key] = copy.deepcopy(other[there])
                other[there] = value
        elif how == "type":
            container[key] = other_type(container[key], rng)
        else:
            container[key] = copy.deepcopy(rng.choice(junk))
    return tree


def other_type(value, rng):
    """The same value as another type."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, (int, float)):
        number = float(value) if abs(value) < 1e300 else math.inf  # of an integer of any length
        return rng.choice([str(value), number, -value, [value], value * 10**6])
    if isinstance(value, list):
        return rng.choice([{str(i): v for i, v in enumerate(value)}, str(value), value[:1]])
    if isinstance(value, dict):
        return rng.choice([list(value.values()), list(value), str(value)])
    return rng.choice([[value], {"name": value}, repr(value)])


def damaged_bytes(data, rng, inserts=()):
    """A copy that is cut, with bytes flipped, lost, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([1, 1, 4, 50, 1000]))
        how = rng.choice(["cut", "flip", "flip", "drop", "double", "zero", "random", "insert"])
        if how == "cut":
            del data[start:]
        elif how == "flip" and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif how == "drop":
            del data[start:end]
        elif how == "double":
            data[start:start] = data[start:end]
        elif how == "zero":
            data[start:end] = bytes(end - start)
        elif how == "random":
            data[start:end] = rng.randbytes(end - start)
        else:
            data[start:start] = rng.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", *inserts])
    return bytes(data)
