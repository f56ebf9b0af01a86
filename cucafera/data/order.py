"""The order of training windows: window n of a run is a pure function of the seed and n.

Nothing is shuffled in memory, as numpy.random.permutation would: a Feistel network with cycle walking (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002) computes any position of a permutation on its own. So a run
over billions of windows starts at once in constant memory, and resumes at any step from the number of that step alone.
The price is time: about 0.6 us per window on one core, 0.15 ms for a step of 256 windows, where a shuffle takes
0.03 us per window and 8 bytes of memory.

n_i  windows of source i
m_i  slots of source i in one epoch of the mixture, about weight_i * n_i
M    windows of one epoch: the sum of all m_i
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ROUNDS = 6
"""Feistel rounds. Four are enough for large ranges (Luby and Rackoff, 1988); those of a few bits need more to look
random (tests/data/test_order.py)."""

BLOCK = 4096
"""Windows computed together: for a few at a time, numpy's overhead per call is a hundred times the arithmetic."""


class WindowOrder:
    """The order in which a run sees the windows of its sources.

    One epoch of the mixture has M slots, in a random order; m_i of them belong to source i. The slots of a source are
    numbered through all epochs, and passes over its windows fill them one after another: each pass shows each window
    once, in another random order. So weight 2 shows a source twice per epoch, and weight 0.5 once in two epochs.

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
        """Return the windows first, ..., first + count - 1 of the run.

        Returns:
            Two arrays [count]: the number of the source, and the number of the window within it.
        """
        begin, end = first // BLOCK, -(-(first + count) // BLOCK)
        sources, windows = np.concatenate([self._block(number) for number in range(begin, max(end, begin + 1))], axis=1)
        wanted = slice(first - begin * BLOCK, first - begin * BLOCK + count)
        return sources[wanted], windows[wanted]

    def _block(self, number: int) -> Integers:
        """Return sources and windows of BLOCK windows of the run, [2, BLOCK]; the last block is cached."""
        # Steps ask for consecutive windows, and a block is many steps: one block in memory is enough.
        if self._last_block[0] == number:
            return self._last_block[1]
        run = np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.int64)
        # 1. The slot of each window: one permutation of the M slots per epoch. A block may span several epochs, so
        # each window has the key of its own.
        epochs, positions = np.divmod(run, self.windows_per_epoch)
        slots = permutation(positions, self.windows_per_epoch, _key(self._seed, 0, epochs))
        # 2. The source that the slot belongs to: slots are numbered source by source.
        sources = np.searchsorted(self._first_slots, slots, side="right") - 1
        windows = np.empty(BLOCK, dtype=np.int64)
        for source, (size, slots_per_epoch) in enumerate(zip(self._source_windows, self._slots, strict=True)):
            own = sources == source
            # 3. The slot counted through all epochs of the source. Passes have `size` windows, which need not divide
            # the slots of an epoch: a pass may end in the middle of one.
            count = epochs[own] * slots_per_epoch + slots[own] - self._first_slots[source]
            passes, positions_in_pass = np.divmod(count, size)
            # 4. The window: one permutation of the source's windows per pass.
            windows[own] = permutation(positions_in_pass, size, _key(self._seed, source + 1, passes))
        self._last_block = (number, np.stack([sources, windows]))
        return self._last_block[1]


def permutation(indices: Integers, size: int, key: int | NDArray[np.uint64]) -> Integers:
    """Return the images of indices under a pseudo-random permutation of range(size).

    A Feistel network permutes the next power of two with an even number of bits, whatever its round function. Results
    outside range(size) are permuted again until they are inside, which is a permutation of range(size) (Black and
    Rogaway, 2002, method 2: cycle walking). The power of two is less than 4 size: fewer than 4 trips on average.

    Args:
        indices: In range(size), of any shape.
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
    """Return the images of values under a keyed permutation of range(4 ** half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mix(_mix(keys + np.uint64(number)) ^ right) & mask)
    return (left << shift) | right


def _key(seed: int, stream: int, counters: Integers) -> NDArray[np.uint64]:
    """Return a key per counter that depends on seed and stream: 0 orders epochs, i + 1 the passes of source i."""
    base = _mix(_mix(np.array([seed], dtype=np.uint64)) + np.uint64(stream))
    return _mix(base + counters.astype(np.uint64))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the next output of splitmix64 (Steele, Lea and Flood, 2014) for each state."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
