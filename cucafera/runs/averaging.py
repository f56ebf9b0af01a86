"""The checkpoints of a run whose weights are averaged (latest weight averaging), chosen by their markers alone."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cucafera.config.check import build
from cucafera.config.errors import UserError
from cucafera.config.schema import CallbacksConfig
from cucafera.quantities import number_of
from cucafera.runs.checkpoints import (
    Checkpoint,
    CheckpointFolder,
    DamagedCheckpointError,
    best_of,
    read_marker,
)
from cucafera.runs.folder import RunFolder
from cucafera.runs.locate import locate_model

DO_WITHOUT = "delete it and its marker to average without it"
"""Advice where one of the checkpoints cannot be used: it is not left out silently."""


def checkpoints_to_average(source: str, count: int) -> list[Checkpoint]:
    """Return the last complete checkpoints of a run, oldest first; their content is not verified.

    One that is kept for its validation alone, the best, is not among them: it may be far from the others.

    Args:
        source: A run folder; or one of its checkpoints, which is then the last of them.
        count: Their number.

    Raises:
        UserError: there are fewer, a marker is damaged, or the source is not a run.
    """
    location = locate_model(source)
    if location.path is None or location.kind not in ("run", "checkpoint"):
        raise UserError(f"--average {count}: {source} is one model: only a run has checkpoints to average")
    is_file = location.kind == "checkpoint"
    folder = CheckpointFolder(location.path.parent if is_file else location.path / "checkpoints")
    apart = _kept_as_best(RunFolder(folder.path.parent))
    apart = None if apart == location.path else apart
    paths = [path for path in folder.marked() if path != apart]
    if is_file:
        paths = [*(path for path in paths if path < location.path), location.path]
    elif not paths:
        raise UserError(f"{source}: the folder holds no checkpoint: {folder.why_none()}")
    if len(paths) < count:
        steps = steps_in_words([checkpoint.step for checkpoint in folder.complete() if checkpoint.path in paths])
        best = f"; {apart.name} is apart from them, kept as the best" if apart else ""
        raise UserError(
            f"--average {count}: there {'is' if len(paths) == 1 else 'are'} only "
            f"{number_of(len(paths), 'checkpoint')}{' up to' if is_file else ' in'} {source}"
            f"{f' ({steps})' if steps else ''}{best}. A run keeps more with callbacks.keep_last={count}, given before "
            "they are removed"
        )
    try:
        return [read_marker(path) for path in paths[-count:]]
    except DamagedCheckpointError as error:
        raise UserError(f"{error}: {DO_WITHOUT}") from error


def _kept_as_best(run: RunFolder) -> Path | None:
    """Return the best checkpoint of a run, if nothing else keeps it: see `CheckpointFolder.remove_old`."""
    complete = run.checkpoints.complete()
    best = best_of(complete)
    if best is None:
        return None
    problems: dict[str, str] = {}
    callbacks = build(CallbacksConfig, run.read_config().get("callbacks") or {}, "callbacks.", problems)
    if problems:
        raise UserError(f"{run.config} cannot be used: {next(iter(problems.values()))}")
    every = callbacks.keep_every_steps
    is_among_others = best in complete[-callbacks.keep_last :] or (every and best.step % every == 0)
    return None if is_among_others else best.path


def steps_in_words(steps: Sequence[int]) -> str:
    """Return steps in ascending order with their spacing, such as "steps 1,600 to 2,000, every 100"."""
    if not steps:
        return ""
    *others, last = (f"{step:,}" for step in steps)
    spacings = {after - before for before, after in pairwise(steps)}
    if not others:
        return f"step {last}"
    if len(others) > 1 and len(spacings) == 1:
        return f"steps {others[0]} to {last}, every {spacings.pop():,}"
    return f"steps {', '.join(others)} and {last}"
