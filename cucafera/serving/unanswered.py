"""Questions that were received and not yet answered, in a file: a bot that was killed answers them when it is back."""

import asyncio
import dataclasses
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from cucafera.config.errors import UserError
from cucafera.storage import PARTIAL, parse_json, read_small_file

log = logging.getLogger(__name__)

MAX_STARTS = 2
"""How often a question is taken up: one that the program did not survive twice may be the reason."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A chat, or a topic of one.

    Attributes:
        chat_id: The chat.
        thread_id: The topic, in a chat that has topics.
        is_private: The chat is one person's with the bot, not a group.
    """

    chat_id: int
    thread_id: int | None
    is_private: bool


@dataclasses.dataclass(frozen=True)
class PendingQuestion:
    """A message to answer.

    Attributes:
        update_id: Number of its update.
        place: Its chat or topic.
        message_id: Its number in the chat.
        text: The message.
        starts: How often it was taken up.
    """

    update_id: int
    place: Place
    message_id: int
    text: str
    starts: int = 1


class UnansweredFile:
    """The file of unanswered questions, which only its owner can read; without a path, everything stays in memory.

    Telegram forgets an update when the next ones are asked for. So the file is written before that, and a question that
    Telegram sends again, because the program died in between, is recognized.

    Args:
        path: The file; None: none.

    Raises:
        UserError: it cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._last_batch: set[int] = set()
        self._questions = {question.update_id: question for question in self._read()}
        self._received = self._questions.keys() | self._last_batch
        try:
            self._write()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

    async def take_up(self) -> tuple[list[PendingQuestion], list[PendingQuestion]]:
        """Return what the last process left: the questions to answer, and those that were taken up MAX_STARTS times.

        Each list has the order of their arrival; the latter are removed.
        """
        left = list(self._questions.values())
        again = [question for question in left if question.starts < MAX_STARTS]
        self._questions = {
            question.update_id: dataclasses.replace(question, starts=question.starts + 1) for question in again
        }
        await self.save()
        return again, [question for question in left if question.starts >= MAX_STARTS]

    def __contains__(self, update_id: int) -> bool:
        """Return True for an update that an earlier process had received."""
        return update_id in self._received

    def keeps(self, question: PendingQuestion) -> bool:
        """Return True for a question that the next process will find."""
        return self.path is not None and question.update_id in self._questions

    def add(self, question: PendingQuestion) -> None:
        """Add a question; `save` writes it."""
        self._questions[question.update_id] = question

    async def save(self, batch: set[int] | None = None) -> None:
        """Write the file, if there is one; a failure is logged.

        Args:
            batch: Numbers of the updates that the last request has returned.
        """
        if batch is not None:
            self._last_batch = batch
        try:
            await asyncio.to_thread(self._write)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.path, error.strerror or error)

    async def remove(self, question: PendingQuestion) -> None:
        """Remove a question that was answered, or never will be."""
        if self._questions.pop(question.update_id, None):
            await self.save()

    def _write(self) -> None:
        if self.path is None:
            return
        with self._lock:
            questions = [dataclasses.asdict(question) for question in list(self._questions.values())]
            content = {"unanswered": questions, "last_batch": sorted(self._last_batch)}
            # Without fsync, which may take seconds: the file is for processes that die, not for machines.
            partial = self.path.with_name(self.path.name + PARTIAL)
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, ensure_ascii=False, indent=1)
            partial.replace(self.path)

    def _read(self) -> list[PendingQuestion]:
        if self.path is None:
            return []
        try:
            text = read_small_file(self.path)
            content: Any = parse_json(text or b'{"unanswered": [], "last_batch": []}')  # empty after a power failure
            self._last_batch = set(content["last_batch"])
            return [PendingQuestion(**fields | {"place": Place(**fields["place"])}) for fields in content["unanswered"]]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is not a file of unanswered questions: remove it") from error
