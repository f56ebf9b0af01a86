"""The progress bar of evaluations."""

import sys
from typing import Any

from tqdm import tqdm

DELAY_SECONDS = 2


def progress_bar(description: str, total: int | None) -> "tqdm[Any]":
    """Return a bar on stderr that appears after DELAY_SECONDS, for `total` items (None: an unknown number)."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=description, total=total, file=sys.stderr, delay=DELAY_SECONDS, mininterval=interval, leave=False)
