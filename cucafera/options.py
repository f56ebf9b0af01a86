"""Command-line options that several commands share; imports nothing heavy."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cucafera import __version__
from cucafera.config.check import build
from cucafera.config.errors import UserError
from cucafera.config.schema import Config, ModelConfig, SamplingConfig
from cucafera.model.flops import parameter_count
from cucafera.output import is_terminal
from cucafera.quantities import data_size, number_of
from cucafera.runs.locate import OUTPUTS, ModelLocation, run_named, runs_below
from cucafera.storage import read_small_file

PUBLISHED_MODEL = "pauhidalgoo/cucafera-chat"
"""The chat model of the original, on the Hugging Face hub."""
DECAYED = 0.1
"""Learning rate, as a fraction of its peak, below which the weights after a few steps are nearly the same point."""


class CommandParser(argparse.ArgumentParser):
    """A parser that takes options by their complete names only, and names the nearest one of an unknown one.

    Of an unknown option only the name is printed: its value may be a token or a key.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; see argparse."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
            if not options:
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
            nearest = difflib.get_close_matches(options[0], self._option_string_actions, n=1)
            self.error(f"there is no option {options[0]}{f'; did you mean {nearest[0]}?' if nearest else ''}")
        return parsed


def command_parser(name: str, **settings: Any) -> CommandParser:
    """Return a parser that shows the command as it was started, with --version; the settings are those of argparse."""
    parser = CommandParser(prog=program_name(name), **settings)
    parser.add_argument("--version", action="version", version=f"cucafera {__version__}")
    return parser


def program_name(name: str) -> str:
    """Return a command as it was started: by its name, or with python -m."""
    module = f"cucafera.{name}"
    return f"python -m {module}" if module in sys.orig_argv else f"cucafera {name}"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if available")


def add_run(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add RUN, which `choose_run` fills in if it is left out."""
    parser.add_argument(
        "run",
        nargs="?",
        type=run_named,
        metavar="RUN",
        help=f"{help_text}; NAME stands for outputs/NAME (default, in a terminal: the newest run below outputs/)",
    )


def add_average(parser: argparse.ArgumentParser) -> None:
    """Add --average, which `averaged_checkpoints` reads."""
    parser.add_argument(
        "--average",
        type=int,
        metavar="N",
        help="the mean of the weights of the last N checkpoints of RUN, or of N up to a checkpoint; better if the "
        "learning rate was not decayed (default: one checkpoint)",
    )


def averaged_checkpoints(arguments: argparse.Namespace) -> list[Path]:
    """Return the checkpoints that --average asks for, oldest first, and print their steps; none without it.

    A learning rate at which a mean does not help is reported.

    Raises:
        UserError: there are fewer checkpoints, or a mean needs more.
    """
    count: int | None = arguments.average
    if count is None:
        return []
    if count < 2:
        raise UserError(f"--average {count}: a mean is of at least 2 checkpoints; without --average, one is taken")
    from cucafera.runs.averaging import checkpoints_to_average, steps_in_words
    from cucafera.runs.folder import RunFolder

    chosen = checkpoints_to_average(arguments.run, count)
    steps = [checkpoint.step for checkpoint in chosen]
    print(f"Averaging the weights after the {steps_in_words(steps)}")
    for note in _learning_rate_notes(RunFolder(chosen[-1].path.parent.parent).checked_config(), steps):
        print(note)
    return [checkpoint.path for checkpoint in chosen]


def _learning_rate_notes(config: Config, steps: Sequence[int]) -> Iterator[str]:
    """Yield a sentence for a learning rate at which a mean of the weights after these steps does not help."""
    from cucafera.training.schedules import lr_ratio

    if steps[0] <= config.schedule.warmup_steps:
        yield (
            f"The first of them is from the warm-up of {number_of(config.schedule.warmup_steps, 'step')}, where "
            "weights change too fast for a mean: average fewer."
        )
    ratio = lr_ratio(steps[-1] - 1, config.schedule, config.horizon_steps)
    if ratio < DECAYED:
        yield (
            f"The learning rate of step {steps[-1]:,} was {ratio:.1%} of its peak: after such a decay a mean gives "
            "nothing, or is worse than the last weights."
        )


def choose_run(name: str, arguments: argparse.Namespace) -> None:
    """Set arguments.run to the newest run below outputs/ if it is not given, and say so.

    A script would use another model after the next training: without a terminal, the message gives the command.

    Args:
        name: Of the command.
        arguments: The parsed command line.

    Raises:
        UserError: RUN is missing, and there is no run or no terminal.
    """
    if arguments.run is not None:
        return
    runs = runs_below(OUTPUTS)
    if not runs:
        raise UserError(
            f"RUN is missing, and there is no run with a checkpoint below {OUTPUTS}/: train one with `cucafera run`, "
            f"or try the published model: cucafera chat {PUBLISHED_MODEL}"
        )
    arguments.run = str(runs[0])
    announce_choice(name, arguments.run, f"the newest run below {OUTPUTS}/")


def announce_choice(name: str, chosen: str, reason: str) -> None:
    """Print which RUN is taken because none is given; see `choose_run`."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        command = shlex.join([*program_name(name).split(), chosen, *sys.argv[1:]])
        raise UserError(f"RUN is missing: {reason} is {chosen}. To take it: {command}")
    print(f"RUN is not given: {chosen}, {reason}", file=sys.stderr)


def loading_line(source: str, location: ModelLocation) -> str:
    """Return the line that says what is loaded: its size is known before anything heavy is imported."""
    facts = ""
    if location.path is None:
        facts = " from the Hugging Face hub, or an earlier download"
    elif location.kind == "gguf":
        facts = f" ({data_size(location.path.stat().st_size)})"
    elif (parameters := _parameters_in(location)) is not None:
        facts = f" ({number_of(parameters, 'parameter')}, {data_size(4 * parameters)} in fp32)"
    return f"Loading {source}{facts}"


def _parameters_in(location: ModelLocation) -> int | None:
    """Return the number of parameters by the model's configuration; None if it says none, which loading reports."""
    import yaml

    assert location.path is not None
    try:
        if location.kind == "hugging_face":
            shape = json.loads(read_small_file(location.path / "config.json"))
            shape = {"num_key_value_heads": shape["num_attention_heads"]} | shape
        else:
            run = location.path if location.kind == "run" else location.path.parent.parent
            shape = yaml.load(read_small_file(run / "config.yaml"), yaml.SafeLoader)["model"]
        return parameter_count(build(ModelConfig, shape, "", {}))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return None


def add_sampling(options: argparse._ActionsContainer, max_new_tokens: int) -> None:
    """Add an option for each setting of SamplingConfig.

    Args:
        options: A parser or a group of one.
        max_new_tokens: Default of --max-new-tokens.
    """
    default = SamplingConfig(max_new_tokens=max_new_tokens)
    for name, meaning in sampling_settings().items():
        option = "--" + name.replace("_", "-")
        if name == "stop":
            options.add_argument(
                option, action="append", metavar="TEXT", help=f"{meaning}; may be repeated", default=[]
            )
        else:
            value = getattr(default, name)
            options.add_argument(
                option, type=number, default=value, metavar="X", help=f"{meaning} (default: %(default)s)"
            )


def sampling_settings() -> dict[str, str]:
    """Return the meaning of each setting of SamplingConfig, for lists of options."""
    meanings = {field.name: field.metadata["meaning"] for field in dataclasses.fields(SamplingConfig)}
    return {name: meaning[0].lower() + meaning[1:].removesuffix(".") for name, meaning in meanings.items()}


def number(text: str) -> int | float | str:
    """Return the number in a text; a text that holds none as it is, for `checked_sampling` to refuse."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def checked_sampling(values: Mapping[str, Any]) -> SamplingConfig:
    """Return the SamplingConfig of values by name. Raises UserError if one is out of bounds."""
    problems: dict[str, str] = {}
    sampling: SamplingConfig = build(SamplingConfig, values, "", problems)
    if problems:
        raise UserError("\n".join(problems.values()))
    return sampling


def sampling_of(arguments: argparse.Namespace) -> SamplingConfig:
    """Return the settings that the options of `add_sampling` give. Raises UserError if one is out of bounds."""
    return checked_sampling({name: getattr(arguments, name) for name in vars(SamplingConfig())})


@contextlib.contextmanager
def shown_log(stream: TextIO) -> Iterator[None]:
    """Print the package's log messages: loading or exporting a large model takes minutes."""
    logger, handler = logging.getLogger("cucafera"), logging.StreamHandler(stream)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
