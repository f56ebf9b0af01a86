"""A page that says what a run is: the source, the machine, the command, and what it changes."""

import dataclasses
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch

import cucafera
from cucafera.composition import default_config
from cucafera.config import Config, shown
from cucafera.training.events import event_logger
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel
from cucafera.training.run_folder import changed_keys


class System(pl.Callback):
    """Writes the page at the beginning of each session.

    Emits the text `system`: revision of the source tree, versions, device, command line, and the configuration's
    differences from the defaults. The name of the machine is not in it.
    """

    def __init__(self, config: Config, hardware: Hardware, overrides: Sequence[str]) -> None:
        self.config = config
        self.hardware = hardware
        self.overrides = overrides

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the page."""
        assert isinstance(pl_module, LanguageModel)
        if logger := event_logger(trainer):
            page = system_page(self.config, self.hardware, self.overrides)
            logger.experiment.add_text("system", page, pl_module.steps_done)


def system_page(config: Config, hardware: Hardware, overrides: Sequence[str]) -> str:
    """The page, as Markdown."""
    compiled = ", compiled" if hardware.compile else ""
    facts = {
        "source": source_revision(Path(cucafera.__file__).parents[1]),
        "cucafera": cucafera.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": f"{hardware.world_size} x {hardware.name}, {hardware.precision}{compiled}",
    }
    changes = changed_keys(config, dataclasses.asdict(default_config()))
    rows = [(key, shown(default), shown(here)) for key, (default, here) in changes.items()]
    lines = [plain(f"python -m cucafera.run {shlex.join(overrides)}"), ""]
    lines += [*table(("what", "which"), [(what, value) for what, value in facts.items() if value]), ""]
    lines += ["### What differs from the defaults", ""]
    lines += table(("key", "default", "here"), rows) if rows else ["Nothing."]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def plain(text: str) -> str:
    """A text that means nothing to Markdown and HTML, and stays on its line."""
    return re.sub(r"[\\`*_{}\[\]()#+!|~:^&<>\"']", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def source_revision(root: Path) -> str | None:
    """The git commit of a source tree, and whether something differs from it; None if it is not a checkout."""
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
    return f"{commit}, with changes that are not committed" if changes else commit
