"""Models with a KV cache: what the engine needs of one, and a decoder of this package as one.

R rows of a forward pass, V vocabulary
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cucafera.config.tokens import PAD_ID
from cucafera.generation.cache import SlotCache
from cucafera.model.transformer import Decoder

PREFIX_BLOCK = 64


class Extension(NamedTuple):
    """Tokens to append to the sequence of a slot.

    Attributes:
        slot: The slot.
        start: Number of tokens of the slot to keep; what it holds behind them is forgotten.
        ids: The tokens that follow, at least one.
        scored: Of how many of these tokens, from the last one back, the logits are wanted.
    """

    slot: int
    start: int
    ids: Sequence[int]
    scored: int


class DecodingBackend(Protocol):
    """A model with its KV cache.

    Attributes:
        context: Maximum number of tokens of a sequence, its prompt included.
        vocab_size: V.
        device: Device of the logits.
        slots: Sequences that the KV cache holds.
        capacity: Maximum number of tokens of each in the cache; the engine is asked for no longer ones.
    """

    context: int
    vocab_size: int
    device: torch.device
    slots: int
    capacity: int

    def extend(self, extensions: Sequence[Extension]) -> Tensor:
        """Append tokens to sequences, in one forward pass.

        Args:
            extensions: At most one per slot, in the order of the slots. The longest of them, after the start of each,
                must fit into the capacity: shorter ones may be padded.

        Returns:
            The logits after the scored tokens, in their order, [sum of scored, V] in fp32.
        """
        ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let the slot `target` begin with the first tokens of the slot `source`."""
        ...

    def clear(self, slot: int) -> None:
        """Remove what a slot holds, which may not be finite."""
        ...


class TorchBackend:
    """A decoder of this package, on the device of its weights.

    Backends of one decoder share its weights and nothing else.

    Args:
        model: The decoder.
        slots: Sequences that the KV cache holds.
        capacity: Tokens of the longest sequence; None: the model's context. A CPU has memory only for what is used.
    """

    def __init__(self, model: Decoder, slots: int = 1, capacity: int | None = None) -> None:
        weight = model.embed_tokens.weight
        self.context = model.config.max_position_embeddings
        self.vocab_size = model.config.vocab_size
        self.device = weight.device
        self.slots = slots
        self.capacity = capacity or self.context
        self._model = model
        self._cache = SlotCache(model.config, slots, self.capacity, weight.device, weight.dtype)

    @torch.inference_mode()
    def extend(self, extensions: Sequence[Extension]) -> Tensor:
        """See `DecodingBackend.extend`; shorter rows are padded on the right."""
        longest = max(len(extension.ids) for extension in extensions)
        padded = [[*ids, *[PAD_ID] * (longest - len(ids))] for _, _, ids, _ in extensions]
        self._cache.begin([slot for slot, _, _, _ in extensions], [start for _, start, _, _ in extensions], longest)
        # `forward` and not `model(...)`: a model compiled for windows would be compiled again for one token.
        hidden = self._model.forward(torch.tensor(padded, device=self.device), cache=self._cache)
        if longest == 1 and all(scored for _, _, _, scored in extensions):
            return self._model.logits(hidden[:, 0]).float()
        scored = [row[len(ids) - count : len(ids)] for row, (_, _, ids, count) in zip(hidden, extensions, strict=True)]
        return self._model.logits(torch.cat(scored)).float()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See `DecodingBackend.copy`."""
        self._cache.copy(source, [target], tokens)

    def clear(self, slot: int) -> None:
        """See `DecodingBackend.clear`."""
        self._cache.clear(slot)


def common_prefix(ids: Sequence[int], others: Sequence[int], limit: int) -> int:
    """Return the length of the longest common prefix, at most a limit."""
    limit = min(limit, len(ids), len(others))
    for start in range(0, limit, PREFIX_BLOCK):  # comparing slices is faster than comparing items
        end = min(start + PREFIX_BLOCK, limit)
        if ids[start:end] != others[start:end]:
            return next(position for position in range(start, end) if ids[position] != others[position])
    return max(limit, 0)
