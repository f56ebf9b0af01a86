"""Counts of what is left out of a source or not used as it is: for the terminal, run.log, report.md, metrics.json."""

from dataclasses import dataclass

LARGE_SHARE = 0.01
"""Of a source: what is left out of it is a warning."""


@dataclass(frozen=True)
class LeftOut:
    """Rows, documents or conversations of one source that have something in common.

    Attributes:
        source: Its name in the configuration.
        count: How many they are.
        total: Of how many.
        what: What they are, and what happened to them.
        first: Position of the first one, and what is wrong with it; empty if not known.
    """

    source: str
    count: int
    total: int
    what: str
    first: str = ""

    @property
    def is_large(self) -> bool:
        """True if this is a large share."""
        return self.count >= LARGE_SHARE * self.total

    def __str__(self) -> str:
        first = f"; the first: {self.first}" if self.first else ""
        share = self.count / self.total
        return f"{self.source}: {self.count:,} of {self.total:,} ({share:.1%}) {self.what}{first}"


def counted(*entries: LeftOut) -> list[LeftOut]:
    """Return those that count anything."""
    return [entry for entry in entries if entry.count]
