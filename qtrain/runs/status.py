"""How a run stands, as summary.json and the rows of results say it."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """`running` is also what a process that was killed leaves behind; the lock of its directory tells (`RunDirectory
    .busy`)."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"  # asked to stop, and saved
    FINISHED = "finished"
    FAILED = "failed"
    DIVERGED = "diverged"
    UNKNOWN = "unknown"  # no summary.json
    DAMAGED = "damaged"  # files that cannot be read

    @property
    def reason(self) -> str | None:
        """What a status means where a run gives no reason of its own."""
        return REASONS.get(self)


FAILED = (Status.FAILED, Status.DIVERGED)  # of a run that ended, but not as it should

REASONS = {
    Status.RUNNING: "at work, or killed; its command again continues it",
    Status.INTERRUPTED: "stopped; its command again continues it",
    Status.DIVERGED: "a loss or gradient norm was not finite",
    Status.UNKNOWN: "no summary.json: training never began, or the folder is not complete",
}
