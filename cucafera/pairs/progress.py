"""Progress on standard error: a bar in a terminal, elsewhere a line every few seconds."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


class PairProgress:
    """Counts prompts and pairs.

    Args:
        total: Number of prompts to answer.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = self._pairs = 0
        self._started = self._last_line = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(
            desc="Prompts", total=total, file=sys.stderr, disable=not self._on_terminal, leave=False
        )

    def __enter__(self) -> "PairProgress":
        return self

    def __exit__(self, *rest: object) -> None:
        self._bar.close()

    def advance(self, is_pair: bool) -> None:
        """Count a prompt that is done."""
        self._done += 1
        self._pairs += is_pair
        self._bar.set_postfix_str(f"{self._pairs:,} pairs", refresh=False)
        self._bar.update()
        now = time.monotonic()
        if not self._on_terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) / self._done * (self._total - self._done)
            print(
                f"Prompts: {self._done:,} of {self._total:,}, {self._pairs:,} pairs, about {left:.0f} s left",
                file=sys.stderr,
            )
