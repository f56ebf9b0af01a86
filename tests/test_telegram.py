"""The Telegram command: its options, its token, and the bot with a real model in a process of its own."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cucafera.config.errors import UserError
from cucafera.serving import telegram_messages as say
from cucafera.telegram import check_url, command_line_parser, read_token, telegram
from tests.imports import HEAVY, imported_packages
from tests.serving.bot_api import TOKEN, ThreadedBotApi, bad_gateway, redirected, refused_with_url
from tests.support import Process, run_command

SETTINGS = ("--seed", "1", "--max-new-tokens", "6", "--device", "cpu")


@pytest.fixture
def fake() -> Iterator[ThreadedBotApi]:
    with ThreadedBotApi() as fake:
        yield fake


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TOKEN)


def start(runs: Path, fake: ThreadedBotApi, *arguments: str) -> Process:
    command = ["-m", "cucafera.telegram", "outputs/chat", "--api-url", fake.api.url, *SETTINGS, *arguments]
    return Process(command, runs, merged=False)


def run_telegram(runs: Path, *arguments: str) -> tuple[int, str]:
    """Run the command, which ends by itself; return its exit code and what it printed."""
    result = run_command("-m", "cucafera.telegram", *arguments, cwd=runs)
    assert TOKEN.partition(":")[2] not in result.stdout + result.stderr
    return result.returncode, result.stdout + result.stderr


# With a real model


def test_the_bot_answers_as_the_chat_command_does_and_ends_in_good_order(runs, fake):
    bot = start(runs, fake, "--anyone", "--system", "Sigues breu.")
    api = fake.api
    try:
        fake.do(api.say("/start"))
        fake.do(api.until(lambda: api.texts() == ["Hola, amb què et puc ajudar?"], seconds=60))
        for chat in (7, 8):
            fake.do(api.say("el sol", chat=chat))
        for chat, count in ((7, 2), (8, 1)):
            fake.do(api.received(count, chat))
        fake.do(api.say("la mar " * 100, chat=8))
        fake.do(api.received(2, 8))
        fake.do(api.say("/redo"))
        fake.do(api.received(3))
        fake.do(api.say("/reseteja"))
        fake.do(api.received(4))
        bot.send_signal(signal.SIGTERM)
        output, log = bot.communicate(timeout=60)
    finally:
        bot.kill()
    assert bot.wait(0) == 0
    chat = run_command(
        "-m", "cucafera.chat", "outputs/chat", "--prompt", "el sol", "--system", "Sigues breu.", *SETTINGS, cwd=runs
    )
    answers = api.texts()
    assert answers[1] == api.texts(8)[0] == chat.stdout.strip()
    assert answers[3] == say.FORGOTTEN and api.texts(8)[1] == say.TOO_LONG
    assert output == "" and "https://t.me/cucafera_bot" in log and "The bot answers everyone in Telegram" in log
    assert "Traceback" not in log
    assert not any(secret in log for secret in (TOKEN, TOKEN.partition(":")[2], "el sol", answers[1]))


def test_a_signal_ends_after_the_answers_and_a_second_one_at_once(runs, fake):
    api, kept = fake.api, runs / "unanswered.json"

    def stop_while_sending(signals: int) -> int:
        """Send signals while an answer has not reached Telegram; return the exit code."""
        bot = start(runs, fake, "--owner", "7", "--unanswered", "unanswered.json")
        try:
            fake.do(api.say("/hello"))
            fake.do(api.until(lambda: api.texts()[-1:] == [say.GREETING], seconds=60))
            api.failures["sendMessage"] = [bad_gateway]  # a second until the next try
            fake.do(api.say("el sol"))
            fake.do(api.until(lambda: not api.failures["sendMessage"], seconds=60))
            for _ in range(signals):
                bot.send_signal(signal.SIGINT)
                time.sleep(0.2)
            return bot.wait(30)
        finally:
            bot.kill()

    assert stop_while_sending(signals=1) == 0
    assert len(api.texts()) == 2 and "el sol" not in kept.read_text()
    assert stop_while_sending(signals=2) == 130
    assert len(api.texts()) == 3 and "el sol" in kept.read_text()
    bot = start(runs, fake, "--owner", "7", "--unanswered", "unanswered.json")
    try:
        fake.do(api.until(lambda: len(api.texts()) == 4, seconds=60))
        bot.send_signal(signal.SIGTERM)
        assert bot.wait(30) == 0
    finally:
        bot.kill()
    assert api.texts()[3] == api.texts()[1] and "el sol" not in kept.read_text()  # the same seed, and once


# What is refused


def test_a_refused_token_ends_in_one_sentence_before_a_model_is_loaded(runs, fake, monkeypatch):
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", "4242:AAE-another_secret")
    arguments = ["outputs/chat", "--api-url", fake.api.url]
    assert run_telegram(runs, *arguments) == (
        2,
        "Telegram refuses the bot's token: ask @BotFather for the current one\n",
    )
    assert not imported_packages("telegram", arguments, runs, code=2) & {"torch", *HEAVY}


def test_a_base_model_is_refused(runs, fake):
    code, printed = run_telegram(runs, "outputs/base", "--api-url", fake.api.url)
    assert code == 2
    assert printed.endswith("The bot needs a model that was trained on conversations; outputs/base was not\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/nowhere"], "outputs/nowhere: there is no such run folder or checkpoint"),
        (["outputs/chat", "--top-p", "0"], "top_p is 0; it must be above 0 and at most 1"),
        (["outputs/chat", "--slots", "0"], "--slots is 0; it must be at least 1"),
        (["outputs/chat", "--per-minute", "0"], "--per-minute is 0; it must be at least 1"),
        (["outputs/chat", "--drain", "-1"], "--drain is -1.0; it must be at least 0"),
        (["outputs/chat", "--api-url", "telegram.org"], "--api-url telegram.org is not the URL of a Bot API server"),
        (["outputs/chat", "--token-file", "nowhere"], "nowhere cannot be read: No such file or directory"),
    ],
)
def test_refusals_say_what_to_change(runs, arguments, message, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError) as refusal:
        telegram(command_line_parser().parse_args(arguments))
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("arguments", [["--help"], ["outputs/chat", "--top-p", "0"], ["outputs/nowhere"]])
def test_help_and_refusals_import_nothing_heavy(runs, arguments):
    code = 0 if "--help" in arguments else 2
    packages = imported_packages("telegram", arguments, runs, code)
    assert not packages & {"torch", "tokenizers", "aiogram", "aiohttp", "pydantic", *HEAVY}


def test_without_aiogram_one_sentence_says_how_to_install_it(runs):
    program = "import sys; sys.modules['aiogram'] = None; from cucafera.telegram import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "outputs/chat"], cwd=runs, capture_output=True, text=True, timeout=60
    )
    expected = "The bot needs the package aiogram, which is not installed: pip install '.[telegram]'\n"
    assert (result.returncode, result.stdout + result.stderr) == (2, expected)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8081", "https://api.example.org/prefix", "http://[::1]:8081/"])
def test_urls_of_servers_are_taken(url):
    check_url(url)


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x", "http://", "http://x:y", "http://x/{y}", "http://a:b@x", "http://x?y"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(UserError, match="is not the URL of a Bot API server"):
        check_url(url)


# The token


def test_the_token_is_from_a_file_or_from_the_environment(tmp_path, capsys):
    environment = {"TELEGRAM_BOT_TOKEN": f" {TOKEN}\n"}
    assert read_token(None, environment) == TOKEN
    assert environment == {}
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert read_token(file, {"TELEGRAM_BOT_TOKEN": "1:another"}) == TOKEN
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    assert read_token(file, {}) == TOKEN
    assert capsys.readouterr().err == f"Other users can read the token: chmod 600 {file}\n"
    with pytest.raises(UserError, match="The bot's token is missing: set TELEGRAM_BOT_TOKEN, or give --token-file"):
        read_token(None, {})


@pytest.mark.parametrize("token", ["secret", "secret:1", "1:a b", "1:a/../b", "1:é", "1:{x}"])
def test_what_is_no_token_is_refused_without_being_shown(token, tmp_path):
    (tmp_path / "token").write_text(token)
    for path, environment in ((tmp_path / "token", {}), (None, {"TELEGRAM_BOT_TOKEN": token})):
        with pytest.raises(UserError, match="does not hold a token") as refusal:
            read_token(path, environment)
        assert token not in str(refusal.value)


def test_the_token_is_no_option():
    options = {option for action in command_line_parser()._actions for option in action.option_strings}
    assert not {option for option in options if "token" in option} - {"--token-file", "--max-new-tokens"}


FAILING = """
import asyncio, logging, os, threading, warnings
from cucafera.telegram import log_without

token = os.environ["TELEGRAM_BOT_TOKEN"]
log_without(token)
error = ValueError("POST http://127.0.0.1/bot" + token + "/getMe, " + token.replace(":", "%3A"))
logging.getLogger("aiohttp.client").error("at %s", error)
try:
    raise error
except ValueError:
    logging.getLogger("cucafera.x").exception("failed")

def fail():
    raise error

async def leave():
    asyncio.get_running_loop().call_soon(fail)
    await asyncio.sleep(0)
    await asyncio.sleep(0)

class Failing:
    def __del__(self):
        raise error

Failing()
print(error)
warnings.warn(str(error))
thread = threading.Thread(target=fail)
thread.start()
thread.join()
asyncio.run(leave())
fail()
"""


def test_nothing_that_is_logged_or_printed_shows_the_token(runs):
    result = subprocess.run([sys.executable, "-c", FAILING], cwd=runs, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "POST http://127.0.0.1/botTOKEN/getMe, TOKEN\n")
    assert result.stderr.count("ValueError: POST http://127.0.0.1/botTOKEN/getMe, TOKEN") == 5
    assert "UserWarning: POST http://127.0.0.1/botTOKEN/getMe, TOKEN" in result.stderr
    assert "at POST http://127.0.0.1/botTOKEN/getMe, TOKEN" in result.stderr
    assert TOKEN.partition(":")[2] not in result.stderr


GIVING_UP = """
from cucafera.serving import telegram_api
from cucafera.telegram import main

telegram_api.GIVE_UP_SECONDS = 0
main()
"""


@pytest.mark.parametrize("failure", [refused_with_url, redirected], ids=["description", "redirects"])
def test_an_error_that_ends_the_bot_is_printed_without_the_token(runs, fake, failure):
    fake.api.failures["getMe"] = [failure] * 30  # aiohttp follows 10 redirects
    arguments = ["outputs/chat", "--api-url", fake.api.url, *SETTINGS]
    result = subprocess.run(
        [sys.executable, "-c", GIVING_UP, *arguments], cwd=runs, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Telegram cannot be reached: ") and "/botTOKEN/getMe" in last
    assert TOKEN.partition(":")[2] not in result.stderr and "Traceback" not in result.stderr


def test_an_api_that_cannot_be_reached_is_logged_without_the_token(runs):
    bot = Process(["-m", "cucafera.telegram", "outputs/chat", "--api-url", "http://127.0.0.1:9", *SETTINGS], runs)
    end = time.monotonic() + 60
    output = ""
    try:
        while "the next try is in 1 s" not in output:
            assert time.monotonic() < end, output
            output += bot.outputs[0].readline()
        bot.send_signal(signal.SIGTERM)
        output += bot.communicate(timeout=30)[0]
    finally:
        bot.kill()
    assert bot.wait(0) == 0
    assert "The bot answers no one yet" in output
    assert "Cannot connect to host 127.0.0.1:9" in output and "Traceback" not in output
    assert TOKEN.partition(":")[2] not in output
