"""Signals: whenever they come, the run stops; those that tell of a closed terminal save as the others do."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qtrain.errors import StoppedError
from qtrain.training.stop import CODES, STOPPED, StopRequest

BEFORE_A_RUN = """
import os, signal, sys
from pathlib import Path
import qtrain.train

def in_the_imports():
    try:
        os.kill(os.getpid(), signal.{name})
    except BaseException:
        pass  # as code that is imported may do
    Path(sys.argv[1]).touch()  # the whole run

qtrain.train._hydra_main = in_the_imports
sys.argv[1:], out = [], sys.argv[1]
sys.argv.append(out)
qtrain.train.checked_overrides = list
qtrain.train.main()
"""

CLOSED_TERMINAL = """
import os, signal, sys, time
from pathlib import Path
from qtrain.training.stop import StopRequest

with StopRequest() as stop, stop.noting():
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text(str(stop.asked))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_before_a_run_listens_ends_the_process(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BEFORE_A_RUN.format(name=name), str(tmp_path / "ran")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (CODES[signal.Signals[name]], "")
    assert ended.stderr == "stopped; the same command continues from the last checkpoint\n"
    assert not (tmp_path / "ran").exists()


IMPORTING = """
import os, signal, sys, time

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "qtrain.train":
            os.kill(os.getpid(), signal.{name})
            time.sleep(60)

sys.meta_path.insert(0, Interrupts())
sys.argv = ["train.py"]
from qtrain.cli import start
start("train")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_a_signal_while_the_command_imports_is_silent(name: str) -> None:
    command = [sys.executable, "-c", IMPORTING.replace("{name}", name)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (CODES[signal.Signals[name]], "")


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """The terminal is gone by then: what the run says must not end it."""
    done = tmp_path / "saved"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CLOSED_TERMINAL, str(done)])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert done.read_text() == str(STOPPED)


def test_a_signal_whose_exception_was_caught_still_stops_the_run() -> None:
    with StopRequest() as stop:
        with pytest.raises(StoppedError):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError), stop.noting():
            raise AssertionError("the run has begun")


def test_nohup_holds() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, stop.noting():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)
