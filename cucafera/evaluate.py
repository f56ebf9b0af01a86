"""The evaluation door: `python -m cucafera.evaluate RUN` measures the model of a run.

Without options, on what the run has held out: bits a byte of its documents, or of the answers of its conversations.
With them, on other text, on multiple choice, on tasks of lm-evaluation-harness; or it shows the model to a person.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cucafera.config import UserError
from cucafera.options import add_device, add_sampling, sampling_of
from cucafera.training.process import keep_freed_memory, let_threads_wait_briefly

if TYPE_CHECKING:
    from cucafera.data.tokenizer import Tokenizer
    from cucafera.evaluation.likelihood import Scorer
    from cucafera.evaluation.perplexity import Text
    from cucafera.evaluation.results import Result
    from cucafera.evaluation.subject import Subject

EXIT_INTERRUPTED = 130

BELONGS_TO = {
    "column": "text",
    "include_path": "tasks",
    "num_fewshot": "tasks",
    "limit": "tasks",
    "apply_chat_template": "tasks",
    "beside": "samples",
    "prompts": "samples",
    "layers": "attention",
    "heads": "attention",
}
"""Options that say nothing without another one."""
AT_LEAST = {"documents": 1, "stride": 1, "num_fewshot": 0, "limit": 1, "seed": 0}
WHAT_CAN_BE_MEASURED = (
    "give --text FILE for bits a byte, --choices FILE for multiple choice, --tasks NAMES for lm-evaluation-harness, "
    "--samples for texts to read, or --attention TEXT for a picture"
)


def main() -> None:
    """Measures what the command line asks for, prints it, and keeps it in the run folder."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    arguments = command_line_parser().parse_args()
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        check(arguments)
        evaluate(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # what reads the output has left
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted: what was measured before is kept", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be, before anything heavy is loaded. Raises UserError."""
    parser = command_line_parser()
    for name, least in AT_LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"{_option(name)} is {value}; it must be at least {least}")
    for name, main_option in BELONGS_TO.items():
        given = getattr(arguments, name) != parser.get_default(name)
        if given and not getattr(arguments, main_option):
            raise UserError(f"{_option(name)} says nothing without {_option(main_option)}")
    sampling_of(arguments)
    for name in ("text", "attention", "tasks"):
        if getattr(arguments, name) is not None and not getattr(arguments, name).strip(" ,"):
            raise UserError(f"{_option(name)} is empty")
    if arguments.out and bool(arguments.samples) == (arguments.attention is not None):
        raise UserError("--out needs one of --samples and --attention: it says where the page, or the picture, goes")
    if arguments.out and arguments.attention is not None and Path(arguments.out).suffix != ".png":
        raise UserError(f"--out {arguments.out}: a picture is a .png file")
    for name, package, extra in (("tasks", "lm_eval", "eval"), ("attention", "matplotlib", "plots")):
        if getattr(arguments, name) is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{_option(name)} needs {package}: pip install '.[{extra}]'")


def evaluate(arguments: argparse.Namespace) -> None:
    """Measures, and shows.

    Raises:
        UserError: there is no such model, or what it is measured with is not there, cannot be read or makes no sense.
    """
    if arguments.run.endswith(".gguf"):
        _evaluate_gguf(arguments)
        return

    from cucafera.training.hardware import device_called

    device = device_called(arguments.device, os.environ)  # before other imports can use up what CUDA warns of once

    from cucafera.evaluation.results import ResultFile, as_table
    from cucafera.evaluation.subject import load_subject

    subject = load_subject(arguments.run, device)
    shows = arguments.samples or arguments.attention is not None
    measures = bool(arguments.text or arguments.choices or arguments.tasks) or not shows
    kept = ResultFile(subject.run) if measures and subject.run is not None else None
    print(f"{arguments.run}: {subject.facts}; on {device.type}, in fp32")
    for note in subject.notes:
        print(f"{note}.")
    if measures:
        results = []
        try:
            for result in _results(arguments, subject):
                results.append(result)
                if kept is not None:
                    assert subject.step is not None
                    kept.add([result], subject.checkpoint.name, subject.step)
        finally:
            if results:
                print("\n" + as_table(results))
        if kept is not None:
            print(f"\nKept in {kept.path}, and on TensorBoard under evaluation/")
    if arguments.samples:
        _show_samples(arguments, subject)
    if arguments.attention is not None:
        _show_attention(arguments, subject)


def _results(arguments: argparse.Namespace, subject: "Subject") -> "Iterator[Result]":
    """Each measurement that is asked for, one after another."""
    if not (arguments.text or arguments.choices or arguments.tasks):
        yield from _held_out(arguments, subject)
    if arguments.text:
        from cucafera.evaluation.likelihood import DecoderScorer

        yield _of_files(arguments, DecoderScorer(subject.model), subject.tokenizer)
    for path in arguments.choices:
        from cucafera.evaluation.likelihood import DecoderScorer
        from cucafera.evaluation.multiple_choice import answer_questions, read_questions
        from cucafera.evaluation.results import Result

        questions = read_questions(path)
        metrics = answer_questions(questions, DecoderScorer(subject.model), subject.tokenizer)
        settings = {"choices": path, "questions": len(questions)}
        yield Result("choices", _task_of(path), metrics, settings, f"{len(questions):,} questions")
    if arguments.tasks:
        from cucafera.evaluation.harness import run_tasks

        names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
        yield from run_tasks(
            subject,
            names,
            arguments.include_path,
            arguments.num_fewshot,
            arguments.limit,
            arguments.apply_chat_template,
        )


def _task_of(path: str) -> str:
    """What a measurement on files is called: their name without endings, or for a pattern that of their folder."""
    return Path(path).name.split(".")[0].strip("*?[]") or Path(path).resolve().parent.name or "text"


def _evaluate_gguf(arguments: argparse.Namespace) -> None:
    """Measures a file that llama.cpp computes. Raises UserError."""
    if not arguments.text or arguments.choices or arguments.tasks or arguments.samples or arguments.attention:
        raise UserError(f"{arguments.run}: of a .gguf file only --text can be measured; the run gives the rest")

    from cucafera.evaluation.results import as_table
    from cucafera.interop.llama_cpp import LlamaCpp

    llama = LlamaCpp(Path(arguments.run).expanduser(), arguments.device)
    print(f"{arguments.run}: {llama.parameters:,} parameters, computed by llama.cpp")
    print("\n" + as_table([_of_files(arguments, llama, llama.tokenizer)]))


def _of_files(arguments: argparse.Namespace, scorer: "Scorer", tokenizer: "Tokenizer") -> "Result":
    """bpb and perplexity of --text."""
    from cucafera.evaluation.perplexity import texts_of_files

    column = arguments.column or "text"
    texts = texts_of_files(arguments.text, column, arguments.documents, tokenizer)
    asked = {"text": arguments.text, "column": column, "documents": arguments.documents}
    return _of_texts(arguments, scorer, "text", _task_of(arguments.text), texts, asked)


def _held_out(arguments: argparse.Namespace, subject: "Subject") -> "Iterator[Result]":
    """What the run has not trained on, source by source."""
    from cucafera.evaluation.likelihood import DecoderScorer
    from cucafera.evaluation.perplexity import held_out_texts

    found = held_out_texts(subject)
    if not found:
        where = f": its prepared tokens are not in {subject.prepared} any more" if subject.sources else ""
        raise UserError(f"what {subject.source} has held out cannot be measured{where}; {WHAT_CAN_BE_MEASURED}")
    for name, texts in found.items():
        kind = "answers" if subject.chats else "text"
        asked = {"held_out": name, "documents": arguments.documents}
        yield _of_texts(
            arguments, DecoderScorer(subject.model), kind, f"held-out-{name}", islice(texts, arguments.documents), asked
        )


def _of_texts(
    arguments: argparse.Namespace,
    scorer: "Scorer",
    kind: str,
    task: str,
    texts: "Iterable[Text]",
    asked: dict[str, str | int | None],
) -> "Result":
    """bpb and perplexity of texts."""
    from cucafera.evaluation.perplexity import measure
    from cucafera.evaluation.results import Result

    stride = scorer.context // 2 if arguments.stride is None else arguments.stride
    if stride >= scorer.context:
        raise UserError(f"--stride is {stride:,}; it must be below the model's context of {scorer.context:,} tokens")
    score = measure(scorer, texts, stride)
    if not score.tokens or not score.text_bytes:
        raise UserError(f"{task}: there is no text to measure; {WHAT_CAN_BE_MEASURED}")
    what = (
        "conversations; only their answers are scored" if kind == "answers" else "documents; their ends are not scored"
    )
    note = (
        f"{score.tokens:,} tokens of {score.text_bytes:,} bytes in {score.texts:,} {what}. Windows of "
        f"{scorer.context:,} tokens, each {stride:,} behind the one before"
    )
    return Result(kind, task, score.metrics(), asked | {"stride": stride, "context": scorer.context}, note)


def _show_samples(arguments: argparse.Namespace, subject: "Subject") -> None:
    from cucafera.evaluation.samples import PROMPTS, OurAuthor, author_called, prompts_of_file, write_page

    path = _place(arguments, subject, "samples.html")
    prompts = prompts_of_file(arguments.prompts) if arguments.prompts else subject.prompts or list(PROMPTS)
    device = subject.model.embed_tokens.weight.device
    authors = [OurAuthor(subject), *(author_called(source, device) for source in arguments.beside)]
    write_page(authors, prompts, sampling_of(arguments), arguments.seed, path)
    print(f"\nSamples: {path}")


def _show_attention(arguments: argparse.Namespace, subject: "Subject") -> None:
    from cucafera.evaluation.attention import draw_attention, numbers_of

    path = _place(arguments, subject, "attention.png")
    layers, heads = (numbers_of(name, getattr(arguments, name)) for name in ("layers", "heads"))
    draw_attention(subject, arguments.attention, layers, heads, path)
    print(f"\nAttention: {path}")


def _place(arguments: argparse.Namespace, subject: "Subject", name: str) -> Path:
    """Where a page or a picture goes."""
    if arguments.out:
        return Path(arguments.out).expanduser()
    if subject.run is None:
        raise UserError(f"{arguments.run} is in no run folder: say with --out where {name} goes")
    return subject.run.path / name


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def command_line_parser() -> argparse.ArgumentParser:
    """The arguments of the door."""
    parser = argparse.ArgumentParser(
        prog="python -m cucafera.evaluate",
        description="Measures the model of a run. Without options: bits a byte of the documents that the run has held "
        "out, or of the answers of its held-out conversations. Results go to the terminal, and of a run to its "
        "evaluation.json and TensorBoard; the same measurement again takes the place of the one before.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder, whose best checkpoint is taken, a checkpoint, a Hugging Face folder or name; for --text a "
        ".gguf file too",
    )
    add_device(parser)
    parser.add_argument("--out", metavar="FILE", help="where --samples or --attention goes (default: into RUN)")

    text = parser.add_argument_group("bits a byte and perplexity of text, in windows that overlap")
    text.add_argument("--text", metavar="FILE", help="a file, folder or glob of .jsonl, .parquet or .txt (.gz, .zst)")
    text.add_argument("--column", help="the column that holds the text (default: text)")
    text.add_argument("--documents", type=int, metavar="N", help="the first N documents (default: all)")
    text.add_argument(
        "--stride", type=int, metavar="TOKENS", help="tokens that a window scores beside context (default: half of it)"
    )

    choices = parser.add_argument_group("multiple choice, as lm-evaluation-harness scores it")
    choices.add_argument(
        "--choices", action="append", default=[], metavar="FILE",
        help="a .jsonl or .parquet file in the form of HellaSwag, ARC or COPA; may be given again",
    )  # fmt: skip

    tasks = parser.add_argument_group("tasks of lm-evaluation-harness; needs pip install '.[eval]'")
    tasks.add_argument("--tasks", metavar="A,B", help="names of tasks or groups, such as catalan_bench, or .yaml files")
    tasks.add_argument("--include-path", metavar="FOLDER", help="a folder with tasks of your own")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task (default: all)")
    tasks.add_argument("--apply-chat-template", action="store_true", help="ask in a conversation, as in finetuning")

    samples = parser.add_argument_group("texts side by side, as a page to read")
    samples.add_argument("--samples", action="store_true", help="let the model write after each prompt")
    samples.add_argument(
        "--beside", action="append", default=[], metavar="RUN",
        help="another run, or a folder or hub name that transformers loads; may be given again",
    )  # fmt: skip
    samples.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: those of the run)")
    samples.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same texts (default: %(default)s)"
    )
    add_sampling(samples, max_new_tokens=128)

    attention = parser.add_argument_group("what heads look at, as a picture; needs pip install '.[plots]'")
    attention.add_argument("--attention", metavar="TEXT", help="what the model reads, up to some 40 tokens")
    attention.add_argument("--layers", metavar="0,3", help="the first is 0 (default: the first, the middle, the last)")
    attention.add_argument("--heads", metavar="0,1", help="the first is 0 (default: the first four)")
    return parser


if __name__ == "__main__":
    main()
