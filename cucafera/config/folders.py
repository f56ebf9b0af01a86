"""The folders of runs: how those of a sweep are named, and which places a run may not use."""

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import ListConfig, OmegaConf

LONGEST_NAME = 150
"""Bytes of the name of a job's folder; file systems allow 255, and some that encrypt names 143 or less of the rest."""
UNIQUE_NAMES = {"job_folder:", "hydra.job.num", "hydra.job.id"}
"""What a name of folders in hydra.sweep.subdir may contain so that each job has its own."""
FIGURES = 4
"""Significant digits of a number in the name of a job."""
LONG_NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(e[+-]?\d+)?(?![\w.])")
"""A number with a decimal point, as Hydra writes it."""
DEPTH = 3
"""Levels below a new run folder in which other runs are looked for."""


def job_folder_name(overrides: Sequence[str] | ListConfig, fixed: Sequence[str]) -> str:
    """Return the name of the folder of a job: what is swept, as key=value.

    It is one name, whatever the values: characters that have a meaning in paths or in this form, and what is too long,
    are replaced, and numbers are rounded; a hash of the exact values then makes the name unique.

    Args:
        overrides: The command line of the job.
        fixed: Its keys that are not swept.
    """
    texts: Any = OmegaConf.to_container(overrides, resolve=False) if isinstance(overrides, ListConfig) else overrides
    parts = sorted(_swept(texts, fixed))
    exact = ",".join(f"{key}={value}" for key, value in parts)
    shown = ",".join(f"{key}={rounded(value)}" for key, value in parts)
    name = "".join(character if character.isprintable() and character not in "/\\$" else "_" for character in shown)
    if name == exact and len(name.encode()) <= LONGEST_NAME and all(map(_is_plain, (value for _, value in parts))):
        return name
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore').rstrip('. ')}-{digest}"


def job_label(overrides: Sequence[str], fixed: Sequence[str]) -> str:
    """Return what is swept, with rounded values, for a line of text; arguments as for `job_folder_name`."""
    return "  ".join(f"{key}={rounded(value)}" for key, value in _swept(overrides, fixed))


def _swept(overrides: Sequence[str], fixed: Sequence[str]) -> list[tuple[str, str]]:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [(each.key_or_group, _value(each)) for each in parsed if each.key_or_group not in set(fixed)]


def rounded(value: str) -> str:
    """Return a value of a setting with its numbers rounded to FIGURES; those that have no more are unchanged."""
    return LONG_NUMBER.sub(_in_figures, value)


def _in_figures(match: re.Match[str]) -> str:
    short = f"{float(match[0]):.{FIGURES}g}"
    return match[0] if float(short) == float(match[0]) else short


# Here, and not where a session begins: processes of some launchers only import the job, and then ask for its folder.
OmegaConf.register_new_resolver("job_folder", job_folder_name, replace=True)


def folder_problem(folder: Path, is_sweep: bool = False) -> str | None:
    """Say why a folder cannot be that of a run, or of a sweep: its path leads to no folder, or to that of another run.

    Args:
        folder: The folder; it need not exist.
        is_sweep: It will hold the folders of runs.
    """
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            if path.is_symlink():
                return f"{path} is a symlink to {path.readlink()}, which is no folder; is its disk mounted?"
            return f"{path} is not a folder; choose another name=..."
    place = Path(os.path.realpath(folder))
    for outer in [place, *place.parents] if is_sweep else place.parents:
        if is_run(outer):
            what = "is" if outer == place else f"lies within {outer},"
            return f"{folder} {what} the folder of another run; choose another name=..."
    if is_sweep or is_run(place):
        return None
    below = (path.parent for depth in range(1, DEPTH + 1) for path in place.glob("*/" * depth + "*.json*"))
    with contextlib.suppress(OSError):  # what cannot be read is no run of this user
        for inner in filter(is_run, below):
            return f"{folder} holds other runs, such as {inner}; choose another name=..."
    return None


def is_run(folder: Path) -> bool:
    """True if a folder is that of a run, or of a job of a sweep."""
    if any((folder / name).is_file() for name in ("history.jsonl", "job.json")):
        return True
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def _value(override: Override) -> str:
    value = override.value()
    return value if isinstance(value, str) else override.get_value_element_as_str()


def _is_plain(value: str) -> bool:
    return "," not in value and "=" not in value and value == value.strip() and not value.endswith(".")
