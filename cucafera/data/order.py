"""Which window is the n-th of the run: a pure function of the seed and n.

Nothing is shuffled in memory: a permutation is computed place by place, so a run over billions of windows
starts at once, and goes on at any step from nothing but the number of that step.

n_i  windows of source i
m_i  slots of source i in one epoch of the mixture, about weight_i * n_i
M    windows of one epoch: the sum of all m_i
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ROUNDS = 6
"""Feistel rounds: four mix large ranges well, ranges of a few bits need more."""

BLOCK = 4096
"""Windows whose places are computed together: of a few, numpy's calls take a hundred times as long as their numbers."""


class WindowOrder:
    """The order in which a run sees the windows of its sources.

    One epoch of the mixture has M slots, in an order of its own. Source i fills m_i of them. Over the epochs it
    counts its slots through, and lays passes over its windows end to end: each pass shows each window once, in an
    order of its own. So weight 2 shows a source twice an epoch, and weight 0.5 once in two epochs.

    Args:
        source_windows: Windows of each source, each at least 1.
        weights: Passes over each source in one epoch, above 0.
        seed: Decides every order.
    """

    def __init__(self, source_windows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._source_windows = [int(windows) for windows in source_windows]
        self._slots = [
            max(1, round(weight * windows)) for windows, weight in zip(self._source_windows, weights, strict=True)
        ]
        self._first_slots = np.concatenate([[0], np.cumsum(self._slots)])
        self._seed = seed
        self._last_block: tuple[int, Integers] = (-1, np.empty((2, 0), np.int64))

    @property
    def windows_per_epoch(self) -> int:
        """M: windows of one epoch of the mixture."""
        return int(self._first_slots[-1])

    def windows(self, first: int, count: int) -> tuple[Integers, Integers]:
        """The windows first, ..., first + count - 1 of the run.

        Returns:
            Two arrays [count]: the number of the source, and the number of the window within it.
        """
        begin, end = first // BLOCK, -(-(first + count) // BLOCK)
        sources, windows = np.concatenate([self._block(number) for number in range(begin, max(end, begin + 1))], axis=1)
        here = slice(first - begin * BLOCK, first - begin * BLOCK + count)
        return sources[here], windows[here]

    def _block(self, number: int) -> Integers:
        """Sources and windows of BLOCK windows of the run, [2, BLOCK]; the last block is kept, for the next step."""
        if self._last_block[0] == number:
            return self._last_block[1]
        run = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64)
        epochs, places = np.divmod(run, self.windows_per_epoch)
        slots = permutation(places, self.windows_per_epoch, _key(self._seed, 0, epochs))
        sources = np.searchsorted(self._first_slots, slots, side="right") - 1
        windows = np.empty(BLOCK, dtype=np.int64)
        for source, (size, slots_per_epoch) in enumerate(zip(self._source_windows, self._slots, strict=True)):
            here = sources == source
            position = epochs[here] * slots_per_epoch + slots[here] - self._first_slots[source]
            passes, place = np.divmod(position, size)
            windows[here] = permutation(place, size, _key(self._seed, source + 1, passes))
        self._last_block = (number, np.stack([sources, windows]))
        return self._last_block[1]


def permutation(indices: Integers, size: int, key: int | NDArray[np.uint64]) -> Integers:
    """Where a pseudo-random permutation of range(size) sends the given places.

    A Feistel network permutes the next power of two with an even number of bits (it is a permutation whatever its
    round function); walking on from results that lie outside range(size) until one lies inside keeps it one
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, method 2: cycle walking).

    Args:
        indices: Places in range(size), of any shape.
        size: Length of the permutation.
        key: Chooses the permutation: one for all indices, or one for each.

    Returns:
        int64 array with the shape of indices.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.array(indices, dtype=np.uint64).ravel()
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), np.shape(indices)).ravel()
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(np.shape(indices))


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half_bits: int) -> NDArray[np.uint64]:
    """A keyed permutation of range(4 ** half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(_mix(keys + np.uint64(number)) ^ right) & mask)
    return (left << shift) | right


def _key(seed: int, stream: int, counters: Integers) -> NDArray[np.uint64]:
    """A key for each counter, different between seeds and streams: 0 orders epochs, i + 1 the passes of source i."""
    base = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(stream))
    return _mix(base + counters.astype(np.uint64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The next output of splitmix64 (Steele, Lea and Flood, 2014) for each state."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
