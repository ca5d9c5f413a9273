"""Files are written whole or not at all, and what a killed process left is removed."""

import os
import signal
import time

import pytest

from retina_plugin.cache import atomic_write, remove_stale_temporaries


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_file_is_written_whole(tmp_path):
    """It appears with its full content, and with the rights of any new file."""
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"1")
        assert not path.exists() and temporary.name == "a.bin"
        assert temporary.parent.parent == path.parent  # the same disk: renaming is one step
    assert path.read_bytes() == b"1" and names(path.parent) == {"a.bin"}
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_error_leaves_the_old_file(tmp_path):
    """And no temporary one."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_bytes(b"new")
        raise KeyError
    assert path.read_bytes() == b"old" and names(tmp_path) == {"a.bin"}


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    """After a power cut the name must not stand for an empty file."""
    steps, fsync, replace = [], os.fsync, os.replace

    def record_fsync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_replace(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_write(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"1")
    assert steps == [str(temporary), "rename", str(tmp_path)]


def start_writing(path):
    """The process that has half written ``path``."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"half")
                os.write(tell, b"1")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    return process


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_temporary_of_a_killed_process_is_removed_by_the_next_write(tmp_path):
    """That of a living process stays."""
    first = start_writing(tmp_path / "a.bin")
    second = start_writing(tmp_path / "a.bin")
    assert len(names(tmp_path)) == 2
    remove_stale_temporaries(tmp_path)
    assert len(names(tmp_path)) == 2  # both live
    kill(first)
    with atomic_write(tmp_path / "b.bin") as temporary:
        temporary.write_bytes(b"1")
    assert len(names(tmp_path) - {"b.bin"}) == 1  # the other one still writes
    kill(second)
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == {"b.bin"}


def test_folder_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "a.bin"):
        pass
