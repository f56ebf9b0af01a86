"""The answer of a sweep: which learning rate is best, how sure that is, and what to try next."""

import csv
import io
import math
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cucafera.config import EXIT_OUT_OF_TIME, EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from cucafera.sweeps.optimum import Optimum
    from cucafera.sweeps.records import Record

RATE, SEED = "optimizer.lr", "seed"
FURTHER_VALUES = 3
"""Values that are proposed to go on with."""
NOT_GIVEN = "default"
"""Stands for the value of a key that a job's command line does not name."""
OWN_OVERRIDES = ("hydra.mode", "hydra.job.config.", "hydra.sweeper.params", "hydra.sweep.dir")
"""What the front door, or Hydra itself, adds to a command line; see `hydra_arguments`."""


class SweepAnswer(Callback):
    """Hydra's callback at the end of a sweep: prints the answer, and leaves it in the sweep folder.

    Files: results.csv, a row a run; summary.md; sweep.png and sweep.pdf. Ends with the exit code of `Answer`.
    """

    def on_multirun_start(self, config: DictConfig, **settings: Any) -> None:
        """Makes the sweep folder, in which a sweeper may want to keep its own notes from the start."""
        from cucafera.sweeps.jobs import BESIDE_SWEEP

        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        if config.hydra.runtime.choices["hydra/launcher"] in BESIDE_SWEEP:
            signal.signal(signal.SIGINT, _leave_to_jobs)

    def on_multirun_end(self, config: DictConfig, **settings: Any) -> None:
        """Answers, when all jobs have ended."""
        from cucafera.sweeps.jobs import own_config_folders

        flags = [f"--config-dir {shlex.quote(folder)}" for folder in own_config_folders(config.hydra)]
        choices = [text for text in config.hydra.overrides.hydra if not text.startswith(OWN_OVERRIDES)]
        try:
            given = answer(
                Path(config.hydra.sweep.dir),
                overrides=list(config.hydra.overrides.task),
                fixed=set(config.hydra.job.config.override_dirname.exclude_keys),
                others=[*flags, *map(shlex.quote, choices)],
            )
            print(given.text, flush=True)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        except Exception:  # Hydra would make a warning of it, and end with 0
            traceback.print_exc()
            sys.exit(1)
        if given.exit_code:
            sys.exit(given.exit_code)


def _leave_to_jobs(number: int, frame: FrameType | None) -> None:
    """Ends the sweep's process: its jobs notice, and save. The launcher would kill them, even in a save."""
    os.write(sys.stderr.fileno(), b"\nInterrupted: the jobs save and stop; then the same command goes on.\n")
    os._exit(128 + number)


class Answer(NamedTuple):
    """What a sweep says.

    Attributes:
        text: For the terminal.
        exit_code: 1 if a job crashed, or else 2 if one was refused, or else 124 if one has not come to its end, or else
            0: to diverge is a result.
    """

    text: str
    exit_code: int


def answer(folder: Path, overrides: Sequence[str], fixed: Container[str], others: Sequence[str] = ()) -> Answer:
    """Writes results.csv, summary.md and the picture into a sweep folder.

    It holds the jobs of this sweep, and of earlier ones in the same folder that had the same values beside what was
    swept.

    Args:
        folder: The sweep folder.
        overrides: The command line of the sweep.
        fixed: Keys of it that are not swept.
        others: What else was given on it, ready for a shell.
    """
    from cucafera.data.files import write_text
    from cucafera.sweeps.optimum import find_optimum
    from cucafera.sweeps.pictures import draw_curves, draw_learning_rates, has_matplotlib
    from cucafera.sweeps.records import as_markdown, as_text, differing_keys, read_records, settings_of

    found = sorted(read_records(folder, folder), key=lambda record: (record.bpb, record.name))
    swept = {_key(text) for text in overrides if _key(text) not in fixed} | {RATE, SEED}
    here = settings_of([text for text in overrides if _key(text) not in swept])
    records = [
        record for record in found if {key: value for key, value in record.settings.items() if key not in swept} == here
    ]
    if not records:
        raise UserError(f"{folder} holds only jobs of other sweeps: {', '.join(record.name for record in found)}")
    keys = differing_keys([record.settings for record in records])
    groups = _groups(records, keys)
    optima = {name: find_optimum((rate, run.loss) for rate, run in runs) for name, runs in groups.items()}
    paragraphs = [_verdict(name, optima[name], runs, overrides, others) for name, runs in groups.items()]
    if len(groups) != 1:
        paragraphs.append(_ranking(records))
    paragraphs += _troubles(records, [record for record in found if record not in records])
    table = _table(records, keys)
    picture = folder / "sweep"
    if not has_matplotlib():
        paragraphs.append("There is no picture: pip install '.[plots]' brings matplotlib, which draws it.")
    elif any(optima.values()):
        draw_learning_rates(groups, optima, picture)
    else:
        draw_curves(records, picture)
    shown = [f"![Loss against learning rate, and curves]({picture.name}.png)"] if has_matplotlib() else []
    markdown = [f"# {folder}", *paragraphs, as_markdown(table), *shown]
    write_text(folder / "summary.md", "\n\n".join(markdown) + "\n")
    write_text(folder / "results.csv", _csv(records, keys))
    places = f"Summary: {folder / 'summary.md'}\nCurves: tensorboard --logdir {shlex.quote(str(folder))}"
    statuses = {record.status for record in records}
    codes = {"crashed": 1, "refused": EXIT_USER_ERROR, "stopped": EXIT_OUT_OF_TIME, "begun": EXIT_OUT_OF_TIME}
    exit_code = next((code for status, code in codes.items() if status in statuses), 0)
    return Answer("\n\n".join(["", as_text(table), *paragraphs, places]), exit_code)


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _groups(records: Sequence["Record"], keys: Sequence[str]) -> dict[str, list[tuple[float, "Record"]]]:
    """Runs with their learning rates, by what they differ in besides it and the seed; nothing if it does not vary."""
    if RATE not in keys:
        return {}
    others = [key for key in keys if key not in (RATE, SEED)]
    groups: dict[str, list[tuple[float, Record]]] = {}
    for record in records:
        name = ", ".join(f"{key}={record.settings.get(key, NOT_GIVEN)}" for key in others)
        rate = record.config.get(RATE, record.settings.get(RATE))
        if _is_number(rate):
            groups.setdefault(name, []).append((float(str(rate)), record))
    return dict(sorted(groups.items()))


def _is_number(text: Any) -> bool:
    try:
        return float(text) > 0
    except (TypeError, ValueError):
        return False


def _verdict(
    name: str,
    optimum: "Optimum | None",
    runs: Sequence[tuple[float, "Record"]],
    overrides: Sequence[str],
    others: Sequence[str],
) -> str:
    """What the runs of a group say of the learning rate, in words."""
    about = f"With {name}, the" if name else "The"
    if optimum is None:
        lower = "; try lower learning rates" if any(record.status == "diverged" for _, record in runs) else ""
        return f"{about} runs came to no result{lower}."
    tried = f"{optimum.best_value:.3g}, with a validation loss of {optimum.best_loss:.3f}"
    if further := _further_values(optimum, sorted({rate for rate, _ in runs})):
        why = (
            f"{optimum.diverged:.3g} came to no result, so a better one may lie between the two"
            if optimum.diverged
            else f"it is the {optimum.edge} of those tried, so a better one may lie beyond it"
        )
        swept = dict(part.split("=", 1) for part in name.split(", ") if part)
        command = _command(swept | {RATE: ",".join(f"{value:.3g}" for value in further)}, overrides, others)
        return f"{about} best learning rate so far is {tried}; {why}. Next:\n\n    {command}"
    if optimum.value is None or optimum.as_good is None:
        return f"{about} best learning rate of those tried is {tried}; the losses around it follow no parabola."
    sure = "how sure that is, more values or seeds would tell (seed=1,2,3)"
    if optimum.factor is not None:
        sure = f"within a factor of {optimum.factor:.2f} (68% confidence, {optimum.points} runs)"
    low, high = optimum.as_good
    return (
        f"{about} best learning rate is {optimum.value:.2g}; {sure}. Everything from {low:.2g} to {high:.2g} is as "
        f"good, to 0.01 nats. Best of those tried: {tried}."
    )


def _further_values(optimum: "Optimum", rates: Sequence[float]) -> list[float]:
    """What to try next: between the best and one that diverged, or beyond the edge of the grid; or nothing."""
    powers = range(1, FURTHER_VALUES + 1)
    if optimum.diverged is not None:
        ratio = (optimum.diverged / optimum.best_value) ** (1 / (FURTHER_VALUES + 1))
        return [optimum.best_value * ratio**power for power in powers]
    if optimum.edge is None:
        return []
    ratio = rates[0] / rates[1] if optimum.edge == "lowest" else rates[-1] / rates[-2]
    return [optimum.best_value * ratio**power for power in powers]


def _command(values: Mapping[str, str], overrides: Sequence[str], others: Sequence[str]) -> str:
    """The sweep again with other values of some keys; what has been run is kept."""
    kept = [shlex.quote(text) for text in overrides if _key(text) not in values]
    changed = [f"{key}={value}" for key, value in values.items() if value != NOT_GIVEN]
    return " ".join(["python -m cucafera.run --multirun", *others, *kept, *changed])


def _ranking(records: Sequence["Record"]) -> str:
    best = records[0]
    if not math.isfinite(best.bpb):
        return "No run came to a result."
    return f"The best is {best.name}, with {best.bpb:.3f} bits a byte (a validation loss of {best.loss:.3f})."


def _troubles(records: Sequence["Record"], others: Sequence["Record"]) -> list[str]:
    meanings = {
        "diverged": "Diverged",
        "crashed": "Crashed; the same command tries again",
        "refused": "Refused, for what stands above or in job.out of their folders",
        "stopped": "Stopped before the end; the same command goes on",
        "begun": "Not at the end; the same command goes on",
    }
    troubles = []
    for status, meaning in meanings.items():
        named = [
            record.name + (f" (exit code {record.job.exit_code})" if record.job and status == "crashed" else "")
            for record in records
            if record.status == status
        ]
        if named:
            troubles.append(f"{meaning}: {'; '.join(sorted(named))}.")
    if others:
        names = "; ".join(record.name for record in others)
        troubles.append(f"Not counted, since they come from sweeps with other values beside what is swept: {names}.")
    return troubles


def _table(records: Sequence["Record"], keys: Sequence[str]) -> list[list[str]]:
    from cucafera.sweeps.records import RESULTS, in_figures, results_of

    rows = [[*(record.settings.get(key, "") for key in keys), *in_figures(results_of(record))] for record in records]
    return [[*keys, *RESULTS], *rows]


def _csv(records: Sequence["Record"], keys: Sequence[str]) -> str:
    from cucafera.sweeps.records import RESULTS, results_of

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", *keys, *RESULTS, "seconds", "exit code", "overrides"])
    for record in records:
        job, seconds = record.job, record.metrics["training_seconds"] if record.metrics else None
        rest = [seconds, job.exit_code if job else None, " ".join(job.overrides) if job else None]
        rows.writerow([record.name, *(record.settings.get(key) for key in keys), *results_of(record), *rest])
    return text.getvalue()
