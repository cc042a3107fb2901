"""Processes that end when the one that started them dies: by SIGKILL it cannot tell them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

PERIOD = 0.5  # seconds between two looks
GRACE = 120.0  # seconds that a process has to end by itself


def end_with_parent(number: int = signal.SIGKILL) -> Callable[[], bool]:
    """From now on this process gets the signal when its parent has died: SIGTERM for one that saves first, and SIGKILL
    GRACE seconds later. A thread asks for the parent's number, which changes with its death on every system. Returns
    what tells whether the parent lives."""
    parent = os.getppid()

    def lives() -> bool:
        return os.getppid() == parent

    def watch() -> None:
        while lives():
            time.sleep(PERIOD)
        os.kill(os.getpid(), number)
        time.sleep(GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end_with_parent").start()
    return lives
