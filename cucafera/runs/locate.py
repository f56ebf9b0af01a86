"""Find what a path or name given as RUN refers to, before anything heavy is imported."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from cucafera.config.errors import UserError
from cucafera.storage import list_folder

HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""OWNER/NAME or OWNER/NAME@REVISION of the Hugging Face hub."""


class ModelLocation(NamedTuple):
    """The kind and path that a RUN argument refers to.

    Attributes:
        kind: `run` (a run folder), `checkpoint` (a file), `hugging_face` (a folder, or a name of the hub) or `gguf`.
        path: The file or folder; None for a name of the hub.
    """

    kind: Literal["run", "checkpoint", "hugging_face", "gguf"]
    path: Path | None


def locate_model(source: str) -> ModelLocation:
    """Find a trained model by its path, or recognize a name of the Hugging Face hub.

    Only looks at what exists: contents are checked by what reads them.

    Args:
        source: Path of a run folder, checkpoint, Hugging Face folder or .gguf file, or OWNER/NAME[@REVISION].

    Raises:
        UserError: there is nothing, or nothing that can hold a model.
    """
    if not source.strip():
        raise UserError("RUN is empty: give a run folder, a checkpoint, a Hugging Face folder or name, or a .gguf file")
    try:
        return _locate(source, Path(source).expanduser())
    except (OSError, RuntimeError) as error:  # no permission; a name too long; ~USER without such a user
        place = getattr(error, "filename", None) or source
        raise UserError(f"{place} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _locate(source: str, path: Path) -> ModelLocation:
    if path.suffix == ".gguf" and not path.is_dir():  # before the hub, whose names may end so too
        if not path.exists():
            raise UserError(f"{source}: there is no such .gguf file")
        return ModelLocation("gguf", path)
    if is_hugging_face(source):
        return ModelLocation("hugging_face", path if path.is_dir() else None)
    if path.is_dir():
        checkpoints = path / "checkpoints"
        if not any(entry.suffix == ".ckpt" for entry in list_folder(checkpoints)):
            missing = "its checkpoints/ is empty" if checkpoints.is_dir() else "it has no folder checkpoints/"
            raise UserError(f"{source}: the folder holds no checkpoint: {missing}")
        return ModelLocation("run", path)
    if not path.exists():
        raise UserError(f"{source}: there is no such run folder or checkpoint")
    if path.suffix != ".ckpt":
        raise UserError(f"{source} is not a checkpoint: checkpoint files end with .ckpt")
    return ModelLocation("checkpoint", path)


def is_hugging_face(source: str) -> bool:
    """True if a source is a Hugging Face folder or a name of its hub, and not a run of this package."""
    path = Path(source).expanduser()
    if path.is_dir():
        return (path / "config.json").is_file()
    # A path below an existing folder was meant for a run, although OWNER/NAME looks the same.
    return not path.exists() and not path.parent.is_dir() and HUB_NAME.fullmatch(source) is not None
