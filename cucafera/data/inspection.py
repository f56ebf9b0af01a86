"""Windows as text for a person to read, and measures of the windows of a source.

T  sequence_length
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cucafera.config.tokens import PAD_ID, SPECIAL_TOKENS
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import IGNORED, Window, WindowSource

MOST_TOKENS = 20_000_000
"""Tokens of a source that are measured, spread evenly over all of it; the tokens of a smaller one all are."""
TRAINED = "⟦{}⟧"
"""How a text that is trained on is marked, where not all is."""


class Measures(NamedTuple):
    """Measures of the windows of one source.

    Attributes:
        windows: Windows of the source.
        measured: Those of them that the other values are about.
        tokens: Positions that are not padding.
        targets: Tokens that are trained on.
        positions: All positions, windows times T.
        text_bytes: UTF-8 bytes of the tokens; none for control tokens.
        counts: How often each entry of the vocabulary occurs, [entries].
        lengths: Tokens of each document or conversation before it is cut or packed, [n].
    """

    windows: int
    measured: int
    tokens: int
    targets: int
    positions: int
    text_bytes: int
    counts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token that is not a control token; 0 if there is none."""
        text = int(self.counts[len(SPECIAL_TOKENS) :].sum())
        return self.text_bytes / max(1, text)

    @property
    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.tokens / max(1, self.positions)

    @property
    def trained(self) -> float:
        """Share of positions whose next token is trained on."""
        return self.targets / max(1, self.positions)


class Piece(NamedTuple):
    """The part of a document or conversation that is in a window.

    Attributes:
        ids: Its tokens, [n]; the last token of a conversation, which is only a target, included.
        trained: True for each token that is trained on, here or in the window before, [n].
        is_padding: True for what fills the window.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    is_padding: bool


def pieces(window: Window) -> Iterator[Piece]:
    """Yield the documents or conversations of a window in their order, and at last its padding."""
    trained = np.concatenate([[True], window.targets != IGNORED])
    is_masked = not trained.all()
    borders = [0, *(np.flatnonzero(np.diff(window.documents)) + 1).tolist(), len(window.documents)]
    for start, end in itertools.pairwise(borders):
        if is_masked and (window.input_ids[start:end] == PAD_ID).all():
            yield Piece(window.input_ids[start:end], np.zeros(end - start, np.bool_), True)
            continue
        ids, flags = window.input_ids[start:end], trained[start:end].copy()
        if is_masked:  # windows of complete conversations: nothing of the one before is trained on
            flags[0] = False
            if trained[end]:
                ids, flags = np.append(ids, window.targets[end - 1]), np.append(flags, True)
        yield Piece(ids, flags, False)


def text_of(piece: Piece, tokenizer: Tokenizer, separator: str = "") -> str:
    """Return the text of a piece.

    Args:
        piece: The piece. If only a part of it is trained on, that part stands in ⟦ ⟧.
        tokenizer: The tokenizer of its ids.
        separator: Put between tokens; then each is decoded alone, with bytes that are a part of a character as escapes.
    """
    borders = [0, *(np.flatnonzero(np.diff(piece.trained)) + 1).tolist(), len(piece.ids)]
    text = ""
    for start, end in itertools.pairwise(borders):
        ids = piece.ids[start:end].tolist()
        tokens = [tokenizer.bytes_of(token).decode(errors="backslashreplace") for token in ids]
        span = separator.join(tokens) if separator else tokenizer.decode(ids)
        text += TRAINED.format(span) if piece.trained[start] and not piece.trained.all() else span
    return text


def measure(source: WindowSource, tokenizer: Tokenizer, length: int, most_tokens: int = MOST_TOKENS) -> Measures:
    """Return the measures of the windows of a source.

    Args:
        source: The windows.
        tokenizer: The tokenizer of their ids.
        length: T.
        most_tokens: Of a source with more, windows that are spread evenly are measured.
    """
    windows = len(source)
    measured = min(windows, max(1, most_tokens // length))
    counts = np.zeros(max(tokenizer.vocab_size, PAD_ID + 1), np.int64)
    tokens = targets = 0
    for number in range(measured):
        window = source.window(number * windows // measured)
        trained = window.targets != IGNORED
        kept = window.input_ids
        if not trained.all():
            kept = kept[window.input_ids != PAD_ID]
        counts += np.bincount(kept, minlength=len(counts))
        tokens += len(kept)
        targets += int(trained.sum())
    text_bytes = int((counts[: tokenizer.vocab_size] * tokenizer.token_bytes()).sum())
    return Measures(
        windows, measured, tokens, targets, measured * length, text_bytes, counts, source.lengths(most_tokens)
    )
