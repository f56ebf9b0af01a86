"""Texts to score, without torch: the documents and conversations of files as token ids."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cucafera.config.schema import ColumnsConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import Message, Rendered, render, up_to_last_answer
from cucafera.data.conversation_formats import conversation_of_row
from cucafera.data.sources import CorpusError, ReadContext
from cucafera.data.sources.files import FilesConfig, FilesSource
from cucafera.data.tokenizer import Tokenizer

CONVERSATIONS_AT_A_TIME = 1000


class EncodedText(NamedTuple):
    """A text as token ids.

    Attributes:
        ids: Token ids; the first is the document start, or the <im_start> of a conversation.
        scored: Mask of the tokens to score, as long as `ids`; None: all but the first.
        text_bytes: UTF-8 bytes of the scored tokens.
    """

    ids: list[int]
    scored: list[bool] | None
    text_bytes: int


def check_texts(path: str, column: str) -> None:
    """Read the first document of files. Raises CorpusError as `read_texts` does."""
    next(_documents(path, column))


def file_notes(option: str, path: str) -> Iterator[str]:
    """Yield what is left out of the files of an option, as lines. Raises CorpusError if there are none."""
    for note in FilesSource(FilesConfig(path=path), ReadContext(option, "", "")).notes():
        yield f"{option} {path}: {note}"


def read_texts(path: str, column: str, documents: int | None, tokenizer: Tokenizer) -> Iterator[EncodedText]:
    """Yield the documents of files, encoded.

    Args:
        path: A file, folder or glob.
        column: The column of the text, in files that have columns.
        documents: Maximum number of documents; None: all.
        tokenizer: Encodes them.

    Raises:
        CorpusError: the files do not exist, cannot be read, or hold no document.
    """
    for text in islice(_documents(path, column), documents):
        yield EncodedText([DOCUMENT_START_ID, *tokenizer.encode(text)], None, len(text.encode()))


def _documents(path: str, column: str) -> Iterator[str]:
    context = ReadContext("--text", "name one with --column", "Fix it, or name another column with --column")
    source = FilesSource(FilesConfig(path=path, columns=ColumnsConfig(text=column)), context)
    for text, _ in source.documents():
        yield text
    if not source.counts.documents:
        raise CorpusError(f"--text {path} holds no document")


def check_conversations(path: str) -> None:
    """Read the first conversation of files. Raises CorpusError as `read_conversations` does."""
    next(_conversations(path))


def read_conversations(path: str, tokenizer: Tokenizer) -> Iterator[Rendered]:
    """Yield the conversations of files, in the formats that finetuning reads, up to the last answer of each.

    Args:
        path: A file, folder or glob.
        tokenizer: Encodes them.

    Raises:
        CorpusError: the files do not exist, cannot be read, or hold no conversation.
    """
    conversations = _conversations(path)
    while batch := list(islice(conversations, CONVERSATIONS_AT_A_TIME)):
        yield from map(up_to_last_answer, render(batch, tokenizer))


def _conversations(path: str) -> Iterator[list[Message]]:
    advice = "Fix it, or remove it; documents are measured with --text, preference pairs with --pairs"
    source = FilesSource(FilesConfig(path=path), ReadContext("--chats", "name another file", advice))
    for conversation, _ in source.convert(lambda row: conversation_of_row(row, source.config.columns)):
        yield conversation
    if not source.counts.documents:
        raise CorpusError(f"--chats {path} holds no conversation")


def task_name(path: str) -> str:
    """Return the name of a measurement on files: the file name without suffixes; for a glob, its folder's name."""
    return Path(path).name.split(".")[0].strip("*?[]") or Path(path).resolve().parent.name or "text"
