"""Errors and endings that the command line knows by name."""


class UserError(ValueError):
    """What was asked, what was found, what to do. The command line prints it without a traceback and exits with 2."""


class DivergedError(UserError):
    """The loss is not finite."""


class RefusedError(UserError):
    """Rank 0 does not go on, and says why. The other ranks end with this, silently."""


class StoppedError(KeyboardInterrupt):
    """The run was asked to stop, and has saved. exit_code: what the process ends with, see `qtrain.training.stop`."""

    def __init__(self, exit_code: int):
        super().__init__()
        self.exit_code = exit_code


class LostRankError(StoppedError):
    """Another process of the run has ended before this one."""


def first_line(error: BaseException) -> str:
    """A foreign exception in one line: its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
