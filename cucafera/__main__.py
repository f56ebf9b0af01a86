"""`cucafera NAME ...` and `python -m cucafera NAME ...` run a command; without a name, they list the commands."""

import difflib
import runpy
import shlex
import sys

from cucafera import __version__
from cucafera.config.errors import EXIT_USER_ERROR
from cucafera.output import protect_output
from cucafera.process import exit_on_interrupt

COMMANDS = {
    "run": "train: pretraining, finetuning or a sweep, from a Hydra configuration",
    "inspect": "show what a run is trained on: windows, masks, lengths, without training",
    "chat": "talk to a trained model in the terminal",
    "serve": "answer over HTTP: OpenAI's API and a web page",
    "telegram": "let people talk to a trained model in Telegram",
    "evaluate": "measure a trained model on text, multiple choice or lm-evaluation-harness tasks",
    "prefer": "make preference pairs from a model's own answers: by rules, or by a person",
    "export": "write a trained model for Hugging Face transformers, llama.cpp or PEFT",
    "compare": "compare the configurations and results of runs",
}


def main() -> None:
    """Run the command that the first argument names; exit with code 2 if there is none of that name."""
    protect_output(is_required=True)
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
    elif arguments[0] == "--version":
        print(f"cucafera {__version__}")
    elif arguments[0] in COMMANDS:
        exit_on_interrupt()  # until the command has been imported
        del sys.argv[1]
        # As `python -m cucafera.NAME` does: processes that a command starts find their module in __main__.__spec__.
        runpy.run_module(f"cucafera.{arguments[0]}", run_name="__main__", alter_sys=True)
    else:
        print(refusal(arguments), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def overview() -> str:
    """Return the list of commands, one per line."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: cucafera NAME ...   (or: python -m cucafera.NAME ...)",
            "",
            *(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()),
            "",
            "cucafera NAME --help shows the options of a command; cucafera --version, the version.",
        ]
    )


def refusal(arguments: list[str]) -> str:
    """Return the message for arguments that do not begin with the name of a command."""
    first = arguments[0]
    if first.startswith(("+", "-", "~")) or "=" in first:
        return f"{first} needs a command before it; to train: cucafera run {shlex.join(arguments)}"
    nearest = difflib.get_close_matches(first, COMMANDS, n=1)
    advice = f"Did you mean {nearest[0]}?" if nearest else f"The commands are {', '.join(COMMANDS)}"
    return f"cucafera has no command {first}. {advice}"


if __name__ == "__main__":
    main()
