"""What runs have left in their folders, side by side."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config import UserError, shown
from cucafera.sweeps.jobs import JOB, Job
from cucafera.training.run_folder import PLUMBING, RunFolder, flat, is_within


@dataclasses.dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        folder: The run folder.
        name: What to call it beside others.
        config: Its configuration, by dotted keys; empty if it was refused before it began.
        job: What is known of it as a job, if it is one of a sweep.
        metrics: Its metrics.json; None if it has not come to its end.
        curve: Its validations so far: step, tokens, loss in nats, bpb.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    job: Job | None
    metrics: dict[str, Any] | None
    curve: list[dict[str, float]]

    @property
    def status(self) -> str:
        """How it ended; see `Job`."""
        if self.job is not None:
            return self.job.status
        return "finished" if self.metrics is not None else "not finished"

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """What the command line of a job set."""
        return settings_of(self.job.overrides if self.job else [])

    @property
    def loss(self) -> float:
        """The last validation loss, nats; infinite if the run has none, or diverged or failed."""
        return self.curve[-1]["loss"] if self.status == "finished" else math.inf

    @property
    def bpb(self) -> float:
        """The same in bits a byte, by which runs with different tokenizers can be compared too."""
        return self.curve[-1]["bpb"] if self.status == "finished" else math.inf


def settings_of(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and their values as Hydra writes them; of a key that is given twice, the last."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.key_or_group: override.get_value_element_as_str() for override in parsed}


def read_records(folder: Path, within: Path | None) -> list[Record]:
    """The run in a folder, or all runs below it.

    Args:
        folder: The folder.
        within: Where their names begin; None: they are called by their paths.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    folders = [folder] if (folder / "config.yaml").exists() else _runs_below(folder)
    if not folders:
        raise UserError(f"{folder}: there is no run")
    return [_read_record(run, str(run.relative_to(within) if within not in (None, run) else run)) for run in folders]


def _runs_below(folder: Path) -> list[Path]:
    return sorted({path.parent for name in (JOB, "config.yaml") for path in folder.rglob(name)})


def _read_record(path: Path, name: str) -> Record:
    folder = RunFolder(path)
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder.config)) if folder.config.exists() else None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{folder.config} cannot be read: {error}") from error
    if not config and folder.config.exists():
        raise UserError(f"{folder.config} is empty, or no configuration")
    config = config if isinstance(config, dict) else {}
    metrics = folder.read_metrics()
    settings = dict(flat({str(key): value for key, value in config.items()}))
    curve = metrics["validation"] if metrics else _curve_of_events(path, int(settings.get("batch_tokens", 0)))
    return Record(path, name, settings, Job.read(path), metrics, curve)


def _curve_of_events(path: Path, batch_tokens: int) -> list[dict[str, float]]:
    """The validations of a run that has not come to its end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    if "val/loss" not in events.Tags()["scalars"]:
        return []
    bpb = {event.step: event.value for event in events.Scalars("val/bpb")}
    return [
        {"step": event.step, "tokens": event.step * batch_tokens, "loss": event.value, "bpb": bpb[event.step]}
        for event in events.Scalars("val/loss")
    ]


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys that do not have the same value in all of them, in the order in which they first stand."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def differences(records: Sequence[Record]) -> list[list[str]]:
    """A table of the keys that differ: a column for each run, or, of more runs than keys, a row."""
    keys = [key for key in differing_keys([record.config for record in records]) if not is_within(key, PLUMBING)]
    rows = [[key, *(shown(record.config[key]) if key in record.config else "" for record in records)] for key in keys]
    table = [["", *(record.name for record in records)], *rows]
    return table if len(records) <= len(keys) else [list(row) for row in zip(*table, strict=True)]


RESULTS = ["status", "loss", "bpb", "best loss", "best bpb", "steps", "tokens", "tokens/s"]


def results_of(record: Record) -> list[float | str | None]:
    """What goes under `RESULTS`: losses in nats a token, bpb in bits a byte; None where nothing is known."""
    if not record.curve or record.status == "refused":  # what lies there is an earlier run's
        return [record.status, *[None] * (len(RESULTS) - 1)]
    last = record.curve[-1]
    best_loss, best_bpb = (min(point[what] for point in record.curve) for what in ("loss", "bpb"))
    speed = record.metrics["tokens_per_second"] if record.metrics else None
    return [record.status, last["loss"], last["bpb"], best_loss, best_bpb, last["step"], last["tokens"], speed]


def in_figures(values: Sequence[float | str | None]) -> list[str]:
    """A row of a table for people."""
    texts = []
    for value in values:
        if isinstance(value, str) or value is None:
            texts.append(value or "")
        else:
            texts.append(
                f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value > 1000 else f"{value:.3f}"
            )
    return texts


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal, the first row its head; figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    to_the_right = [all(_is_figure(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        )
        for row in rows
    ]
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _is_figure(cell: str) -> bool:
    try:
        float(cell.replace(",", "") or 0)
    except ValueError:
        return False
    return True
