"""The data loader's workers and the signals of a training."""

import multiprocessing
import subprocess
import time

from retina_plugin.data.samples import leave_signals_to_parent


def _work(connection):
    leave_signals_to_parent(0)
    connection.send("ready")
    time.sleep(60)


def test_sigterm_ends_a_worker_only_if_its_parent_sends_it():
    """SLURM sends it to all. Python sends it once at the parent's exit, then waits for ever."""
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(theirs,), daemon=True)
    worker.start()
    assert ours.recv() == "ready"
    for name in ("TERM", "TERM", "INT", "USR1"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)
        worker.join(0.2)
        assert worker.is_alive(), name
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
