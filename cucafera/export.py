"""Export a trained model: `python -m cucafera.export RUN --to hf FOLDER`, `--to gguf FILE` or `--to peft FOLDER`."""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cucafera.config.errors import UserError
from cucafera.config.fields import format_value
from cucafera.config.schema import SamplingConfig
from cucafera.options import (
    add_average,
    add_run,
    averaged_checkpoints,
    choose_run,
    command_parser,
    loading_line,
    shown_log,
)
from cucafera.output import announced, protect_output
from cucafera.process import raise_on_interrupt
from cucafera.runs.locate import GGUF_MAGIC, ModelLocation, check_not_gguf, is_hugging_face, locate_model

if TYPE_CHECKING:
    from cucafera.interop.model_card import TrainingLineage
    from cucafera.interop.trained import TrainedModel

EXIT_INTERRUPTED = 130
MIN_CURVE_POINTS = 4
"""Validations of a run whose curves are drawn; fewer are only given as numbers."""
FORMATS = ("hf", "gguf", "peft")
HUGGING_FACE_TYPES = ("fp32", "bf16", "fp16")
ARCHITECTURES = ("gemma", "llama")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
"""The same types as in interop/, repeated so that they can be checked without importing torch."""


class Target(NamedTuple):
    """The format and path of an export.

    Attributes:
        format: hf, gguf or peft.
        path: The folder or file.
        type: Of the weights.
        architecture: That a Hugging Face folder is written as; None: by the activation.
        base: The base of an adapter, a Hugging Face folder or name; None for other formats.
    """

    format: str
    path: Path
    type: str
    architecture: str | None
    base: str | None = None

    @property
    def modelfile(self) -> Path:
        """The Modelfile of a GGUF file."""
        from cucafera.interop.ollama import SUFFIX

        return self.path.with_name(self.path.name.removesuffix(".gguf") + SUFFIX)


def main() -> None:
    """Export a model, or print in one line why it is not exported."""
    protect_output()
    arguments = command_line_parser().parse_args()
    try:
        choose_run("export", arguments)
        with shown_log(sys.stdout):
            export(arguments, checked_target(arguments), averaged_checkpoints(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{error.filename or arguments.to[1]} cannot be written: {error.strerror or error}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def checked_target(arguments: argparse.Namespace) -> Target:
    """Return the target. Raises UserError for wrong names and paths, without importing torch."""
    format_, path = arguments.to[0], Path(arguments.to[1]).expanduser()
    if format_ not in FORMATS:
        raise UserError(
            f"--to {format_}: there is no such format; it must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    types = GGUF_TYPES if format_ == "gguf" else HUGGING_FACE_TYPES
    type_ = arguments.type or ("f16" if format_ == "gguf" else "fp32")
    if type_ not in types:
        raise UserError(f"--type {type_}: for --to {format_} it must be one of {', '.join(types)}")
    if arguments.architecture not in (None, *ARCHITECTURES):
        raise UserError(f"--architecture {arguments.architecture}: it must be one of {', '.join(ARCHITECTURES)}")
    if arguments.architecture is not None and format_ != "hf":
        reason = "has the architecture that llama.cpp computes" if format_ == "gguf" else "fits both"
        raise UserError(
            f"--architecture is of --to hf; {'a GGUF file' if format_ == 'gguf' else 'an adapter'} {reason}"
        )
    if format_ == "gguf" and path.is_dir():
        raise UserError(f"{path} is a folder: --to gguf takes the name of a file, such as {path / 'model.gguf'}")
    if format_ == "gguf" and not path.name.isprintable():
        raise UserError(f"{format_value(str(path))}: a Modelfile cannot name a file with such characters")
    if arguments.base is not None and format_ != "peft":
        raise UserError(f"--base {arguments.base}: only --to peft has a base, that of an adapter")
    if arguments.average is not None and format_ == "peft":
        raise UserError(
            f"--average {arguments.average}: the mean of several adapters is not an adapter of their rank, and the "
            "means of their matrices are another model; export the mean, merged, with --to hf or --to gguf"
        )
    target = Target(format_, path, type_, arguments.architecture)
    written = [path, target.modelfile] if format_ == "gguf" else [path]
    for file in written:
        if file.exists() and not arguments.overwrite:
            raise UserError(f"{file} exists: choose another path, or replace it with --overwrite")
        if file.exists() and not _is_exported(file, target):
            raise UserError(f"{file} is not an exported model, so it is not replaced: choose another path")
    location = locate_model(arguments.run)
    check_not_gguf(arguments.run, "")
    return target._replace(base=_base_of_adapter(arguments, location)) if format_ == "peft" else target


def _base_of_adapter(arguments: argparse.Namespace, location: ModelLocation) -> str:
    """Return the base of the adapters of a run, a Hugging Face folder or name: --base, or what it was trained from.

    Raises:
        UserError: the run has no adapters, or its base has not been exported.
    """
    from cucafera.config.branch import run_and_step
    from cucafera.runs.folder import RunFolder

    path = location.path
    if location.kind == "hugging_face" or path is None:
        raise UserError(f"{arguments.run}: --to peft takes a run that trained adapters (adapter=lora)")
    config = RunFolder(path.parent.parent if location.kind == "checkpoint" else path).read_config()
    if not (config.get("adapter") or {}).get("rank"):
        raise UserError(f"{arguments.run} trained all weights, without adapters: export it with --to hf")
    if (config.get("schedule") or {}).get("cooldown_start_step") and not arguments.base:
        config = RunFolder(
            run_and_step(str(config["init_from"]))[0]
        ).read_config()  # of the run that added the adapters
    base = arguments.base or config.get("init_from")
    if base is None:
        raise UserError(f"{arguments.run} has no base, since it started from random weights: export it with --to hf")
    if not is_hugging_face(base):
        locate_model(base)  # says what is missing
        folder = (Path(base) if Path(base).is_dir() else Path(base).parent.parent) / "hf"
        raise UserError(
            f"{base} is not in a form that PEFT can load: export it with python -m cucafera.export "
            f"{shlex.quote(base)} --to hf {shlex.quote(str(folder))}, and give --base {shlex.quote(str(folder))}"
        )
    return str(Path(base).expanduser())


def _is_exported(path: Path, target: Target) -> bool:
    """True if a path is an earlier export, not a run, a checkpoint or another file of the user."""
    from cucafera.interop.ollama import HEADER

    if target.format != "gguf":
        return (path / ("config.json" if target.format == "hf" else "adapter_config.json")).is_file()
    if not path.is_file():
        return False
    expected = GGUF_MAGIC if path == target.path else HEADER.encode()
    with path.open("rb") as file:
        return file.read(len(expected)) == expected


def export(arguments: argparse.Namespace, target: Target, averaged: list[Path]) -> None:
    """Load the model, write it, and verify what was written.

    Args:
        arguments: The command line.
        target: The files to write.
        averaged: The checkpoints whose mean is the model; none: the model of RUN.

    Raises:
        UserError: the model cannot be loaded, or the format cannot represent it.
        OSError: the target cannot be written.
    """
    with announced(loading_line(arguments.run, locate_model(arguments.run)), sys.stdout):
        from cucafera.interop.gguf import check_type
        from cucafera.interop.hugging_face import require_transformers
        from cucafera.interop.trained import load_mean, load_trained

        if target.format == "gguf":  # what is missing is said before a large model is loaded
            check_type(target.type)
        else:
            require_transformers()
        trained = load_mean(averaged) if averaged else load_trained(arguments.run)
    raise_on_interrupt()
    for note in trained.notes:
        print(note)
    target.path.parent.mkdir(parents=True, exist_ok=True)
    name = arguments.name or _default_name(arguments.run, trained, target)
    if target.format == "gguf":
        print(_export_to_gguf(trained, target, name, arguments.license))
    else:
        print(_export_folder(trained, target, name, arguments.license))
    print(f"{target.path}: {target.type}, from {trained.origin}")
    if target.format == "gguf":
        tag = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-") or "cucafera"
        print(f"{target.modelfile}: for Ollama: ollama create {tag} -f {shlex.quote(str(target.modelfile))}")
        return
    if arguments.name is None:
        print(f"The model card calls the model {name}: choose another name with --name")
    if arguments.license is None:
        print("The model card names no licence: choose one with --license, such as apache-2.0")


def _default_name(source: str, trained: "TrainedModel", target: Target) -> str:
    """Return the name of a GGUF file; else that of the run, or of the source without its revision on the hub."""
    if target.format == "gguf":
        return target.path.name.removesuffix(".gguf")
    if trained.run is not None:
        return str(trained.run.read_config()["name"])
    parts = Path(source).expanduser().resolve().parts if Path(source).exists() else source.split("@")[0].split("/")
    return next((part for part in reversed(parts) if part not in FORMATS), parts[-1])


def _export_folder(trained: "TrainedModel", target: Target, name: str, licence: str | None) -> str:
    """Write a folder, which gets its name when all of it is verified. Returns the result of the verification."""
    from cucafera.interop.hugging_face import architecture_of, tools_note, write_folder
    from cucafera.interop.model_card import CURVES, model_card, read_lineage
    from cucafera.interop.peft import BASE_NOTE, write_adapter
    from cucafera.storage import PARTIAL, fsync_folder, write_text

    lineage = None if trained.run is None else read_lineage(trained.run)
    sampling = _recommended_sampling(trained, lineage)
    partial = target.path.with_name(target.path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        described = (trained.model, trained.tokenizer, trained.chats, sampling, target.type, partial)
        if target.base is None:
            architecture = architecture_of(trained.model.config, target.architecture)
            note = tools_note(trained.model.config, architecture)
            verification = write_folder(*described, architecture)
        else:
            assert trained.adapter is not None
            note = BASE_NOTE
            verification = write_adapter(trained.adapter, target.base, *described)
        has_curves = trained.run is not None and _draw_curves(trained.run.path, partial / CURVES)
        base = target.base
        if base is not None and Path(base).is_dir():
            base = os.path.relpath(base, target.path)
        card = model_card(trained, lineage, name, licence, f"{note} {verification}", has_curves, sampling, base)
        write_text(partial / "README.md", card)
        if target.path.exists():
            shutil.rmtree(target.path)
        partial.rename(target.path)
        fsync_folder(target.path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{note}\n{verification}."


def _export_to_gguf(trained: "TrainedModel", target: Target, name: str, licence: str | None) -> str:
    """Write a GGUF file and its Modelfile, both or none. Returns the result of the verification."""
    from cucafera.interop.gguf import write_gguf
    from cucafera.interop.hugging_face import generation_config
    from cucafera.interop.model_card import read_lineage
    from cucafera.interop.ollama import modelfile
    from cucafera.storage import atomic_write

    lineage = None if trained.run is None else read_lineage(trained.run)
    generation = generation_config(_recommended_sampling(trained, lineage), trained.chats)
    context = trained.model.config.max_position_embeddings
    with atomic_write(target.modelfile) as file:
        file.write(modelfile(target.path.name, generation, trained.chats, context, licence).encode())
        return str(write_gguf(trained, target.path, target.type, name, licence))


def _recommended_sampling(trained: "TrainedModel", lineage: "TrainingLineage | None") -> SamplingConfig:
    """Return the sampling of the run, with room for longer texts than its samples."""
    sampling = SamplingConfig() if lineage is None else SamplingConfig(**lineage.config["callbacks"]["sampling"])
    sampling.max_new_tokens = trained.model.config.max_position_embeddings // 4
    return sampling


def _draw_curves(run: Path, path: Path) -> bool:
    """Draw the validation curves. Returns False if they have too few points, or matplotlib is not installed."""
    from cucafera.sweeps.pictures import draw_curves, has_matplotlib
    from cucafera.sweeps.records import read_records

    if not has_matplotlib():
        return False
    records = [record for record in read_records(run, run.parent) if len(record.curve) >= MIN_CURVE_POINTS]
    if records:
        draw_curves(records, path.with_suffix(""), formats=(path.suffix.removeprefix("."),))
    return bool(records)


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "export",
        description="Export a trained model, and verify on real text that the files compute the same. hf: a folder for "
        "transformers and compatible tools, with a model card. gguf: a file for llama.cpp and compatible tools, with a "
        "Modelfile for Ollama. peft: a folder with the LoRA adapter that a run trained, for PEFT and compatible tools, "
        "with a model card.",
    )
    add_run(parser, "a run folder (its best checkpoint), a checkpoint, or a Hugging Face folder or name")
    parser.add_argument(
        "--to",
        nargs=2,
        metavar=("FORMAT", "PATH"),
        required=True,
        help="hf FOLDER, gguf FILE, or peft FOLDER",
    )
    parser.add_argument(
        "--type",
        help=f"of the weights; hf and peft: {', '.join(HUGGING_FACE_TYPES)} (default: fp32); gguf: "
        f"{', '.join(GGUF_TYPES)} (default: f16)",
    )
    parser.add_argument(
        "--architecture",
        metavar="{" + ",".join(ARCHITECTURES) + "}",
        help="of a Hugging Face folder. gemma: the form that vLLM and mlx-lm read too, for a model with the activation "
        "gelu_pytorch_tanh. llama: for one with another activation; with gelu_pytorch_tanh, only transformers computes "
        "it. (default: gemma if the activation is gelu_pytorch_tanh, else llama)",
    )
    add_average(parser)
    parser.add_argument("--base", metavar="FOLDER", help="peft: the base of the adapter, as a Hugging Face folder or "
                        "name (default: the run's init_from)")  # fmt: skip
    parser.add_argument("--name", help="name of the model (default: that of the run, or of a GGUF file)")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, an identifier such as apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file or exported folder")
    return parser


if __name__ == "__main__":
    main()
