"""The command ``retina``: its help, its version, unknown commands."""

import os
import subprocess
import sys

import pytest

from retina_plugin import __version__
from retina_plugin.cli import COMMANDS, main


def ended(capsys, *argv):
    """Exit status and what was printed."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    printed = capsys.readouterr()
    return end.value.code, printed.out + printed.err


def test_help_lists_every_command(capsys):
    status, text = ended(capsys, "--help")
    assert status == 0
    for name, what in COMMANDS.items():
        assert f"{name}  " in text and what in text


def test_version(capsys):
    assert ended(capsys, "--version") == (0, f"retina_plugin {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(capsys, command):
    status, text = ended(capsys, command, "--help")
    assert status == 0 and f"usage: retina {command}" in text


@pytest.mark.parametrize("argv", [[], ["fly"]])
def test_unknown_command_is_refused(capsys, argv):
    status, text = ended(capsys, *argv)
    assert status == 2 and "COMMAND" in text


def test_module_is_the_same_command(repo, tmp_path):
    """``python -m retina_plugin`` in a folder without a checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "retina_plugin", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repo)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"retina_plugin {__version__}\n"
