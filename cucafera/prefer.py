"""Make preference pairs from a model's own answers: `python -m cucafera.prefer RUN --prompts FILE --out pairs.jsonl`.

By rules (the best of several answers against the worst), by the answers in FILE (against the model's own), or by a
person, who reads two answers in the terminal and says which is better.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.data.language import LANGUAGES, language_of
from cucafera.options import (
    add_device,
    add_run,
    add_sampling,
    choose_run,
    command_parser,
    loading_line,
    sampling_of,
    shown_log,
)
from cucafera.output import announced, protect_output
from cucafera.process import keep_freed_memory, let_threads_wait_briefly, raise_on_interrupt
from cucafera.quantities import number_of
from cucafera.runs.locate import ModelLocation, locate_model, model_name

if TYPE_CHECKING:
    from cucafera.interop.loaded import LoadedModel
    from cucafera.pairs.pair_file import PairFile
    from cucafera.pairs.prompts import PairPrompt, ReadPrompts
    from cucafera.pairs.rules import Rules

EXIT_INTERRUPTED = 130
ANY_LANGUAGE = "any"
RULE_DEFAULTS = {"answers": 4, "language": "ca", "length": "1,150"}
"""Options of --by rules."""
WORDS = re.compile(r"(\d{1,6}),(\d{1,6})")
SLOTS = (1, 1024)
MAX_ANSWERS = 64
SAMPLING = SamplingConfig(max_new_tokens=256, temperature=0.8, top_k=0, top_p=0.95, repetition_penalty=1.0)
"""Answers that differ, and without a penalty that hides what the model is to unlearn."""


def main() -> None:
    """Make pairs as the command line asks, and print what became of the prompts."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    protect_output()
    arguments = command_line_parser().parse_args()
    try:
        prefer(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\nInterrupted: what is done is in {arguments.out}; the same command continues", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def prefer(arguments: argparse.Namespace) -> None:
    """Make pairs as the command line says.

    Raises:
        UserError: an option, the prompts, the model or the file of pairs cannot be used so.
    """
    sampling = check_values(arguments)
    if arguments.by == "person":
        prepare_terminal()
    choose_run("prefer", arguments)
    location = locate_model(arguments.run)

    from cucafera.pairs.pair_file import open_pair_file, out_path, weights_fingerprint
    from cucafera.pairs.prompts import read_prompts

    out = out_path(arguments.out)
    read = read_prompts(arguments.prompts, out)
    if arguments.by == "reference" and not any(prompt.reference for prompt in read.prompts):
        raise UserError(
            f"--by reference needs an answer in the rows of {arguments.prompts}, and no row has one: give "
            "conversations, or the columns prompt and answer"
        )
    rules = rules_of(arguments)
    for note in read.notes:
        print(f"--prompts {arguments.prompts}: {note}")
    model = load(arguments, location)
    settings = {
        "model": model_name(arguments.run, location),
        "weights": weights_fingerprint(model.origin),
        "by": arguments.by,
        "answers": arguments.answers,
        "language": arguments.language,
        "length": arguments.length,
        "seed": arguments.seed,
        **vars(sampling),
    }
    with open_pair_file(out, settings["model"], arguments.by, settings) as file:
        for note in file.notes:
            print(note)
        if file.entries:
            print(f"{number_of(len(file.entries), 'prompt')} done before: {arguments.out} is continued")
        raise_on_interrupt()
        try:
            make_pairs(arguments, model, sampling, read.prompts, file, rules)
        finally:
            print_summary(arguments, location, read, file, rules)


def prepare_terminal() -> None:
    """Let a person be asked: losing standard output ends the command. Raises UserError without standard input."""
    protect_output(is_required=True)
    if sys.stdin is None:
        raise UserError("--by person reads what you type from standard input, which is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def check_values(arguments: argparse.Namespace) -> SamplingConfig:
    """Return the sampling, and set the defaults of --by rules.

    Raises:
        UserError: an option is out of bounds, or has no effect.
    """
    for name, default in RULE_DEFAULTS.items():
        if arguments.by == "rules":
            setattr(arguments, name, default if getattr(arguments, name) is None else getattr(arguments, name))
        elif getattr(arguments, name) is not None:
            raise UserError(f"--{name} has no effect with --by {arguments.by}: only rules compare several answers")
    if arguments.by == "rules" and not 2 <= arguments.answers <= MAX_ANSWERS:
        raise UserError(f"--answers is {arguments.answers}; it must be from 2 to {MAX_ANSWERS}: a pair has two answers")
    if arguments.language not in (None, ANY_LANGUAGE, *LANGUAGES):
        known = ", ".join(LANGUAGES)
        raise UserError(f"--language is {arguments.language!r}; it must be one of {known}, or {ANY_LANGUAGE}")
    if arguments.length is not None:
        _bounds(arguments.length)
    if not SLOTS[0] <= arguments.slots <= SLOTS[1]:
        raise UserError(f"--slots is {arguments.slots}; it must be from {SLOTS[0]} to {SLOTS[1]:,}")
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; it must be at least 0")
    sampling = sampling_of(arguments)
    if arguments.by != "reference" and sampling.temperature == 0:
        raise UserError("temperature is 0, with which all answers to a prompt are the same: give a higher one")
    return sampling


def _bounds(text: str) -> tuple[int, int]:
    """Return the numbers of words of --length. Raises UserError."""
    found = WORDS.fullmatch(text.replace(" ", ""))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--length is {text!r}; it must be the fewest and the most words of an answer, such as 1,150")
    return int(found[1]), int(found[2])


def rules_of(arguments: argparse.Namespace) -> "Rules":
    """Return the rules of the command line. Raises UserError if languages cannot be recognized."""
    from cucafera.pairs.rules import Rules

    words = None if arguments.length is None else _bounds(arguments.length)
    if arguments.language in (None, ANY_LANGUAGE):
        return Rules(None, lambda text: None, words)
    return Rules(arguments.language, language_recognizer(), words)


def language_recognizer() -> Callable[[str], str | None]:
    """Return a function from a text to the code of its language. Raises UserError if its package is missing."""
    language_of("La llengua catalana es reconeix pel seu text.")  # a package that is missing is reported here
    return language_of


def load(arguments: argparse.Namespace, location: ModelLocation) -> "LoadedModel":
    """Load the model. Raises UserError if that fails, or it was not trained on conversations."""
    with announced(loading_line(arguments.run, location), sys.stderr), shown_log(sys.stderr):
        from cucafera.interop.loaded import load_model

        model = load_model(arguments.run, location, arguments.device, arguments.slots)
    if not model.chats:
        advice = "take a run of +experiment=finetune"
        if location.kind != "gguf":
            start = shlex.quote(f"init_from={arguments.run}")
            advice = f"`python -m cucafera.run +experiment=finetune {start}` makes a chat model of it"
        raise UserError(
            f"{arguments.run} was not trained on conversations, so it gives no answers to compare: {advice}"
        )
    for note in (model.description, *(f"{note}." for note in model.notes)):
        print(note, file=sys.stderr)
    return model


def make_pairs(
    arguments: argparse.Namespace,
    model: "LoadedModel",
    sampling: SamplingConfig,
    prompts: "list[PairPrompt]",
    file: "PairFile",
    rules: "Rules",
) -> None:
    """Write the pairs of the prompts that are not done. Raises UserError if the model or the disk fails."""
    from cucafera.pairs.answers import answer_prompts
    from cucafera.pairs.judging import Judging
    from cucafera.pairs.outcomes import against_reference, ranked
    from cucafera.pairs.progress import PairProgress

    done = file.done
    left = [prompt for prompt in prompts if prompt.key not in done]
    if arguments.by == "reference":
        left = [prompt for prompt in left if prompt.reference is not None]
    count = {"rules": arguments.answers, "reference": 1, "person": 2}[arguments.by]
    answered = answer_prompts(model.engine, left, count, sampling, arguments.seed)
    if arguments.by == "person":
        Judging(answered, file, rules, len(left) + len(file.entries), arguments.seed).run()
        return
    decide = ranked if arguments.by == "rules" else against_reference
    with PairProgress(len(left)) as progress:
        for item in answered:
            done_prompt, pair = decide(item, rules)
            file.add(item.prompt, done_prompt, pair)
            progress.advance(pair is not None)


def print_summary(
    arguments: argparse.Namespace, location: ModelLocation, read: "ReadPrompts", file: "PairFile", rules: "Rules"
) -> None:
    """Print what became of the prompts, and the command that trains on the pairs."""
    from cucafera.pairs.outcomes import summary
    from cucafera.pairs.pair_file import PAIR

    print()
    for line in summary(read, file.entries, arguments.out, rules, needs_reference=arguments.by == "reference"):
        print(line)
    if location.kind != "gguf" and any(entry.outcome == PAIR for entry in file.entries):
        run, path = (
            shlex.quote(f"{key}={value}")
            for key, value in (("init_from", arguments.run), ("data.sources.files.path", arguments.out))
        )
        print(f"{'Next':<9}python -m cucafera.run +experiment=prefer {run} data=preference_files {path}")


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "prefer",
        description="Make preference pairs, a better and a worse answer to each prompt, from a model's own answers. "
        "The same command continues a file that is not complete.",
    )
    add_run(parser, "a run folder (its best checkpoint), a checkpoint, a Hugging Face folder or name, or a .gguf file")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE",
        help="a file, folder or glob: .txt with one prompt per line, or .jsonl, .csv or .parquet with a column prompt "
        "or messages, whose own last answer is left off",
    )  # fmt: skip
    parser.add_argument(
        "--out", required=True, metavar="FILE.jsonl",
        help="append pairs to it; FILE.done.jsonl says which prompts are done",
    )  # fmt: skip
    parser.add_argument(
        "--by", choices=("rules", "reference", "person"), default="rules",
        help="rules: the best of several answers against the worst; reference: the answer in FILE against the model's "
        "own (SPIN); person: you choose between two answers in the terminal (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same answers (default: %(default)s)"
    )
    parser.add_argument(
        "--slots", type=int, default=16, metavar="N",
        help="answers that are written at a time; each has a KV cache for the whole context (default: %(default)s)",
    )  # fmt: skip
    add_device(parser)
    rules = parser.add_argument_group(
        "rules: a good answer ends by itself, is in the language, repeats no five words, and has a length within bounds"
    )
    rules.add_argument(
        "--answers", type=int, metavar="N", help=f"answers per prompt (default: {RULE_DEFAULTS['answers']})"
    )
    rules.add_argument(
        "--language", metavar="CODE",
        help=f"such as ca, en or es; {ANY_LANGUAGE}: do not look at it (default: {RULE_DEFAULTS['language']})",
    )  # fmt: skip
    rules.add_argument("--length", metavar="MIN,MAX", help=f"words of an answer (default: {RULE_DEFAULTS['length']})")
    add_sampling(parser.add_argument_group("sampling of answers"), max_new_tokens=SAMPLING.max_new_tokens)
    parser.set_defaults(**vars(SAMPLING))
    return parser


if __name__ == "__main__":
    main()
