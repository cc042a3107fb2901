"""Processes that outlive the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = """
import multiprocessing, os, signal, time
import qtrain.train as train
from qtrain.errors import StoppedError

def training(tree):
    def stop(*_):
        print("saved", flush=True)
        raise StoppedError(130)
    signal.signal(signal.SIGTERM, stop)
    print(os.getpid(), flush=True)
    time.sleep(60)

def jobs():
    train._job = training
    train.job({})
    time.sleep(60)  # for another job

multiprocessing.get_context("fork").Process(target=jobs).start()
time.sleep(60)
"""


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_job_whose_launcher_was_killed_saves_and_ends() -> None:
    """Of hydra/launcher=local: it trained on unseen, and then waited for the jobs of a launcher that was gone."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        job = int(launcher.stdout.readline())
        launcher.kill()
        assert launcher.stdout.readline() == "saved\n"
        deadline = time.monotonic() + 20
        while runs(job):
            if time.monotonic() > deadline:
                os.kill(job, signal.SIGKILL)
                pytest.fail("it still runs 20 s later")
            time.sleep(0.05)
