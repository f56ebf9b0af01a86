"""The Telegram command: `python -m cucafera.telegram RUN` lets people talk to a trained model in Telegram.

The bot itself is `serving.telegram_bot`; this file reads options and the token, loads the model, and ends in good
order on SIGTERM and Ctrl-C.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import asyncio
import dataclasses
import logging
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast
from urllib.parse import quote, urlsplit

from cucafera.config.errors import UserError
from cucafera.options import (
    add_device,
    add_run,
    add_sampling,
    choose_run,
    command_parser,
    loading_line,
    sampling_of,
)
from cucafera.output import protect_output
from cucafera.process import keep_freed_memory, let_threads_wait_briefly, raise_on_interrupt
from cucafera.runs.locate import locate_model
from cucafera.storage import read_small_file

if TYPE_CHECKING:
    from cucafera.generation.session import ChatSession
    from cucafera.serving.telegram_bot import BotSettings
    from cucafera.serving.unanswered import UnansweredFile

log = logging.getLogger("cucafera.telegram")  # also as __main__

EXIT_INTERRUPTED = 130
TOKEN_VARIABLE = "TELEGRAM_BOT_TOKEN"
TOKEN = re.compile(r"\d+:[\w-]+", re.ASCII)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INSTALL = "pip install '.[telegram]'"
EPILOG = f"""The bot's token, which @BotFather gives, is read from the environment variable {TOKEN_VARIABLE} or from
--token-file; never give it on the command line, which other users of the machine can see.

A person that is not allowed is answered with an id: start the bot without --owner and --allow,
write to it, and start it again with --owner and that id."""


def main() -> None:
    """Run the bot until SIGTERM or Ctrl-C."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    protect_output()
    arguments = command_line_parser().parse_args()
    try:
        sys.exit(telegram(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def telegram(arguments: argparse.Namespace) -> int:
    """Run the bot as the command line says; return the exit code.

    Raises:
        UserError: an option is out of bounds, the model cannot be loaded or does not chat, or the token is refused.
    """
    sampling = sampling_of(arguments)
    for name, least in (("slots", 1), ("per_minute", 1), ("drain", 0)):
        if (value := getattr(arguments, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if arguments.api_url is not None:
        check_url(arguments.api_url)
    token = read_token(arguments.token_file, os.environ)
    choose_run("telegram", arguments)
    location = locate_model(arguments.run)
    try:
        from cucafera.serving.telegram_bot import BotSettings, most_turns
    except ModuleNotFoundError as error:
        raise UserError(f"The bot needs the package {error.name}, which is not installed: {INSTALL}") from error
    from cucafera.serving.unanswered import UnansweredFile

    log_without(token)
    unanswered = UnansweredFile(arguments.unanswered)
    settings = BotSettings(
        allowed=frozenset(arguments.allow),
        anyone=arguments.anyone,
        owners=frozenset(arguments.owner),
        per_minute=arguments.per_minute,
        slots=arguments.slots,
        logs_texts=arguments.log_texts,
    )
    asyncio.run(_check_token(token, arguments.api_url))  # before a model is loaded, which may take minutes
    log.info(loading_line(arguments.run, location))
    from cucafera.generation.engine_thread import EngineThread
    from cucafera.generation.session import ChatSession
    from cucafera.interop.loaded import load_model

    model = load_model(arguments.run, location, arguments.device, arguments.slots)
    if not model.chats:
        raise UserError(f"The bot needs a model that was trained on conversations; {arguments.run} was not")
    for note in (model.description, *model.notes, about_access(settings)):
        log.info(note)
    raise_on_interrupt()
    with EngineThread(model.engine) as engine:

        def new_session() -> ChatSession:
            session = ChatSession(engine, model.tokenizer, sampling, arguments.seed)
            session.system = (arguments.system or "").strip()
            return session

        # A GGUF file has its own number of slots.
        settings = dataclasses.replace(settings, slots=engine.slots, turns=most_turns(engine.context))
        asyncio.run(_run(token, arguments, new_session, settings, unanswered))
    return 0


async def _check_token(token: str, api_url: str | None) -> None:
    """Raise UserError if Telegram refuses the token; other failures may pass, and are only logged."""
    from aiogram.exceptions import TelegramAPIError
    from aiogram.methods import GetMe

    from cucafera.serving.telegram_api import FAILURES, call_once, reason
    from cucafera.serving.telegram_bot import create_bot

    bot = create_bot(token, api_url)
    try:
        await call_once(bot, GetMe())
    except (TelegramAPIError, *FAILURES) as error:
        log.warning("Telegram: %s", reason(error))
    finally:
        await bot.session.close()


async def _run(
    token: str,
    arguments: argparse.Namespace,
    new_session: "Callable[[], ChatSession]",
    settings: "BotSettings",
    unanswered: "UnansweredFile",
) -> None:
    """Run the bot until a signal; raises UserError as `TelegramBot.run` does."""
    from cucafera.serving.telegram_bot import TelegramBot, create_bot

    stopping = asyncio.Event()

    def stop(number: int) -> None:
        if stopping.is_set() and number != signal.SIGHUP:  # a terminal that is closed sends several
            os._exit(128 + number)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup, or in the background
            loop.add_signal_handler(number, stop, number)
    bot = create_bot(token, arguments.api_url)
    try:
        await TelegramBot(bot, new_session, settings, unanswered).run(stopping, arguments.drain)
    finally:
        await bot.session.close()


def about_access(settings: "BotSettings") -> str:
    """Return the sentence that says whom the bot answers."""
    if settings.anyone:
        return "The bot answers everyone in Telegram"
    if settings.allowed or settings.owners:
        ids = sorted(settings.allowed | settings.owners)
        return f"The bot answers {', '.join(map(str, ids))} and no one else"
    return "The bot answers no one yet: write to it, and start it again with --owner and the number that it answers"


def check_url(url: str) -> None:
    """Raise UserError for what is not the URL of a server."""
    try:
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_server = False
    if not is_server or set(url) & set("{}?#@"):
        raise UserError(f"--api-url {url} is not the URL of a Bot API server, such as http://127.0.0.1:8081")


def read_token(path: Path | None, environment: MutableMapping[str, str]) -> str:
    """Return the token of the bot, and remove it from the environment.

    Args:
        path: A file that holds only the token; None: it is in the environment.
        environment: The environment variables.

    Raises:
        UserError: there is none, or it has not the form of a token. The message does not contain it.
    """
    token, source = environment.pop(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
    if path is not None:
        source = str(path)
        try:
            token = read_small_file(path).decode(errors="replace").strip()
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                print(f"Other users can read the token: chmod 600 {path}", file=sys.stderr)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not token:
        raise UserError(f"The bot's token is missing: set {TOKEN_VARIABLE}, or give --token-file; @BotFather gives one")
    if not TOKEN.fullmatch(token):
        raise UserError(f"{source} does not hold a token, such as 123456:ABC-xyz; @BotFather gives one")
    return token


class OutputWithoutSecret:
    """Standard output or standard error without the token.

    Requests of the Bot API have it in their URL, and so may the exceptions of what sends them, the errors that are
    printed for users, and the descriptions with which a server refuses requests.

    Args:
        output: Gets the texts.
        secret: What is replaced.
    """

    def __init__(self, output: TextIO, secret: str) -> None:
        self._output = output
        self._secret = re.compile("|".join(map(re.escape, (secret, quote(secret, safe=""), secret.partition(":")[2]))))

    def write(self, text: str) -> int:
        """Write a text with a placeholder for the secret, which must be in one write."""
        self._output.write(self._secret.sub("TOKEN", text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts as `write` does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def log_without(token: str) -> None:
    """Log to standard error; what is logged and printed from now on, stack traces too, is without the token."""
    sys.stdout = cast(TextIO, OutputWithoutSecret(sys.stdout, token))
    sys.stderr = cast(TextIO, OutputWithoutSecret(sys.stderr, token))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("cucafera").setLevel(logging.INFO)


def telegram_id(text: str) -> int:
    """Return the id in a text. Raises ArgumentTypeError if it is none."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is no number: the bot answers people with theirs, and groups have one too"
        ) from None


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "telegram",
        description="Let people talk to a chat model in Telegram.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser, "a run folder (its best checkpoint), a checkpoint, a Hugging Face folder or name, or a .gguf file")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="a file that holds the bot's token")
    people = parser.add_argument_group("whom the bot answers")
    repeated = "may be repeated"
    people.add_argument(
        "--owner", type=telegram_id, action="append", default=[], metavar="ID",
        help=f"a user that may also set the system message of a chat, by /system; {repeated}",
    )  # fmt: skip
    people.add_argument(
        "--allow", type=telegram_id, action="append", default=[], metavar="ID", help=f"a user or a group; {repeated}"
    )
    people.add_argument("--anyone", action="store_true", help="everyone in Telegram, at your machine's expense")
    people.add_argument(
        "--per-minute", type=int, default=20, metavar="N", help="messages per user and minute (default: %(default)s)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message: how the model should behave")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed: the same seed gives the same answers")
    add_device(parser)
    parser.add_argument(
        "--slots", type=int, default=4, metavar="N", help="answers that are generated at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--unanswered", type=Path, metavar="FILE",
        help="keep messages in this file until they are answered: a bot that was killed answers them when it is back",
    )  # fmt: skip
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS",
        help="time for answers after SIGTERM or Ctrl-C; a second signal ends at once (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--log-texts", action="store_true", help="log messages and answers, not only their lengths")
    parser.add_argument("--api-url", metavar="URL", help="a Bot API server of your own (default: Telegram's)")
    add_sampling(parser, max_new_tokens=256)
    return parser


if __name__ == "__main__":
    main()
