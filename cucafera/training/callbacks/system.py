"""A page that describes a session: source revision, versions, device, command, and changed settings."""

import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch

import cucafera
from cucafera.config.fields import format_value
from cucafera.markup import markdown, markdown_table
from cucafera.training.callbacks.base import Callback
from cucafera.training.events import event_logger
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel


class System(Callback):
    """Write the page at the start of each session.

    Emits the text `system`: revision of the source tree, versions, device, command line, and the settings that differ
    from the defaults. The host name is omitted for privacy.

    Args:
        hardware: The device.
        overrides: The command line.
        changes: Keys that differ from the defaults, with the default and the value of the run.
    """

    def __init__(self, hardware: Hardware, overrides: Sequence[str], changes: Mapping[str, tuple[Any, Any]]) -> None:
        self.hardware = hardware
        self.overrides = overrides
        self.changes = changes

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Write the page."""
        if logger := event_logger(trainer):
            page = system_page(self.hardware, self.overrides, self.changes)
            logger.experiment.add_text("system", page, module.steps_done)


def system_page(hardware: Hardware, overrides: Sequence[str], changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the page as Markdown. Arguments as for `System`."""
    compiled = ", compiled" if hardware.compile else ""
    facts = {
        "source": source_revision(Path(cucafera.__file__).parents[1]),
        "cucafera": cucafera.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": f"{hardware.world_size} x {hardware.name}, {hardware.precision}{compiled}",
    }
    rows = [(key, format_value(default), format_value(value)) for key, (default, value) in changes.items()]
    lines = [markdown(f"python -m cucafera.run {shlex.join(overrides)}"), ""]
    lines += [*markdown_table([("property", "value"), *((name, value) for name, value in facts.items() if value)]), ""]
    lines += ["### Settings that differ from the defaults", ""]
    lines += markdown_table([("key", "default", "this run"), *rows]) if rows else ["None."]
    return "\n".join(lines)


def source_revision(root: Path) -> str | None:
    """Return the git commit of a source tree and whether it has uncommitted changes; None if it is no checkout."""
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, or it does not trust this folder
        return None
    return f"{commit}, with uncommitted changes" if changes else commit
