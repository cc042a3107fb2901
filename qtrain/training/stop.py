"""Being asked to stop.

    SIGINT (Ctrl-C), SIGTERM,     exit code 130: the same command continues from the last checkpoint
    SIGHUP (closed terminal)
    SIGUSR1, SIGUSR2              exit code 75 (EX_TEMPFAIL of sysexits.h): queue it again; schedulers send these before
                                  a job's time is up

A signal to any process of a run reaches all of them at the end of a step: they agree, save and end. A second SIGINT
ends the process at once, without saving. Exit code 75 is also that of a process that has lost another of its run.
SIGHUP stays ignored in a process that was started so, as by nohup.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from qtrain.errors import StoppedError

log = logging.getLogger("qtrain")

STOPPED, QUEUE_AGAIN = 130, 75
END = 0  # no signal has this number
CODES = {
    signal.SIGINT: STOPPED,
    signal.SIGTERM: STOPPED,
    signal.SIGHUP: STOPPED,
    signal.SIGUSR1: QUEUE_AGAIN,
    signal.SIGUSR2: QUEUE_AGAIN,
}


class StopRequest:
    """While entered, notes signals. Before and after training (`noting`) one ends the run at once, by StoppedError.

    asked: 0, or the exit code that was asked for.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._noting = False
        self._before: dict[int, Any] = {}
        self._seen: list[int] = []

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._seen:  # a launcher's own handler, as submitit's, which queues the job again
            before = self._before.get(number)
            is_own = getattr(before, "__module__", "").split(".")[0] == "qtrain"  # those end a process that has no run
            if CODES[signal.Signals(number)] == QUEUE_AGAIN and callable(before) and not is_own:
                before(number, None)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within it, a signal is noted for the loop to see. One that came before ends the run here at the latest: code
        of a library that it interrupted may have caught its exception."""
        if self.asked:
            raise StoppedError(self.asked)
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    @contextmanager
    def meeting(self, seconds: float, otherwise: str) -> Iterator[None]:
        """Within it, processes wait for each other in code that sees no signals: then a signal ends this process at
        once, and so does waiting longer than `seconds`, with the message `otherwise`."""

        def too_long() -> None:
            print(f"error: {otherwise} within {seconds:.0f} s; start the same command again", file=sys.stderr)
            end_now(QUEUE_AGAIN)

        timer = threading.Timer(seconds, too_long)
        timer.daemon = True
        timer.start()
        try:
            with _woken(lambda number: end_now(CODES[signal.Signals(number)])):
                yield
        finally:
            timer.cancel()

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Within it, a second SIGINT ends this process even while it waits for another rank."""
        count = [0]

        def interrupted(number: int) -> None:
            count[0] += number == signal.SIGINT
            if count[0] > 1:
                end_now(STOPPED)

        with _woken(interrupted):
            yield

    def ask_from_outside(self) -> None:
        """As a signal, from another thread: the launcher of this process is gone."""
        if self._noting:
            self.asked = self.asked or QUEUE_AGAIN
        else:
            end_now(QUEUE_AGAIN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        code = CODES[signal.Signals(number)]
        self._seen.append(number)
        if number == signal.SIGHUP:
            leave_lost_terminal()
        again = self.asked and number == signal.SIGINT
        self.asked = max(self.asked, code)
        if not self._noting or again:
            raise StoppedError(code)
        log.warning("%s: finishing this step and saving; Ctrl-C to stop at once", signal.Signals(number).name)


def heard() -> list[signal.Signals]:
    """The signals that stop a run of this process."""
    return [number for number in CODES if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def leave_lost_terminal() -> None:
    """Sends to nowhere what is written to a terminal that was closed: each word to it would be an error."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def _woken(called: Callable[[int], None]) -> Iterator[None]:
    """Within it, `called` is called with the number of each signal, by a thread of its own: the main thread sees none
    while it waits in C++."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:  # until the end below: loader processes hold the pipe open
        while (number := os.read(reading, 1)[0]) != END:
            if number in CODES:
                called(number)

    thread = threading.Thread(target=watch, daemon=True, name="signal-watch")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.set_blocking(writing, True)
        os.write(writing, bytes([END]))
        thread.join()
        os.close(writing)
        os.close(reading)


def end_now(code: int) -> NoReturn:
    """Ends the process without its cleaning up, from any thread or signal handler."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(RuntimeError, OSError, ValueError):  # it was being written to, is no longer there, or is closed
            stream.flush()
    os._exit(code)
