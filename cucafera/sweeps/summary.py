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

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cucafera.config.command_line import GENERATED
from cucafera.config.compose import as_typed
from cucafera.config.errors import EXIT_OUT_OF_TIME, EXIT_USER_ERROR, UserError
from cucafera.config.quoting import parse
from cucafera.markup import csv_cell, markdown
from cucafera.output import notify
from cucafera.quantities import number_of
from cucafera.sweeps import NOT_GIVEN, RATE, SEED

if TYPE_CHECKING:
    from cucafera.objectives import MetricSpec
    from cucafera.sweeps.importance import Importance
    from cucafera.sweeps.optimum import Optimum
    from cucafera.sweeps.records import RunRecord

FEWEST_RATES, MOST_GROUPS = 3, 6
"""Learning rates of each of several sweeps side by side, and how many of these; else it is a search."""
NEAR = 0.1
"""Share of the range of a parameter, at its ends, in which a better value may lie beyond."""
WIDER = 4.0
"""Factor by which the interval of a search is widened; of a parameter that is not logarithmic, half of its length."""
FURTHER_VALUES = 3
"""Values that are proposed for the next sweep."""
MOST_TIES = 3
"""Settings that are named as being as good as the best."""
RUN_AGAIN = "run the same command again to resume"
PROBLEMS = {
    "diverged": "Diverged",
    "crashed": "Crashed (run the same command again to retry)",
    "refused": "Refused (see job.out in its folder)",
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

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing to pickle: launchers send it to the processes of jobs, where it has no progress to show."""
        return {}

    def on_multirun_start(self, config: DictConfig, **settings: Any) -> None:
        """Create the sweep folder, in which a sweeper may keep its own files from the start, and show the progress."""
        from cucafera.sweeps.jobs import LOCAL_LAUNCHERS
        from cucafera.sweeps.progress import SweepProgress, number_of_jobs

        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        given = OverridesParser.create().parse_overrides(as_typed(config.hydra.overrides.task))
        total = number_of_jobs(given, config.hydra.sweeper.get("n_trials"))
        self.progress = SweepProgress(Path(config.hydra.sweep.dir), total)
        self.progress.start()
        if config.hydra.runtime.choices["hydra/launcher"] in LOCAL_LAUNCHERS:
            signal.signal(signal.SIGINT, _leave_to_jobs)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # started by nohup
                signal.signal(signal.SIGHUP, _leave_to_jobs)

    def on_multirun_end(self, config: DictConfig, **settings: Any) -> None:
        """Summarize the sweep when all jobs have ended."""
        self.progress.stop()
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
    from cucafera.sweeps.importance import importance
    from cucafera.sweeps.metrics import fitted_metric, shown_metrics
    from cucafera.sweeps.optimum import find_optimum
    from cucafera.sweeps.pictures import draw_learning_rates, draw_parameters, has_matplotlib
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
    parameters = [key for key in keys if key != SEED]
    shares = importance(
        {key: [record.settings.get(key, NOT_GIVEN) for record in records] for key in parameters if len(parameters) > 1},
        [record.rank for record in records],
    )
    if groups:
        paragraphs = [_verdict(name, optima[name], runs, fitted, overrides, others) for name, runs in groups.items()]
        if len(groups) > 1:
            paragraphs.append(_best_sentence(records, keys))
    else:
        paragraphs = [_conclusion(records, keys, shares, overrides, others)]
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
        draw_parameters(records, parameters or keys, shares, picture)
    shown = [f"![Results and curves]({picture.name}.png)"] if has_matplotlib() else []
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
    """Return the runs with their learning rates, grouped by their other settings.

    Empty if these are not sweeps of the learning rate side by side, each with enough values for an optimum, but a
    search or a grid of several parameters.
    """
    if RATE not in keys:
        return {}
    others = [key for key in keys if key not in (RATE, SEED)]
    groups: dict[str, list[tuple[float, RunRecord]]] = {}
    for record in records:
        name = ", ".join(f"{key}={record.settings.get(key, NOT_GIVEN)}" for key in others)
        rate = record.config.get(RATE, record.settings.get(RATE))
        if _is_number(rate):
            groups.setdefault(name, []).append((float(str(rate)), record))
    fewest = min((len({rate for rate, _ in runs}) for runs in groups.values()), default=0)
    if len(groups) > 1 and (fewest < FEWEST_RATES or len(groups) > MOST_GROUPS):
        return {}
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
    if optimum.is_flat:
        low, high = min(rate for rate, _ in runs), max(rate for rate, _ in runs)
        return (
            f"{subject} learning rates from {low:.3g} to {high:.3g} differ by no more than "
            f"{f'{metric.negligible:g} {metric.unit}'.rstrip()}: any of them is as good. The best is {tried}."
        )
    if optimum.value is None or optimum.as_good is None:
        return (
            f"{subject} best learning rate tried is {tried}; the results around it show no clear minimum. More values "
            "or seeds may (seed=1,2,3)."
        )
    uncertainty = "try more values or seeds to estimate its uncertainty (seed=1,2,3)"
    if optimum.interval is not None:
        uncertainty = (
            f"with 68% confidence between {optimum.interval[0]:.2g} and {optimum.interval[1]:.2g} "
            f"({number_of(optimum.points, 'run')})"
        )
    low, high = optimum.as_good
    resolved = f"{optimum.resolved:.2g} {metric.unit}".rstrip()
    if optimum.resolved > metric.negligible:
        resolved += ", which is how far the results are from a parabola"
    return (
        f"{subject} best learning rate is {optimum.value:.2g}; {uncertainty}. Values from {low:.2g} to {high:.2g} are "
        f"as good to {resolved}. Best value tried: {tried}."
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
    changed = [shlex.quote(f"{key}={value}") for key, value in values.items() if value != NOT_GIVEN]
    return " ".join(["python -m cucafera.run --multirun", *others, *kept, *changed])


class _Setting(NamedTuple):
    """The runs that differ only in their seeds.

    Attributes:
        values: What is swept, by key.
        runs: The runs; at least one.
        costs: Their primary metric such that lower is better, infinite without a result.
    """

    values: dict[str, str]
    runs: list["RunRecord"]
    costs: list[float]

    @property
    def mean(self) -> float:
        return math.fsum(self.costs) / len(self.costs)

    @property
    def text(self) -> str:
        return ", ".join(f"{key}={self.runs[0].shown(key)}" for key in self.values)


def _settings(records: Sequence["RunRecord"], keys: Sequence[str]) -> list[_Setting]:
    """Return the settings of a sweep, that with the best mean over its seeds first."""
    found: dict[tuple[str, ...], list[RunRecord]] = {}
    others = [key for key in keys if key != SEED]
    for record in records:
        found.setdefault(tuple(record.settings.get(key, NOT_GIVEN) for key in others), []).append(record)
    settings = [
        _Setting(dict(zip(others, values, strict=True)), runs, [run.rank for run in runs])
        for values, runs in found.items()
    ]
    return sorted(settings, key=lambda setting: setting.mean)


def _best_sentence(records: Sequence["RunRecord"], keys: Sequence[str]) -> str:
    """Return which setting is the best, with the spread over its seeds and its distance to the next."""
    from cucafera.sweeps.metrics import fitted_metric, primary_metric

    settings = _settings(records, keys)
    best = settings[0]
    if not math.isfinite(best.mean):
        return "No run has a result."
    metric, fitted = primary_metric(best.runs[0].config), fitted_metric(best.runs[0].config)

    def text(metric: "MetricSpec") -> str:
        values = [value for run in best.runs if (value := run.result(metric)) is not None]
        return f"{metric.label} {math.fsum(values) / len(values):{metric.format}}"

    in_brackets = [text(fitted)] if fitted != metric else []
    spread = ""
    if len(best.runs) > 1:
        spread = f" ± {_spread([best]):.2g}"
        in_brackets.insert(0, f"mean and standard deviation of {len(best.runs)} seeds")
    results = f"{text(metric)}{spread} {metric.unit}".rstrip() + (f" ({'; '.join(in_brackets)})" if in_brackets else "")
    if not best.values:
        return f"The result is {results}."
    sentence = f"The best of {len(settings)} settings is {best.text}: {results}."
    ties = [setting.text for setting in settings[1:] if setting.mean == best.mean]
    if ties:  # an accuracy over few examples has few values
        shown = "; ".join(ties[:MOST_TIES]) + (f" and {len(ties) - MOST_TIES} more" if len(ties) > MOST_TIES else "")
        sentence += f" It is as good with {shown}."
    noise = _spread(settings)
    if len(settings) > 1 and noise is not None and math.isfinite(settings[1].mean):
        difference = settings[1].mean - best.mean
        error = noise * math.sqrt(1 / len(best.runs) + 1 / len(settings[1].runs))
        clear = "more than the noise of the seeds" if difference > 2 * error else "which may be noise of the seeds"
        sentence += f" The next, {settings[1].text}, is {difference:.2g} worse, {clear} ({error:.2g})."
    return sentence


def _spread(settings: Sequence[_Setting]) -> float | None:
    """Return the standard deviation between the seeds of a setting, pooled over the settings; None with one seed."""
    finite = [setting for setting in settings if math.isfinite(setting.mean)]
    degrees_of_freedom = sum(len(setting.costs) - 1 for setting in finite)
    if degrees_of_freedom == 0:
        return None
    squares = math.fsum((cost - setting.mean) ** 2 for setting in finite for cost in setting.costs)
    return math.sqrt(squares / degrees_of_freedom)


def _conclusion(
    records: Sequence["RunRecord"],
    keys: Sequence[str],
    shares: Mapping[str, "Importance"],
    overrides: Sequence[str],
    others: Sequence[str],
) -> str:
    """Return the conclusion from a search, or from any sweep but of learning rates: one paragraph, and a command."""
    from cucafera.sweeps.importance import as_numbers

    settings = _settings(records, keys)
    sentences = [_best_sentence(records, keys)]
    if len(settings) == 1 or not math.isfinite(settings[0].mean):
        return sentences[0]
    clear = {key: share for key, share in shares.items() if share.is_clear}
    if clear:
        explained = ", ".join(f"{key} {share.share:.0%}" for key, share in clear.items())
        rest = [key for key in shares if key not in clear]
        sentences.append(
            f"Of the differences between the {number_of(len(records), 'job')}, each alone explains: {explained}"
            + (f"; no more than chance: {', '.join(rest)}." if rest else ".")
        )
    elif shares:
        sentences.append(
            f"No parameter alone explains more of the differences between {number_of(len(records), 'job')} than chance."
        )
    best = dict(settings[0].values)
    quarter = [setting for setting in settings if math.isfinite(setting.mean)][: max(3, len(settings) // 4)]
    beyond: dict[str, str] = {}
    narrower: dict[str, str] = {}
    for key in clear:
        numbers = as_numbers([setting.values[key] for setting in settings])
        good = as_numbers([setting.values[key] for setting in quarter])
        if numbers is None or good is None:
            continue
        sentences.append(f"The best {len(good)} settings have {key} from {min(good):.3g} to {max(good):.3g}.")
        text = next((text for text in overrides if _key(text) == key), "")
        if wider := _wider(float(best[key]), numbers, text):
            beyond[key] = wider
        elif interval := _interval(text, min(good), max(good)):
            narrower[key] = interval
    if beyond:
        why = f"the best {' and '.join(beyond)} lies at the end of what was tried"
        return " ".join(sentences) + f" Next, since {why}:\n\n    {_command(beyond, overrides, others)}"
    if narrower:
        return " ".join(sentences) + f" Next, a search close to it:\n\n    {_command(narrower, overrides, others)}"
    if _spread(settings) is None and not any(_is_interval(text) for text in overrides):
        command = _command(best | {SEED: "1,2,3"}, overrides, others)
        return " ".join(sentences) + f" Each ran with one seed. Next, the noise of the best:\n\n    {command}"
    return " ".join(sentences)


def _wider(best: float, tried: Sequence[float], override: str) -> str | None:
    """Return values to try beyond the end of a range that the best value is near to; None if it is not."""
    from cucafera.sweeps.importance import is_logarithmic

    values = sorted(set(tried))
    is_log = is_logarithmic(values)
    if len(values) < FEWEST_RATES:
        return None
    low, high, at = (math.log(value) if is_log else value for value in (values[0], values[-1], best))
    if NEAR < (at - low) / (high - low) < 1 - NEAR:
        return None
    upwards = at - low > (high - low) / 2
    if not _is_interval(override):
        step = values[-1] / values[-2] if upwards else values[0] / values[1]
        if not is_log:
            return None
        return ",".join(f"{(values[-1] if upwards else values[0]) * step**power:.3g}" for power in (1, 2))
    start, end = _ends(override)
    if is_log and start > 0:
        return _interval(override, best / WIDER, best * WIDER)
    reach = (end - start) / 2
    return _interval(override, max(best - reach, 0.0), best + reach)


def _ends(text: str) -> tuple[float, float]:
    """Return the ends of an interval."""
    interval: Any = getattr(parse(text), "value", dict)()
    return float(interval.start), float(interval.end)


def _is_interval(text: str) -> bool:
    override = parse(text)
    return override is not None and override.is_interval_sweep()


def _interval(text: str, low: float, high: float) -> str | None:
    """Return the interval of a search with other ends; None if the override is none."""
    override = parse(text)
    if override is None or not override.is_interval_sweep():
        return None
    interval = f"interval({low:.3g}, {high:.3g})"
    return f"tag(log, {interval})" if "log" in override.value().tags else interval  # type: ignore[union-attr]


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
        [
            *(record.shown(key) if key in record.settings else "" for key in keys),
            *in_figures(results_of(record, metrics)),
        ]
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
