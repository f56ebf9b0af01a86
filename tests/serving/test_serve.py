"""The serve command: its options, keys and addresses, what it prints, and signals."""

import contextlib
import http.client
import ipaddress
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import pytest

from cucafera import serve
from cucafera.config.errors import UserError
from cucafera.runs.locate import ModelLocation, model_name
from cucafera.serve import (
    KEY_VARIABLE,
    NEUTRAL_SAMPLING,
    PAGE_SAMPLING,
    allowed_hosts,
    api_keys,
    command_line_parser,
    is_loopback,
    listening_socket,
    own_address,
    sampling_with,
    service_notes,
    shown_address,
    start_listening,
)
from tests.imports import imported_packages
from tests.support import Process


def parsed(*arguments: str):
    return command_line_parser().parse_args(["chat", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        (["outputs/chat", "--port", "70000"], "--port is 70000; it must be from 0 (any free port) to 65535"),
        (["outputs/chat", "--slots", "0"], "--slots is 0; it must be from 1 to 1,024"),
        (["outputs/chat", "--timeout", "nan"], "--timeout is nan; it must be from 0 to 1,000,000"),
        (["outputs/chat", "--max-body", "10"], "--max-body is 10; it must be from 1,000 to 1,000,000,000"),
        (["outputs/chat", "--temperature", "-1"], "temperature is -1; it must be 0 or at least 0.001"),
        (["outputs/chat", "--cors", "https://a.b/c"], "--cors https://a.b/c: an origin is written as"),
        (["outputs/chat", "--host", "0.0.0.0", "--port", "0"], "--host 0.0.0.0 lets other machines use the model"),
        (["outputs/chat", "--host", "no such host"], "--host no such host cannot be used"),
        (["outputs/chat", "--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read: No such file"),
        (["outputs/chat", "--api-key-file", "x", "--no-api-key"], "--no-api-key and --api-key-file exclude each other"),
        (["outputs/chat", "--port", "0", "--collect", "x.json"], "--collect x.json: give the name of a .jsonl file"),
        (["outputs/base", "--port", "0", "--system", "x"], "--system needs a model that was trained on conversations"),
        (["corpus.jsonl"], "corpus.jsonl is not a checkpoint"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_refused_in_a_sentence(runs, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "argv", ["serve", *arguments])
    monkeypatch.setattr(serve, "protect_output", lambda: None)
    with pytest.raises(SystemExit) as exited:
        serve.main()
    printed = capsys.readouterr().err
    assert exited.value.code == 2 and message in printed and "Traceback" not in printed


def test_a_port_in_use_is_refused_before_a_model_is_loaded(runs, monkeypatch):
    monkeypatch.chdir(runs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used: Address already in use. Choose"):
            serve.serve(parsed("--port", str(port)), {})


def test_of_two_servers_that_start_together_the_slower_one_is_refused():
    with listening_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with listening_socket("127.0.0.1", port) as second:  # neither listens yet
            start_listening("127.0.0.1", first)
            with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used: .*--port 0 takes a free"):
                start_listening("127.0.0.1", second)


def test_an_address_of_another_machine_is_refused_as_such():
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.7 is no address of this machine"):
        listening_socket("192.0.2.7", 0)


def test_a_missing_extra_is_named(runs, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"serving needs starlette and uvicorn: pip install '\.\[serve\]'"):
        serve.serve(parsed(), {})


def test_keys_are_lines_of_a_file_or_words_of_the_environment(tmp_path, chat):
    path = tmp_path / "keys"
    path.write_text("one\n\n two \r\n")
    assert api_keys(parsed("--api-key-file", str(path)), {KEY_VARIABLE: "other"}) == ("one", "two")
    assert api_keys(parsed(), {KEY_VARIABLE: "one two"}) == ("one", "two")
    assert api_keys(parsed("--no-api-key"), {KEY_VARIABLE: "one"}) == api_keys(parsed(), {}) == ()
    path.chmod(0o644)
    assert "chmod 600" in service_notes(parsed("--api-key-file", str(path)), chat.service)[0]
    path.chmod(0o600)
    assert service_notes(parsed("--api-key-file", str(path)), chat.service) == []
    for content in (b"", b"\n \n"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is empty: write one key per line"):
            api_keys(parsed("--api-key-file", str(path)), {})
    for content, problem in (
        (b"a b", "has a line that is no key"),
        ("clé".encode(), "no key"),
        (b"\xff", "not a text"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            api_keys(parsed("--api-key-file", str(path)), {})


@pytest.mark.parametrize(
    ("host", "has_keys", "expected"),
    [
        ("127.0.0.1", False, {"localhost", "127.0.0.1", "[::1]"}),
        ("127.0.0.5", False, {"localhost", "127.0.0.1", "[::1]", "127.0.0.5"}),
        ("127.0.0.1", True, None),
        ("0.0.0.0", False, None),
    ],
)
def test_without_keys_a_loopback_server_answers_to_names_of_this_machine(host, has_keys, expected):
    with listening_socket(host, 0) as listener:
        assert allowed_hosts(host, listener, has_keys) == expected


def test_the_printed_address_can_be_typed():
    with listening_socket("127.0.0.1", 0) as listener:
        assert shown_address("localhost", listener) == f"http://localhost:{listener.getsockname()[1]}"
    with listening_socket("0.0.0.0", 0) as listener:
        host = shown_address("0.0.0.0", listener).removeprefix("http://").rpartition(":")[0]
        assert host == own_address() and (host == socket.gethostname() or ipaddress.ip_address(host).version == 4)
    if socket.has_ipv6:
        with contextlib.suppress(UserError), listening_socket("::1", 0) as listener:  # a machine may have no address
            assert shown_address("::1", listener) == f"http://[::1]:{listener.getsockname()[1]}"
            assert is_loopback(listener) and "[::1]" in (allowed_hosts("::1", listener, False) or ())


def test_a_model_is_named_after_its_run_folder_or_file(tmp_path):
    run = tmp_path / "finetune"
    assert model_name(str(run), ModelLocation("run", run)) == "finetune"
    assert model_name("x", ModelLocation("checkpoint", run / "checkpoints" / "step-1.ckpt")) == "finetune"
    assert model_name("x", ModelLocation("gguf", tmp_path / "small.q8.gguf")) == "small.q8"
    assert model_name("owner/name@main", ModelLocation("hugging_face", None)) == "owner/name"


def test_page_and_api_begin_with_their_own_sampling_unless_an_option_sets_it():
    arguments = parsed("--temperature", "0.5", "--max-new-tokens", "9")
    for default in (NEUTRAL_SAMPLING, PAGE_SAMPLING):
        changed = sampling_with(default, arguments)
        assert vars(changed) == vars(default) | {"temperature": 0.5, "max_new_tokens": 9}
    assert sampling_with(NEUTRAL_SAMPLING, parsed()).temperature == 1.0
    assert sampling_with(PAGE_SAMPLING, parsed()).repetition_penalty == 1.2


@pytest.mark.parametrize("arguments", [["--help"], ["outputs/nowhere"], ["outputs/chat", "--port", "-1"]], ids=" ".join)
def test_help_and_refusals_come_before_anything_heavy_is_imported(runs, arguments):
    code = 0 if arguments == ["--help"] else 2
    packages = imported_packages("serve", arguments, runs, code)
    assert not packages & {"torch", "numpy", "tokenizers", "starlette", "uvicorn", "lightning", "hydra"}


# The program


def test_the_end_of_the_program_does_not_wait_for_its_worker():
    program = "import time; from cucafera.serving.server import Worker; Worker().submit(lambda: time.sleep(60))"
    subprocess.run([sys.executable, "-c", program], timeout=40, check=True)


class Served:
    """The command on a free port.

    Args:
        process: Its process.
        outputs: Its stdout and stderr.
    """

    def __init__(self, process: Process, *outputs: IO[str]) -> None:
        self.process = process
        self.stdout, self.stderr = outputs
        self.printed = [self.stdout.readline() for _ in range(2)]
        self.address = self.printed[0].removeprefix("Page: ").strip()
        self.log = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.stderr:
            self.log += line

    def request(self, body: dict) -> http.client.HTTPResponse:
        self.connection = http.client.HTTPConnection(self.address.split("/")[2], timeout=30)
        content = {"model": "chat", "messages": [{"role": "user", "content": "Hola"}], "temperature": 0} | body
        self.connection.request(
            "POST", "/v1/chat/completions", json.dumps(content), {"Content-Type": "application/json"}
        )
        return self.connection.getresponse()

    def end(self) -> int:
        code = self.process.wait(30)
        self.reader.join(10)
        return code


@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_program_prints_its_address_answers_and_ends_with_the_signal(runs, received):
    process = Process(["-m", "cucafera.serve", "chat", "--port", "0", "--no-api-key"], runs, merged=False)
    served = Served(process, *process.outputs)
    assert served.printed[0].startswith("Page: http://127.0.0.1:")
    assert served.printed[1] == f"API:  {served.address}v1, model chat, no key is needed\n"
    response = served.request({"max_tokens": 2})
    assert response.status == 200 and response.getheader("server") is None
    assert json.load(response)["usage"]["completion_tokens"] == 2
    served.connection.close()
    served.process.send_signal(received)
    assert served.end() == 128 + received
    assert f"{received.name} received: finishing the running requests, at most 30 s." in served.log
    assert "POST /v1/chat/completions 200" in served.log and "Traceback" not in served.log


ENDLESS = {"max_tokens": 100, "stream": True}
SLOW = """
import time
from cucafera import serve
from cucafera.generation.engine import Engine
step = Engine.step
def slowly(engine):
    time.sleep(0.05)
    return step(engine)
Engine.step = slowly
serve.main()
"""


def slow_server(runs: Path, *arguments: str) -> Served:
    """Start the command with steps of 50 ms."""
    program = runs / "slow_server.py"
    program.write_text(SLOW)
    process = Process([program, "chat", "--port", "0", *arguments], runs, merged=False)
    return Served(process, *process.outputs)


def test_what_runs_at_sigterm_is_finished_and_what_comes_later_gets_503(runs):
    served = slow_server(runs)
    stream = served.request(ENDLESS | {"max_tokens": 40})
    stream.readline()
    served.process.send_signal(signal.SIGTERM)
    refused = served.request({})
    assert refused.status == 503 and json.load(refused)["error"]["code"] == "stopping"
    assert stream.read().endswith(b"data: [DONE]\n\n")
    assert served.end() == 143


def test_the_end_of_the_drain_cuts_off_and_a_second_signal_ends_at_once(runs):
    served = slow_server(runs, "--drain", "0.2")
    stream = served.request(ENDLESS)
    stream.readline()
    served.process.send_signal(signal.SIGTERM)
    assert b'"code":"stopping"' in stream.read()
    assert served.end() == 143 and "were cut off" in served.log
    served = slow_server(runs)
    served.request(ENDLESS).readline()
    served.process.send_signal(signal.SIGINT)
    while "SIGINT received" not in served.log:
        time.sleep(0.01)
    began = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    assert served.end() == 130 and time.monotonic() - began < 2
