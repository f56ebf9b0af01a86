"""Samples of text to train a tokenizer on: spread over all of a source, whatever the order of its documents."""

import heapq
import random
from collections.abc import Iterator, Mapping

from cucafera.data.tokenizer import excerpts


class TextSample:
    """A random sample of texts, at least `most_bytes` if there are as many; the same for the same texts.

    Each excerpt of a text draws a number, and those with the smallest numbers are kept.

    Args:
        most_bytes: UTF-8 bytes to keep.

    Attributes:
        size: UTF-8 bytes that are kept.
    """

    def __init__(self, most_bytes: float) -> None:
        self.size = 0
        self._most_bytes = most_bytes
        self._random = random.Random(0)
        self._kept: list[tuple[float, int, bytes]] = []
        """A heap: negated number, position among all excerpts, UTF-8. The first has the largest number."""
        self._seen = 0

    def add(self, text: str) -> None:
        """Consider a text."""
        for excerpt in excerpts(text):
            key = -self._random.random()
            self._seen += 1
            if self.size < self._most_bytes or key > self._kept[0][0]:
                content = excerpt.encode()
                heapq.heappush(self._kept, (key, self._seen, content))
                self.size += len(content)
                self.limit(self._most_bytes)

    def limit(self, most_bytes: float) -> None:
        """Keep fewer bytes."""
        self._most_bytes = most_bytes
        while self._kept and self.size - len(self._kept[0][2]) >= most_bytes:
            self.size -= len(heapq.heappop(self._kept)[2])

    def texts(self) -> Iterator[str]:
        """Yield what is kept, in the order of the texts."""
        for _, _, content in sorted(self._kept, key=lambda kept: kept[1]):
            yield content.decode()


def shares_by_weight(
    total: float, weights: Mapping[str, float], sizes: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """Yield the share of each name in a total, by weight; what exceeds a size is shared among the others.

    Args:
        total: The sum of all shares, unless the sizes are less.
        weights: By name.
        sizes: Of what there is, by name.
    """
    weight = sum(weights.values())
    for name in sorted(weights, key=lambda name: sizes[name] / weights[name]):  # the first ones are used up
        share = min(total * weights[name] / weight, sizes[name])
        yield name, share
        total -= share
        weight -= weights[name]
