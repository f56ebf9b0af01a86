"""Export a trained model: `python -m cucafera.export RUN --to hf FOLDER` or `--to gguf FILE`."""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cucafera.config.errors import UserError
from cucafera.config.schema import SamplingConfig
from cucafera.options import command_parser
from cucafera.output import protect_output
from cucafera.process import raise_on_interrupt

if TYPE_CHECKING:
    from cucafera.interop.trained import TrainedModel

EXIT_INTERRUPTED = 130
HUGGING_FACE_TYPES = ("fp32", "bf16", "fp16")
GGUF_MAGIC = b"GGUF"
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
"""The same types as in interop/, repeated so that they can be checked without importing torch."""


class Target(NamedTuple):
    """The format and path of an export.

    Attributes:
        format: hf or gguf.
        path: The folder or file.
        type: Of the weights.
    """

    format: str
    path: Path
    type: str


def main() -> None:
    """Export a model, or print in one line why it is not exported."""
    protect_output()
    arguments = command_line_parser().parse_args()
    try:
        with _log_to_stdout():
            export(arguments, checked_target(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{error.filename or arguments.to[1]} cannot be written: {error.strerror or error}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def _log_to_stdout() -> Iterator[None]:
    """Print the package's log messages: the export of a large model takes minutes."""
    logger, handler = logging.getLogger("cucafera"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def checked_target(arguments: argparse.Namespace) -> Target:
    """Return the target. Raises UserError for wrong names and paths, without importing torch."""
    from cucafera.runs.locate import locate_model

    format_, path = arguments.to[0], Path(arguments.to[1]).expanduser()
    if format_ not in ("hf", "gguf"):
        raise UserError(f"--to {format_}: there is no such format; it must be hf or gguf")
    types = HUGGING_FACE_TYPES if format_ == "hf" else GGUF_TYPES
    type_ = arguments.type or ("fp32" if format_ == "hf" else "f16")
    if type_ not in types:
        raise UserError(f"--type {type_}: for --to {format_} it must be one of {', '.join(types)}")
    if format_ == "gguf" and path.is_dir():
        raise UserError(f"{path} is a folder: --to gguf takes the name of a file, such as {path / 'model.gguf'}")
    if path.exists() and not arguments.overwrite:
        raise UserError(f"{path} exists: choose another path, or replace it with --overwrite")
    if path.exists() and not _is_exported(path, format_):
        raise UserError(f"{path} is not an exported model, so it is not replaced: choose another path")
    if locate_model(arguments.run).kind == "gguf":
        raise UserError(f"{arguments.run}: a .gguf file cannot be exported; give the run that it was made from")
    return Target(format_, path, type_)


def _is_exported(path: Path, format_: str) -> bool:
    """True if a path is an earlier export, not a run, a checkpoint or another file of the user."""
    if format_ == "hf":
        return (path / "config.json").is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def export(arguments: argparse.Namespace, target: Target) -> None:
    """Load the model, write it, and verify what was written.

    Raises:
        UserError: the model cannot be loaded, or the format cannot represent it.
        OSError: the target cannot be written.
    """
    from cucafera.interop.gguf import check_type, write_gguf
    from cucafera.interop.hugging_face import require_transformers
    from cucafera.interop.trained import load_trained

    if target.format == "hf":  # what is missing is said before a large model is loaded
        require_transformers()
    else:
        check_type(target.type)
    trained = load_trained(arguments.run)
    raise_on_interrupt()
    for note in trained.notes:
        print(note)
    target.path.parent.mkdir(parents=True, exist_ok=True)
    name = arguments.name or target.path.name.removesuffix(".gguf")
    if target.format == "hf":
        print(_export_to_hugging_face(trained, target, name, arguments.license))
    else:
        print(write_gguf(trained, target.path, target.type, name, arguments.license))
    print(f"{target.path}: {target.type}, from {trained.checkpoint}")
    if target.format == "hf" and arguments.license is None:
        print("The model card names no licence: choose one with --license, such as apache-2.0")


def _export_to_hugging_face(trained: "TrainedModel", target: Target, name: str, licence: str | None) -> str:
    """Write a folder, which gets its name when all of it is verified. Returns the result of the verification."""
    from cucafera.interop.hugging_face import write_folder
    from cucafera.interop.model_card import CURVES, model_card, read_lineage
    from cucafera.storage import PARTIAL, fsync_folder, write_text

    lineage = None if trained.run is None else read_lineage(trained.run)
    sampling = SamplingConfig() if lineage is None else SamplingConfig(**lineage.config["callbacks"]["sampling"])
    sampling.max_new_tokens = trained.model.config.max_position_embeddings // 4
    partial = target.path.with_name(target.path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        verification = write_folder(trained.model, trained.tokenizer, trained.chats, sampling, target.type, partial)
        has_curves = trained.run is not None and _draw_curves(trained.run.path, partial / CURVES)
        card = model_card(trained, lineage, name, licence, verification, has_curves)
        write_text(partial / "README.md", card)
        if target.path.exists():
            shutil.rmtree(target.path)
        partial.rename(target.path)
        fsync_folder(target.path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{verification}."


def _draw_curves(run: Path, path: Path) -> bool:
    """Draw the validation curves. Returns False if there are none, or matplotlib is not installed."""
    from cucafera.sweeps.pictures import draw_curves, has_matplotlib
    from cucafera.sweeps.records import read_records

    if not has_matplotlib():
        return False
    records = [record for record in read_records(run, run.parent) if record.curve]
    if records:
        draw_curves(records, path.with_suffix(""), formats=(path.suffix.removeprefix("."),))
    return bool(records)


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "export",
        description="Export a trained model, and verify on real text that the files compute the same. hf: a folder for "
        "transformers and compatible tools, with a model card. gguf: a file for llama.cpp and compatible tools.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (its best checkpoint), a checkpoint, or a Hugging "
                        "Face folder or name")  # fmt: skip
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "PATH"), required=True, help="hf FOLDER, or gguf FILE")
    parser.add_argument(
        "--type",
        help=f"of the weights; hf: {', '.join(HUGGING_FACE_TYPES)} (default: fp32); gguf: {', '.join(GGUF_TYPES)} "
        "(default: f16)",
    )
    parser.add_argument("--name", help="name of the model (default: that of the folder or file)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, an identifier such as apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file or exported folder")
    return parser


if __name__ == "__main__":
    main()
