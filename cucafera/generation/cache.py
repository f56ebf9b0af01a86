"""The KV cache: a slot for each sequence, each with a length of its own.

R rows of a forward pass, T new tokens of each row, K key/value heads, S tokens in the cache, d head dim
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cucafera.config.schema import ModelConfig
from cucafera.model.attention import attend
from cucafera.quantities import number_of

WASTE = 2
"""Rows are computed in one call while that reads at most so many times the keys that they have: measured with 16 rows
on two cores, a call per row costs a tiny model a quarter of its tokens per second."""


class _Run(NamedTuple):
    """Rows that are computed in one call of attention, because their slots follow each other.

    Attributes:
        rows: Which rows of the forward pass.
        slots: Their slots.
        tokens: S, those of the longest.
        mask: Added to the scores of each new token's keys, [R, 1, T, S]: 0, or -inf for a key that it does not attend
            to. None: causal from the first token on, or one token that attends to all.
    """

    rows: slice
    slots: slice
    tokens: int
    mask: Tensor | None


class SlotCache:
    """Keys and values of several sequences, in memory allocated once.

    `begin` says which tokens come next, then each layer calls `attend`. Rows are padded on the right to the same
    number of tokens: what padding writes lies behind the sequence, where no token attends to, and is overwritten.

    Args:
        config: Configuration of the model that fills it.
        slots: Number of sequences.
        capacity: Maximum number of tokens of a sequence.
        device, dtype: Those of the model's weights.

    Attributes:
        positions: Position of each new token, [R, T]: see `begin`.
    """

    positions: Tensor

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, capacity, head_dim)
        self.capacity = capacity
        self._device = device
        self._keys, self._values = (_zeros(shape, device, dtype) for _ in range(2))
        self._last_position = config.max_position_embeddings - 1
        self._runs: list[_Run] = []

    def begin(self, slots: Sequence[int], starts: Sequence[int], tokens: int) -> None:
        """Prepare a forward pass.

        Args:
            slots: The slot of each row, in ascending order, each once.
            starts: Number of tokens that each slot holds already; what it holds behind them is forgotten.
            tokens: T, new tokens of each row, padding included; with those before, at most the capacity.
        """
        if max(starts) + tokens > self.capacity:
            raise ValueError(f"{number_of(max(starts) + tokens, 'token')} exceed the capacity of {self.capacity}")
        columns = torch.tensor(starts, device=self._device)[:, None] + torch.arange(tokens, device=self._device)
        self._slots, self._columns = torch.tensor(slots, device=self._device)[:, None], columns
        self._runs = [self._run(rows, slots, starts, tokens) for rows in _split_into_runs(slots, starts, tokens)]
        # The padding of a text that fills the context has no position.
        self.positions = columns.clamp(max=self._last_position)

    def _run(self, rows: slice, slots: Sequence[int], starts: Sequence[int], tokens: int) -> _Run:
        before = starts[rows]
        total = max(before) + tokens
        mask = None
        if any(before) if tokens > 1 else min(before) < max(before):
            unseen = torch.arange(total, device=self._device) > self._columns[rows, :, None]
            # On a CPU, SDPA takes up to twice as long with a Boolean mask.
            mask = torch.zeros(unseen.shape, device=self._device, dtype=self._keys.dtype)
            mask = mask.masked_fill(unseen, -torch.inf)[:, None]
        first = slots[rows.start]
        return _Run(rows, slice(first, first + len(before)), total, mask)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the keys and values of new tokens, and return what these attend to.

        Args:
            layer: Number of the layer.
            queries: [R, H, T, d].
            keys, values: [R, K, T, d].

        Returns:
            [R, H, T, d].
        """
        all_keys, all_values = self._keys[layer], self._values[layer]
        all_keys[self._slots, :, self._columns] = keys.transpose(1, 2)
        all_values[self._slots, :, self._columns] = values.transpose(1, 2)
        mixed = [
            attend(queries[rows], all_keys[slots, :, :tokens], all_values[slots, :, :tokens], mask)
            for rows, slots, tokens, mask in self._runs
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        """Copy the first tokens of a slot to other slots."""
        for stored in (self._keys, self._values):
            stored[:, list(targets), :, :tokens] = stored[:, source : source + 1, :, :tokens]

    def clear(self, slot: int) -> None:
        """Clear a slot: a key that is not finite would reach even what does not attend to it."""
        for stored in (self._keys, self._values):
            stored[:, slot] = 0


def _zeros(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros: a masked key still takes part in sums, times 0, and what was in the memory before may be NaN.

    On a CPU the system clears pages when they are first used, so that a cache costs only what it holds.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _split_into_runs(slots: Sequence[int], starts: Sequence[int], tokens: int) -> list[slice]:
    """Split rows into those with consecutive slots, of which no few are so long that the others read mostly padding."""
    runs, begin = [], 0
    longest = total = 0
    for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        size = start + tokens
        wide = max(longest, size) * (row - begin + 1)
        if row > begin and (slot != slots[row - 1] + 1 or wide > WASTE * (total + size)):
            runs.append(slice(begin, row))
            begin, longest, total = row, 0, 0
        longest, total = max(longest, size), total + size
    runs.append(slice(begin, len(slots)))
    return runs
