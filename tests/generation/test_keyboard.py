"""Messages that are typed, pasted or piped; and the terminal, which is left as it was found."""

import os
import signal
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cucafera.generation.keyboard import Keyboard, Typed, UnclosedMessageError
from tests.support import PseudoTerminal


def read_all(lines: str, monkeypatch: pytest.MonkeyPatch) -> list[Typed]:
    """Read messages from the lines of a pipe until they end."""
    reads, writes = os.pipe()
    os.write(writes, lines.encode())
    os.close(writes)
    keyboard, found = Keyboard(is_terminal=False), []
    with os.fdopen(reads) as pipe, keyboard.session():
        monkeypatch.setattr("sys.stdin", pipe)
        while True:
            try:
                found.append(keyboard.read())
            except EOFError:
                return found


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        ("Hola\n\nBon dia", [("Hola", False), ("", False), ("Bon dia", False)]),
        ("  Hola  \r\n", [("Hola", False)]),
        ("/help\n/system Sigues breu.\n", [("/help", True), ("/system Sigues breu.", True)]),
        ("//usr/bin\n// \n", [("/usr/bin", False), ("/", False)]),
        ('"""\nun\n\n  dos\n"""\ntres\n', [("un\n\n  dos", False), ("tres", False)]),
        ('"""un\n/dos"""\n"""/help"""\n', [("un\n/dos", False), ("/help", False)]),
        ('"""\n"""\nva dir "Hola"\n', [("", False), ('va dir "Hola"', False)]),
    ],
)
def test_a_line_is_a_message_and_so_are_the_lines_between_quotes(lines, messages, monkeypatch, capsys):
    assert read_all(lines, monkeypatch) == messages
    assert capsys.readouterr().out == ""


def test_quotes_that_nothing_closes_send_no_message(monkeypatch):
    with pytest.raises(UnclosedMessageError, match='The message is not sent: it begins with """, and no """ ends it'):
        read_all('"""\nun\ndos\n', monkeypatch)


# In a terminal

PROGRAM = """
import sys, time
from cucafera.generation.keyboard import Keyboard

keyboard = Keyboard(is_terminal=True)
with keyboard.session():
    while True:
        text = keyboard.read().text
        if text == "answer":
            with keyboard.unshown():
                print("answering")
                time.sleep(float(sys.argv[1]))
        print("got", ascii(text))
"""
SHELL = """
import os, signal, subprocess, sys, termios

signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = subprocess.Popen([sys.executable, *sys.argv[1:]], process_group=0)
while True:
    os.tcsetpgrp(0, job.pid)
    os.kill(job.pid, signal.SIGCONT)
    _, status = os.waitpid(job.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    os.tcsetpgrp(0, os.getpgrp())
    flags = termios.tcgetattr(0)[3]
    print("suspended", bool(flags & termios.ECHO), bool(flags & termios.ICANON))
"""
"""Runs a job in the foreground, and continues it whenever it is suspended."""


def edits_lines(terminal: PseudoTerminal) -> bool:
    """True if the terminal itself shows and edits what is typed, as before the program."""
    flags = termios.tcgetattr(terminal.master)[3]
    return bool(flags & termios.ECHO) and bool(flags & termios.ICANON)


@pytest.fixture
def start() -> Iterator:
    terminals = []

    def started(*arguments: str, seconds: float = 0.5, **environment: str) -> PseudoTerminal:
        terminal = PseudoTerminal([*arguments, "-c", PROGRAM, str(seconds)], Path.cwd(), **environment)
        terminals.append(terminal)
        terminal.wait_for("> ")
        return terminal

    yield started
    for terminal in terminals:
        terminal.process.kill()
        terminal.process.wait()


def test_pasted_lines_are_one_message_and_typed_ahead_text_waits_for_the_next_prompt(start):
    terminal = start()
    assert not edits_lines(terminal)  # readline does
    terminal.type("\x1b[200~cel·la\ndos\x1b[201~")
    terminal.wait_for("dos")
    terminal.type("\r")
    terminal.wait_for(r"got 'cel\xb7la\ndos'")
    terminal.wait_for("> ")
    terminal.type("answer\r")
    terminal.wait_for("answering")
    terminal.type("despx\x7fres\r\x1b[200~a\nb\x1b[201~\x1bOD")
    assert "desp" not in terminal.wait_for("got 'answer'")
    terminal.wait_for("got 'despres'")
    terminal.type("\r")
    terminal.wait_for(r"got 'a\nb'")
    terminal.wait_for("> ")
    time.sleep(0.5)  # as a person would; readline must be waiting
    terminal.type("\x04")
    assert terminal.exit_code() == 1  # EOFError of the program


def test_in_a_terminal_that_does_not_mark_pastes_lines_that_arrive_together_are_one_message(start):
    terminal = start(TERM="dumb")
    terminal.type("un\n\ndos\n")
    assert "\x1b" not in terminal.wait_for(r"got 'un\n\ndos'")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_the_terminal_is_restored_when_a_signal_ends_the_program(start, number):
    for text in ("", "answer\r"):
        terminal = start(seconds=60)
        if text:
            terminal.type(text)
            terminal.wait_for("answering")
        assert not edits_lines(terminal)
        time.sleep(0.1)  # Python handles a signal when the call that waits is interrupted
        terminal.process.send_signal(number)
        assert terminal.process.wait(10) == 128 + number
        assert edits_lines(terminal)


def test_the_terminal_is_restored_while_the_program_is_suspended(start):
    terminal = start("-c", SHELL)
    terminal.type("mig")
    terminal.wait_for("mig")
    terminal.type("\x1a")
    terminal.wait_for("suspended True True")
    terminal.wait_for("> mig")
    terminal.type(" fet\r")
    terminal.wait_for("got 'mig fet'")
    terminal.type("answer\r")
    terminal.wait_for("answering")
    terminal.type("\x1a")
    terminal.wait_for("suspended True True")
    time.sleep(0.1)
    terminal.type("amagat\r")
    assert "amagat" not in terminal.wait_for("got 'answer'")
    terminal.wait_for("got 'amagat'")
