"""The door to other tools: `python -m cucafera.export RUN --to hf FOLDER` or `--to gguf FILE`."""

import argparse
import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cucafera.config import SamplingConfig, UserError

if TYPE_CHECKING:
    from cucafera.interop.trained import TrainedModel

FORMATS = ("hf", "gguf")
HUGGING_FACE_TYPES = ("fp32", "bf16", "fp16")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
"""As in the rooms behind; they stand here to be told before torch is loaded."""


def main() -> None:
    """Writes a trained model as others have it, or says in a sentence why not."""
    arguments = command_line_parser().parse_args()
    try:
        with _told():
            _export(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{error.filename or arguments.to[1]} cannot be written: {error.strerror or error}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the rooms tell of their work goes to the terminal: an export of a large model takes minutes."""
    logger, handler = logging.getLogger("cucafera"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _export(arguments: argparse.Namespace) -> None:
    kind, target = arguments.to[0], Path(arguments.to[1]).expanduser()
    if kind not in FORMATS:
        raise UserError(f"--to {kind}: there is no such format; it must be hf or gguf")
    types = HUGGING_FACE_TYPES if kind == "hf" else GGUF_TYPES
    type_ = arguments.type or ("fp32" if kind == "hf" else "f16")
    if type_ not in types:
        raise UserError(f"--type {type_}: for --to {kind} it must be one of {', '.join(types)}")
    if kind == "gguf" and target.is_dir():
        raise UserError(f"{target} is a folder: --to gguf takes the name of a file, such as {target / 'model.gguf'}")
    if target.exists() and not arguments.overwrite:
        raise UserError(f"{target} exists: choose another, or replace it with --overwrite")
    if kind == "hf" and target.exists() and not (target / "config.json").is_file():
        raise UserError(f"{target} is no exported model, and is not replaced: choose another")

    from cucafera.interop.trained import load_trained

    trained = load_trained(arguments.run)
    for note in trained.notes:
        print(note)
    target.parent.mkdir(parents=True, exist_ok=True)
    name = arguments.name or target.name.removesuffix(".gguf")
    if kind == "hf":
        print(_to_hugging_face(trained, target, type_, name, arguments.license))
    else:
        from cucafera.interop.gguf import write_gguf

        print(f"{write_gguf(trained, target, type_, name, arguments.license)}\n{target}: from {trained.checkpoint}")


def _to_hugging_face(trained: "TrainedModel", target: Path, dtype: str, name: str, licence: str | None) -> str:
    """Writes the folder, which takes its name when all of it has been compared."""
    from cucafera.data.files import PARTIAL, flush_folder, write_text
    from cucafera.interop.hugging_face import write_folder
    from cucafera.interop.model_card import CURVES, model_card, read_past

    past = None if trained.run is None else read_past(trained.run)
    sampling = SamplingConfig() if past is None else SamplingConfig(**past.config["callbacks"]["sampling"])
    sampling.max_new_tokens = trained.model.config.max_position_embeddings // 4
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        proof = write_folder(trained.model, trained.tokenizer, trained.chats, sampling, dtype, partial)
        has_curves = trained.run is not None and _draw_curves(trained.run.path, partial / CURVES)
        write_text(partial / "README.md", model_card(trained, past, name, licence, proof, has_curves))
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        flush_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    told = f"{proof}.\n{target}: {dtype}, from {trained.checkpoint}"
    if licence is None:
        told += "\nIts model card names no licence yet: --license apache-2.0, for example"
    return told


def _draw_curves(run: Path, path: Path) -> bool:
    """Draws the validation curves, if there is something to draw with and something to draw."""
    from cucafera.sweeps.pictures import draw_curves, has_matplotlib
    from cucafera.sweeps.records import read_records

    if not has_matplotlib():
        return False
    records = [record for record in read_records(run, run.parent) if record.curve]
    if records:
        draw_curves(records, path.with_suffix(""), formats=(path.suffix.removeprefix("."),))
    return bool(records)


def command_line_parser() -> argparse.ArgumentParser:
    """The arguments of the door."""
    parser = argparse.ArgumentParser(
        prog="python -m cucafera.export",
        description="Writes a trained model as other tools have it, after comparing what was written with the source "
        "on real text. hf: a folder for transformers and what builds on it, with a model card. gguf: a file for "
        "llama.cpp and what builds on it.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (its best checkpoint), a checkpoint, or a Hugging "
                        "Face folder or name")  # fmt: skip
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "PATH"), required=True, help="hf FOLDER, or gguf FILE")
    parser.add_argument(
        "--type",
        help=f"of the weights; hf: {', '.join(HUGGING_FACE_TYPES)} (default: fp32); gguf: {', '.join(GGUF_TYPES)} "
        "(default: f16)",
    )
    parser.add_argument("--name", help="what the model is called (default: the name of the folder or file)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, as the hub calls it: apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


if __name__ == "__main__":
    main()
