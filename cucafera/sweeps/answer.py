"""The answer of a sweep: which learning rate is best, how sure that is, and what to try next."""

import csv
import io
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

if TYPE_CHECKING:
    from cucafera.sweeps.optimum import Optimum
    from cucafera.sweeps.records import Record

RATE, SEED = "optimizer.lr", "seed"
FURTHER_VALUES = 3
"""Values that are proposed behind the edge of a grid."""


class SweepAnswer(Callback):
    """Hydra's callback at the end of a sweep: prints the answer, and leaves it in the sweep folder.

    Files: results.csv, a row a run; summary.md; sweep.png and sweep.pdf. Ends with 1 if a job crashed, else with 2 if
    one was refused.
    """

    def on_multirun_start(self, config: DictConfig, **settings: Any) -> None:
        """Makes the sweep folder, in which a sweeper may want to keep its own notes from the start."""
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)

    def on_multirun_end(self, config: DictConfig, **settings: Any) -> None:
        """Answers, when all jobs have ended."""
        overrides = [*config.hydra.overrides.task, *_choices(config.hydra.overrides.hydra)]
        folder = Path(config.hydra.sweep.dir)
        print(answer(folder, overrides), flush=True)
        if code := exit_code(folder):
            sys.exit(code)


def _choices(overrides: Sequence[str]) -> list[str]:
    """What the user chose of Hydra itself, such as a launcher."""
    return [text for text in overrides if not text.startswith(("hydra.job.", "hydra.sweeper.params", "hydra.mode"))]


def exit_code(folder: Path) -> int:
    """1 if a job of the sweep in a folder crashed, 2 if one was refused, or else 0: to diverge is a result."""
    from cucafera.sweeps.records import read_records

    statuses = {record.status for record in read_records(folder)}
    return 1 if "crashed" in statuses else 2 if "refused" in statuses else 0


def answer(folder: Path, overrides: Sequence[str]) -> str:
    """Writes results.csv, summary.md and the picture into a sweep folder.

    Args:
        folder: The sweep folder.
        overrides: The command line of the sweep.

    Returns:
        The summary, for the terminal.
    """
    from cucafera.data.files import write_text
    from cucafera.sweeps.optimum import find_optimum
    from cucafera.sweeps.pictures import draw_curves, draw_learning_rates, has_matplotlib
    from cucafera.sweeps.records import as_markdown, as_text, differing_keys, read_records

    records = sorted(read_records(folder), key=lambda record: (record.loss, record.name))
    keys = differing_keys([record.settings for record in records])
    groups = _groups(records, keys)
    optima = {name: find_optimum((rate, run.loss) for rate, run in runs) for name, runs in groups.items()}
    paragraphs = [_verdict(name, optima[name], overrides) for name in groups] or [_ranking(records)]
    paragraphs += _troubles(records)
    table = _table(records, keys)
    picture = folder / "sweep"
    if not has_matplotlib():
        paragraphs.append("There is no picture: pip install 'cucafera[plots]' brings matplotlib, which draws it.")
    elif any(optima.values()):
        draw_learning_rates(groups, optima, picture)
    else:
        draw_curves(records, picture)
    shown = [f"![Loss against learning rate, and curves]({picture.name}.png)"] if has_matplotlib() else []
    markdown = [f"# {folder}", *paragraphs, as_markdown(table), *shown]
    write_text(folder / "summary.md", "\n\n".join(markdown) + "\n")
    write_text(folder / "results.csv", _csv(records, keys))
    places = f"Summary: {folder / 'summary.md'}\nCurves: tensorboard --logdir {shlex.quote(str(folder))}"
    return "\n\n".join(["", as_text(table), *paragraphs, places])


def _groups(records: Sequence["Record"], keys: Sequence[str]) -> dict[str, list[tuple[float, "Record"]]]:
    """Runs with their learning rates, by what they differ in besides it and the seed; nothing if it does not vary."""
    if RATE not in keys:
        return {}
    others = [key for key in keys if key not in (RATE, SEED)]
    groups: dict[str, list[tuple[float, Record]]] = {}
    for record in records:
        name = ", ".join(f"{key}={record.settings.get(key, 'default')}" for key in others)
        rate = record.config.get(RATE, record.settings.get(RATE))
        if _is_number(rate):
            groups.setdefault(name, []).append((float(str(rate)), record))
    return dict(sorted(groups.items()))


def _is_number(text: Any) -> bool:
    try:
        return float(text) > 0
    except (TypeError, ValueError):
        return False


def _verdict(name: str, optimum: "Optimum | None", overrides: Sequence[str]) -> str:
    """What the runs of a group say of the learning rate, in words."""
    about = f"With {name}, the" if name else "The"
    if optimum is None:
        return f"{about} runs came to no finite loss; try lower learning rates."
    tried = f"{optimum.best_value:.3g}, with a validation loss of {optimum.best_loss:.3f}"
    if optimum.edge:
        return (
            f"{about} best learning rate is not known yet: of those tried it is the {optimum.edge}, {tried}, and "
            f"beyond it may lie a better one. Next:\n\n    {_next_command(optimum, overrides)}"
        )
    if optimum.value is None:
        return f"{about} best learning rate of those tried is {tried}; the losses around it follow no parabola."
    assert optimum.as_good is not None
    sure = "how sure that is, more values or seeds would tell (seed=1,2,3)"
    if optimum.factor is not None:
        sure = f"within a factor of {optimum.factor:.2f} (one standard error, {optimum.points} runs)"
    low, high = optimum.as_good
    return (
        f"{about} best learning rate is {optimum.value:.2g}; {sure}. Everything from {low:.2g} to {high:.2g} is as "
        f"good, to 0.01 nats. Best of those tried: {tried}."
    )


def _next_command(optimum: "Optimum", overrides: Sequence[str]) -> str:
    """The sweep again, with values beyond the edge; what has been run is kept."""
    swept = next(text for text in overrides if text.lstrip("+").startswith(RATE + "="))
    values = sorted(float(value) for value in swept.partition("=")[2].split(",") if _is_number(value))
    ratio = values[-1] / values[-2] if len(values) > 1 else 2.0
    step = ratio if optimum.edge == "highest" else 1 / ratio
    further = [f"{optimum.best_value * step**power:.3g}" for power in range(1, FURTHER_VALUES + 1)]
    others = [shlex.quote(text) for text in overrides if text != swept]
    return " ".join(["python -m cucafera.run --multirun", *others, f"{RATE}={','.join(further)}"])


def _ranking(records: Sequence["Record"]) -> str:
    best = records[0]
    if not math.isfinite(best.loss):
        return "No run came to a finite loss."
    return f"The best is {best.name}, with a validation loss of {best.loss:.3f} ({best.curve[-1]['bpb']:.3f} bpb)."


def _troubles(records: Sequence["Record"]) -> list[str]:
    meanings = {
        "diverged": "Diverged",
        "crashed": "Crashed; the same command tries again",
        "refused": "Refused, for what stands above",
        "stopped": "Stopped before the end; the same command goes on",
        "not finished": "Not finished",
    }
    troubles = []
    for status, meaning in meanings.items():
        named = [
            record.name + (f" (exit code {record.ended.exit_code})" if record.ended and status == "crashed" else "")
            for record in records
            if record.status == status
        ]
        if named:
            troubles.append(f"{meaning}: {'; '.join(sorted(named))}.")
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
        ended, seconds = record.ended, record.metrics["training_seconds"] if record.metrics else None
        rest = [seconds, ended.exit_code if ended else None, " ".join(ended.overrides) if ended else None]
        rows.writerow([record.name, *(record.settings.get(key) for key in keys), *results_of(record), *rest])
    return text.getvalue()
