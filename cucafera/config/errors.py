"""The error that a user can fix, and the exit codes of the commands."""

EXIT_USER_ERROR = 2

EXIT_DIVERGED = 3

EXIT_OUT_OF_TIME = 124
"""Of a run that max_time stopped, as of the command `timeout`."""


class UserError(Exception):
    """A problem that the user can fix: commands print its message without a stack trace and exit with its code."""

    exit_code = EXIT_USER_ERROR
