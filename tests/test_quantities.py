"""Numbers for people, and that all of the program writes them in one way."""

import re

import pytest

from cucafera.quantities import data_size, duration, flops, number_of, plural, rounded
from tests.support import ROOT

NOUNS = (
    "batch byte character checkpoint choice column conversation core device document entry epoch example file folder "
    "head job key layer line message micro-batch page panel parameter point position process prompt question run row "
    "second shard source step task text token trial tensor update value window word"
).split()
PLURALS = "|".join(map(plural, NOUNS))
BARE_PLURAL = re.compile(
    rf"\{{(?![A-Z_]+\b|subject\b|rounded\(|[^{{}}]*:\.[1-9]f\}})[^{{}}]*\}}[ -]({PLURALS})\b(?!/s)|%[ds] ({PLURALS})\b"
)
"""A number of any value before a plural; constants, which are in capitals, are above one, and 1.0 takes a plural.
`subject` is a part of a sentence."""


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (number_of(0, "step"), "0 steps"), (number_of(1, "step"), "1 step"), (number_of(7932, "token"), "7,932 tokens"),
        (number_of(2, "entry"), "2 entries"), (number_of(2, "key"), "2 keys"), (number_of(2, "batch"), "2 batches"),
        (number_of(2, "process"), "2 processes"), (number_of(2, "training token"), "2 training tokens"),
        (rounded(0), "0"), (rounded(543.6), "544"), (rounded(999.4), "999"), (rounded(999.6), "1.00k"),
        (rounded(41_000), "41.0k"), (rounded(999_999), "1.00M"), (rounded(1.64e6), "1.64M"), (rounded(5.5e9), "5.50B"),
        (rounded(2e12), "2.00T"),
        (data_size(1), "1 byte"), (data_size(999), "999 bytes"), (data_size(288_400), "288 kB"),
        (data_size(2.94e9), "2.94 GB"), (flops(694_000), "694 kFLOP"), (flops(1.52e9), "1.52 GFLOP"),
        (duration(-1), "0 s"), (duration(0.4), "0 s"), (duration(9.6), "10 s"),
        (duration(59.6), "1 min 00 s"), (duration(3661), "1 h 01 min"), (duration(4e6), "1,111 h 06 min"),
    ],
)  # fmt: skip
def test_quantities_are_short_and_have_units(text, right):
    assert text == right


def test_no_source_writes_a_plural_after_a_number_that_may_be_one():
    """`number_of` does it; a plural in an f-string is right for all numbers but one."""
    found = []
    for folder in ("cucafera", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if BARE_PLURAL.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
