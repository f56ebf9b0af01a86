"""Repetition: texts in which the same words come again and again."""

from cucafera.data.chatml import Message


def repeats_words(text: str, n: int = 5, times: int = 2) -> bool:
    """True if the same `n` consecutive words occur `times` times or more.

    Words stand between white space, punctuation included, and case does not matter. Occurrences may overlap.
    """
    words = text.casefold().split()
    counts: dict[tuple[str, ...], int] = {}
    for run in zip(*(words[start:] for start in range(n)), strict=False):
        counts[run] = counts.get(run, 0) + 1
        if counts[run] >= times:
            return True
    return False


def is_repetitive(conversation: list[Message], times: int) -> bool:
    """True if one of the trained answers has the same five words in a row `times` times or more."""
    return any(
        message.role == "assistant" and message.trained and repeats_words(message.content, times=times)
        for message in conversation
    )
