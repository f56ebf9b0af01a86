"""Find what a path or name given as RUN refers to, before anything heavy is imported."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from cucafera.config.errors import UserError
from cucafera.storage import list_folder

OUTPUTS = Path("outputs")
"""The folder of run folders, below the current one."""
MAX_DEPTH = 3
"""Levels of folders below OUTPUTS that are searched: those of a sweep hold one folder per job."""

HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""OWNER/NAME or OWNER/NAME@REVISION of the Hugging Face hub."""
GGUF_MAGIC = b"GGUF"
"""The first bytes of a GGUF file, whatever its name."""


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
    if is_gguf(source):  # before the hub, whose names may end so too
        if not path.exists():
            raise UserError(f"{source}: there is no such .gguf file")
        return ModelLocation("gguf", path)
    if is_hugging_face(source):
        return ModelLocation("hugging_face", path if path.is_dir() else None)
    if path.is_dir():
        checkpoints = path / "checkpoints"
        if not any(entry.suffix == ".ckpt" for entry in list_folder(checkpoints)):
            missing = "its checkpoints/ is empty" if checkpoints.is_dir() else "it has no folder checkpoints/"
            runs = "" if checkpoints.is_dir() else _listed(runs_below(path))
            raise UserError(f"{source}: the folder holds no checkpoint: {missing}{runs}")
        return ModelLocation("run", path)
    if not path.exists():
        raise UserError(f"{source}: there is no such run folder or checkpoint{_nearest_run(path)}")
    if path.suffix != ".ckpt":
        raise UserError(f"{source} is not a checkpoint: checkpoint files end with .ckpt")
    return ModelLocation("checkpoint", path)


def model_name(source: str, location: ModelLocation) -> str:
    """Return the name of a model for others: that of its run, folder or file, or OWNER/NAME of the hub."""
    if location.path is None:
        return source.partition("@")[0]
    path = location.path.resolve()
    if location.kind == "checkpoint":
        return path.parent.parent.name
    return path.stem if location.kind == "gguf" else path.name


def run_named(source: str) -> str:
    """Return the path outputs/NAME if there is such a run folder, and nothing else called NAME; else the source."""
    path = OUTPUTS / source
    with contextlib.suppress(OSError, RuntimeError):  # a name too long; ~USER without such a user
        if not Path(source).expanduser().exists() and (path / "checkpoints").is_dir():
            return str(path)
    return source


def runs_below(folder: Path) -> list[Path]:
    """Return the run folders below a folder that hold a complete checkpoint, the one that saved last first.

    Folders that cannot be read are left out.
    """
    return [run for _, run in sorted(_saved_runs(folder, MAX_DEPTH), reverse=True)]


def _saved_runs(folder: Path, depth: int) -> Iterator[tuple[int, Path]]:
    """Yield when each run saved last, in ns, and its folder."""
    for entry in _readable(folder):
        saved = [marker for marker in _readable(entry / "checkpoints") if marker.suffix == ".json"]
        with contextlib.suppress(OSError):  # training removes its old checkpoints
            if times := [marker.stat().st_mtime_ns for marker in saved if marker.with_suffix(".ckpt").exists()]:
                yield max(times), entry
                continue
        if depth > 1 and not entry.name.startswith("."):
            yield from _saved_runs(entry, depth - 1)


def _readable(folder: Path) -> list[Path]:
    try:
        return list_folder(folder)
    except OSError:  # not a folder, or no permission
        return []


def _listed(runs: list[Path]) -> str:
    return f"; runs in it: {', '.join(map(str, runs[:3]))}{', ...' if len(runs) > 3 else ''}" if runs else ""


def _nearest_run(path: Path) -> str:
    """Return "; did you mean ...?" with the run whose name is nearest to that of a path; or nothing."""
    names = {run.name: run for run in runs_below(OUTPUTS)}
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {names[nearest[0]]}?" if nearest else ""


def is_gguf(source: str) -> bool:
    """True if a source begins as GGUF files do, or has the name of one and is no folder."""
    return begins_as_gguf(source) or (source.endswith(".gguf") and not Path(source).expanduser().is_dir())


def begins_as_gguf(source: str) -> bool:
    """True if a source is a regular file with the first bytes of GGUF; False if it cannot be read."""
    try:
        path = Path(source).expanduser()
        if not path.is_file():  # a pipe would block
            return False
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except (OSError, RuntimeError):
        return False


def check_not_gguf(source: str, key: str) -> None:
    """Raise UserError if a source is a GGUF file, where weights to train or convert are needed.

    Args:
        source: The path.
        key: Prefix of the message: how the user gave the path, such as "init_from=".
    """
    if begins_as_gguf(source):
        raise UserError(
            f"{key}{source} is a GGUF file, which only chat and evaluate --text read: give the run it was made from"
        )


def is_hugging_face(source: str) -> bool:
    """True if a source is a Hugging Face folder, of a model or an adapter, or a name of its hub, and not a run."""
    path = Path(source).expanduser()
    if path.is_dir():
        return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    # A path below an existing folder was meant for a run, although OWNER/NAME looks the same.
    return not path.exists() and not path.parent.is_dir() and HUB_NAME.fullmatch(source) is not None
