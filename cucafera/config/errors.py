"""The error that a user can fix, and the exit codes of the commands."""

EXIT_WORKER_LOST = 1
"""Of a run that stopped because one of its processes died; as for any crash, the same command may help."""

EXIT_USER_ERROR = 2

EXIT_DIVERGED = 3

EXIT_OUT_OF_TIME = 124
"""Of a run that max_time stopped, as of the command `timeout`."""


def one_line(text: str) -> str:
    r"""Return a text with its line ends, and what UTF-8 cannot encode, as escapes: names may hold both."""
    return text.replace("\r", r"\r").replace("\n", r"\n").encode(errors="backslashreplace").decode()


class UserError(Exception):
    """A problem that the user can fix: commands print its message without a stack trace and exit with its code."""

    exit_code = EXIT_USER_ERROR
