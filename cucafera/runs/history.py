"""history.jsonl: one line per start, resume, stop, rollback, loss of memory and end of a run."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from cucafera.config.schema import Config
from cucafera.storage import append

log = logging.getLogger(__name__)

STARTED, RESUMED, STOPPED, ROLLED_BACK, COMPLETED = "started", "resumed", "stopped", "rolled back", "completed"
OUT_OF_MEMORY = "out of memory"


def add_event(path: Path, event: str, facts: Mapping[str, Any]) -> None:
    """Append an event with its time to a history. A disk that takes no more is logged, and does not end the run."""
    line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "event": event, **facts}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # a power cut within the last line
        append(path, (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror or error)


def has_event(path: Path, event: str, facts: Mapping[str, Any]) -> bool:
    """True if a history has an event with all of these facts."""
    if not path.exists():
        return False
    wanted = {"event": event, **facts}
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):  # a line that was torn by a power cut
            if wanted.items() <= json.loads(line).items():
                return True
    return False


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
