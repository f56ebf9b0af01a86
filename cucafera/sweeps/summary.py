"""The summary of a sweep: the best learning rate, its uncertainty, and the command to run next."""

import csv
import io
import itertools
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

from cucafera.config.command_line import GENERATED
from cucafera.config.compose import as_typed
from cucafera.config.errors import EXIT_OUT_OF_TIME, EXIT_USER_ERROR, UserError
from cucafera.config.quoting import parse
from cucafera.markup import csv_cell, markdown
from cucafera.output import notify

if TYPE_CHECKING:
    from cucafera.objectives import MetricSpec
    from cucafera.sweeps.optimum import Optimum
    from cucafera.sweeps.records import RunRecord

RATE, SEED = "optimizer.lr", "seed"
FURTHER_VALUES = 3
"""Values that are proposed for the next sweep."""
NOT_GIVEN = "default"
"""Stands for the value of a key that a job's command line does not set."""
RUN_AGAIN = "run the same command again to resume"
PROBLEMS = {
    "diverged": "Diverged",
    "crashed": "Crashed (run the same command again to retry)",
    "refused": "Refused (see the message above, or job.out in its folder)",
    "stopped": f"Stopped before the end ({RUN_AGAIN})",
    "started": f"Unfinished ({RUN_AGAIN})",
}
"""Statuses of jobs that are listed below the table, with their headings."""
EXIT_CODES = {
    "crashed": 1,
    "refused": EXIT_USER_ERROR,
    "stopped": EXIT_OUT_OF_TIME,
    "started": EXIT_OUT_OF_TIME,
}
"""Exit codes of a sweep by the statuses of its jobs, the first that occurs: to diverge is a result, not a failure."""


class SweepSummaryCallback(Callback):
    """Hydra's callback at the end of a sweep: prints the summary, and writes it into the sweep folder.

    Files: results.csv, a row per run; summary.md; sweep.png and sweep.pdf. Ends with the summary's exit code.
    """

    def on_multirun_start(self, config: DictConfig, **settings: Any) -> None:
        """Create the sweep folder, in which a sweeper may keep its own files from the start."""
        from cucafera.sweeps.jobs import LOCAL_LAUNCHERS

        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        if config.hydra.runtime.choices["hydra/launcher"] in LOCAL_LAUNCHERS:
            signal.signal(signal.SIGINT, _leave_to_jobs)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # started by nohup
                signal.signal(signal.SIGHUP, _leave_to_jobs)

    def on_multirun_end(self, config: DictConfig, **settings: Any) -> None:
        """Summarize the sweep when all jobs have ended."""
        choices = itertools.takewhile(lambda text: text != GENERATED, as_typed(config.hydra.overrides.hydra))
        try:
            summary = summarize_sweep(
                Path(config.hydra.sweep.dir),
                overrides=as_typed(config.hydra.overrides.task),
                fixed=set(config.hydra.job.config.override_dirname.exclude_keys),
                others=list(map(shlex.quote, choices)),
            )
            print(summary.text, flush=True)
        except UserError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        except Exception:  # Hydra would turn it into a warning, and exit with 0
            traceback.print_exc()
            sys.exit(1)
        if summary.exit_code:
            sys.exit(summary.exit_code)


def _leave_to_jobs(number: int, frame: FrameType | None) -> None:
    """Exit the sweep's process: its jobs notice that, and save. The launcher would kill them, even within a save."""
    notify("Interrupted: the jobs save and stop. Run the same command again to resume.")
    os._exit(128 + number)


class SweepSummary(NamedTuple):
    """The summary of a sweep.

    Attributes:
        text: For the terminal.
        exit_code: See EXIT_CODES; 0 if none of them applies.
    """

    text: str
    exit_code: int


def summarize_sweep(
    folder: Path, overrides: Sequence[str], fixed: Container[str], others: Sequence[str] = ()
) -> SweepSummary:
    """Write results.csv, summary.md and the picture into a sweep folder, and return the summary.

    It covers the jobs of this sweep, and of earlier ones in the same folder whose other settings were the same.

    Args:
        folder: The sweep folder.
        overrides: The command line of the sweep.
        fixed: Its keys that are not swept.
        others: The rest of the command line, quoted for a shell.

    Raises:
        UserError: the folder holds no job of this sweep.
    """
    from cucafera.storage import write_text
    from cucafera.sweeps.metrics import fitted_metric, shown_metrics
    from cucafera.sweeps.optimum import find_optimum
    from cucafera.sweeps.pictures import draw_curves, draw_learning_rates, has_matplotlib
    from cucafera.sweeps.records import as_markdown, as_text, differing_keys, read_records, settings_of

    found = sorted(read_records(folder, folder), key=lambda record: (record.rank, record.name))
    swept = {_key(text) for text in overrides if _key(text) not in fixed} | {RATE, SEED}
    settings = settings_of([text for text in overrides if _key(text) not in swept])
    records = [
        record
        for record in found
        if {key: value for key, value in record.settings.items() if key not in swept} == settings
    ]
    if not records:
        raise UserError(f"{folder} holds only jobs of other sweeps: {', '.join(record.name for record in found)}")
    keys = differing_keys([record.settings for record in records])
    metrics = shown_metrics(record.config for record in records)
    fitted = fitted_metric(records[0].config)
    groups = _groups(records, keys)
    optima = {
        name: find_optimum([(rate, _finite(run, fitted)) for rate, run in runs], fitted.negligible, fitted.direction)
        for name, runs in groups.items()
    }
    paragraphs = [_verdict(name, optima[name], runs, fitted, overrides, others) for name, runs in groups.items()]
    if len(groups) != 1:
        paragraphs.append(_ranking(records))
    others_found = [record for record in found if record not in records]
    refused = [record.name for record in others_found if _has_swept_values(record, overrides)]
    paragraphs += _failed_jobs_section(records, [record for record in others_found if record.name not in refused])
    if refused:
        paragraphs.append(
            f"Not run, since their folders hold jobs with other settings: {'; '.join(refused)}. Choose another "
            "name=..., or run all jobs again with resume=overwrite."
        )
    table = _table(records, keys, metrics)
    picture = folder / "sweep"
    if not has_matplotlib():
        paragraphs.append("No picture was drawn: it needs matplotlib (pip install '.[plots]').")
    elif any(optima.values()):
        draw_learning_rates(groups, optima, picture)
    else:
        draw_curves(records, picture)
    shown = [f"![Results against learning rate, and curves]({picture.name}.png)"] if has_matplotlib() else []
    parts = [part for paragraph in paragraphs for part in paragraph.split("\n\n")]
    # A command to type is indented: a block of code, in which nothing is interpreted.
    texts = [part if part.startswith("    ") else markdown(part) for part in parts]
    page = [f"# {markdown(str(folder))}", *texts, as_markdown(table), *shown]
    write_text(folder / "summary.md", "\n\n".join(page) + "\n")
    write_text(folder / "results.csv", _csv(records, keys, metrics))
    files = f"Summary: {folder / 'summary.md'}\nCurves: tensorboard --logdir {shlex.quote(str(folder))}"
    statuses = {record.status for record in records}
    exit_code = next((code for status, code in EXIT_CODES.items() if status in statuses), 0)
    exit_code = exit_code or (EXIT_USER_ERROR if refused else 0)
    return SweepSummary("\n\n".join(["", as_text(table), *paragraphs, files]), exit_code)


def _has_swept_values(record: "RunRecord", overrides: Sequence[str]) -> bool:
    """True if each swept key of a command line has the value of a run among its own."""
    found = [override for override in map(parse, overrides) if override is not None and override.is_discrete_sweep()]
    return bool(found) and all(
        record.settings.get(override.key_or_group) in list(override.sweep_string_iterator()) for override in found
    )


def _finite(record: "RunRecord", metric: "MetricSpec") -> float:
    """Return a result; infinite if there is none, which `find_optimum` leaves out."""
    value = record.result(metric)
    return math.inf if value is None else value


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def _groups(records: Sequence["RunRecord"], keys: Sequence[str]) -> dict[str, list[tuple[float, "RunRecord"]]]:
    """Return the runs with their learning rates, grouped by their other settings; empty if the rate does not vary."""
    if RATE not in keys:
        return {}
    others = [key for key in keys if key not in (RATE, SEED)]
    groups: dict[str, list[tuple[float, RunRecord]]] = {}
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
    runs: Sequence[tuple[float, "RunRecord"]],
    metric: "MetricSpec",
    overrides: Sequence[str],
    others: Sequence[str],
) -> str:
    """Return the conclusion from the runs of a group about the learning rate, as a sentence."""
    subject = f"With {name}, the" if name else "The"
    if optimum is None:
        lower = "; try lower learning rates" if any(record.status == "diverged" for _, record in runs) else ""
        return f"{subject} runs have no result{lower}."
    tried = f"{optimum.best_value:.3g} ({metric.label} {optimum.best_score:{metric.format}})"
    if further := _further_values(optimum, sorted({rate for rate, _ in runs})):
        why = (
            f"{optimum.diverged:.3g} has no result, so a better one may lie between the two"
            if optimum.diverged
            else f"it is the {optimum.edge} value tried, so a better one may lie beyond it"
        )
        swept = dict(part.split("=", 1) for part in name.split(", ") if part)
        command = _command(swept | {RATE: ",".join(f"{value:.3g}" for value in further)}, overrides, others)
        return f"{subject} best learning rate so far is {tried}; {why}. Next:\n\n    {command}"
    if optimum.value is None or optimum.as_good is None:
        return f"{subject} best learning rate tried is {tried}; the results around it do not fit a parabola."
    uncertainty = "try more values or seeds to estimate its uncertainty (seed=1,2,3)"
    if optimum.factor is not None:
        uncertainty = f"within a factor of {optimum.factor:.2f} (68% confidence, {optimum.points} runs)"
    low, high = optimum.as_good
    return (
        f"{subject} best learning rate is {optimum.value:.2g}; {uncertainty}. Values from {low:.2g} to {high:.2g} are "
        f"as good to {metric.negligible:g} {metric.unit}. Best value tried: {tried}."
    )


def _further_values(optimum: "Optimum", rates: Sequence[float]) -> list[float]:
    """Return values to try next: between the best and one that diverged, or beyond the edge of the grid; else none."""
    powers = range(1, FURTHER_VALUES + 1)
    if optimum.diverged is not None:
        ratio = (optimum.diverged / optimum.best_value) ** (1 / (FURTHER_VALUES + 1))
        return [optimum.best_value * ratio**power for power in powers]
    if optimum.edge is None:
        return []
    ratio = rates[0] / rates[1] if optimum.edge == "lowest" else rates[-1] / rates[-2]
    return [optimum.best_value * ratio**power for power in powers]


def _command(values: Mapping[str, str], overrides: Sequence[str], others: Sequence[str]) -> str:
    """Return the command of the sweep with other values of some keys; finished runs are kept."""
    kept = [shlex.quote(text) for text in overrides if _key(text) not in values]
    changed = [f"{key}={value}" for key, value in values.items() if value != NOT_GIVEN]
    return " ".join(["python -m cucafera.run --multirun", *others, *kept, *changed])


def _ranking(records: Sequence["RunRecord"]) -> str:
    from cucafera.sweeps.metrics import fitted_metric, primary_metric

    best = records[0]
    metric = primary_metric(best.config)
    fitted = fitted_metric(best.config)
    value, fit = best.result(metric), best.result(fitted)
    if value is None or not math.isfinite(best.rank):
        return "No run has a result."
    text = f"The best is {best.name}: {metric.label} {value:{metric.format}} {metric.unit}"
    return text + (f" ({fitted.label} {fit:{fitted.format}})." if fit is not None and metric != fitted else ".")


def _failed_jobs_section(records: Sequence["RunRecord"], others: Sequence["RunRecord"]) -> list[str]:
    """Return a paragraph per kind of PROBLEMS, and one for the jobs of other sweeps in the same folder."""
    paragraphs = []
    for status, heading in PROBLEMS.items():
        names = [
            record.name + (f" (exit code {record.job.exit_code})" if record.job and status == "crashed" else "")
            for record in records
            if record.status == status
        ]
        if names:
            paragraphs.append(f"{heading}: {'; '.join(sorted(names))}.")
    if others:
        names = [record.name for record in others]
        paragraphs.append(f"Not counted, since their sweeps had other settings: {'; '.join(names)}.")
    return paragraphs


def _table(records: Sequence["RunRecord"], keys: Sequence[str], metrics: Sequence["MetricSpec"]) -> list[list[str]]:
    from cucafera.sweeps.records import in_figures, result_columns, results_of

    rows = [
        [*(record.settings.get(key, "") for key in keys), *in_figures(results_of(record, metrics))]
        for record in records
    ]
    return [[*keys, *result_columns(metrics)], *rows]


def _csv(records: Sequence["RunRecord"], keys: Sequence[str], metrics: Sequence["MetricSpec"]) -> str:
    from cucafera.sweeps.records import result_columns, results_of

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["run", *keys, *result_columns(metrics), "seconds", "exit code", "overrides"])
    for record in records:
        job, seconds = record.job, record.metrics["training_seconds"] if record.metrics else None
        rest = [seconds, job.exit_code if job else None, " ".join(job.overrides) if job else None]
        cells = [record.name, *map(record.settings.get, keys), *results_of(record, metrics), *rest]
        rows.writerow(map(csv_cell, cells))
    return text.getvalue()
