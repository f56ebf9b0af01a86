"""Command-line options that several doors share; imports nothing heavy."""

import argparse

from cucafera.config import SamplingConfig, UserError, sampling_problems


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if there is")


def add_sampling(options: argparse._ActionsContainer, max_new_tokens: int) -> None:
    """Adds the options that say how a model writes.

    Args:
        options: A parser or a group of one.
        max_new_tokens: Default of the longest text, in tokens.
    """
    default = SamplingConfig()
    longest = "longest text, in tokens (default: %(default)s)"
    options.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=longest)
    options.add_argument(
        "--temperature", type=float, default=default.temperature, help="0: the likeliest token (default: %(default)s)"
    )
    options.add_argument("--top-k", type=int, default=default.top_k, help="0: off (default: %(default)s)")
    options.add_argument("--top-p", type=float, default=default.top_p, help="1: off (default: %(default)s)")
    options.add_argument("--min-p", type=float, default=default.min_p, help="0: off (default: %(default)s)")
    options.add_argument(
        "--repetition-penalty", type=float, default=default.repetition_penalty, help="1: off (default: %(default)s)"
    )
    options.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end a text before this one")


def sampling_of(arguments: argparse.Namespace) -> SamplingConfig:
    """What the options of `add_sampling` say. Raises UserError if it cannot be."""
    sampling = SamplingConfig(**{name: getattr(arguments, name) for name in vars(SamplingConfig())})
    if problems := sampling_problems(sampling):
        raise UserError("\n".join(problems))
    return sampling
