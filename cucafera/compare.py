"""The command that compares runs: `python -m cucafera.compare RUN RUN...`."""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import sys
import textwrap
from pathlib import Path

from cucafera.config.errors import UserError
from cucafera.options import announce_choice, command_parser
from cucafera.output import protect_output
from cucafera.runs.locate import OUTPUTS, run_named
from cucafera.terminal_table import terminal_width


def main() -> None:
    """Print the differences of configurations, and the results; draw the curves with --plot."""
    protect_output(is_required=True)
    parser = command_parser(
        "compare",
        description="Shows runs side by side: the differences of their configurations, and their results.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=run_named,
        metavar="RUN",
        help="a run folder, or a folder of runs, such as a sweep; NAME stands for outputs/NAME (default, in a "
        "terminal: all runs below outputs/)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the validation curves into FILE.png and FILE.pdf")
    arguments = parser.parse_args()
    try:
        if not arguments.runs:
            arguments.runs = [str(OUTPUTS)]
            announce_choice("compare", str(OUTPUTS), "the folder of all runs")
        print(compare([Path(run) for run in arguments.runs], Path(arguments.plot) if arguments.plot else None))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def compare(folders: list[Path], plot: Path | None) -> str:
    """Return the tables for the terminal.

    Args:
        folders: Run folders, or folders of runs.
        plot: Path of the picture of the curves, with or without its suffix; None: no picture.

    Raises:
        UserError: there is no run, or the picture cannot be drawn.
    """
    from cucafera.sweeps.metrics import shown_metrics
    from cucafera.sweeps.pictures import FORMATS, draw_curves, has_matplotlib
    from cucafera.sweeps.records import (
        as_text,
        differences,
        in_figures,
        read_records,
        result_columns,
        results_of,
        units_of,
    )

    if plot is not None and not has_matplotlib():
        raise UserError("--plot needs matplotlib: pip install '.[plots]'")
    alone = len(folders) == 1
    records = [record for folder in folders for record in read_records(folder, folder if alone else None)]
    different = differences(records)
    metrics = shown_metrics(record.config for record in records)
    results = [
        ["run", *result_columns(metrics)],
        *([record.name, *in_figures(results_of(record, metrics))] for record in records),
    ]
    units = units_of(metrics)
    heading = f"Results ({units}):" if units else "Results:"
    if width := terminal_width():
        heading = textwrap.fill(heading, width)
    lines = (
        ["Differences of the configurations:", as_text(different)]
        if len(different) > 1 and len(different[0]) > 1
        else ["The configurations are equal."]
    )
    lines += ["", heading, as_text(results)]
    if plot is not None:
        plot = plot.with_suffix("") if plot.suffix.removeprefix(".") in FORMATS else plot
        try:
            draw_curves(records, plot)
        except OSError as error:
            raise UserError(f"{plot} cannot be written: {error.strerror or error}") from error
        lines += ["", "Curves: " + " and ".join(f"{plot}.{ending}" for ending in FORMATS)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
