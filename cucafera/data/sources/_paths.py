"""From paths, folders and globs to files: one rule for what is read, and a count of everything else."""

import errno
import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cucafera.data.sources import CorpusError

KINDS_NAMED = 6
"""Kinds of files left out that a message names; the others are summed up."""

ADVICE = {
    (".xlsx", ".xls", ".ods", ".numbers"): "save the sheet as .csv",
    (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm", ".xml"): "extract its text into a .txt file",
    (".md", ".rst", ".tex", ".srt", ".vtt", ".log", ".text"): "if it is plain text, let its name end with .txt",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "extract it",
    (".arrow", ".feather"): "convert it to .parquet, or give the folder of save_to_disk as dataset=FOLDER",
    (".lz4", ".z", ".br"): "decompress it",
}
"""What to do with a file of a format that cannot be read, by the end of its name."""
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files about the data of a folder, of the datasets library; with the first, state.json is another one."""

FormatOf = Callable[[Path], str | None]
"""The format of a file by its name; None if it cannot be read."""


@dataclass
class FoundFiles:
    """The files of a source, and counts of what lies next to them.

    Attributes:
        files: Those that are read, sorted by path, each once.
        left_out: Those that cannot be read, by kind, such as ".pdf".
        hidden: Hidden files, and files in hidden folders.
        repeated: Further paths of the same files: symlinks, or overlapping entries of a list.
        in_matched_folders: Files that are read because a glob matches a folder that holds them.
    """

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    repeated: int = 0
    in_matched_folders: int = 0

    def describe(self) -> str:
        """Return what is left out or read once, as one line; empty if there is nothing to say."""
        parts = []
        if self.left_out:
            kinds = [f"{count:,} {kind}" for kind, count in self.left_out.most_common(KINDS_NAMED)]
            if others := self.left_out.total() - sum(count for _, count in self.left_out.most_common(KINDS_NAMED)):
                kinds.append(f"{others:,} of other kinds")
            parts.append(f"{_files(self.left_out.total())} left out: {', '.join(kinds)}")
        if self.hidden:
            parts.append(f"hidden: {self.hidden:,}" if parts else f"hidden files left out: {self.hidden:,}")
        if self.repeated:
            parts.append(f"{_files(self.repeated)} found by a second path, read once")
        if self.in_matched_folders:
            parts.append(f"{_files(self.in_matched_folders)} read from folders that the pattern matches")
        return "; ".join(parts)


def find_files(paths: Sequence[str], name: str, format_of: FormatOf, readable: str) -> FoundFiles:
    """Return the files of paths, each of which is a file, a folder or a glob.

    Folders and globs follow the same rule: hidden files (unless a part of the glob that begins with a dot matches them)
    and files of other formats are left out and counted, symlinks are followed, and what is neither file nor folder is
    left out and counted. A folder that a glob matches is read like a folder.

    Args:
        paths: The paths. One that exists is taken as it is, whatever characters it has.
        name: Of the source, for messages.
        format_of: Tells which files can be read.
        readable: The formats that can be read, for messages.

    Raises:
        CorpusError: A path gives no file that can be read, or a folder or file on the way cannot be read.
    """
    found = FoundFiles()
    seen: dict[str, Path] = {}
    for text in paths:
        one = _find(expanded(text), name, format_of, readable)
        for path in one.files:
            if seen.setdefault(os.path.realpath(path), path) is path:
                found.files.append(path)
            else:
                found.repeated += 1
        found.left_out += one.left_out
        found.hidden += one.hidden
        found.repeated += one.repeated
        found.in_matched_folders += one.in_matched_folders
    found.files.sort()
    return found


def content_of_folder(folder: Path, name: str) -> list[tuple[str, int, int]]:
    """Return the relative name, size and time of change of each file below a folder that is not hidden, sorted.

    Raises:
        CorpusError: A folder or file cannot be read.
    """
    content = []
    for path, hidden, _ in _matches(folder, ("**",), name):
        if not hidden and (status := _status(path, name)) is not None:
            content.append((path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return sorted(content)


def expanded(text: str) -> Path:
    """Return a path, with ~ as the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user: then it is a name that begins with ~
        return Path(text)


def _find(path: Path, name: str, format_of: FormatOf, readable: str) -> FoundFiles:
    """Return the files of one path."""
    status = _status(path, name)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        if not stat.S_ISREG(status.st_mode):
            raise CorpusError(f"{name}: {path} is no regular file, but a pipe, socket or device: give a file")
        if format_of(path) is None:
            suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".zst", ".bz2", ".xz") else path.suffix
            advice = next((advice for kinds, advice in ADVICE.items() if suffix.lower() in kinds), None)
            what = f": {advice}; {readable} can be read" if advice else f"; {readable} can"
            raise CorpusError(f"{name}: {path} has a format that cannot be read{what}")
        return FoundFiles([path])
    if status is not None and ((path / "dataset_dict.json").is_file() or _is_metadata(path / "state.json")):
        raise CorpusError(f"{name}: {path} is a folder of save_to_disk: {name}.path=null {name}.dataset={path}")
    if status is None and path.is_symlink():
        raise CorpusError(f"{name}: {path} is a symlink to {path.readlink()}, which does not exist")
    if status is None and not glob.has_magic(str(path)):
        raise CorpusError(f"{name}: there is no file {path}")
    if status is not None:
        matches = _matches(path, ("**",), name)
    else:
        start, *parts = path.parts if path.is_absolute() else ("", *path.parts)
        matches = _matches(Path(start), tuple(parts), name)
    found = _sorted_out(matches, name, format_of)
    if not found.files:
        what = f"the folder {path} holds" if status is not None else f"the pattern {path} matches"
        more = f" ({found.describe()})" if found.describe() else ""
        if status is None and not more:
            raise CorpusError(f"{name}: there is no file {path}")
        raise CorpusError(f"{name}: {what} no file that can be read{more}; {readable} can")
    return found


def _sorted_out(matches: Iterator[tuple[Path, bool, bool]], name: str, format_of: FormatOf) -> FoundFiles:
    """Return which matches are read, and count the others."""
    found = FoundFiles()
    by_path: dict[Path, tuple[bool, bool]] = {}
    for path, hidden, in_folder in matches:  # several matches of ** may give the same path
        before = by_path.get(path, (True, True))
        by_path[path] = (hidden and before[0], in_folder and before[1])
    seen: set[str] = set()
    others: list[tuple[Path, str]] = []
    for path in sorted(by_path):
        hidden, in_folder = by_path[path]
        if hidden or format_of(path) is None or _is_metadata(path):
            kind = path.name if _is_metadata(path) else _kind(path)
            others.append((path, "hidden" if hidden else kind))
        elif (status := _status(path, name)) is None:
            raise CorpusError(f"{name}: cannot read {path}: it is a symlink to nothing, or was deleted")
        elif not stat.S_ISREG(status.st_mode):
            others.append((path, "pipe, socket or device"))
        elif (real := os.path.realpath(path)) in seen:
            found.repeated += 1
        else:
            seen.add(real)
            found.files.append(path)
            found.in_matched_folders += in_folder
    for path, kind in others:  # unless they are read by another path, as those in the cache of the hub
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            if kind == "hidden":
                found.hidden += 1
            else:
                found.left_out[kind] += 1
    return found


def _matches(
    folder: Path,
    parts: tuple[str, ...],
    name: str,
    hidden: bool = False,
    in_folder: bool = False,
    ancestors: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[tuple[Path, bool, bool]]:
    """Yield each file that matches a pattern below a folder, True if it is hidden, and True if only a folder of it
    matches.

    Args:
        folder: Where to look.
        parts: The pattern; empty if the folder itself matches.
        name: Of the source, for messages.
        hidden: True if the folder is hidden.
        in_folder: True if a folder above matches the complete pattern.
        ancestors: Device and inode of the folders above that match the same **: a symlink to one of them is a loop.
    """
    if not parts:
        parts, in_folder = ("**",), True
    head, rest = parts[0], parts[1:]
    if head == "**" and rest:
        yield from _matches(folder, rest, name, hidden, in_folder)
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in ancestors:
            return
        if head == "**" or _is_pattern(folder, head):
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        else:
            names = [head] if os.path.lexists(folder / head) else []
    except OSError as error:
        if not hidden:
            raise CorpusError(f"{name}: cannot read the folder {folder}: {error.strerror or error}") from error
        return
    for entry in names:
        if head not in ("**", entry) and not fnmatch.fnmatchcase(entry, head):
            continue
        path, is_hidden = folder / entry, hidden or (entry.startswith(".") and not head.startswith("."))
        if not _is_folder(path, is_hidden, name):
            if not rest:
                yield path, is_hidden, in_folder
        elif head == "**":
            inodes = ancestors | {(status.st_dev, status.st_ino)}
            yield from _matches(path, parts, name, is_hidden, in_folder, inodes)
        else:
            yield from _matches(path, rest, name, is_hidden, in_folder)


def _is_pattern(folder: Path, part: str) -> bool:
    """True if a part of a path is a pattern; a name with brackets that exists is a name."""
    return glob.has_magic(part) and ("*" in part or "?" in part or not os.path.lexists(folder / part))


def _is_folder(path: Path, hidden: bool, name: str) -> bool:
    """True for a folder, or a symlink to one. Raises CorpusError if that cannot be found out, unless it is hidden."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if hidden or error.errno in (errno.ENOENT, errno.ELOOP):  # a symlink to nothing, or to itself
            return False
        raise CorpusError(f"{name}: cannot read {path}: {error.strerror or error}") from error


def _status(path: Path, name: str) -> os.stat_result | None:
    """Return the status of a path; None if it does not exist."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise CorpusError(f"{name}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _is_metadata(path: Path) -> bool:
    if path.name == "state.json":
        return path.is_file() and path.with_name("dataset_info.json").is_file()
    return path.name in METADATA


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if not suffixes:
        return "without suffix"
    return "".join(suffixes) if suffixes[-1] in (".gz", ".zst", ".xz", ".bz2") else suffixes[-1]


def _files(count: int) -> str:
    return f"{count:,} file{'s' if count != 1 else ''}"
