"""Held-out data: by the hash of a text, or the end of the longest document where that leaves a side empty.

The text is a document, or the first question of a conversation or pair, or all messages where that leaves a side empty.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from cucafera.data.chatml import Conversation
from cucafera.data.sources import Source, is_held_out
from cucafera.quantities import number_of

VERSION = 1
"""Increased whenever other text would be held out."""
BOUNDARIES = ("\n\n", "\n", " ")
"""Where a document is cut, the first of them that is near enough."""


@dataclass(frozen=True)
class Split:
    """The split of a source into text to train on and text to validate on.

    Attributes:
        fraction: Share of the documents, or of the characters of the one that is cut, to hold out.
        cut: Hash of the document whose end is held out, and all others are trained on; None: the hash of each document
            decides.
        note: What is held out of that document, as a clause.
    """

    fraction: float
    cut: bytes | None = None
    note: str = ""

    def parts(self, text: str) -> list[tuple[str, bool]]:
        """Return the parts of a document, each with True if it is held out."""
        if self.cut is None:
            return [(text, is_held_out(text, self.fraction))]
        if _digest(text) != self.cut:
            return [(text, False)]
        start = _start_of_stretch(text, self.fraction)
        return [(text[:start], False), (text[start:], True)]


def find_split(source: Source[Any], fraction: float) -> Split:
    """Return the split of a source: as a rule by the hash of each document.

    If that would hold out none of the documents, or all of them, as it does with a single one, the end of the longest
    document is held out. The source is read until both sides have a document.

    Args:
        source: Is read.
        fraction: data.validation_fraction.

    Raises:
        CorpusError: As `Source.documents`.
    """
    longest, number, sides = "", 0, set()
    for number, (text, _) in enumerate(source.documents(), 1):  # noqa: B007
        sides.add(is_held_out(text, fraction))
        if len(sides) == 2:
            return Split(fraction)
        if len(text) > len(longest):
            longest = text
    start = _start_of_stretch(longest, fraction)
    if not longest[:start].strip() or not longest[start:].strip():
        return Split(fraction)
    which = "its only document" if number == 1 else f"the longest of its {number_of(number, 'document')}"
    note = f"the last {len(longest) - start:,} of {number_of(len(longest), 'character')} of {which} are held out"
    return Split(fraction, _digest(longest), note)


def first_question(conversation: Conversation) -> str:
    """Return the first message of the user: the text whose hash decides the side of a conversation or pair.

    So no question is on both sides, and one that finetuning holds out is held out by preference tuning too, unless that
    has a smaller data.validation_fraction.
    """
    contents = [message.content.strip() for message in conversation if message.role == "user"]
    return contents[0] if contents else "\n".join(message.content.strip() for message in conversation)


def complete_text(conversation: Conversation) -> str:
    """Return all messages as one text, whose hash decides where that of the first question leaves a side empty."""
    return "\n".join(f"{message.role}\n{message.content.strip()}" for message in conversation)


def _start_of_stretch(text: str, fraction: float) -> int:
    """Return where the held-out end of a document starts: near its fraction, where a paragraph, line or word starts."""
    wanted = round(len(text) * fraction)
    latest = len(text) - wanted
    for boundary in BOUNDARIES:
        start = text.rfind(boundary, max(0, latest - wanted), latest)
        if start >= 0:
            return start + len(boundary)
    return latest


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
