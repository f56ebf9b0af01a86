"""Prompts to make pairs for: lines of text, or rows with a prompt or a conversation, each prompt once."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cucafera.config.errors import UserError, one_line
from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import Conversation, ConversationError, Message, stripped
from cucafera.data.compression import COMPRESSED
from cucafera.data.conversation_formats import prompt_of_row
from cucafera.data.sources import ReadContext
from cucafera.data.sources.files import FilesConfig, FilesSource

OPTION = "--prompts"
SETTINGS_NAMED = re.compile(r" \((of )?data\.sources\.NAME[^)]*\)")
"""Advice about a configuration, which this command does not have."""


class PairPrompt(NamedTuple):
    """A conversation to answer.

    Attributes:
        messages: The last one is of the user.
        reference: The answer that the row has; None without one.
        key: The same for the same messages, and for no others.
    """

    messages: Conversation
    reference: str | None
    key: str


@dataclass
class ReadPrompts:
    """The prompts of files, and counts of what is not among them.

    Attributes:
        prompts: In the order of the files.
        repeated: Prompts left out because an earlier one is the same.
        unusable: Rows left out because they hold no prompt.
        first_unusable: Position of the first of those, and what is wrong with it.
        notes: What else a person should know about the files, as clauses.
    """

    prompts: list[PairPrompt] = field(default_factory=list)
    repeated: int = 0
    unusable: int = 0
    first_unusable: str = ""
    notes: list[str] = field(default_factory=list)


def read_prompts(path: str, out: Path) -> ReadPrompts:
    """Read the prompts of a file, folder or glob.

    Args:
        path: Of .txt files, in which each line is a prompt, and of files with rows; see `FilesConfig`.
        out: The file that pairs are written to, which must not be one of them.

    Raises:
        UserError: there is no such file, it cannot be read, or holds no prompt.
    """
    if not path.strip():
        raise UserError(f"{OPTION} is empty")
    files = _source(path)
    files.check()
    inputs = files.inputs()
    folder = Path(os.path.expanduser(path))  # noqa: PTH111  # expanduser() of a path raises for an unknown ~USER
    if os.path.realpath(out) in inputs or (folder.is_dir() and out.resolve().is_relative_to(folder.resolve())):
        raise UserError(f"--out {out} is one of the files of {OPTION}: pairs need a file of their own, outside of them")
    read = ReadPrompts(notes=list(files.notes()))
    seen: set[str] = set()
    for file in sorted(inputs):
        source = _source(file)
        for prompt in _prompts_of(source, Path(file)):
            if prompt.key in seen:
                read.repeated += 1
                continue
            seen.add(prompt.key)
            read.prompts.append(prompt)
        read.unusable += source.counts.broken
        read.first_unusable = read.first_unusable or source.counts.first_broken
    if not read.prompts:
        reason = f": {read.first_unusable}" if read.unusable else ": write one per line, or rows with a column prompt"
        raise UserError(one_line(f"{OPTION} {path} holds no prompt{reason}"))
    return read


def prompt_of(messages: Conversation, reference: str | None = None) -> PairPrompt:
    """Return a prompt with its key."""
    content = json.dumps([(message.role, stripped(message.content)) for message in messages])
    return PairPrompt(messages, reference, hashlib.sha256(content.encode()).hexdigest()[:32])


def _source(path: str) -> FilesSource:
    context = ReadContext(OPTION, "", "", skip_broken_rows=True)
    return FilesSource(FilesConfig(path=path, document_separator=r"\n"), context)


def _prompts_of(source: FilesSource, file: Path) -> Iterator[PairPrompt]:
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    if name.suffix.lower() == ".txt":
        for text, _ in source.documents():
            yield prompt_of([Message("user", text.strip())])
    else:
        for prompt, _ in source.convert(_prompt_of_row):
            yield prompt


def _prompt_of_row(row: dict[str, object]) -> PairPrompt:
    try:
        return prompt_of(*prompt_of_row(row, ColumnsConfig()))
    except ConversationError as error:
        raise ConversationError(SETTINGS_NAMED.sub("", str(error))) from error
