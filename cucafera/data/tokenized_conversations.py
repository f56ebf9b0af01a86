"""Tokenized conversations, concatenated, and their files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cucafera.data.chatml import Rendered
from cucafera.data.prepared import damaged
from cucafera.quantities import number_of
from cucafera.storage import file_sha256, flush


class TokenizedConversations(NamedTuple):
    """Conversations, concatenated.

    Attributes:
        ids: Token ids, uint16.
        trained: True for what is trained, as long as `ids`.
        ends: End of each conversation in them.
    """

    ids: NDArray[np.uint16]
    trained: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def conversation(self, number: int) -> Rendered:
        """Return the conversation of this number."""
        part = slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
        return Rendered(self.ids[part], self.trained[part])


def joined(conversations: Sequence[Rendered]) -> TokenizedConversations:
    """Return conversations as one."""
    return TokenizedConversations(
        np.concatenate([np.empty(0, np.uint16), *(rendered.ids for rendered in conversations)]),
        np.concatenate([np.empty(0, np.bool_), *(rendered.trained for rendered in conversations)]),
        np.cumsum([len(rendered.ids) for rendered in conversations], dtype=np.int64),
    )


def write_conversations(path: Path, conversations: TokenizedConversations) -> str:
    """Write conversations to a new .npz file, on disk when it returns. Return its SHA-256."""
    with path.open("wb") as file:
        np.savez(file, ids=conversations.ids, trained=conversations.trained, ends=conversations.ends)
        flush(file)
    return file_sha256(path)


def read_conversations(path: Path, expected_sha256: str, vocab_size: int) -> TokenizedConversations:
    """Load conversations that `write_conversations` wrote. Raises PreparedDataError if they are damaged."""
    try:
        if file_sha256(path) != expected_sha256:
            raise damaged(path, "checksum mismatch")
        with np.load(path) as arrays:
            read = TokenizedConversations(arrays["ids"], arrays["trained"], arrays["ends"])
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
    if len(read.ids) and int(read.ids.max()) >= vocab_size:
        raise damaged(
            path, f"it holds the id {int(read.ids.max()):,}; the vocabulary has {number_of(vocab_size, 'entry')}"
        )
    return read
