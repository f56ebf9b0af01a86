"""Pages that describe a session: command, settings, source revision, versions, device."""

import dataclasses
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

import cucafera
from cucafera.config.fields import format_value
from cucafera.config.schema import Config
from cucafera.markup import markdown, markdown_code, markdown_table
from cucafera.training.callbacks.base import Callback
from cucafera.training.events import event_logger
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel


class System(Callback):
    """Write the pages at the start of each session.

    Emits, in the order in which TensorBoard shows them after the samples, the texts
        settings/changed    the command line, and the settings that differ from the defaults
        settings/full       the complete configuration
        system              revision of the source tree, versions, device; not the host name, for privacy

    Args:
        config: The run.
        hardware: The device.
        overrides: The command line.
        changes: Keys that differ from the defaults, with the default and the value of the run.
    """

    def __init__(
        self,
        config: Config,
        hardware: Hardware,
        overrides: Sequence[str],
        changes: Mapping[str, tuple[Any, Any]],
    ) -> None:
        self.config = config
        self.hardware = hardware
        self.overrides = overrides
        self.changes = changes

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Write the pages."""
        if logger := event_logger(trainer):
            pages = {
                "settings/changed": changes_page(self.overrides, self.changes),
                "settings/full": markdown_code(OmegaConf.to_yaml(dataclasses.asdict(self.config))),
                "system": system_page(self.hardware),
            }
            for name, page in pages.items():
                logger.experiment.add_text(name, page, module.steps_done)


def changes_page(overrides: Sequence[str], changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the command line and the changed settings as Markdown. Arguments as for `System`."""
    rows = [(key, format_value(default), format_value(value)) for key, (default, value) in changes.items()]
    lines = [markdown(f"python -m cucafera.run {shlex.join(overrides)}"), ""]
    lines += markdown_table([("setting", "default", "this run"), *rows]) if rows else ["All settings have defaults."]
    return "\n".join(lines)


def system_page(hardware: Hardware) -> str:
    """Return source revision, versions and device as Markdown."""
    compiled = ", compiled" if hardware.compile else ""
    facts = {
        "source": source_revision(Path(cucafera.__file__).parents[1]),
        "cucafera": cucafera.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": f"{hardware.world_size} x {hardware.name}, {hardware.precision}{compiled}",
    }
    rows = [(name, value) for name, value in facts.items() if value]
    return "\n".join(markdown_table([("property", "value"), *rows]))


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
