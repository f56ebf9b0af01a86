"""Evaluate a trained model: `python -m cucafera.evaluate RUN`.

Without options, on what its run held out: bits per byte of documents, or of the answers of conversations, or preference
pairs. With options, on other text, conversations, pairs, multiple choice or lm-evaluation-harness; or show generated
texts or attention maps.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from cucafera.config.errors import UserError
from cucafera.options import (
    add_average,
    add_device,
    add_run,
    add_sampling,
    averaged_checkpoints,
    choose_run,
    command_parser,
    loading_line,
    sampling_of,
)
from cucafera.output import announced, protect_output
from cucafera.process import keep_freed_memory, let_threads_wait_briefly, raise_on_interrupt
from cucafera.quantities import number_of
from cucafera.runs.locate import is_gguf, locate_model, run_named

if TYPE_CHECKING:
    from cucafera.data.tokenizer import Tokenizer
    from cucafera.evaluation.evaluated_model import EvaluatedModel
    from cucafera.evaluation.requests import Scorer
    from cucafera.evaluation.results import Result

EXIT_INTERRUPTED = 130
T = TypeVar("T")


def main() -> None:
    """Evaluate as the command line asks, print the results, and save them in the run folder."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    protect_output()
    arguments = command_line_parser().parse_args()
    try:
        choose_run("evaluate", arguments)
        check_values(arguments)
        check_paths(arguments)
        evaluate(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nInterrupted: finished measurements are saved", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def evaluate(arguments: argparse.Namespace) -> None:
    """Run what the command line asks for; nothing heavy is imported before.

    Raises:
        UserError: the model or the data cannot be loaded, or an option does not fit them.
    """
    averaged = averaged_checkpoints(arguments)
    if is_gguf(arguments.run):
        _evaluate_gguf(arguments)
        return

    with announced(loading_line(arguments.run, locate_model(arguments.run)), sys.stdout):
        from cucafera.device import resolve_device

        device = resolve_device(arguments.device, os.environ)  # first: CUDA gives its warning only once

        from cucafera.evaluation.evaluated_model import load_evaluated_model

        evaluated = load_evaluated_model(arguments.run, device, averaged)
    print(f"{arguments.run}: {evaluated.facts}; on {device.type}, in fp32")
    for note in evaluated.notes:
        print(f"{note}.")
    measurements = [mode.run for option, mode in MEASUREMENTS.items() if getattr(arguments, option)]
    views = [mode.run for option, mode in VIEWS.items() if getattr(arguments, option)]
    if measurements or not views:
        _measure(arguments, evaluated, measurements or [_measure_held_out])
    for view in views:
        print(f"\nSaved to {view(arguments, evaluated)}")


def _measure(
    arguments: argparse.Namespace,
    evaluated: "EvaluatedModel",
    measurements: "list[Callable[[argparse.Namespace, EvaluatedModel], Iterator[Result]]]",
) -> None:
    """Run measurements one after another; each result is saved at once, so that an interruption loses only one.

    What a measurement refuses at its call, before its first result, is refused before anything is measured.
    """
    from cucafera.evaluation.results import ResultFile, as_table

    raise_on_interrupt()
    file = None if evaluated.run is None else ResultFile(evaluated.run)
    results = []
    prepared = [measurement(arguments, evaluated) for measurement in measurements]
    try:
        for measurement in prepared:
            for result in measurement:
                results.append(result)
                if file is not None:
                    assert evaluated.step is not None
                    file.add(result, evaluated.checkpoint.name, evaluated.step, evaluated.averaged)
    finally:
        if results:
            print("\n" + as_table(results))
    if file is not None:
        print(f"\nSaved to {file.path}, and to TensorBoard under evaluation/")


def _evaluate_gguf(arguments: argparse.Namespace) -> None:
    """Measure what only needs the likelihood of texts, with llama.cpp."""
    with announced(loading_line(arguments.run, locate_model(arguments.run)), sys.stdout):
        from cucafera.evaluation.results import as_table
        from cucafera.interop.llama_cpp import LlamaCpp

        llama = LlamaCpp(Path(arguments.run).expanduser(), arguments.device)
    print(f"{arguments.run}: {number_of(llama.parameters, 'parameter')}, computed by llama.cpp")
    for note in llama.notes:
        print(f"{note}.")
    raise_on_interrupt()
    results = []
    try:
        for option, score in LIKELIHOODS.items():
            if getattr(arguments, option):
                results.append(score(arguments, llama, llama.tokenizer))
    finally:
        if results:
            print("\n" + as_table(results))


def _measure_held_out(arguments: argparse.Namespace, evaluated: "EvaluatedModel") -> "Iterator[Result]":
    from cucafera.evaluation.held_out import measure_held_out

    yield from measure_held_out(evaluated, arguments.documents, arguments.stride)


def _measure_likelihood(option: str, arguments: argparse.Namespace, evaluated: "EvaluatedModel") -> "Iterator[Result]":
    from cucafera.evaluation.likelihood import DecoderScorer

    yield LIKELIHOODS[option](arguments, DecoderScorer(evaluated.model), evaluated.tokenizer)


def _score_text(arguments: argparse.Namespace, scorer: "Scorer", tokenizer: "Tokenizer") -> "Result":
    from cucafera.evaluation.perplexity import measure_files

    column = arguments.column or DEFAULT_COLUMN
    return measure_files(scorer, tokenizer, arguments.text, column, arguments.documents, arguments.stride)


def _score_chats(arguments: argparse.Namespace, scorer: "Scorer", tokenizer: "Tokenizer") -> "Result":
    from cucafera.evaluation.perplexity import measure_conversations

    return measure_conversations(scorer, tokenizer, arguments.chats, arguments.documents, arguments.stride)


def _score_pairs(arguments: argparse.Namespace, scorer: "Scorer", tokenizer: "Tokenizer") -> "Result":
    from cucafera.evaluation.pairs import measure_pairs

    return measure_pairs(scorer, tokenizer, arguments.pairs, arguments.documents)


def _measure_choices(arguments: argparse.Namespace, evaluated: "EvaluatedModel") -> "Iterator[Result]":
    from cucafera.evaluation.likelihood import DecoderScorer
    from cucafera.evaluation.multiple_choice import measure_questions, read_questions

    scorer, asked = DecoderScorer(evaluated.model), arguments.apply_chat_template
    as_chat = evaluated.chats if asked is None else asked
    for path in arguments.choices:
        yield measure_questions(path, read_questions(path), scorer, evaluated.tokenizer, as_chat)


def _measure_tasks(arguments: argparse.Namespace, evaluated: "EvaluatedModel") -> "Iterator[Result]":
    from cucafera.evaluation.harness import TaskSettings, run_tasks
    from cucafera.evaluation.tasks import load_tasks

    tasks = load_tasks(_names(arguments.tasks), arguments.include_path)
    settings = TaskSettings(
        arguments.num_fewshot,
        arguments.limit,
        bool(arguments.apply_chat_template),
        arguments.system_instruction,
        arguments.fewshot_as_multiturn is not False,
    )
    return run_tasks(evaluated, tasks, settings)


def _show_samples(arguments: argparse.Namespace, evaluated: "EvaluatedModel") -> Path:
    from cucafera.evaluation.samples import CucaferaGenerator, load_generator, write_samples
    from cucafera.evaluation.samples_page import DEFAULT_PROMPTS, read_prompts

    path = _output_path(arguments, evaluated, "samples.html")
    prompts = read_prompts(arguments.prompts) if arguments.prompts else evaluated.prompts or list(DEFAULT_PROMPTS)
    device = evaluated.model.embed_tokens.weight.device
    generators = [CucaferaGenerator(evaluated), *(load_generator(source, device) for source in arguments.compare)]
    figures = write_samples(generators, prompts, sampling_of(arguments), arguments.seed, path)
    print("\n" + "\n".join(figures))
    return path


def _show_attention(arguments: argparse.Namespace, evaluated: "EvaluatedModel") -> Path:
    from cucafera.evaluation.attention import draw_attention

    path = _output_path(arguments, evaluated, "attention.png")
    layers, heads = _indices("layers", arguments.layers), _indices("heads", arguments.heads)
    draw_attention(evaluated, arguments.attention, layers, heads, path)
    return path


class Mode(NamedTuple, Generic[T]):
    """The effect of an option of the command line.

    Attributes:
        run: Gets the arguments and the model; a measurement yields results, a view returns the path of its file.
        details: Options that have no effect without this one, or another that has them too.
        package: A package that it needs, and the extra of this package that installs it.
    """

    run: "Callable[[argparse.Namespace, EvaluatedModel], T]"
    details: tuple[str, ...] = ()
    package: tuple[str, str] | None = None


LIKELIHOODS: "dict[str, Callable[[argparse.Namespace, Scorer, Tokenizer], Result]]" = {
    "text": _score_text,
    "chats": _score_chats,
    "pairs": _score_pairs,
}
"""What only needs the likelihood of texts, by option: llama.cpp computes it too."""
MEASUREMENTS: "dict[str, Mode[Iterator[Result]]]" = {
    "text": Mode(functools.partial(_measure_likelihood, "text"), details=("column",)),
    "chats": Mode(functools.partial(_measure_likelihood, "chats")),
    "pairs": Mode(functools.partial(_measure_likelihood, "pairs")),
    "choices": Mode(_measure_choices, details=("apply_chat_template",)),
    "tasks": Mode(
        _measure_tasks,
        details=(
            "include_path",
            "num_fewshot",
            "limit",
            "apply_chat_template",
            "system_instruction",
            "fewshot_as_multiturn",
        ),
        package=("lm_eval", "eval"),
    ),
}
VIEWS: dict[str, Mode[Path]] = {
    "samples": Mode(_show_samples, details=("compare", "prompts")),
    "attention": Mode(_show_attention, details=("layers", "heads"), package=("matplotlib", "plots")),
}

DEFAULT_COLUMN = "text"
MINIMUM = {"documents": 1, "stride": 1, "num_fewshot": 0, "limit": 1, "seed": 0}


def check_values(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that are out of bounds, empty, or do not go together."""
    parser = command_line_parser()
    for name, minimum in MINIMUM.items():
        value = getattr(arguments, name)
        if value is not None and value < minimum:
            raise UserError(f"{_option(name)} is {value}; it must be at least {minimum}")
    for name in (*LIKELIHOODS, "tasks", "attention"):
        value = getattr(arguments, name)
        if value is not None and not value.strip(" ,"):
            raise UserError(f"{_option(name)} is empty")
    modes: dict[str, Mode[Any]] = {**MEASUREMENTS, **VIEWS}
    for name in {name for mode in modes.values() for name in mode.details}:
        owners = [option for option, mode in modes.items() if name in mode.details]
        is_given = getattr(arguments, name) != parser.get_default(name)
        if is_given and not any(getattr(arguments, option) for option in owners):
            raise UserError(f"{_option(name)} has no effect without {' or '.join(map(_option, owners))}")
    if arguments.fewshot_as_multiturn is not None and not arguments.apply_chat_template:
        raise UserError("--fewshot-as-multiturn has no effect without --apply-chat-template")
    for main_option, mode in modes.items():
        if getattr(arguments, main_option) and mode.package and importlib.util.find_spec(mode.package[0]) is None:
            raise UserError(f"{_option(main_option)} needs {mode.package[0]}: pip install '.[{mode.package[1]}]'")
    sampling_of(arguments)
    for name in ("layers", "heads"):
        _indices(name, getattr(arguments, name))
    if arguments.out and bool(arguments.samples) == bool(arguments.attention):
        raise UserError("--out needs either --samples or --attention: it is the path of that page or picture")
    if arguments.out and arguments.attention and Path(arguments.out).suffix != ".png":
        raise UserError(f"--out {arguments.out}: the picture must be a .png file")
    asked = {name for name in modes if getattr(arguments, name)}
    if is_gguf(arguments.run) and (not asked or asked - LIKELIHOODS.keys()):
        options = " or ".join(map(_option, LIKELIHOODS))
        raise UserError(f"{arguments.run}: a .gguf file can only be measured with {options}; use its run for the rest")


def check_paths(arguments: argparse.Namespace) -> None:
    """Raise UserError for paths that do not exist and for data files that cannot be read, without importing torch."""
    for source in (arguments.run, *arguments.compare):
        locate_model(source)
    if arguments.text:
        from cucafera.evaluation.texts import check_texts

        check_texts(arguments.text, arguments.column or DEFAULT_COLUMN)
    if arguments.chats:
        from cucafera.evaluation.texts import check_conversations

        check_conversations(arguments.chats)
    if arguments.pairs:
        from cucafera.evaluation.pairs import check_pairs

        check_pairs(arguments.pairs)
    if arguments.choices:
        from cucafera.evaluation.multiple_choice import read_questions

        for path in arguments.choices:
            read_questions(path)
    given = [(_option(name), getattr(arguments, name)) for name in LIKELIHOODS if getattr(arguments, name)]
    for option, path in [*given, *(("--choices", path) for path in arguments.choices)]:
        from cucafera.evaluation.texts import file_notes

        for note in file_notes(option, path):
            print(note)
    if arguments.prompts:
        from cucafera.evaluation.samples_page import read_prompts

        read_prompts(arguments.prompts)
    for name in _names(arguments.tasks or ""):
        if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_file():
            raise UserError(f"--tasks {name}: there is no such file")
    if arguments.include_path and not Path(arguments.include_path).expanduser().is_dir():
        raise UserError(f"--include-path {arguments.include_path}: there is no such folder")
    if arguments.out and not Path(arguments.out).expanduser().parent.is_dir():
        raise UserError(f"--out {arguments.out}: there is no folder {Path(arguments.out).parent}")


def _names(text: str) -> list[str]:
    """Return the non-empty names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _indices(name: str, text: str | None) -> list[int] | None:
    """Return the numbers of a comma-separated list; None for None. Raises UserError for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{name} is {text!r}; it must be numbers separated by commas, such as 0,3") from error


def _output_path(arguments: argparse.Namespace, evaluated: "EvaluatedModel", name: str) -> Path:
    if arguments.out:
        return Path(arguments.out).expanduser()
    if evaluated.run is None:
        raise UserError(f"{arguments.run} is not in a run folder: give the path of {name} with --out")
    return evaluated.run.path / name


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "evaluate",
        description="Evaluate a trained model. Without options: bits per byte of the documents that its run held out, "
        "or of the answers of its held-out conversations; of a preference run, its held-out pairs, and the answers "
        "that the finetuned run before it held out. Results are printed, and saved to evaluation.json and "
        "TensorBoard in the run folder; a repeated measurement replaces the earlier result.",
    )
    add_run(
        parser,
        "a run folder (its best checkpoint), a checkpoint, or a Hugging Face folder or name; with --text, --chats "
        "or --pairs also a .gguf file",
    )
    add_average(parser)
    add_device(parser)
    parser.add_argument("--out", metavar="FILE", help="output of --samples or --attention (default: in the run folder)")

    text = parser.add_argument_group("bits per byte and perplexity of text or answers, in overlapping windows")
    text.add_argument("--text", metavar="FILE", help="a file, folder or glob of .jsonl, .csv, .parquet or .txt")
    text.add_argument("--column", help=f"the column of the text (default: {DEFAULT_COLUMN})")
    text.add_argument(
        "--chats", metavar="FILE",
        help="the same of conversations, in the formats that finetuning reads: only their answers are scored",
    )  # fmt: skip
    text.add_argument(
        "--documents", type=int, metavar="N", help="only the first N documents, conversations or pairs (default: all)"
    )
    text.add_argument(
        "--stride", type=int, metavar="TOKENS", help="tokens scored per window (default: half of the context)"
    )

    pairs = parser.add_argument_group("preference pairs: is the better answer the more probable one")
    pairs.add_argument("--pairs", metavar="FILE", help="a file, folder or glob, in the formats of preference tuning")

    choices = parser.add_argument_group("multiple choice, scored as in lm-evaluation-harness")
    choices.add_argument(
        "--choices", action="append", default=[], metavar="FILE",
        help="a .jsonl or .parquet file in the format of HellaSwag, ARC or COPA; may be repeated",
    )  # fmt: skip
    choices.add_argument(
        "--apply-chat-template", action=argparse.BooleanOptionalAction,
        help="ask in a conversation, as in finetuning (default: --choices do for a chat model, --tasks do not)",
    )  # fmt: skip

    tasks = parser.add_argument_group("tasks of lm-evaluation-harness; needs pip install '.[eval]'")
    tasks.add_argument("--tasks", metavar="A,B", help="names of tasks or groups, such as catalan_bench, or .yaml files")
    tasks.add_argument("--include-path", metavar="FOLDER", help="a folder with your own tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task (default: all)")
    tasks.add_argument(
        "--system-instruction", metavar="TEXT",
        help="with --apply-chat-template the system message, else a text before each question",
    )  # fmt: skip
    tasks.add_argument(
        "--fewshot-as-multiturn", action=argparse.BooleanOptionalAction,
        help="in a conversation, solved examples are turns of their own (default) or a part of the question",
    )  # fmt: skip

    samples = parser.add_argument_group("generated texts of several models, side by side in an HTML page")
    samples.add_argument("--samples", action="store_true", help="generate a text after each prompt")
    samples.add_argument(
        "--compare", action="append", default=[], metavar="RUN", type=run_named,
        help="another run, or a folder or hub name that transformers loads; may be repeated",
    )  # fmt: skip
    samples.add_argument("--prompts", metavar="FILE", help="one prompt per line (default: those of the run)")
    samples.add_argument("--seed", type=int, default=0, help="random seed of each text (default: %(default)s)")
    add_sampling(samples, max_new_tokens=128)

    attention = parser.add_argument_group("attention maps, as a picture; needs pip install '.[plots]'")
    attention.add_argument("--attention", metavar="TEXT", help="the text that the model reads, up to about 40 tokens")
    attention.add_argument("--layers", metavar="0,3", help="the first is 0 (default: the first, the middle, the last)")
    attention.add_argument("--heads", metavar="0,1", help="the first is 0 (default: the first four)")
    return parser


if __name__ == "__main__":
    main()
