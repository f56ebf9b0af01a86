"""Look at what a model is trained on, without training: `python -m cucafera.inspect`, with the overrides of a run.

Prepares the data as the run would, which then starts at once. Shows windows as text, and measures of each source.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf

from cucafera.config.command_line import check_command_line
from cucafera.config.compose import check_composed, hydra_session, problem_list
from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.options import command_parser
from cucafera.output import protect_output
from cucafera.process import keep_freed_memory, let_threads_wait_briefly
from cucafera.quantities import number_of
from cucafera.run import read_model_elsewhere

if TYPE_CHECKING:
    from cucafera.data.inspection import Measures
    from cucafera.data.run_data import RunData
    from cucafera.data.windows import Window

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
TRAINING, HELD_OUT = "training", "held out"
BAR_WIDTH = 40
"""Characters of the longest bar of a histogram."""


class DescribedRun(NamedTuple):
    """The run whose data are shown.

    Attributes:
        config: Its configuration.
        fingerprints: Of the data that it was trained with; empty if it has not started.
        skipped_batches: Numbers of the batches that its rollbacks skipped.
    """

    config: Config
    fingerprints: Mapping[str, str] = {}
    skipped_batches: Sequence[int] = ()


def main() -> None:
    """Show the data of the command line's run."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    protect_output(is_required=True)
    arguments = command_line_parser().parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_values(arguments)
        log.info("Reading the configuration")
        with hydra_session(read_model_elsewhere):
            run = described_run(arguments.overrides)
        print(inspect(run, arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "inspect",
        description="Shows what a model is trained on, without training: measures of each source, and windows as text. "
        "Prepares tokenizer and tokens as the run would; the run finds them.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="what python -m cucafera.run would get, such as +experiment=finetune init_from=outputs/quickstart; "
        "or the folder of a run",
    )
    parser.add_argument(
        "--step", type=int, default=1, metavar="S", help="show windows of this training step (default: 1)"
    )
    parser.add_argument(
        "--windows", type=int, default=2, metavar="N", help="how many windows are shown (default: %(default)s)"
    )
    parser.add_argument("--held-out", action="store_true", help="show held-out windows instead")
    parser.add_argument("--tokens", action="store_true", help="show where tokens begin, by |")
    return parser


def check_values(arguments: argparse.Namespace) -> None:
    """Raise UserError if the value of an option is out of bounds."""
    for option, least in (("step", 1), ("windows", 0)):
        if getattr(arguments, option) < least:
            raise UserError(f"--{option} is {getattr(arguments, option)}; it must be at least {least}")


def described_run(overrides: list[str]) -> DescribedRun:
    """Return the run of a command line or run folder.

    Args:
        overrides: The overrides of a run that need not exist; or the path of a run folder.

    Raises:
        UserError: The configuration has problems, or cannot be read.
    """
    first = next((text for text in overrides if "=" not in text and not text.startswith(("+", "~"))), None)
    if first is None:
        node, config, problems = check_command_line(overrides)
        if node is None or problems:
            raise UserError(problem_list(problems))
        return DescribedRun(config)

    if len(overrides) > 1:
        raise UserError(f"{first} is not an override, key=value; a run folder stands alone, with its own configuration")
    folder = Path(first).expanduser()
    if not folder.is_dir():
        raise UserError(f"{first}: there is no such run folder, and it is not an override, key=value")

    from cucafera.runs.folder import RunFolder, read_checkpoint_of

    run = RunFolder(folder)
    if not run.config.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config, problems = check_composed(OmegaConf.create(run.read_config()))
    if problems:
        raise UserError(problem_list([f"{run.config}: {problem}" for problem in problems]))
    config.init_from = None  # the run has a copy of the tokenizer
    config.tokenizer.path = str(run.tokenizer)
    newest = run.checkpoints.complete()[-1:]  # the best one may lack the last rollbacks
    _, checkpoint = read_checkpoint_of(str(newest[0].path if newest else folder), "")
    return DescribedRun(config, checkpoint["fingerprints"], checkpoint["skipped_batches"])


def inspect(run: DescribedRun, arguments: argparse.Namespace) -> str:
    """Return what is shown of a run's data.

    Args:
        run: The run, whose data must be those that it was trained with.
        arguments: Of `command_line_parser`.

    Raises:
        UserError: The data cannot be read, or have changed.
    """
    config = run.config
    log.info("Opening the data of %s", config.run_dir)

    from cucafera.interop.trained import initial_tokenizer
    from cucafera.objectives import objective_of

    if config.init_from and config.tokenizer.path is None:
        config.tokenizer.path = str(initial_tokenizer(config))
    objective = objective_of(config)
    data = objective.open_data(config)
    data.check_fingerprints(run.fingerprints)
    steps = data.steps_of(config.epochs) if config.epochs is not None else config.total_steps
    if arguments.step > steps:
        raise UserError(f"--step is {arguments.step:,}; the run has {number_of(steps, 'step')}")
    lines = [_summary(config, data, steps)]
    for name, training, held_out in zip(config.data.sources, data.training, data.validation, strict=True):
        lines += ["", *_source_lines(name, data, training, held_out)]
    if data.notes or data.left_out:
        lines += ["", *data.notes, *map(str, data.left_out)]
    shown = _held_out_windows(data) if arguments.held_out else _training_windows(data, run, arguments.step)
    use = "measured" if arguments.held_out else data.use
    for _, (title, window) in zip(range(arguments.windows), shown, strict=False):
        lines += ["", *_window_lines(title, use, window, data, "|" if arguments.tokens else "")]
    return "\n".join(lines)


def _summary(config: Config, data: "RunData[Any]", steps: int) -> str:
    """The line on the run as a whole."""
    seen = f"the data are seen {data.epochs_at(steps):.2f} times"
    if (repeated := config.data.overfit_steps) is not None:
        seen = f"only the data of the first {number_of(repeated, 'step')} are seen, again and again"
    masking = f"its own {data.piece}" if config.data.document_masking else "all of its window"
    return (
        f"{config.objective.name}: {number_of(steps, 'step')} of {number_of(config.windows_per_step, 'window')} of "
        f"{number_of(config.sequence_length, 'token')}; {seen}.\n"
        f"A token attends to what stands before it in {masking}."
    )


def _source_lines(name: str, data: "RunData[Any]", training: Any, held_out: Any) -> list[str]:
    """The table of one source, and the lengths of what it holds."""
    from cucafera.data.inspection import measure

    length = data.config.sequence_length
    sides = [measure(side, data.tokenizer, length) for side in (training, held_out)]
    rows = [(name, [TRAINING, HELD_OUT])]
    for label, value in _measures(data, length).items():
        rows.append((label, [value(side) if side.windows else "" for side in sides]))
    label_width = max(len(label) for label, _ in rows)
    lines = [f"  {label:<{label_width}}" + "".join(f"{cell:>16}" for cell in cells) for label, cells in rows]
    if any(side.measured < side.windows for side in sides):
        lines.append(f"  of {number_of(sides[0].measured, 'training window')}, spread evenly over all")
    return [*lines, "", f"  tokens of a training {data.noun}", *_histogram(sides[0], length)]


def _measures(data: "RunData[Any]", length: int) -> dict[str, Any]:
    """The rows of the table: a label, and the function from `Measures` to its cell."""
    import numpy as np

    noun, entries = data.noun, data.tokenizer.vocab_size

    def lengths(function: Any) -> Any:
        return lambda side: f"{int(function(side.lengths)):,}" if len(side.lengths) else ""

    return {
        "windows": lambda side: f"{side.windows:,}",
        f"{noun}s": lambda side: f"{len(side.lengths):,}",
        "tokens": lambda side: f"{side.tokens:,}",
        f"tokens of a {noun}: median": lengths(np.median),
        "  longest": lengths(np.max),
        f"  longer than a window of {length:,}": lengths(lambda values: (values > length).sum()),
        "bytes per token": lambda side: f"{side.bytes_per_token:.2f}",
        "padding": lambda side: f"{side.padding:.1%}",
        data.use: lambda side: f"{side.trained:.1%}",
        f"entries that occur, of {entries:,}": lambda side: f"{int((side.counts[:entries] > 0).sum()):,}",
    }


def _histogram(measures: "Measures", length: int) -> Iterator[str]:
    """Yield a bar for each power of two of the lengths of documents, conversations or pairs."""
    import numpy as np

    bins = np.bincount(np.log2(np.maximum(1, measures.lengths)).astype(int))
    most = max(1, int(bins.max(initial=0)))
    for exponent in range(int(np.flatnonzero(bins)[0]) if bins.any() else 0, len(bins)):
        first, last = 2**exponent, 2 ** (exponent + 1) - 1
        bar = "#" * round(BAR_WIDTH * int(bins[exponent]) / most)
        window = "  <- window" if first <= length <= last else ""
        yield f"  {first:>9,} to {last:>9,}  {bins[exponent]:>9,}  {bar}{window}".rstrip()


def _training_windows(data: "RunData[Any]", run: DescribedRun, step: int) -> "Iterator[tuple[str, Window]]":
    """Yield the windows of a step in their order, each with its title."""
    names, count = list(run.config.data.sources), run.config.windows_per_step
    for position, (source, number) in enumerate(data.training_steps(run.skipped_batches).positions(step - 1), 1):
        windows = data.training[source]
        place = f"window {number + 1:,} of {len(windows):,} of {names[source]}"
        yield f"Step {step:,}, window {position:,} of {count:,}: {place}", windows.window(number)


def _held_out_windows(data: "RunData[Any]") -> "Iterator[tuple[str, Window]]":
    """Yield the windows that validation measures, each with its title."""
    names = list(data.config.data.sources)
    for source, number in data.validation_positions():
        windows = data.validation[source]
        yield f"Held out: window {number + 1:,} of {len(windows):,} of {names[source]}", windows.window(number)


def _window_lines(title: str, use: str, window: "Window", data: "RunData[Any]", separator: str) -> Iterator[str]:
    """Yield the lines of a window, of which some or all is used: trained on or measured."""
    from cucafera.data.inspection import pieces, text_of

    found = list(pieces(window))
    is_masked = not all(piece.trained.all() for piece in found)
    yield f"{title}; {'what stands in ⟦ ⟧' if is_masked else 'all of it'} is {use}"
    for number, piece in enumerate(found):
        if piece.is_padding:
            yield f"  -- padding: {number_of(len(piece.ids), 'token')}"
            continue
        yield f"  -- {data.name_of_piece(number)}: {number_of(len(piece.ids), 'token')}"
        yield from ("  " + line for line in text_of(piece, data.tokenizer, separator).split("\n"))


if __name__ == "__main__":
    main()
