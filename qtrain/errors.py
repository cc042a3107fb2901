"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """What was asked, what was found, what to do. The command line prints it without a traceback and exits with 2."""
