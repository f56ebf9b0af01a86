"""Messages from standard input: typed or pasted at a terminal, or the lines of a pipe.

A line is a message. Several pasted lines are one message: readline keeps them together where it knows the terminal's
bracketed paste, and elsewhere the lines that have arrived with the first one belong to it. Anywhere, a pipe included,
the lines between two lines of three quotes are one message.

What is typed while the model answers is not shown in the answer. It waits in the terminal's buffer, and readline shows
it at the next prompt. The history of lines is kept in memory only: it may hold private texts.
"""

import contextlib
import os
import select
import signal
import sys
import termios
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from cucafera.config.errors import UserError

PROMPT, CONTINUED = "> ", "... "
QUOTES = '"""'
PASTE_ON, PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"
"""Ask a terminal to mark where pasted text begins and ends, or not to."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that would end the process before it restores the terminal."""
LOCAL_FLAGS = 3
"""Position of the flags of echo and line editing in what termios.tcgetattr returns."""
PASTE_SECONDS = 0.05
"""Time within which the next line of a pasted text arrives."""


class UnclosedMessageError(UserError):
    """The input ended within a message of several lines."""


class Typed(NamedTuple):
    """A message, or a command.

    Attributes:
        text: Without the spaces and line ends around it.
        is_command: It begins with a slash that is not meant literally.
    """

    text: str
    is_command: bool


class Keyboard:
    """Reads messages from standard input.

    Args:
        is_terminal: A person types there; else it is a pipe or file, and no prompt is printed.
    """

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self._marks_pastes = is_terminal and _enable_bracketed_paste()
        self._prompt = ""
        self._mode: list[Any] = []

    def read(self) -> Typed:
        """Return the next message or command; empty if the line is.

        Raises:
            EOFError: the input has ended.
            UnclosedMessageError: it has ended before the quotes of a message were closed.
        """
        text = self._lines().strip()
        if text.startswith(QUOTES):
            return Typed(self._quoted(text.removeprefix(QUOTES)), is_command=False)
        if text.startswith("//"):
            return Typed(text.removeprefix("/"), is_command=False)
        return Typed(text, is_command=text.startswith("/"))

    def _quoted(self, text: str) -> str:
        while not text.rstrip().endswith(QUOTES):
            try:
                text += "\n" + self._line(CONTINUED)
            except EOFError as error:
                problem = f"The message is not sent: it begins with {QUOTES}, and no {QUOTES} ends it."
                raise UnclosedMessageError(problem) from error
        return text.rstrip().removesuffix(QUOTES).strip()

    def _lines(self) -> str:
        """Return a line, or several that were pasted together."""
        text = self._line(PROMPT)
        while self.is_terminal and not self._marks_pastes and text.strip() and _is_waiting():
            try:
                text += "\n" + self._line(CONTINUED)
            except EOFError:
                break
        return text

    def _line(self, prompt: str) -> str:
        self._prompt = prompt if self.is_terminal else ""
        try:
            return input(self._prompt)
        finally:
            self._prompt = ""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Restore the terminal at the end, also if it comes by a signal, and while the process is suspended."""
        if not self.is_terminal:
            yield
            return
        self._mode = termios.tcgetattr(sys.stdin)
        handlers = {number: signal.getsignal(number) for number in (*ENDING_SIGNALS, signal.SIGTSTP)}
        for number, handler in handlers.items():
            if handler is signal.SIG_DFL:  # not one that is ignored, as SIGHUP by nohup
                signal.signal(number, self._suspend if number == signal.SIGTSTP else _exit)
        try:
            yield
        finally:
            self._set_mode(self._mode)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def unshown(self) -> Iterator[None]:
        """Let what is typed meanwhile wait for the next prompt, without showing it."""
        if not self.is_terminal:
            yield
            return
        quiet = termios.tcgetattr(sys.stdin)
        # A terminal that edits lines would cut those of more than 4,095 bytes; Ctrl-C would discard what is typed.
        quiet[LOCAL_FLAGS] = quiet[LOCAL_FLAGS] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        self._set_mode(quiet)
        self._mark_pastes(PASTE_ON)
        try:
            yield
        finally:
            self._mark_pastes(PASTE_OFF)
            self._set_mode(self._mode)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Give the shell its terminal as it was, stop, and when continued in the foreground take it again."""
        mode = termios.tcgetattr(sys.stdin)
        self._mark_pastes(PASTE_OFF)
        self._set_mode(self._mode)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._suspend)
        if os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
            self._set_mode(mode)
            self._mark_pastes(PASTE_ON)
            if self._prompt:
                print(self._prompt + _typed_so_far(), end="", flush=True)

    def _set_mode(self, mode: list[Any]) -> None:
        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)

    def _mark_pastes(self, sequence: bytes) -> None:
        if self._marks_pastes:
            with contextlib.suppress(OSError):  # the terminal was closed
                os.write(sys.stdout.fileno(), sequence)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _enable_bracketed_paste() -> bool:
    """Load readline, with which input() edits lines; return True if it keeps the lines of a pasted text together.

    libedit, in its place on macOS and in some builds of Python, does not, and no terminal called dumb marks them.
    """
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or "") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return True


def _typed_so_far() -> str:
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


def _is_waiting() -> bool:
    return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
