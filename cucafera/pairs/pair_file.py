"""The file of pairs, and next to it the one that says which prompts are done: the same command continues.

FILE.jsonl has a row per pair, as `serve --collect` writes them. FILE.done.jsonl begins with the settings that the pairs
are made with; then it has a line per prompt that is done, also those that gave no pair. Both only grow, a line at a
time, each flushed to disk; of a prompt, the row comes first. A prompt with a row in FILE.jsonl is done, whoever wrote
the row.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from cucafera.config.errors import UserError
from cucafera.config.schema import ColumnsConfig
from cucafera.data.conversation_formats import prompt_of_row
from cucafera.pairs.prompts import PairPrompt, prompt_of
from cucafera.quantities import number_of
from cucafera.storage import append_line, file_sha256, open_to_append, parse_json

VERSION = 1
"""Increased whenever the same settings would make other pairs."""
PAIR = "pair"
WEIGHTS = (".safetensors", ".bin")
"""Suffixes of the files of a Hugging Face folder that hold weights."""
ANOTHER = "give another --out FILE"


class DonePrompt(NamedTuple):
    """A prompt that is done.

    Attributes:
        prompt: Its key.
        outcome: `pair`, or why it gave none.
        answers: Number of its answers.
        broken: Number of them that break a rule, by rule.
    """

    prompt: str
    outcome: str
    answers: int
    broken: Mapping[str, int]


class Pair(NamedTuple):
    """A better and a worse answer.

    Attributes:
        chosen: The better one.
        rejected: The worse one.
        finish_reasons: Of both; see `OwnAnswer`.
        reasons: The rules that decided; none if no rule did.
    """

    chosen: str
    rejected: str
    finish_reasons: tuple[str, str]
    reasons: Sequence[str] = ()


class PairFile:
    """The two files, opened by `open_pair_file`.

    Attributes:
        path: FILE.jsonl.
        entries: The prompts that are done, in order.
        notes: What was repaired on opening, as sentences.
    """

    def __init__(self, path: Path, model: str, by: str) -> None:
        self.path = path
        self.done_path = done_path_of(path)
        self.entries: list[DonePrompt] = []
        self.notes: list[str] = []
        self._model = model
        self._by = by
        self._undoable: list[tuple[int, int]] = []

    @property
    def done(self) -> set[str]:
        """Keys of the prompts that are done."""
        return {entry.prompt for entry in self.entries}

    def add(self, prompt: PairPrompt, entry: DonePrompt, pair: Pair | None = None) -> None:
        """Write that a prompt is done, and its pair before. Raises UserError if that fails."""
        sizes = (self.path.stat().st_size, self.done_path.stat().st_size)
        if pair is not None:
            row = {
                "prompt": [{"role": message.role, "content": message.content} for message in prompt.messages],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
                "model": self._model,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "by": self._by,
                **({"reasons": list(pair.reasons)} if pair.reasons else {}),
                "finish_reasons": list(pair.finish_reasons),
            }
            _append(self.path, row)
        _append(self.done_path, entry._asdict())
        self.entries.append(entry)
        self._undoable.append(sizes)

    def undo(self) -> None:
        """Remove the last prompt that was added since the file was opened, with its pair. Raises UserError."""
        sizes = self._undoable.pop()
        self.entries.pop()
        try:
            for path, size in zip((self.done_path, self.path), reversed(sizes), strict=True):
                truncate(path, size)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def open(self, settings: Mapping[str, Any]) -> None:
        """Read what is done, and repair what a crash has left. Raises UserError as `open_pair_file` does."""
        settings = {"version": VERSION, **settings}
        for path in (self.path, self.done_path):
            _remove_partial_line(path, self.notes)
        rows, lines = list(_rows(self.path)), list(_rows(self.done_path))
        if rows and not lines:
            raise UserError(
                f"--out {self.path} has {number_of(len(rows), 'row')}, and there is no {self.done_path.name} that says "
                f"how they were made: {ANOTHER}"
            )
        if lines:
            self._check_settings(lines[0][1], settings)
        self.entries = [self._entry(line, number) for number, line in lines[1:]]
        if not rows and any(entry.outcome == PAIR for entry in self.entries):
            raise UserError(
                f"{self.done_path} lists pairs, and {self.path} has none: delete {self.done_path.name} to begin again"
            )
        if not lines:
            _append(self.done_path, {"settings": settings})
        os.close(open_to_append(self.path))  # a model whose prompts give no pair leaves an empty file
        done = self.done
        for number, row in rows:
            try:
                key = prompt_of(prompt_of_row(row, ColumnsConfig())[0]).key
            except UserError as error:
                raise UserError(f"{self.path}:{number} is no row of a pair: {error}. Fix it, or {ANOTHER}") from error
            if key not in done:
                done.add(key)
                entry = DonePrompt(key, PAIR, 0, {})
                _append(self.done_path, entry._asdict())
                self.entries.append(entry)

    def _check_settings(self, line: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise UserError if pairs were made with other settings."""
        earlier = line.get("settings")
        if not isinstance(earlier, dict) or earlier.get("version") != VERSION:
            raise UserError(f"{self.done_path}:1 has no settings of this version: {ANOTHER}")
        changed = {name for name in {*earlier, *settings} if earlier.get(name) != settings.get(name)}
        if "weights" in changed:
            raise UserError(f"--out {self.path} holds pairs of another model, {earlier.get('model')}: {ANOTHER}")
        if named := sorted(changed - {"model"}):
            was = ", ".join(f"--{name.replace('_', '-')} {_shown(earlier.get(name))}" for name in named)
            now = ", ".join(_shown(settings.get(name)) for name in named)
            raise UserError(f"--out {self.path} was made with {was}, and now it is {now}: give the same, or {ANOTHER}")

    def _entry(self, line: Mapping[str, Any], number: int) -> DonePrompt:
        try:
            return DonePrompt(str(line["prompt"]), str(line["outcome"]), int(line["answers"]), dict(line["broken"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.done_path}:{number} is damaged: {ANOTHER}") from error


@contextmanager
def open_pair_file(path: Path, model: str, by: str, settings: Mapping[str, Any]) -> Iterator[PairFile]:
    """Hold the file of pairs for one command, and read what is done.

    Args:
        path: FILE.jsonl; see `out_path`.
        model: Name of the model, for the rows.
        by: How pairs are made, for the rows.
        settings: All that decides the pairs of a prompt, as JSON values by option, `model` and `weights` included.

    Raises:
        UserError: another command holds it, it cannot be read or written, it was made with other settings, or it holds
            a row that is none of a pair.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--out {path}: another command is writing pairs to it; wait for it, or {ANOTHER}") from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        file = PairFile(path, model, by)
        try:
            file.open(settings)
        except OSError as error:
            raise _cannot_write(path, error) from error
        yield file
    finally:
        lock.release()


def out_path(text: str) -> Path:
    """Return the path of --out. Raises UserError if pairs cannot be written to it. No file is created."""
    if not text.endswith(".jsonl"):
        raise UserError(f"--out {text}: give the name of a .jsonl file, which preference tuning reads")
    path = Path(text)
    try:
        path = path.expanduser()
        if not path.parent.is_dir():
            raise UserError(f"--out {text}: there is no folder {path.parent}")
        for file in (path, done_path_of(path)):
            try:
                file.lstat()
            except FileNotFoundError:
                if not os.access(file.parent, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "its folder cannot be written", str(file.parent)) from None
            else:
                os.close(open_to_append(file))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no such ~USER
        raise _cannot_write(path, error) from error
    return path


def done_path_of(path: Path) -> Path:
    """Return the path of the file that says which prompts are done."""
    return path.with_suffix(".done.jsonl")


def weights_fingerprint(origin: Path) -> str:
    """Return a hash of a model's weights: of a file, or of the weight files of a folder. Raises UserError."""
    try:
        files = [origin] if origin.is_file() else sorted(path for path in origin.iterdir() if path.suffix in WEIGHTS)
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename or origin} cannot be read: {error.strerror or error}") from error


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first bytes, on the disk too. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_partial_line(path: Path, notes: list[str]) -> None:
    """Remove a last line that a crash has cut; it has no line end."""
    if not path.exists():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    start = content.rfind(b"\n") + 1
    try:
        parse_json(content[start:])
    except ValueError:
        truncate(path, start)
        notes.append(f"The last line of {path} was cut, as by a crash: removed, its prompt is answered again.")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines, each with its line number. Raises UserError for anything else."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}. Fix it, or {ANOTHER}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number} is not a JSON object: fix it, or {ANOTHER}")
        yield number, row


def _append(path: Path, row: Mapping[str, Any]) -> None:
    try:
        append_line(path, json.dumps(row, ensure_ascii=False))
    except OSError as error:
        raise _cannot_write(path, error) from error


def _shown(value: Any) -> str:
    return "off" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _cannot_write(path: Path, error: Exception) -> UserError:
    return UserError(f"--out: {path} cannot be written: {getattr(error, 'strerror', None) or error}")
