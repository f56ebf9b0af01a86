"""Rows that people's choices on the page become: preferences, and conversations with a rating.

FILE.jsonl has TRL's conversational preference format, which preference tuning reads: `prompt`, `chosen` and `rejected`,
each a list of messages; FILE.ratings.jsonl has `messages` and `rating`. Both name the model, and the time in UTC.
"""

import contextlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cucafera.config.errors import UserError
from cucafera.data.chatml import Message
from cucafera.serving.openai_api import ApiError, Json, parse_messages, refuse
from cucafera.storage import append_line, open_to_append

RATINGS = ("up", "down")
MAX_CHARACTERS = 200_000
"""Longest row: more than fits any context."""


class CollectedRows:
    """Appends rows to two files, each flushed to disk before it counts as written.

    Args:
        path: FILE.jsonl.
        model: Name of the model, for the rows.

    Raises:
        UserError: the path has another suffix, or one of the files cannot be written.
    """

    def __init__(self, path: Path, model: str) -> None:
        if path.suffix != ".jsonl":
            raise UserError(f"--collect {path}: give the name of a .jsonl file, which preference tuning reads")
        self.preferences = path
        self.ratings = path.with_suffix(".ratings.jsonl")
        self._model = model
        self._lock = threading.Lock()
        for file in (self.preferences, self.ratings):
            _check_writable(file)

    def write_preference(self, content: Json) -> None:
        """Write which of two answers is better. Raises ApiError for a body without prompt, chosen and rejected."""
        prompt = _conversation(content.get("prompt"), "prompt", last="user")
        answers = {name: _conversation(content.get(name), name, last="assistant") for name in ("chosen", "rejected")}
        for name, answer in answers.items():
            if len(answer) != 1:
                refuse(name, f"{name} must be one message of the assistant")
        if answers["chosen"] == answers["rejected"]:
            refuse("rejected", "chosen and rejected are the same answer")
        self._write(self.preferences, {"prompt": prompt, **answers})

    def write_rating(self, content: Json) -> None:
        """Write a rating of the last answer of a conversation. Raises ApiError for another body.

        The answers before it were not rated: as context, they have weight 0 for finetuning.
        """
        messages = _conversation(content.get("messages"), "messages", last="assistant")
        for message in messages[:-1]:
            if message["role"] == "assistant":
                message["weight"] = 0
        rating = content.get("rating")
        if not isinstance(rating, str) or rating not in RATINGS:
            refuse("rating", f"rating must be {' or '.join(RATINGS)}")
        self._write(self.ratings, {"messages": messages, "rating": rating})

    def _write(self, path: Path, row: Json) -> None:
        row |= {"model": self._model, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps(row, ensure_ascii=False)
        if len(line) > MAX_CHARACTERS:
            raise ApiError(413, f"The conversation has more than {MAX_CHARACTERS:,} characters")
        try:
            with self._lock:
                append_line(path, line)
        except OSError as error:
            raise ApiError(503, f"The row could not be written: {error.strerror}", "not_written") from error


def _conversation(value: Any, place: str, last: str) -> list[Json]:
    """Return messages as they are written, of which the last is of a role, and none is empty. Raises ApiError."""
    messages: list[Message] = parse_messages(value, place)
    for number, message in enumerate(messages):
        if not message.content.strip():
            refuse(place, f"{place}[{number}] is empty")
    if messages[-1].role != last:
        refuse(place, f"the last message of {place} must be of the {last}")
    return [{"role": message.role, "content": message.content} for message in messages]


def _check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be appended to; one that was not there is not left."""
    is_new = not path.exists()
    try:
        os.close(open_to_append(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--collect: {path} cannot be written: {getattr(error, 'strerror', error)}") from error
    if is_new:
        with contextlib.suppress(OSError):
            path.unlink()
