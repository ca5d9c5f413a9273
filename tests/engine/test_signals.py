"""Signals that ask a training to stop. ``test_resume.py`` sends them to real trainings."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from retina_plugin.engine import signals
from retina_plugin.engine.signals import Interrupted, StopRequests, pass_signals_on

NAMES = ["SIGTERM", "SIGINT", "SIGUSR1"]


def send(name):
    signal.raise_signal(getattr(signal, name))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that can be set."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("name", NAMES)
def test_signal_is_noted(name):
    with StopRequests() as requests:
        assert requests.received is None and not requests.agreed()
        send(name)
        assert requests.received.name == name and requests.agreed()


def test_handlers_are_put_back():
    """Also after an error."""
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    with pytest.raises(ZeroDivisionError), StopRequests():
        assert signal.getsignal(signal.SIGTERM) not in before
        raise ZeroDivisionError
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before


def test_second_signal_ends_the_process_at_once(monkeypatch, clock):
    """One that comes within three seconds is the same one, passed on by a launcher."""
    raised = []
    with StopRequests():
        send("SIGTERM")
        clock[0] += 2.9
        send("SIGTERM")
        send("SIGINT")
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        clock[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_signal_in_an_evaluation_is_raised():
    """A SystemExit with code 75; before and after the block nothing is raised."""
    with StopRequests() as requests:
        with requests.raised_at_once():
            pass
        with pytest.raises(Interrupted) as end, requests.raised_at_once():
            send("SIGUSR1")
        assert end.value.code == 75
        with pytest.raises(Interrupted), requests.raised_at_once():
            raise AssertionError("it came before the block")


def test_no_handler_outside_the_main_thread():
    """Python admits none there."""
    failed = []

    def work():
        try:
            with StopRequests() as requests, pass_signals_on():
                failed.append(requests.agreed())
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == [False]


def _wait_for_signal(connection):
    with StopRequests() as requests:
        connection.send("ready")
        while requests.received is None:
            time.sleep(0.01)
        connection.send(requests.received.name)


def test_signals_are_passed_on_to_children():
    """As to the processes of Detectron2's ``launch``."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_wait_for_signal, args=(theirs,))
    child.start()
    assert ours.recv() == "ready"
    with pass_signals_on():
        send("SIGUSR1")
    assert ours.recv() == "SIGUSR1"
    child.join()


def test_without_children_a_signal_does_what_it_did():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with pass_signals_on():
            send("SIGUSR1")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]
    assert signals.EXIT_CODE == 75
