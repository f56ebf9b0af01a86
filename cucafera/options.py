"""Command-line options that several commands share; imports nothing heavy."""

import argparse
import sys
from typing import Any

from cucafera import __version__
from cucafera.config.check import sampling_problems
from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig


def command_parser(name: str, **settings: Any) -> argparse.ArgumentParser:
    """Return a parser that shows the command as it was started, with --version; the settings are those of argparse."""
    module = f"cucafera.{name}"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}" if module in sys.orig_argv else f"cucafera {name}", **settings
    )
    parser.add_argument("--version", action="version", version=f"cucafera {__version__}")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if available")


def add_sampling(options: argparse._ActionsContainer, max_new_tokens: int) -> None:
    """Add the sampling options.

    Args:
        options: A parser or a group of one.
        max_new_tokens: Default of --max-new-tokens.
    """
    default = SamplingConfig()
    options.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="maximum length of a response, in tokens (default: %(default)s)",
    )
    for name, help_text in (
        ("temperature", "0: greedy decoding"),
        ("top-k", "sample from the K most probable tokens; 0: off"),
        ("top-p", "nucleus sampling; 1: off"),
        ("min-p", "minimum probability, relative to the most probable token; 0: off"),
        ("repetition-penalty", "1: off"),
    ):
        value = getattr(default, name.replace("-", "_"))
        options.add_argument(
            f"--{name}", type=type(value), default=value, metavar="X", help=f"{help_text} (default: %(default)s)"
        )
    options.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given several times"
    )


def sampling_of(arguments: argparse.Namespace) -> SamplingConfig:
    """Return the settings that the options of `add_sampling` give. Raises UserError if one is out of bounds."""
    sampling = SamplingConfig(**{name: getattr(arguments, name) for name in vars(SamplingConfig())})
    if problems := sampling_problems(sampling):
        raise UserError("\n".join(problems))
    return sampling
