"""Outputs that cannot end a command, and texts without control characters."""

import errno
import io
import logging
import os
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from cucafera.output import Output, RunLog, bar_output, printable, protect_output, report_lost_output
from tests.support import run_command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("right\rwrong", "right\\x0dwrong"),
        ("a\x00b\x08c\x0bd\x0ce\x7f", "a\\x00b\\x08c\\x0bd\\x0ce\\x7f"),
        ("\x80\x9b31m\x9f", "\\x80\\x9b31m\\x9f"),
        ("\u202efdp.exe\u202c \u2066a\u2069", "\\u202efdp.exe\\u202c \\u2066a\\u2069"),
        ("line\u2028line\u2029", "line\\u2028line\\u2029"),
        ("\ud83d, caf\udce9", "\\ud83d, caf\\udce9"),
        ("two\nlines\tand a tab: l\u00b7l, \u00e0, \U0001f44d\u200d, \u05d0", None),
    ],
)
def test_control_characters_are_shown_as_escapes_and_all_other_text_as_it_is(text, shown):
    assert printable(text) == (text if shown is None else shown)


def pipe_without_reader() -> io.TextIOWrapper:
    ours, theirs = os.pipe()
    os.close(ours)
    return os.fdopen(theirs, "w")


def full_disk() -> io.TextIOWrapper:
    return Path("/dev/full").open("w")


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (pipe_without_reader, "Broken pipe"),
        (full_disk, "No space left on device"),
        (Broken, "Input/output error"),
    ],
)
def test_an_output_that_is_lost_fails_no_write_and_is_logged_once(stream, reason, caplog):
    output = Output(stream(), "Standard output")
    for _ in range(3):
        print("a line", file=output)
        output.flush()
    output.end()
    assert output.lost == reason
    assert [record.getMessage() for record in caplog.records] == [
        f"Standard output cannot be written: {reason}. The log continues without it"
    ]


def test_a_closed_pipe_is_replaced_by_the_null_device_for_libraries_too():
    stream = pipe_without_reader()
    output = Output(stream, "Standard output")
    print("a line", file=output)
    os.write(stream.fileno(), b"of a library")
    stream.close()


def test_a_disk_that_has_space_again_is_written_to(tmp_path):
    class Full(io.FileIO):
        is_full = True

        def write(self, content):
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    file = Full(tmp_path / "log", "w")
    output = Output(io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8"), "Standard output")
    print("first", file=output)
    file.is_full = False
    print("second", file=output)
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_lacks_a_character_loses_nothing_else(encoding):
    content = io.BytesIO()
    output = Output(io.TextIOWrapper(content, encoding=encoding), "Standard output")
    print("cel\u00b7la \u2026 \udc80", file=output)
    assert content.getvalue().decode(encoding).startswith("cel")
    assert content.getvalue().endswith(b"\\udc80\n")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (pipe_without_reader, ""),
        (full_disk, "Standard output cannot be written: No space left on device\n"),
    ],
)
def test_a_command_that_needs_its_output_ends_with_code_1(monkeypatch, capsys, stream, message):
    monkeypatch.setattr(sys, "stdout", stream())
    protect_output(is_required=True)
    with pytest.raises(SystemExit) as end:
        print("a line")
    print("another line is no second end")
    assert end.value.code == 1
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\r 50%|#", "\r 50%|#"),
        ("\x1b[A\x1b[A", "\x1b[A\x1b[A"),
        ("\r\x1b[2Jevil\r", "\r\\x1b[2Jevil\\x0d"),
        ("\x1b[Aevil", "\\x1b[Aevil"),
    ],
)
def test_a_bar_moves_the_cursor_and_its_texts_do_not(text, shown):
    stream = io.StringIO()
    bar_output(Output(stream, "Standard output")).write(text)
    assert stream.getvalue() == shown


def test_a_bar_of_tqdm_is_drawn_without_the_control_characters_of_its_title():
    stream = io.StringIO()
    with tqdm(total=2, desc="\x1b[31mnet", file=bar_output(Output(stream, "Standard output"))) as bar:
        bar.update()
        bar.set_postfix_str("\x9b")
    drawn = stream.getvalue()
    assert drawn.count("\r") > 1 and "\\x1b[31mnet" in drawn and "\\x9b" in drawn
    assert "\x1b" not in drawn and "\x9b" not in drawn


def test_an_output_that_was_closed_at_the_start_is_logged_when_there_is_a_log(monkeypatch, caplog):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        protect_output()
        print("a line")
        report_lost_output()
    assert not caplog.records
    report_lost_output()
    report_lost_output()
    assert [record.getMessage().split(" cannot")[0] for record in caplog.records] == [
        "Standard output", "Standard error",
    ]  # fmt: skip


CLOSED = """
import os, sys
for number, name in enumerate(("stdin", "stdout", "stderr")):
    os.close(number)
    setattr(sys, name, None)
from cucafera.output import protect_output
protect_output()
print("a line")
descriptor = os.open("file", os.O_WRONLY | os.O_CREAT)
os.write(1, b"of a library")
os.write(2, b"of a library")
os.write(descriptor, b"content")
"""


def test_no_file_takes_the_place_of_a_closed_output(tmp_path):
    (tmp_path / "closed.py").write_text(CLOSED)
    assert run_command("closed.py", cwd=tmp_path).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.fixture
def run_log(tmp_path):
    handler = RunLog(tmp_path / "run.log", delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    yield handler
    handler.close()


def record(message: str, **facts) -> logging.LogRecord:
    return logging.LogRecord("name", logging.INFO, "path", 1, message, None, facts.get("exc_info"))


def test_the_log_holds_no_control_characters_and_every_message(run_log, tmp_path):
    for message in ("\x1b[2J", "a\rb", "\udc80", "cel\u00b7la"):
        run_log.emit(record(message))
    try:
        raise ValueError("\x1b[31m")
    except ValueError:
        run_log.emit(record("trace", exc_info=sys.exc_info()))
    content = (tmp_path / "run.log").read_bytes().decode()
    assert content.startswith("\\x1b[2J\na\\x0db\n\\udc80\ncel\u00b7la\ntrace\nTraceback")
    assert "\x1b" not in content


def test_a_log_on_a_disk_that_fails_is_reported_once_and_continued(run_log, tmp_path, capsys, monkeypatch):
    def fail(handler):
        raise OSError(errno.EIO, "Input/output error")

    run_log.emit(record("first"))
    with monkeypatch.context() as patch:
        patch.setattr(logging.FileHandler, "flush", fail)
        run_log.emit(record("second"))
        run_log.emit(record("third"))
    run_log.emit(record("fourth"))
    assert capsys.readouterr().err.count("run.log cannot be written: Input/output error") == 1
    assert (tmp_path / "run.log").read_text() == "first\nsecond\nthird\nfourth\n"


def test_a_symlink_at_the_path_of_the_log_is_not_followed(run_log, tmp_path):
    (tmp_path / "run.log").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="it is a symlink"):
        run_log.emit(record("message"))
    assert not (tmp_path / "other").exists()
