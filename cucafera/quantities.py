"""Numbers for people: counts with their nouns, rounded numbers, amounts of data and of computation, durations.

All that is printed and written into reports uses these, so that one quantity looks the same everywhere.
"""

import re

PREFIXES = ("", "k", "M", "G", "T", "P")
"""Of the powers of 1,000."""


def number_of(number: float, noun: str) -> str:
    """Return a count with its noun, a singular: 1 step, 7,932 steps, 2 batches, 5 entries."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return the plural of an English noun that has a regular one."""
    if re.search("(s|x|z|ch|sh)$", noun):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", noun) else f"{noun}s"


def rounded(number: float) -> str:
    """Return a number in three digits and a letter: 1.64M, 45.2k, 1.05B."""
    return "".join(_scaled(number)).replace("G", "B")


def data_size(number: float) -> str:
    """Return a number of bytes in three digits: 312 kB, 2.94 GB; a kB has 1,000 bytes."""
    return number_of(round(number), "byte") if round(number) < 1000 else f"{' '.join(_scaled(number))}B"


def flops(number: float) -> str:
    """Return a number of floating point operations in three digits: 694 kFLOP, 1.52 GFLOP."""
    return f"{' '.join(_scaled(number))}FLOP"


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, short enough for a line."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _scaled(number: float) -> tuple[str, str]:
    """Return three significant digits and a prefix. Below 1,000 there is no prefix, and no digit behind the point."""
    power = 0
    while power < len(PREFIXES) - 1 and abs(number) >= 999.5:
        number, power = number / 1000, power + 1
    digits = f"{number:.0f}" if power == 0 else f"{number:#.3g}".removesuffix(".")
    return digits, PREFIXES[power]
