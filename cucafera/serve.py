"""The serve command: `python -m cucafera.serve RUN` answers over HTTP, by OpenAI's API and on a web page.

The server itself is `serving/server.py`; this file reads options, keys and the model, and handles signals.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import asyncio
import errno
import importlib.util
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.options import (
    add_device,
    add_run,
    checked_sampling,
    choose_run,
    command_parser,
    loading_line,
    number,
    sampling_settings,
    shown_log,
)
from cucafera.output import announced, notify, protect_output
from cucafera.process import keep_freed_memory, let_threads_wait_briefly
from cucafera.runs.locate import ModelLocation, locate_model, model_name
from cucafera.storage import read_small_file

if TYPE_CHECKING:
    import uvicorn

    from cucafera.generation.engine_thread import EngineThread
    from cucafera.serving.server import Service

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
KEY_VARIABLE = "CUCAFERA_API_KEY"
MAX_NEW_TOKENS = 1024
NEUTRAL_SAMPLING = SamplingConfig(
    max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
)
"""Of a request that sets nothing: the model's own distribution, as OpenAI's API."""
PAGE_SAMPLING = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS)
"""The page begins with the settings of the terminal chat."""
LIMITS = {
    "slots": (1, 1024),
    "queue": (0, 100_000),
    "timeout": (0, 10**6),
    "drain": (0, 10**6),
    "max_body": (1000, 10**9),
}
"""Bounds of options."""
ORIGIN = re.compile(r"\*|https?://[^/\s?#]+")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FLUSH_SECONDS = 2
"""Time for the last answers to reach their clients after the engine has drained."""


def main() -> None:
    """Load a model, and answer requests until a signal."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    protect_output()
    arguments = command_line_parser().parse_args()
    try:
        sys.exit(serve(arguments, os.environ))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def serve(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Serve as the command line says; returns the exit code.

    Raises:
        UserError: an option is out of bounds, the address cannot be used, or the model cannot be loaded.
    """
    check_options(arguments)
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        raise UserError("serving needs starlette and uvicorn: pip install '.[serve]'")
    keys = api_keys(arguments, environment)
    choose_run("serve", arguments)
    location = locate_model(arguments.run)
    with listening_socket(arguments.host, arguments.port) as listener:
        check_exposure(arguments, listener, bool(keys))
        with announced(loading_line(arguments.run, location), sys.stderr), shown_log(sys.stderr):
            service, engine = load_service(arguments, location, keys, listener)
        for note in service_notes(arguments, service):
            print(f"{note}.", file=sys.stderr)
        with engine:
            return run_server(arguments, service, listener)


def check_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that is out of bounds."""
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(arguments, name) <= high:
            option = f"--{name.replace('_', '-')} is {getattr(arguments, name):g}"
            raise UserError(f"{option}; it must be from {low:,} to {high:,}")
    if not 0 <= arguments.port < 1 << 16:
        raise UserError(f"--port is {arguments.port}; it must be from 0 (any free port) to 65535")
    for origin in arguments.cors:
        if not ORIGIN.fullmatch(origin):
            raise UserError(f"--cors {origin}: an origin is written as https://example.org, without a path")
    sampling_with(NEUTRAL_SAMPLING, arguments)
    if arguments.api_key_file is not None and arguments.no_api_key:
        raise UserError("--no-api-key and --api-key-file exclude each other")


def sampling_with(default: SamplingConfig, arguments: argparse.Namespace) -> SamplingConfig:
    """Return the sampling of the options that are given, and of a default. Raises UserError."""
    given = {name: getattr(arguments, name) for name in vars(default) if name != "stop"}
    return checked_sampling(vars(default) | {name: value for name, value in given.items() if value is not None})


def api_keys(arguments: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys of --api-key-file, or of the environment; none with --no-api-key.

    Raises:
        UserError: the file cannot be read, or has no usable key.
    """
    if arguments.no_api_key:
        return ()
    if arguments.api_key_file is None:
        keys = environment.get(KEY_VARIABLE, "").split()
        return _checked_keys(keys, KEY_VARIABLE) if keys else ()
    path = Path(arguments.api_key_file)
    try:
        lines = read_small_file(path.expanduser()).decode().splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"--api-key-file {path} cannot be read: {reason}") from error
    return _checked_keys([line.strip() for line in lines if line.strip()], f"--api-key-file {path}")


def _checked_keys(keys: list[str], source: str) -> tuple[str, ...]:
    if not keys:
        raise UserError(f"{source} is empty: write one key per line, such as the output of `openssl rand -hex 24`")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"{source} has a line that is no key: a key has letters, digits and signs, without spaces")
    return tuple(keys)


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that an address in use is reported before a model is loaded.

    Raises:
        UserError: there is no such host here, or the port is in use or reserved.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no host name"
        raise UserError(f"--host {host} cannot be used: {reason}") from error
    # With the protocol by name: asyncio sets TCP_NODELAY only then, and without it a response takes 40 ms.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host} is no address of this machine; 0.0.0.0 stands for all of them") from error
        raise port_error(host, port, error) from error
    return listener


def start_listening(host: str, listener: socket.socket) -> None:
    """Let clients connect. Raises UserError if another program was faster: both can be bound until one listens."""
    from cucafera.serving.connections import BACKLOG

    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise port_error(host, listener.getsockname()[1], error) from error


def port_error(host: str, port: int, error: OSError) -> UserError:
    """Return the error of a port that cannot be used."""
    return UserError(
        f"port {port} of {host} cannot be used: {error.strerror}. Choose another by --port N; --port 0 takes a free one"
    )


def check_exposure(arguments: argparse.Namespace, listener: socket.socket, has_keys: bool) -> None:
    """Raise UserError if other machines could use the server without a key, and that was not asked for."""
    if not (has_keys or arguments.no_api_key or is_loopback(listener)):
        raise UserError(
            f"--host {arguments.host} lets other machines use the model: give keys by --api-key-file FILE (one per "
            f"line) or {KEY_VARIABLE}, or say with --no-api-key that everyone may"
        )


def is_loopback(listener: socket.socket) -> bool:
    """True if only this machine reaches a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def load_service(
    arguments: argparse.Namespace, location: ModelLocation, keys: tuple[str, ...], listener: socket.socket
) -> "tuple[Service, EngineThread]":
    """Load the model, start its engine, and return the server's routes.

    Raises:
        UserError: the model cannot be loaded, is not trained on conversations but has --system, or --collect names a
            file that cannot be written.
    """
    from cucafera.generation.engine_thread import EngineThread
    from cucafera.interop.loaded import load_model
    from cucafera.serving.collected import CollectedRows
    from cucafera.serving.openai_api import MAX_CHOICES, ServedModel
    from cucafera.serving.server import Access, Service

    name = model_name(arguments.run, location)
    collected = CollectedRows(Path(arguments.collect).expanduser(), name) if arguments.collect else None
    model = load_model(arguments.run, location, arguments.device, arguments.slots)
    if arguments.system and not model.chats:
        raise UserError(f"--system needs a model that was trained on conversations; {arguments.run} was not")
    for note in (model.description, *(f"{note}." for note in model.notes)):
        print(note, file=sys.stderr)
    engine = EngineThread(model.engine, arguments.queue, arguments.timeout or None)
    served = ServedModel(
        name=name,
        tokenizer=model.tokenizer,
        context=engine.context,
        chats=model.chats,
        sampling=sampling_with(NEUTRAL_SAMPLING, arguments),
        system=(arguments.system or "").strip(),
        max_choices=min(MAX_CHOICES, engine.slots + arguments.queue),
    )
    access = Access(
        keys, allowed_hosts(arguments.host, listener, bool(keys)), tuple(arguments.cors), arguments.max_body
    )
    page_sampling = sampling_with(PAGE_SAMPLING, arguments)
    page_sampling = replace(page_sampling, max_new_tokens=min(page_sampling.max_new_tokens, engine.context))
    return Service(engine, served, access, page_sampling, collected, arguments.log_texts), engine


def allowed_hosts(host: str, listener: socket.socket, has_keys: bool) -> frozenset[str] | None:
    """Return the host names that a server without keys on this machine answers to; None: any."""
    if has_keys or not is_loopback(listener):
        return None
    address = listener.getsockname()[0]
    own = {host.lower(), f"[{address}]" if ":" in address else address}
    return frozenset({"localhost", "127.0.0.1", "[::1]", *own})


def service_notes(arguments: argparse.Namespace, service: "Service") -> list[str]:
    """Return what an operator should know, as sentences without their ends."""
    notes = []
    if not service.model.chats:
        notes.append("This is a base model, which continues texts: only /v1/completions answers")
    path = arguments.api_key_file
    if path is not None and Path(path).expanduser().stat().st_mode & 0o077:
        notes.append(f"{path} can be read by other users of this machine: chmod 600 {path} prevents that")
    if arguments.log_texts:
        notes.append("The log has the texts of prompts and answers")
    return notes


def run_server(arguments: argparse.Namespace, service: "Service", listener: socket.socket) -> int:
    """Serve until a signal, drain, and return the exit code."""
    from cucafera.serving.connections import http_server

    start_log()
    start_listening(arguments.host, listener)  # clients are answered as soon as the event loop runs
    address = shown_address(arguments.host, listener)
    key = "with a key: Authorization: Bearer KEY" if service.access.keys else "no key is needed"
    lines = [f"Page: {address}/", f"API:  {address}/v1, model {service.model.name}, {key}"]
    if arguments.collect:
        lines.append(f"Choices on the page are appended to {arguments.collect}")
    lines.append("Ctrl-C stops it.")
    shutdown = Shutdown(service, http_server(service.app()), arguments.drain)
    return asyncio.run(shutdown.serve(listener, lambda: print("\n".join(lines), flush=True)))


def start_log() -> None:
    """Print the package's log messages with their time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("cucafera")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def shown_address(host: str, listener: socket.socket) -> str:
    """Return the address that a person types."""
    bound, port = listener.getsockname()[:2]
    name = own_address() if ipaddress.ip_address(bound.partition("%")[0]).is_unspecified else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def own_address() -> str:
    """Return the address of this machine in its network, or its name if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation: this chooses a route, and sends nothing
        except OSError:
            return socket.gethostname()
        address: str = probe.getsockname()[0]
        return address


class Shutdown:
    """Ends a server in good order: running requests finish within a limit, and new ones get 503.

    A second SIGINT or SIGTERM ends the process at once. SIGHUP never counts as the second: of a closed terminal, the
    shell and the system each send one.

    Args:
        service: The routes.
        server: Their server.
        seconds: Limit of the running requests.
    """

    def __init__(self, service: "Service", server: "uvicorn.Server", seconds: float) -> None:
        self._service = service
        self._server = server
        self._seconds = seconds
        self._exit_code = 0
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, listener: socket.socket, announce: Callable[[], None]) -> int:
        """Serve on a socket until a signal; returns the exit code.

        Args:
            listener: The socket, which listens.
            announce: Prints the address, once a signal would drain.
        """
        loop = asyncio.get_running_loop()
        for received in STOP_SIGNALS:
            if signal.getsignal(received) != signal.SIG_IGN:  # as SIGHUP is by nohup
                loop.add_signal_handler(received, self._on_signal, received)
        announce()
        await self._server.serve(sockets=[listener])
        return self._exit_code

    def _on_signal(self, received: signal.Signals) -> None:
        if self._draining is None:
            self._exit_code = 128 + received
            self._service.is_stopping = True
            again = "Ctrl-C again ends it" if received == signal.SIGINT else "A second signal ends it"
            limit = f"at most {self._seconds:g} s"
            notify(f"{received.name} received: finishing the running requests, {limit}. {again} at once.")
            self._draining = asyncio.ensure_future(self._drain())
        elif received != signal.SIGHUP:
            os._exit(128 + received)

    async def _drain(self) -> None:
        if not await asyncio.to_thread(self._service.engine.drain, self._seconds):
            log.warning("Requests that were still running after %g s were cut off", self._seconds)
        end = time.monotonic() + FLUSH_SECONDS
        while self._service.active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self._server.should_exit = True


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "serve",
        description="Serve the model of a run, of a Hugging Face folder or of a .gguf file over HTTP: by OpenAI's API "
        "at /v1, and on a web page.\nNeeds pip install '.[serve]'.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser, "a run folder (its best checkpoint), a checkpoint, a Hugging Face folder or name, or a .gguf file")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: %(default)s)")
    parser.add_argument("--system", metavar="TEXT", help="system message of conversations that have none")
    parser.add_argument(
        "--collect",
        metavar="FILE",
        help="append which answers people prefer on the page to FILE.jsonl, and their ratings to FILE.ratings.jsonl",
    )
    parser.add_argument("--log-texts", action="store_true", help="write prompts and answers into the log")
    add_device(parser)
    _add_access(parser.add_argument_group("access"))
    _add_limits(parser.add_argument_group("limits"))
    _add_sampling(parser.add_argument_group("sampling of a request that does not set it"))
    return parser


def _add_access(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"one API key per line; or the environment variable {KEY_VARIABLE}. Other machines need a key",
    )
    group.add_argument("--no-api-key", action="store_true", help="everyone who reaches the address may use the model")
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin read answers, such as https://example.org; may be repeated (default: none)",
    )


def _add_limits(group: argparse._ActionsContainer) -> None:
    options: list[tuple[str, type[int] | type[float], float, str]] = [
        ("--slots", int, 16, "requests that are answered at a time; each has a KV cache for the whole context"),
        ("--queue", int, 64, "requests that may wait for a slot; further ones get 429"),
        ("--timeout", float, 120, "seconds that a request may wait for a slot; 0: no limit"),
        ("--drain", float, 30, "seconds in which running requests may finish after SIGTERM or Ctrl-C"),
        ("--max-body", int, 2_000_000, "bytes of the largest request"),
    ]
    for name, kind, default, meaning in options:
        group.add_argument(name, type=kind, default=default, metavar="N", help=f"{meaning} (default: %(default)s)")


def _add_sampling(group: argparse._ActionsContainer) -> None:
    """Add an option for each setting of the sampling but stop texts, without a default: page and API have their own."""
    for name, meaning in sampling_settings().items():
        if name != "stop":
            api, page = getattr(NEUTRAL_SAMPLING, name), getattr(PAGE_SAMPLING, name)
            default = f"{api}" if api == page else f"API {api}, as OpenAI's; page {page}"
            option = "--" + name.replace("_", "-")
            group.add_argument(option, type=number, metavar="X", help=f"{meaning} (default: {default})")


if __name__ == "__main__":
    main()
