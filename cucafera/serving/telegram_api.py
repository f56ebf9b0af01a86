"""Calls of Telegram's Bot API that wait out rate limits and failures, and texts cut to the size that it takes."""

import asyncio
import logging
import re
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, TypeVar

from aiogram import Bot
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.exceptions import (
    AiogramError,
    ClientDecodeError,
    TelegramAPIError,
    TelegramEntityTooLarge,
    TelegramMigrateToChat,
    TelegramNetworkError,
    TelegramNotFound,
    TelegramRetryAfter,
    TelegramServerError,
    TelegramUnauthorizedError,
)
from aiogram.methods import GetUpdates, Response, TelegramMethod
from aiogram.types import Update
from pydantic import ValidationError

from cucafera.config.errors import UserError, one_line

log = logging.getLogger(__name__)

MAX_UNITS = 4096
"""Longest text of a message, in UTF-16 code units, as Telegram counts."""
REQUEST_SECONDS = 30
"""Longest time of one request, without the time that getUpdates waits for updates."""
FIRST_RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 30.0
GIVE_UP_SECONDS = 3600.0
"""Longest time for which a request is repeated while Telegram fails or cannot be reached."""

BREAKS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"[.!?…][\"'»”)\]]*\s", r"\s")]
"""Ends of paragraphs, lines, sentences and words: a long text is cut at the first kind that has one late enough."""

Result = TypeVar("Result", bound=Any)
FAILURES = (TelegramNetworkError, TelegramServerError, ClientDecodeError, OSError)
"""Failures that may pass: of the network, of Telegram, or of a proxy that answers for it."""


class RateLimitedSession(AiohttpSession):
    """aiogram's session, for which every response with status 429 is a TelegramRetryAfter.

    Without a time to wait, or with 0 seconds, aiogram takes it for a refusal of the request.
    """

    def check_response(
        self, bot: Bot, method: TelegramMethod[Result], status_code: int, content: str
    ) -> Response[Result]:
        """Return the response. Raises the exceptions of aiogram."""
        try:
            return super().check_response(bot, method, status_code, content)
        except TelegramRetryAfter:
            raise
        except (TelegramAPIError, ClientDecodeError) as error:
            if status_code == HTTPStatus.TOO_MANY_REQUESTS:
                raise TelegramRetryAfter(method, str(error), 0) from None
            raise


class TokenRefusedError(UserError):
    """A token that Telegram does not know, or no longer."""

    def __init__(self) -> None:
        super().__init__("Telegram refuses the bot's token: ask @BotFather for the current one")


def utf16_length(text: str) -> int:
    """Return the number of UTF-16 code units of a text."""
    return len(text) + sum(character > "\uffff" for character in text)


def split_message(text: str, limit: int = MAX_UNITS) -> list[str]:
    """Cut a text into messages of at most `limit` UTF-16 code units each, none of them blank.

    Cuts are at the ends of paragraphs, else of lines, sentences or words, in the second half of a message; a word that
    is longer than that is cut between characters, never within a surrogate pair.
    """
    parts = []
    while utf16_length(text := text.strip()) > limit:
        end = _cut(text, _fitting(text, limit))
        parts.append(text[:end].rstrip())
        text = text[end:]
    return [*parts, text] if text else parts


def _fitting(text: str, limit: int) -> int:
    """Return the number of characters at the start of a text that have at most `limit` UTF-16 code units."""
    units = 0
    for number, character in enumerate(text):
        units += utf16_length(character)
        if units > limit:
            return number
    return len(text)


def _cut(text: str, most: int) -> int:
    """Return how many characters the first message takes, at most `most`."""
    for pattern in BREAKS:
        # One more character: a break may follow a message that is full.
        ends = [match.end() for match in pattern.finditer(text, 0, most + 1) if match.start() > most // 2]
        if ends:
            return ends[-1]
    return most


async def call(bot: Bot, method: TelegramMethod[Result], request_seconds: int = REQUEST_SECONDS) -> Result:
    """Call a method until it succeeds: a rate limit is waited out, failures of Telegram or the network retried.

    A request may reach Telegram although its response is lost; then a message is sent twice, which is better than not
    at all.

    Raises:
        TokenRefusedError: Telegram does not know the token.
        TelegramAPIError: it refuses the request, or has failed for GIVE_UP_SECONDS.
    """
    give_up = time.monotonic() + GIVE_UP_SECONDS
    delay = FIRST_RETRY_SECONDS
    while True:
        try:
            return await call_once(bot, method, request_seconds)
        except TelegramMigrateToChat as error:
            method = method.model_copy(update={"chat_id": error.migrate_to_chat_id})
            continue
        except TelegramRetryAfter as error:  # without a limit: it says when it takes the message
            wait = max(float(error.retry_after), FIRST_RETRY_SECONDS)
            log.info("%s: Telegram's rate limit; the next try is in %.0f s", type(method).__name__, wait)
        except TelegramEntityTooLarge:
            raise
        except FAILURES as error:
            if time.monotonic() + delay > give_up:
                raise
            wait, delay = delay, min(2 * delay, LONGEST_RETRY_SECONDS)
            log.warning("%s: %s; the next try is in %.0f s", type(method).__name__, reason(error), wait)
        await asyncio.sleep(wait)


async def call_once(bot: Bot, method: TelegramMethod[Result], request_seconds: int = REQUEST_SECONDS) -> Result:
    """Call a method. Raises TokenRefusedError, or the exceptions of aiogram."""
    try:
        return await bot(method, request_timeout=request_seconds)
    except (TelegramUnauthorizedError, TelegramNotFound) as error:
        if isinstance(error, TelegramUnauthorizedError) or _is_of_token(error):
            raise TokenRefusedError from None
        raise


def _is_of_token(error: TelegramNotFound) -> bool:
    """True for the bare "Not Found" of a token without a bot; other errors name what is not found."""
    return error.message.strip().lower() == "not found" and error.method.__api_method__ in ("getMe", "getUpdates")


async def get_updates(
    bot: Bot, offset: int | None, wait_seconds: int, kinds: list[str]
) -> list[tuple[int, Update | None]]:
    """Return the updates from `offset` on with their ids, as soon as there is one or after `wait_seconds`.

    The request acknowledges all updates before `offset`: Telegram forgets them. An update that aiogram cannot read is
    None, so that it does not come again forever, with all that follow.

    Raises:
        TokenRefusedError: Telegram does not know the token.
        AiogramError, OSError: the request fails.
    """
    method = GetUpdates(offset=offset, timeout=wait_seconds, allowed_updates=kinds)
    try:
        updates = await call_once(bot, method, wait_seconds + REQUEST_SECONDS)
        return [(update.update_id, update) for update in updates]
    except ClientDecodeError as error:
        if not (isinstance(error.data, dict) and error.data.get("ok")):
            raise
        return list(_readable(error.data["result"]))


def _readable(updates: list[dict[str, Any]]) -> Iterator[tuple[int, Update | None]]:
    for update in updates:
        try:
            yield update["update_id"], Update.model_validate(update)
        except ValidationError:
            log.warning("Update %s is of a kind that aiogram cannot read: it is left out", update["update_id"])
            yield update["update_id"], None


def reason(error: AiogramError | OSError) -> str:
    """Return a line that says why a request failed."""
    if isinstance(error, ClientDecodeError):
        return "the response is not Telegram's"
    return one_line(str(error.message) if isinstance(error, TelegramAPIError) else str(error) or type(error).__name__)
