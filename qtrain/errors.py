"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """What was asked, what was found, what to do. The command line prints it without a traceback and exits with 2."""


def first_line(error: BaseException) -> str:
    """A foreign exception in one line: its type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
