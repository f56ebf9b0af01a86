"""history.jsonl: one line per start, first checkpoint, resume, stop, rollback, loss of memory and end of a run.

Each line ends with a CRC-32 of the rest, since later starts decide by what it says.
"""

import dataclasses
import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.storage import append, parse_json, read_small_file

log = logging.getLogger(__name__)

STARTED, RESUMED, STOPPED, ROLLED_BACK, COMPLETED = "started", "resumed", "stopped", "rolled back", "completed"
FIRST_CHECKPOINT = "first checkpoint"
OUT_OF_MEMORY = "out of memory"

LINE = re.compile(rb'(?P<body>\{.*"crc32": )(?P<crc32>\d+)\}')


def append_event(path: Path, event: str, facts: Mapping[str, Any]) -> None:
    """Append an event with its time to a history. Raises OSError."""
    described = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": event, **facts}
    body = json.dumps(described).removesuffix("}").encode() + b', "crc32": '
    path.parent.mkdir(parents=True, exist_ok=True)
    before = read_small_file(path) if path.exists() else b""
    torn = before and not before.endswith(b"\n")  # a power cut within the last line
    append(path, (b"\n" if torn else b"") + body + b"%d}\n" % zlib.crc32(body))


def add_event(path: Path, event: str, facts: Mapping[str, Any]) -> bool:
    """Append an event to a history. A disk that takes no more is logged, and does not end the run; returns False."""
    try:
        append_event(path, event, facts)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror or error)
        return False
    return True


def read_events(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the events of a history; None for a line that was torn by a power cut, or edited.

    Raises:
        UserError: the history cannot be read.
    """
    try:
        content = read_small_file(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    for line in content.splitlines():
        match = LINE.fullmatch(line)
        if match is None or match["crc32"] != b"%d" % zlib.crc32(match["body"]):
            yield None
            continue
        try:
            yield parse_json(line)
        except ValueError:
            yield None


def has_event(path: Path, event: str, facts: Mapping[str, Any]) -> bool:
    """True if a history has an event with all of these facts. Raises UserError if it cannot be read."""
    wanted = {"event": event, **facts}
    return any(found is not None and wanted.items() <= found.items() for found in read_events(path))


def has_no_checkpoint(path: Path) -> bool:
    """True if a history proves that the run, as it was last started from scratch, has not completed a checkpoint yet.

    Raises:
        UserError: it cannot be read.
    """
    proven = False
    for event in read_events(path):
        proven = event is not None and (event.get("event") == STARTED or (proven and not _saved(event)))
    return proven


def _saved(event: Mapping[str, Any]) -> bool:
    return event.get("event") in (FIRST_CHECKPOINT, RESUMED, COMPLETED) or bool(event.get("saved_step"))


def memory_facts(config: Config, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the memory of a step depends on.

    Args:
        config: The run.
        hardware: The settings of the trainer with every `auto` resolved, as plain data.
    """
    return {
        "hardware": dict(hardware),
        "strategy": config.trainer.strategy,
        "model": dataclasses.asdict(config.model),
        "adapter": dataclasses.asdict(config.adapter),
        "sequence_length": config.sequence_length,
    }
